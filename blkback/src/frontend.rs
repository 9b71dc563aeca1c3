//! A block frontend in user space: [`BlkFront`] connects to a backend over any
//! [`Guest`] and is a [`Disk`], so whatever takes a disk also runs at the
//! guest's end of the ring.
//!
//! Each [`Disk::queue`] is one ring; they are handed out in turn, and a dropped one can be had
//! again. A queue holds as many requests as its ring has slots, and fewer while they need more
//! pages than its pool has. Payload is copied through pages that stay granted as long as the
//! device lives; a caller who takes its memory from [`BlkFront::buffer`] saves that copy.

pub mod handshake;
mod pages;
mod queue;
mod shared;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use blktap::{Disk, DiskQueue, Done, Full, Geometry, Request};
use hypervisor::xenbus::State;
use hypervisor::xenbus::front::{Connection, Stage};
use hypervisor::{Access, EventChannel, GrantedPages, Guest};
use parking_lot::Mutex;
use perf::Handle;
use rings::{PAGE_SIZE, RingCounters};

use crate::config::GrantMode;
use crate::counters::QueueCounters;
use crate::negotiate::{Accepted, Protocol, QueueKeys};
use crate::proto::{Native, SEGMENTS_PER_PAGE, X86_32, X86_64};
use handshake::{Chosen, DiskInfo, KIND, KeySet, Node, is_choice};
use pages::Region;
use queue::{AnyQueue, Parts, Queue};
use shared::Shared;

/// What a frontend asks for; it gets no more than the backend offers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FrontOptions {
    /// The layout of requests.
    pub protocol: Protocol,
    /// Whether the backend may keep pages mapped.
    pub grants: GrantMode,
    /// Rings.
    pub max_queues: u32,
    /// Pages of a ring, as an order.
    pub max_ring_page_order: u32,
    /// Segments of an indirect request; 0: none are made. At most 512.
    pub max_indirect_segments: u32,
    /// Pages that each ring has for payload, at least those of one largest request and two. On
    /// Xen all rings' pages count against gntalloc's parameter `limit` (1024 unless raised).
    pub pool_pages: u32,
    /// How long a queue polls before it sleeps, in microseconds, at most.
    pub poll_us: u32,
    /// Which keys are known.
    pub keys: KeySet,
    /// How long the backend may take for each step.
    pub patience: Duration,
}

impl Default for FrontOptions {
    fn default() -> Self {
        FrontOptions {
            protocol: Protocol::X86_64,
            grants: GrantMode::Persistent,
            max_queues: u32::MAX,
            max_ring_page_order: 4,
            max_indirect_segments: 256,
            pool_pages: 1024,
            poll_us: 100,
            keys: KeySet::All,
            patience: Duration::from_secs(10),
        }
    }
}

/// Counters of one ring of a frontend.
#[derive(Clone, Default)]
pub struct FrontCounters {
    /// The ring's.
    pub ring: Handle<RingCounters>,
    /// The requests'.
    pub queue: Handle<QueueCounters>,
}

/// A block device, seen from the guest. It closes when it and all its queues are dropped.
pub struct BlkFront {
    device: Arc<Device>,
}

struct Device {
    /// The first to go: the backend must be done with what follows.
    connection: Connection,
    guest: Arc<dyn Guest>,
    shared: Arc<Shared>,
    free: Mutex<Vec<Box<dyn AnyQueue>>>,
    chosen: Chosen,
    counters: Vec<FrontCounters>,
}

/// A ring's parts before its queue is made.
struct Raw {
    ring: Arc<dyn GrantedPages>,
    payload: Arc<dyn GrantedPages>,
    channel: Box<dyn EventChannel>,
}

/// Memory for payload that the backend reaches without a copy at this end. Requests whose
/// buffers lie in it in whole sectors use it as it is. The device keeps it granted until it
/// closes, longer than this handle.
pub struct GrantedBuffer {
    granted: Arc<dyn GrantedPages>,
}

impl GrantedBuffer {
    /// First byte, aligned to 4096.
    pub fn base(&self) -> *mut u8 {
        self.granted.base()
    }
    /// Bytes.
    pub fn len(&self) -> usize {
        self.granted.len()
    }
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// The memory itself, to be read and written.
    pub fn memory(&self) -> &Arc<dyn GrantedPages> {
        &self.granted
    }
}

impl BlkFront {
    /// Connects to the backend of the guest's block device `devid`, which a toolstack has made.
    /// A device that an earlier life of this guest left connected is connected anew.
    pub fn connect(guest: Arc<dyn Guest>, devid: u32, options: FrontOptions) -> io::Result<Self> {
        let connection = Connection::meet(&*guest, KIND, devid, options.patience)?;
        let (node, store) = (&connection.node, &connection.store);
        let offered = handshake::offer(store, node).map_err(io::Error::other)?;
        let essential = options.keys == KeySet::Essential;
        let limit = |n: u32, plain: u32| if essential { plain } else { n };
        let queues = limit(offered.max_queues.min(options.max_queues).max(1), 1);
        let order = limit(offered.max_ring_page_order.min(options.max_ring_page_order), 0);
        let most = options.max_indirect_segments.min(SEGMENTS_PER_PAGE as u32);
        let max_indirect = limit(offered.max_indirect_segments.min(most), 0) as usize;
        let raws = (0..queues)
            .map(|_| Raw::make(&*guest, node, order, &options, max_indirect))
            .collect::<io::Result<Vec<_>>>()?;
        let keys = raws
            .iter()
            .map(|raw| QueueKeys { ring_refs: raw.ring.refs().to_vec(), port: raw.channel.port() });
        let accepted = Accepted {
            protocol: options.protocol,
            persistent: offered.persistent && options.grants == GrantMode::Persistent && !essential,
            queues: keys.collect(),
        };
        let chosen = Chosen { accepted, keys: options.keys };
        // The rings must be empty rings before the backend maps them.
        raws.iter().try_for_each(|raw| raw.empty(options.protocol))?;
        connection.introduce(&chosen.keys(), is_choice, State::Initialised)?;
        let info = DiskInfo::read(store, node).inspect_err(|_| connection.give_up())?;
        let shared = Arc::new(Shared::new(info)?);
        let counters = raws.iter().map(|_| FrontCounters::default()).collect::<Vec<_>>();
        let mut free = Vec::new();
        for (number, raw) in raws.into_iter().enumerate().rev() {
            let name = format!("vbd-{devid}.{number}");
            let parts = raw.parts(name, &shared, max_indirect, &options, &counters[number]);
            free.push(queue_of(options.protocol, parts)?);
        }
        node.set_state(store, State::Connected)?;
        let told = shared.clone();
        connection.watch(&*guest, move |store, node, state| told.told(store, node, state))?;
        let free = Mutex::new(free);
        let device = Device { connection, guest, shared, free, chosen, counters };
        Ok(BlkFront { device: Arc::new(device) })
    }

    /// What the backend says of the disk; its `sectors` is that of the connection.
    pub fn info(&self) -> &DiskInfo {
        &self.device.shared.info
    }
    /// What was agreed on.
    pub fn chosen(&self) -> &Accepted {
        &self.device.chosen.accepted
    }
    /// How many queues there are.
    pub fn queues(&self) -> usize {
        self.device.counters.len()
    }
    /// The counters of each ring.
    pub fn counters(&self) -> &[FrontCounters] {
        &self.device.counters
    }
    /// Why the disk is disabled, if it is.
    pub fn fault(&self) -> Option<String> {
        self.device.shared.health.reason()
    }
    /// Whether the backend has asked to close: nothing new is taken (ENODEV).
    pub fn is_closing(&self) -> bool {
        self.device.shared.health.stage() != Stage::Connected
    }
    /// Memory that requests on all queues use without a copy, rounded up to pages.
    pub fn buffer(&self, len: usize) -> io::Result<GrantedBuffer> {
        let device = &self.device;
        let pages = len.div_ceil(PAGE_SIZE).max(1);
        let granted =
            device.guest.grant(device.connection.node.backend, pages, Access::ReadWrite)?;
        device.shared.regions.add(Region::new(granted.clone()));
        Ok(GrantedBuffer { granted })
    }
    /// Closes by the handshake and reports what went wrong, which `Drop` could only log. All
    /// queues must have been dropped (ResourceBusy).
    pub fn close(self) -> io::Result<()> {
        if self.device.free.lock().len() != self.queues() && self.fault().is_none() {
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, "a queue is in use"));
        }
        self.device.connection.close()
    }
    /// Goes without a word, as a kernel that starts another by kexec: the nodes stay as they are.
    pub fn abandon(self) {
        self.device.connection.abandon();
    }
}

fn queue_of(protocol: Protocol, parts: Parts) -> io::Result<Box<dyn AnyQueue>> {
    Ok(match protocol {
        Protocol::X86_64 => Box::new(Queue::<X86_64>::new(parts)?),
        Protocol::X86_32 => Box::new(Queue::<X86_32>::new(parts)?),
        Protocol::Native => Box::new(Queue::<Native>::new(parts)?),
    })
}

impl Raw {
    fn make(
        guest: &dyn Guest,
        node: &Node,
        order: u32,
        options: &FrontOptions,
        max_indirect: usize,
    ) -> io::Result<Raw> {
        // A table and the page of zeroes beside the payload.
        let least = max_indirect.max(crate::proto::MAX_SEGMENTS) + 2;
        let pages = (options.pool_pages as usize).max(least);
        Ok(Raw {
            ring: guest.grant(node.backend, 1 << order, Access::ReadWrite)?,
            payload: guest.grant(node.backend, pages, Access::ReadWrite)?,
            channel: guest.alloc_unbound(node.backend)?,
        })
    }

    fn empty(&self, protocol: Protocol) -> io::Result<()> {
        let memory = self.ring.clone();
        queue::initialise(protocol, memory)
    }

    fn parts(
        self,
        name: String,
        shared: &Arc<Shared>,
        max_indirect: usize,
        options: &FrontOptions,
        counters: &FrontCounters,
    ) -> Parts {
        Parts {
            name,
            ring: self.ring,
            channel: self.channel,
            payload: self.payload,
            shared: shared.clone(),
            max_indirect,
            poll_us: options.poll_us,
            ring_counters: counters.ring.clone(),
            counters: counters.queue.clone(),
        }
    }
}

impl Disk for BlkFront {
    fn geometry(&self) -> Geometry {
        let (shared, info) = (&self.device.shared, &self.device.shared.info);
        let block = u64::from(info.disk.logical_block);
        Geometry {
            size: shared.sectors() * 512 / block * block,
            logical_block: info.disk.logical_block,
            physical_block: info.disk.physical_block,
            memory_align: 1,
            discard: info.disk.discard.filter(|_| !info.is_read_only()),
            secure_discard: info.disk.secure_discard,
            read_only: info.is_read_only(),
        }
    }
    /// The backend says by itself when the size changes; this says what it has said.
    fn refresh(&self) -> io::Result<Geometry> {
        Ok(self.geometry())
    }
    fn queue(&self, depth: u32) -> io::Result<Box<dyn DiskQueue>> {
        let queue = self.device.free.lock().pop();
        let mut queue = queue.ok_or_else(|| {
            let text = format!("all {} queues are in use", self.device.counters.len());
            io::Error::new(io::ErrorKind::ResourceBusy, text)
        })?;
        queue.set_depth(depth);
        Ok(Box::new(Held { queue: Some(queue), device: self.device.clone() }))
    }
}

/// A queue in use; it goes back to its device.
struct Held {
    queue: Option<Box<dyn AnyQueue>>,
    device: Arc<Device>,
}

impl Held {
    fn queue(&mut self) -> io::Result<&mut Box<dyn AnyQueue>> {
        self.queue.as_mut().ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

impl DiskQueue for Held {
    #[inline]
    fn submit(&mut self, request: &Request<'_>) -> Result<(), Full> {
        self.queue.as_mut().ok_or(Full)?.submit(request)
    }
    fn submit_all(&mut self) -> io::Result<()> {
        self.queue()?.submit_all()
    }
    fn poll(&mut self, done: &mut Vec<Done>) -> io::Result<()> {
        self.queue()?.poll(done)
    }
    fn wait(&mut self, fds: &[BorrowedFd<'_>], timeout: Option<Duration>) -> io::Result<u64> {
        self.queue()?.wait(fds, timeout)
    }
    fn in_flight(&self) -> u32 {
        self.queue.as_ref().map_or(0, |queue| queue.in_flight())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let Some(mut queue) = self.queue.take() else { return };
        if !queue.drain() {
            tracing::debug!("a queue was dropped without all its answers");
        }
        self.device.free.lock().push(queue);
    }
}
