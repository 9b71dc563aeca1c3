//! A network frontend in user space: [`NetFront`] connects to a backend over any [`Guest`]. Its
//! queues move [`Frame`](crate::Frame)s, as the backend's endpoints do, so that a
//! [`Host`](crate::stack::host::Host) with a TCP/IP stack runs on one.
//!
//! Packets are copied through pages that stay granted as long as the device lives: no grant is made
//! or ended for a packet.

mod control;
mod queue;
mod receive;
mod staging;
mod transmit;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use hypervisor::xenbus::State;
use hypervisor::xenbus::front::{Connection, Health, Node};
use hypervisor::{Access, GrantedPages, Guest};
use parking_lot::Mutex;
use perf::Handle;
use rings::{Corrupt, RingCounters};

use crate::endpoint::Accepts;
use crate::negotiate::{Accepted, Multicast, Offer, Ports, QueueKeys, RxNotify};
use crate::proto::{CtrlResponse, GrefEntry};
use crate::stack::Link;
use control::Control;
pub use control::HashChoice;
pub use queue::FrontQueue;
use queue::{Channels, Queue};
use receive::Receive;
use transmit::Transmit;

/// The kind of a network device in xenstore.
pub const KIND: &str = "vif";
/// A packet's length where nobody says another, without its Ethernet header.
const MTU: u16 = 1500;

/// How many event channels a queue has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// One for each of its rings, where the backend offers it.
    Offered,
    /// One for both.
    Never,
}

/// Whether a frontend has a control ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CtrlUse {
    /// Where the backend offers it.
    Offered,
    /// No.
    Never,
}

/// Whether a frontend has the backend keep its pages mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StagingUse {
    /// As many as the backend keeps. It asks over a control ring, which it has then.
    Offered,
    /// No.
    Never,
}

/// What a frontend asks for; it gets no more than the backend offers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FrontOptions {
    /// What it takes of packets to it.
    pub accepts: Accepts,
    /// Pairs of rings.
    pub max_queues: u32,
    /// Pages of each ring, as an order.
    pub max_ring_page_order: u32,
    /// Event channels.
    pub split: Split,
    /// Control ring.
    pub ctrl: CtrlUse,
    /// Pages that the backend keeps mapped.
    pub staging: StagingUse,
    /// Which group addresses it gets.
    pub multicast: Multicast,
    /// Bytes to leave free before each packet to it, at most 256.
    pub xdp_headroom: u16,
    /// Pages of each queue for packets from the guest; no more than its ring has slots are used.
    pub tx_pages: u32,
    /// And for packets to it.
    pub rx_pages: u32,
    /// How long the backend may take for each step.
    pub patience: Duration,
}

impl Default for FrontOptions {
    fn default() -> Self {
        FrontOptions {
            accepts: Accepts {
                scatter: true,
                checksum4: true,
                checksum6: true,
                tso4: true,
                tso6: true,
            },
            max_queues: 1,
            max_ring_page_order: 0,
            split: Split::Offered,
            ctrl: CtrlUse::Never,
            staging: StagingUse::Never,
            multicast: Multicast::Flood,
            xdp_headroom: 0,
            tx_pages: 256,
            rx_pages: 256,
            patience: Duration::from_secs(10),
        }
    }
}

/// What a queue has counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Frames put into the ring, and unsegmented ones among them.
    pub tx_frames: u64,
    /// See `tx_frames`.
    pub tx_gso: u64,
    /// Slots that the backend says it has dropped (`NETIF_RSP_DROPPED`).
    pub tx_dropped: u64,
    /// Slots that it refuses (`NETIF_RSP_ERROR`).
    pub tx_errors: u64,
    /// Frames received.
    pub rx_frames: u64,
    /// Packets received that were none.
    pub rx_errors: u64,
}

/// What a backend must not do: the device is disabled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
enum Fault {
    /// Its index is impossible.
    #[error("{0}")]
    Corrupt(Corrupt),
    /// It answers a request that is not in the ring.
    #[error("a response to the request {0}, which is not in the ring")]
    TxId(u16),
    /// The same for packets to the guest, whose responses keep to the requests' order.
    #[error("a response to the page {0}, which is not the next one")]
    RxId(u16),
    /// It says that it has written beyond the page.
    #[error("a response of {len} bytes from {offset} on, which is past the page")]
    RxSpan { offset: u16, len: i16 },
    /// There is no memory for a packet, although it was looked for.
    #[error("no frame for a packet")]
    NoFrame,
}

impl From<Corrupt> for Fault {
    fn from(corrupt: Corrupt) -> Fault {
        Fault::Corrupt(corrupt)
    }
}

/// A network device, seen from the guest. It closes when it and all its queues are dropped.
pub struct NetFront {
    device: Arc<Device>,
    chosen: Accepted,
    offer: Offer,
    mac: Option<[u8; 6]>,
    mtu: u16,
    /// Of each queue: those of its pages that the backend has said to keep mapped.
    staged: Vec<Vec<GrefEntry>>,
}

struct Device {
    /// The first to go: the backend must be done with what follows.
    connection: Connection,
    health: Arc<Health>,
    /// Those that nobody uses. All of them outlive the connection.
    queues: Mutex<Vec<Option<Queue>>>,
    /// It outlives the connection as well.
    control: Mutex<Option<Control>>,
}

/// A queue's parts.
struct Raw {
    tx_ring: Arc<dyn GrantedPages>,
    rx_ring: Arc<dyn GrantedPages>,
    transmit: Transmit,
    receive: Receive,
    channels: Channels,
}

impl NetFront {
    /// Connects to the backend of the guest's network device `devid`, which a toolstack has made.
    /// A device that an earlier life of this guest left connected is connected anew.
    pub fn connect(guest: &dyn Guest, devid: u32, options: &FrontOptions) -> io::Result<NetFront> {
        let connection = Connection::meet(guest, KIND, devid, options.patience)?;
        let (node, store) = (&connection.node, &connection.store);
        let offer = Offer::read(|key| node.back_key(store, key)).map_err(io::Error::other)?;
        let queues = offer.max_queues.min(options.max_queues).max(1);
        let raws = (0..queues).map(|_| Raw::make(guest, node, &offer, options));
        let raws = raws.collect::<io::Result<Vec<_>>>()?;
        let asks = options.ctrl == CtrlUse::Offered || options.staging == StagingUse::Offered;
        let control =
            (offer.ctrl_ring && asks).then(|| Control::make(guest, node.backend, options.patience));
        let control = control.transpose()?;
        let mut chosen = choose(&offer, options, &raws);
        chosen.ctrl = control.as_ref().map(Control::keys);
        // A network frontend goes straight to state 4.
        connection.introduce(&chosen.front_keys(), Accepted::is_choice, State::Connected)?;
        let mac = node.front_key(store, "mac").or_else(|| node.back_key(store, "mac"));
        let mtu = node.front_key(store, "mtu").and_then(|mtu| mtu.trim().parse().ok());
        let health = Arc::new(Health::new()?);
        let backend = node.backend;
        let pages: Vec<_> = raws.iter().map(Raw::pages).collect();
        let made = raws.into_iter().enumerate().map(|(number, raw)| {
            let name = format!("vif-{devid}.{number}");
            Queue::new(health.clone(), name, raw.transmit, raw.receive, raw.channels).map(Some)
        });
        let queues = Mutex::new(made.collect::<io::Result<Vec<_>>>()?);
        let told = health.clone();
        connection.watch(guest, move |_, _, state| told.told(state))?;
        let control = Mutex::new(control);
        let device = Arc::new(Device { connection, health, queues, control });
        let staged = match &mut *device.control.lock() {
            Some(control) if options.staging == StagingUse::Offered => {
                staging::announce(guest, backend, control, &pages)?
            }
            _ => Vec::new(),
        };
        let (mac, mtu) = (mac.as_deref().and_then(parse_mac), mtu.unwrap_or(MTU));
        Ok(NetFront { device, chosen, offer, mac, mtu, staged })
    }

    /// The queue `number`, from 0 on. A dropped one can be had again.
    pub fn queue(&self, number: usize) -> io::Result<FrontQueue> {
        let queue = self.device.queues.lock().get_mut(number).and_then(Option::take);
        let queue = queue.ok_or_else(|| {
            let text = format!(
                "{}: queue {number} is in use, or not there",
                self.device.connection.node.front
            );
            io::Error::new(io::ErrorKind::ResourceBusy, text)
        })?;
        Ok(FrontQueue::new(queue, number, self.device.clone()))
    }
    /// How many queues there are.
    pub fn queues(&self) -> usize {
        self.chosen.queues.len()
    }
    /// Those of a queue's pages that the backend has said to keep mapped, as it was asked.
    pub fn staged(&self, queue: usize) -> &[GrefEntry] {
        self.staged.get(queue).map_or(&[], Vec::as_slice)
    }
    /// What was agreed on.
    pub fn chosen(&self) -> &Accepted {
        &self.chosen
    }
    /// The Ethernet address that the toolstack has given it.
    pub fn mac(&self) -> Option<[u8; 6]> {
        self.mac
    }
    /// What a stack at this end may send.
    pub fn link(&self) -> Link {
        Link::new(self.mtu, sends(&self.offer))
    }
    /// Whether the backend says that there is a carrier; where it says nothing, there is.
    pub fn carrier(&self) -> bool {
        self.device.connection.back_key("carrier").is_none_or(|value| value.trim() != "0")
    }
    /// Sends a request over the control ring and waits for its answer. Unsupported: there is none.
    pub fn control(&self, kind: u16, data: [u32; 3]) -> io::Result<CtrlResponse> {
        self.with_control(|control| control.ask(kind, data))
    }
    /// The page that requests over the control ring may name. Unsupported: there is none.
    pub fn control_page(&self) -> io::Result<Arc<dyn GrantedPages>> {
        self.with_control(|control| Ok(control.page().clone()))
    }
    /// Has packets to the guest spread over its queues by their hash. Unsupported: there is no
    /// control ring. InvalidInput: the backend will not.
    pub fn spread(&self, choice: &HashChoice) -> io::Result<()> {
        self.with_control(|control| control.choose(choice))
    }
    fn with_control<R>(&self, act: impl FnOnce(&mut Control) -> io::Result<R>) -> io::Result<R> {
        match &mut *self.device.control.lock() {
            Some(control) => act(control),
            None => Err(io::Error::new(io::ErrorKind::Unsupported, "there is no control ring")),
        }
    }
    /// Changes which group addresses it gets, at any time. The backend follows soon after.
    /// Unsupported: it would not follow.
    pub fn set_multicast(&mut self, multicast: Multicast) -> io::Result<()> {
        let Connection { node, store, .. } = &self.device.connection;
        let follows = node.back_key(store, "feature-dynamic-multicast-control");
        if follows.is_none_or(|value| value.trim() != "1") {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let on = u8::from(multicast == Multicast::Listed);
        node.set_front_key(store, "request-multicast-control", &on.to_string())?;
        self.chosen.multicast = multicast;
        Ok(())
    }
    /// Changes how many bytes are left free before each packet to it, at most 256, and waits until
    /// they are. Unsupported: the backend does not leave any.
    pub fn set_headroom(&mut self, bytes: u16) -> io::Result<()> {
        if !self.offer.xdp_headroom {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let Connection { node, store, patience, .. } = &self.device.connection;
        node.set_front_key(store, "xdp-headroom", &bytes.to_string())?;
        node.set_state(store, State::Reconfiguring)?;
        let settled = |s| !matches!(s, State::Connected);
        let state = node.wait_backend(store, *patience, settled)?;
        if state != State::Reconfigured {
            return Err(node.refused(store));
        }
        node.set_state(store, State::Connected)?;
        node.wait_backend(store, *patience, |s| s != State::Reconfigured)?;
        self.chosen.xdp_headroom = bytes;
        Ok(())
    }
    /// Why the device is disabled, if it is.
    pub fn fault(&self) -> Option<String> {
        self.device.health.reason()
    }
    /// Closes by the handshake and reports what went wrong, which `Drop` could only log. All queues
    /// must have been dropped (ResourceBusy).
    pub fn close(self) -> io::Result<()> {
        if self.device.queues.lock().iter().any(Option::is_none) && self.fault().is_none() {
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, "a queue is in use"));
        }
        self.device.connection.close()
    }
    /// Goes without a word, as a kernel that starts another by kexec: the nodes stay as they are.
    pub fn abandon(self) {
        self.device.connection.abandon();
    }
}

/// What a backend with this offer takes of packets from the guest.
fn sends(offer: &Offer) -> Accepts {
    Accepts {
        scatter: offer.scatter,
        checksum4: true,
        checksum6: offer.checksum6,
        tso4: offer.tso4,
        tso6: offer.tso6,
    }
}

fn choose(offer: &Offer, options: &FrontOptions, raws: &[Raw]) -> Accepted {
    let listed = options.multicast == Multicast::Listed && offer.multicast;
    let keys = |raw: &Raw| QueueKeys {
        tx_refs: raw.tx_ring.refs().to_vec(),
        rx_refs: raw.rx_ring.refs().to_vec(),
        ports: match &raw.channels {
            Channels::Shared(one) => Ports::Shared(one.port()),
            Channels::Split { tx, rx } => Ports::Split { tx: tx.port(), rx: rx.port() },
        },
    };
    Accepted {
        accepts: options.accepts,
        rx_notify: RxNotify::Yes,
        multicast: if listed { Multicast::Listed } else { Multicast::Flood },
        xdp_headroom: if offer.xdp_headroom { options.xdp_headroom } else { 0 },
        ctrl: None,
        queues: raws.iter().map(keys).collect(),
    }
}

/// Six bytes in hexadecimal, with colons between.
fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut bytes = text.trim().split(':').map(|part| u8::from_str_radix(part, 16).ok());
    let mut mac = [0; 6];
    for byte in &mut mac {
        *byte = bytes.next()??;
    }
    bytes.next().is_none().then_some(mac)
}

impl Raw {
    /// The pages of packets from the guest, and to it.
    fn pages(&self) -> [Arc<dyn GrantedPages>; 2] {
        [self.transmit.pages().clone(), self.receive.pages().clone()]
    }

    fn make(
        guest: &dyn Guest,
        node: &Node,
        offer: &Offer,
        options: &FrontOptions,
    ) -> io::Result<Raw> {
        let unfit =
            |e: rings::SizeError| io::Error::new(io::ErrorKind::InvalidInput, e.to_string());
        let ring_pages = 1usize << offer.max_ring_page_order.min(options.max_ring_page_order);
        let grant = |pages, access| guest.grant(node.backend, pages, access);
        let (tx_ring, rx_ring) =
            (grant(ring_pages, Access::ReadWrite)?, grant(ring_pages, Access::ReadWrite)?);
        let tx_slots = rings::slot_count::<crate::proto::Tx>(ring_pages);
        let rx_slots = rings::slot_count::<crate::proto::Rx>(ring_pages);
        let pages = |wanted: u32, slots: u32| wanted.clamp(1, slots) as usize;
        let tx_pages = grant(pages(options.tx_pages, tx_slots), Access::ReadOnly)?;
        let rx_pages = grant(pages(options.rx_pages, rx_slots), Access::ReadWrite)?;
        let port = || guest.alloc_unbound(node.backend);
        let channels = if offer.split && options.split == Split::Offered {
            Channels::Split { tx: port()?, rx: port()? }
        } else {
            Channels::Shared(port()?)
        };
        let counters = Handle::<RingCounters>::default;
        let transmit = Transmit::new(tx_ring.clone(), tx_pages, sends(offer), counters());
        let mut transmit = transmit.map_err(unfit)?;
        // Who hashes takes hashes.
        transmit.takes_hash = offer.ctrl_ring;
        let receive = Receive::new(rx_ring.clone(), rx_pages, counters());
        Ok(Raw { transmit, receive: receive.map_err(unfit)?, tx_ring, rx_ring, channels })
    }
}

impl Device {
    fn take_back(&self, number: usize, queue: Queue) {
        if let Some(place) = self.queues.lock().get_mut(number) {
            *place = Some(queue);
        }
    }
}

#[cfg(test)]
#[path = "frontend/tests.rs"]
mod tests;
