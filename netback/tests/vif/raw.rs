//! A frontend whose slots the tests write one by one.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hypervisor::embedded::Frontend;
use hypervisor::store::Client;
use hypervisor::xenbus::State;
use hypervisor::xenbus::front::Node;
use hypervisor::{Access, DomId, EventChannel, GrantedPages, Guest};
use netback::endpoint::Accepts;
use netback::frontend::{CtrlUse, KIND};
use netback::negotiate::{Accepted, CtrlKeys, Multicast, Ports, QueueKeys, RxNotify};
use netback::proto::{Ctrl, Rx, RxRequest, RxResponse, Tx, TxRequest, TxResponse};
use perf::Handle;
use rings::{FrontRing, Notify, PAGE_SIZE};

use crate::rig::LIMIT;

/// Pages for packets, each way.
pub(crate) const PAGES: usize = 64;

/// See the module. As a queue it is its first.
pub(crate) struct Raw {
    node: Node,
    store: Client,
    pub(crate) queues: Vec<RawQueue>,
    pub(crate) ctrl: Option<RawCtrl>,
}

/// Pages for packets to the guest are posted by the tests too.
pub(crate) struct RawQueue {
    pub(crate) tx: FrontRing<Tx, Arc<dyn GrantedPages>>,
    pub(crate) rx: FrontRing<Rx, Arc<dyn GrantedPages>>,
    pub(crate) tx_pages: Arc<dyn GrantedPages>,
    pub(crate) rx_pages: Arc<dyn GrantedPages>,
    pub(crate) channel: Box<dyn EventChannel>,
}

/// A control ring.
pub(crate) struct RawCtrl {
    pub(crate) ring: FrontRing<Ctrl, Arc<dyn GrantedPages>>,
    pub(crate) channel: Box<dyn EventChannel>,
}

impl Deref for Raw {
    type Target = RawQueue;
    fn deref(&self) -> &RawQueue {
        &self.queues[0]
    }
}

impl DerefMut for Raw {
    fn deref_mut(&mut self) -> &mut RawQueue {
        &mut self.queues[0]
    }
}

impl Raw {
    pub(crate) fn connect(guest: &Frontend, devid: u32, accepts: Accepts) -> Raw {
        Raw::make(guest, devid, accepts, 1, CtrlUse::Never)
    }
    pub(crate) fn with_queues(guest: &Frontend, devid: u32, accepts: Accepts, count: u32) -> Raw {
        Raw::make(guest, devid, accepts, count, CtrlUse::Never)
    }
    pub(crate) fn with_ctrl(guest: &Frontend, devid: u32, accepts: Accepts) -> Raw {
        Raw::make(guest, devid, accepts, 1, CtrlUse::Offered)
    }

    fn make(guest: &Frontend, devid: u32, accepts: Accepts, count: u32, ctrl_use: CtrlUse) -> Raw {
        let store = guest.store().unwrap();
        let node = Node::find(&store, KIND, devid).unwrap();
        node.wait_backend(&store, LIMIT, |s| s == State::InitWait).unwrap();
        let (queues, keys) = (0..count).map(|_| RawQueue::make(guest, node.backend)).unzip();
        let ctrl = (ctrl_use == CtrlUse::Offered).then(|| RawCtrl::make(guest, node.backend));
        let (ctrl_keys, ctrl) = ctrl.unzip();
        let accepted = Accepted {
            accepts,
            rx_notify: RxNotify::Yes,
            multicast: Multicast::Flood,
            xdp_headroom: 0,
            ctrl: ctrl_keys,
            queues: keys,
        };
        let (keys, choice) = (accepted.front_keys(), Accepted::is_choice);
        node.choose(&store, &keys, choice, State::Connected).unwrap();
        node.wait_backend(&store, LIMIT, |s| s == State::Connected).unwrap();
        Raw { node, store, queues, ctrl }
    }

    /// Writes a key of the frontend's directory.
    pub(crate) fn set_key(&self, key: &str, value: &str) {
        self.node.set_front_key(&self.store, key, value).unwrap();
    }
    /// Writes the frontend's state.
    pub(crate) fn set_state(&self, state: u32) {
        self.set_key("state", &state.to_string());
    }
    pub(crate) fn backend_state(&self) -> State {
        self.node.backend_state(&self.store).unwrap()
    }
    /// The backend has given up this device.
    pub(crate) fn assert_ended(&self) {
        let gone = |s| matches!(s, State::Closing | State::Closed | State::Unknown);
        self.node.wait_backend(&self.store, LIMIT, gone).unwrap();
    }
    pub(crate) fn close(self) {
        self.node.close(&self.store, LIMIT).unwrap();
    }
}

impl RawCtrl {
    fn make(guest: &Frontend, backend: DomId) -> (CtrlKeys, RawCtrl) {
        let memory = guest.grant(backend, 1, Access::ReadWrite).unwrap();
        let channel = guest.alloc_unbound(backend).unwrap();
        let keys = CtrlKeys { ring_ref: memory.refs()[0], port: channel.port() };
        let ring = FrontRing::init(memory, Handle::default()).unwrap();
        (keys, RawCtrl { ring, channel })
    }
}

impl RawQueue {
    fn make(guest: &Frontend, backend: DomId) -> (RawQueue, QueueKeys) {
        let grant = |pages| guest.grant(backend, pages, Access::ReadWrite).unwrap();
        let (tx_ring, rx_ring) = (grant(1), grant(1));
        let channel = guest.alloc_unbound(backend).unwrap();
        let keys = QueueKeys {
            tx_refs: tx_ring.refs().to_vec(),
            rx_refs: rx_ring.refs().to_vec(),
            ports: Ports::Shared(channel.port()),
        };
        let tx = FrontRing::init(tx_ring, Handle::default()).unwrap();
        let rx = FrontRing::init(rx_ring, Handle::default()).unwrap();
        (RawQueue { tx, rx, tx_pages: grant(PAGES), rx_pages: grant(PAGES), channel }, keys)
    }

    /// Writes slots and tells of them.
    pub(crate) fn send(&mut self, slots: &[TxRequest]) {
        slots.iter().for_each(|slot| self.tx.push(slot).unwrap());
        self.publish();
    }
    pub(crate) fn publish(&mut self) {
        let tx = self.tx.publish();
        let rx = self.rx.publish();
        if tx == Notify::Send || rx == Notify::Send {
            self.channel.notify().unwrap();
        }
    }
    /// Posts pages for packets to the guest, from the page `first` on.
    pub(crate) fn post(&mut self, first: usize, count: usize) {
        for page in first..first + count {
            let page = page % PAGES;
            let gref = self.rx_pages.refs()[page];
            self.rx.push(&RxRequest { id: page as u16, pad: 0, gref }).unwrap();
        }
        self.publish();
    }
    /// A slot of the page `page`.
    pub(crate) fn slot(&self, page: usize, offset: u16, size: u16, flags: u16) -> TxRequest {
        TxRequest { gref: self.tx_pages.refs()[page], offset, flags, id: page as u16, size }
    }
    /// The next `count` answers.
    pub(crate) fn answers(&mut self, count: usize) -> Vec<TxResponse> {
        let end = Instant::now() + LIMIT;
        let mut all = Vec::new();
        while all.len() < count {
            match self.tx.take().unwrap() {
                Some(rsp) => all.push(rsp),
                None => assert!(Instant::now() < end, "{} of {count} answers", all.len()),
            }
            std::thread::yield_now();
        }
        all
    }
    /// The next `count` slots of packets to the guest, each with its bytes.
    pub(crate) fn received(&mut self, count: usize) -> Vec<(RxResponse, Vec<u8>)> {
        let end = Instant::now() + LIMIT;
        let mut all = Vec::new();
        while all.len() < count {
            if let Some(rsp) = self.rx.take().unwrap() {
                let len = usize::try_from(rsp.status).unwrap_or(0);
                let mut bytes = vec![0; len];
                let at = usize::from(rsp.id) * PAGE_SIZE + usize::from(rsp.offset);
                self.rx_pages.read(at, &mut bytes);
                all.push((rsp, bytes));
            } else {
                assert!(Instant::now() < end, "{} of {count} slots", all.len());
                std::thread::yield_now();
            }
        }
        all
    }
    /// Whether nothing more comes for a while.
    pub(crate) fn is_quiet(&mut self) -> bool {
        std::thread::sleep(Duration::from_millis(50));
        self.tx.take().unwrap().is_none() && self.rx.take().unwrap().is_none()
    }
}
