//! A guest that reaches every word of its rings and every key of its devices.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blkback::negotiate::{Accepted, Protocol, QueueKeys};
use blkback::proto::{
    Abi, Body, DirectOp, MAX_INDIRECT_PAGES, MAX_SEGMENTS, RSP_OKAY, Request, Response, Ring,
    Segment, X86_64, wire,
};
use hypervisor::core::domains::Kind;
use hypervisor::embedded::{Frontend, Link, Toolstack};
use hypervisor::store::{Client, Tx};
use hypervisor::xenbus::State;
use hypervisor::{Access, EventChannel, GrantedPages, Guest};
use rings::{FrontRing, Notify};
use rustix::event::{PollFd, PollFlags, poll};

use crate::rig::{PATIENCE, Rig, until};

/// A slot as it lies in the ring.
pub type Raw = wire::packed8::Direct;

/// The x86-64 layout of a slot: offsets of its fields.
pub mod at {
    pub const HEADER: usize = 64;
    pub const SLOT: usize = 112;
    pub const REQ_PROD: usize = 0;
    pub const RSP_PROD: usize = 8;
    pub const RSP_EVENT: usize = 12;
    pub const SECTOR: usize = 16;
    pub const SEGMENTS: usize = 24;
}

/// A domain as which this process acts.
pub struct Domain {
    pub id: u16,
    pub guest: Arc<Frontend>,
    pub store: Client,
}

/// What a frontend chooses.
#[derive(Clone, Copy)]
pub struct Wish {
    pub queues: usize,
    pub order: u32,
    pub persistent: bool,
}

/// One queue, one page, no persistent grants.
pub const PLAIN: Wish = Wish { queues: 1, order: 0, persistent: false };
/// As [`PLAIN`], with persistent grants.
pub const PERSISTENT: Wish = Wish { persistent: true, ..PLAIN };

/// One queue of a connected device.
pub struct Queue {
    pub ring: FrontRing<Ring<X86_64>, Arc<dyn GrantedPages>>,
    pub memory: Arc<dyn GrantedPages>,
    pub channel: Box<dyn EventChannel>,
    next: u64,
}

impl Domain {
    pub fn new(toolstack: &Toolstack, name: &str) -> Domain {
        let id = toolstack.create_domain(None, Kind::Guest, name).unwrap();
        Domain::of(id, toolstack.connect_domain(id).unwrap())
    }
    /// The domain that a connection is for.
    pub fn of(id: u16, connection: std::os::fd::OwnedFd) -> Domain {
        let guest = Arc::new(Frontend::new(Link::new(connection).unwrap()));
        let store = guest.store().unwrap();
        Domain { id, guest, store }
    }
    /// Pages that the backend may write.
    pub fn pages(&self, count: usize) -> Arc<dyn GrantedPages> {
        self.guest.grant(0, count, Access::ReadWrite).unwrap()
    }
    pub fn read_only(&self, count: usize) -> Arc<dyn GrantedPages> {
        self.guest.grant(0, count, Access::ReadOnly).unwrap()
    }
    /// Writes a key of a device.
    pub fn set(&self, devid: u32, key: &str, value: &str) {
        self.store.write(Tx::NONE, &format!("device/vbd/{devid}/{key}"), value).unwrap();
    }
    pub fn unset(&self, devid: u32, key: &str) {
        self.store.remove(Tx::NONE, &format!("device/vbd/{devid}/{key}")).unwrap();
    }
    pub fn set_state(&self, devid: u32, state: State) {
        self.set(devid, "state", &state.to_string());
    }
    /// Makes the rings and writes their keys, and no state.
    pub fn prepare(&self, devid: u32, wish: Wish) -> Vec<Queue> {
        let queue = |_| {
            let memory = self.pages(1 << wish.order);
            let ring = FrontRing::init(memory.clone(), Default::default()).unwrap();
            Queue { ring, memory, channel: self.guest.alloc_unbound(0).unwrap(), next: 1 }
        };
        let queues: Vec<Queue> = (0..wish.queues).map(queue).collect();
        let keys =
            |q: &Queue| QueueKeys { ring_refs: q.memory.refs().into(), port: q.channel.port() };
        let chosen = Accepted {
            protocol: Protocol::X86_64,
            persistent: wish.persistent,
            queues: queues.iter().map(keys).collect(),
        };
        for (key, value) in chosen.front_keys() {
            self.set(devid, &key, &value);
        }
        queues
    }
    /// Connects a device whose backend waits.
    pub fn connect(&self, rig: &Rig, devid: u32, wish: Wish) -> Vec<Queue> {
        rig.wait(self.id, devid, State::InitWait);
        let queues = self.prepare(devid, wish);
        self.set_state(devid, State::Initialised);
        rig.wait(self.id, devid, State::Connected);
        self.set_state(devid, State::Connected);
        queues
    }
    /// Closes a device in order.
    pub fn close(&self, rig: &Rig, devid: u32) {
        self.set_state(devid, State::Closing);
        until("the backend closes", || {
            matches!(rig.state(self.id, devid), Some(State::Closing | State::Closed))
        });
        self.set_state(devid, State::Closed);
        rig.wait(self.id, devid, State::Closed);
    }
    /// Starts again with a device that is closed or has failed.
    pub fn again(&self, rig: &Rig, devid: u32, wish: Wish) -> Vec<Queue> {
        self.set_state(devid, State::Closed);
        rig.wait(self.id, devid, State::Closed);
        self.set_state(devid, State::Initialising);
        self.connect(rig, devid, wish)
    }
}

impl Queue {
    /// Asks what the library's encoder can say. Gives the request's id.
    pub fn send(&mut self, body: Body) -> u64 {
        let id = self.next;
        self.send_raw(&X86_64::encode(&Request { id, handle: 0, body }));
        self.next += 1;
        id
    }
    /// Puts any bytes into the next slot and publishes it.
    pub fn send_raw(&mut self, raw: &Raw) {
        self.ring.push(raw).expect("a free slot");
        self.publish();
    }
    pub fn push(&mut self, body: Body) -> u64 {
        let id = self.next;
        self.next += 1;
        let raw = X86_64::encode(&Request { id, handle: 0, body });
        self.ring.push(&raw).expect("a free slot");
        id
    }
    pub fn publish(&mut self) {
        if self.ring.publish() == Notify::Send {
            self.channel.notify().unwrap();
        }
    }
    /// The next response, or why there is none.
    pub fn try_answer(&mut self, patience: Duration) -> Result<Response, String> {
        let end = Instant::now() + patience;
        loop {
            if let Some(raw) = self.ring.take().map_err(|e| e.to_string())? {
                return Ok(X86_64::parse_response(&raw));
            }
            if Instant::now() > end {
                return Err(format!("no answer within {patience:?}"));
            }
            if self.ring.arm().map_err(|e| e.to_string())? == rings::Pending::Nothing {
                readable(self.channel.as_fd(), 100);
                self.channel.acknowledge().map_err(|e| e.to_string())?;
            }
        }
    }
    pub fn answer(&mut self) -> Response {
        self.try_answer(PATIENCE).unwrap()
    }
    /// Sends one request and gives its status; the echo is checked.
    pub fn ask(&mut self, body: Body) -> i16 {
        let id = self.send(body);
        let response = self.answer();
        let wanted = Request { id, handle: 0, body }.answer(response.status);
        assert_eq!(response, wanted);
        response.status
    }
    /// A good write and a good read of it. `page` is a page of this guest's.
    pub fn works(&mut self, page: &dyn GrantedPages, sector: u64) {
        let data = crate::image::patterned(sector, 4096);
        page.write(0, &data);
        let whole = [whole(page.refs()[0])];
        assert_eq!(self.ask(write(sector, &whole)), RSP_OKAY);
        page.write(0, &[0; 4096]);
        assert_eq!(self.ask(read(sector, &whole)), RSP_OKAY);
        let mut found = vec![0; 4096];
        page.read(0, &mut found);
        assert!(found == data, "what was read is not what was written");
    }
}

/// Waits up to `ms` for a descriptor to become readable.
pub fn readable(fd: impl AsFd, ms: i64) -> bool {
    let limit = rustix::time::Timespec { tv_sec: ms / 1000, tv_nsec: ms % 1000 * 1_000_000 };
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    poll(&mut fds, Some(&limit)).unwrap_or(0) > 0
}

/// A whole page.
pub fn whole(gref: u32) -> Segment {
    Segment { gref, first_sect: 0, last_sect: 7 }
}

/// A request with segments in the slot; `count` may say more than there are.
pub fn direct_n(op: DirectOp, sector: u64, segments: &[Segment], count: u8) -> Body {
    let mut all = [Segment::default(); MAX_SEGMENTS];
    all[..segments.len()].copy_from_slice(segments);
    Body::Direct { op, sector, nr_segments: count, segments: all }
}

pub fn read(sector: u64, segments: &[Segment]) -> Body {
    direct_n(DirectOp::Read, sector, segments, segments.len() as u8)
}

pub fn write(sector: u64, segments: &[Segment]) -> Body {
    direct_n(DirectOp::Write, sector, segments, segments.len() as u8)
}

pub fn indirect(inner: u8, sector: u64, nr_segments: u16, pages: &[u32]) -> Body {
    let mut grefs = [0; MAX_INDIRECT_PAGES];
    grefs[..pages.len()].copy_from_slice(pages);
    Body::Indirect { inner, nr_segments, sector, grefs }
}

/// Writes a table of segments, from the first byte of granted pages on.
pub fn put_table(pages: &dyn GrantedPages, segments: &[Segment]) {
    for (i, s) in segments.iter().enumerate() {
        let mut bytes = [0; 8];
        bytes[..4].copy_from_slice(&s.gref.to_le_bytes());
        (bytes[4], bytes[5]) = (s.first_sect, s.last_sect);
        pages.write(i * 8, &bytes);
    }
}
