//! A guest that breaks the block protocol on purpose, for the lab: run it in a Xen guest that has
//! two block devices and no blkfront loaded. It attacks through one device and reads through the
//! other meanwhile, and says what became of both.
//!
//! ```text
//! modprobe xen-evtchn xen-gntalloc
//! hostile_guest bad-reference|revoked-reference|corrupt-index|storm BAD_DEVID GOOD_DEVID
//! ```
#![allow(clippy::print_stdout)]

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use blkback::frontend::handshake::{Chosen, KIND, KeySet, Node};
use blkback::negotiate::{Accepted, Protocol, QueueKeys};
use blkback::proto::{Abi, X86_64};
use blkback::proto::{Body, DirectOp, MAX_SEGMENTS, RSP_ERROR, RSP_OKAY, Request, Ring, Segment};
use blkback::{BlkFront, FrontOptions};
use blktap::{Disk, blocking};
use hypervisor::store::Client;
use hypervisor::xen::Xen;
use hypervisor::xenbus::State;
use hypervisor::{Access, EventChannel, GrantedPages, Guest};
use rings::mem::SharedMem;
use rings::{FrontRing, Notify};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const PATIENCE: Duration = Duration::from_secs(30);
/// A reference that nobody has granted.
const NOBODYS: u32 = 0x00ff_fff0;
/// How long a storm lasts.
const STORM: Duration = Duration::from_secs(3);

struct Attacker {
    xen: Arc<Xen>,
    store: Client,
    node: Node,
    memory: Arc<dyn GrantedPages>,
    ring: FrontRing<Ring<X86_64>, Arc<dyn GrantedPages>>,
    channel: Box<dyn EventChannel>,
    next: u64,
}

impl Attacker {
    fn connect(xen: Arc<Xen>, devid: u32) -> Result<Attacker> {
        let store = Guest::store(&*xen)?;
        let node = Node::find(&store, KIND, devid)?;
        node.wait_backend(&store, PATIENCE, |s| s == State::InitWait)?;
        let memory = xen.grant(node.backend, 1, Access::ReadWrite)?;
        let ring = FrontRing::init(memory.clone(), Default::default())?;
        let channel = xen.alloc_unbound(node.backend)?;
        let queue = QueueKeys { ring_refs: memory.refs().into(), port: channel.port() };
        let (protocol, keys) = (Protocol::X86_64, KeySet::All);
        let accepted = Accepted { protocol, persistent: true, queues: vec![queue] };
        Chosen { accepted, keys }.write(&store, &node)?;
        node.wait_backend(&store, PATIENCE, |s| s == State::Connected)?;
        node.set_state(&store, State::Connected)?;
        Ok(Attacker { xen, store, node, memory, ring, channel, next: 1 })
    }

    /// A page that the backend may use.
    fn page(&self) -> Result<Arc<dyn GrantedPages>> {
        Ok(self.xen.grant(self.node.backend, 1, Access::ReadWrite)?)
    }

    /// Reads the first 4 KiB of the disk into `gref`; the status of the answer.
    fn read_into(&mut self, gref: u32) -> Result<i16> {
        let mut segments = [Segment::default(); MAX_SEGMENTS];
        segments[0] = Segment { gref, first_sect: 0, last_sect: 7 };
        let (op, id) = (DirectOp::Read, self.next);
        self.next += 1;
        let body = Body::Direct { op, sector: 0, nr_segments: 1, segments };
        let raw = X86_64::encode(&Request { id, handle: 0, body });
        self.ring.push(&raw).map_err(|_| "the ring is full")?;
        if self.ring.publish() == Notify::Send {
            self.channel.notify()?;
        }
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            if let Some(answer) = self.ring.take()? {
                let answer = X86_64::parse_response(&answer);
                assert_eq!(answer.id, id, "an answer to another request");
                return Ok(answer.status);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Err("no answer".into())
    }

    /// The device still serves what is right.
    fn good_read(&mut self) -> Result<()> {
        let page = self.page()?;
        match self.read_into(page.refs()[0])? {
            RSP_OKAY => Ok(()),
            status => Err(format!("a good read was answered {status}").into()),
        }
    }

    fn attack(&mut self, kind: &str) -> Result<()> {
        match kind {
            "bad-reference" => {
                for _ in 0..100 {
                    assert_eq!(self.read_into(NOBODYS)?, RSP_ERROR);
                }
                self.good_read()
            }
            "revoked-reference" => {
                // Never used by the backend, so nothing keeps the page granted.
                let gref = self.page()?.refs()[0];
                assert_eq!(self.read_into(gref)?, RSP_ERROR);
                self.good_read()
            }
            "corrupt-index" => {
                self.memory.word(0).store(0x4000_0000, Ordering::Release);
                self.channel.notify()?;
                self.node.wait_backend(&self.store, PATIENCE, |s| s == State::Closing)?;
                Ok(())
            }
            "storm" => {
                let end = Instant::now() + STORM;
                while Instant::now() < end {
                    self.channel.notify()?;
                }
                self.good_read()
            }
            _ => Err(format!("{kind}: no such attack").into()),
        }
    }

    /// Closes as a frontend does, so that the toolstack can take the device away.
    fn close(self) -> Result<()> {
        self.node.set_state(&self.store, State::Closing)?;
        let closing = |s| matches!(s, State::Closing | State::Closed);
        self.node.wait_backend(&self.store, PATIENCE, closing)?;
        self.node.set_state(&self.store, State::Closed)?;
        self.node.wait_backend(&self.store, PATIENCE, |s| s == State::Closed)?;
        Ok(())
    }
}

/// Reads the other device until told to stop, and counts.
fn witness(disk: &BlkFront, stop: &AtomicBool, reads: &AtomicU64) -> Result<()> {
    let mut queue = disk.queue(1)?;
    let mut page = vec![0; 4096];
    while !stop.load(Ordering::Acquire) {
        blocking::read_at(&mut *queue, 0, &mut page)?;
        reads.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

/// Waits until the other device has answered `wanted` reads.
fn wait_for_reads(reads: &AtomicU64, wanted: u64) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    while reads.load(Ordering::Relaxed) < wanted {
        if Instant::now() >= end {
            return Err("the other device answers nothing".into());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, kind, bad, good] = arguments.as_slice() else {
        return Err("hostile_guest ATTACK BAD_DEVID GOOD_DEVID".into());
    };
    let xen = Arc::new(Xen::open()?);
    // gntalloc gives a program 1024 pages by default.
    let few = FrontOptions {
        max_queues: 1,
        max_ring_page_order: 0,
        max_indirect_segments: 0,
        pool_pages: 64,
        ..FrontOptions::default()
    };
    let disk = BlkFront::connect(xen.clone(), good.parse()?, few)?;
    let mut attacker = Attacker::connect(xen, bad.parse()?)?;
    let (stop, reads) = (AtomicBool::new(false), AtomicU64::new(0));
    let during = std::thread::scope(|scope| -> Result<u64> {
        let other = scope.spawn(|| witness(&disk, &stop, &reads).map_err(|e| e.to_string()));
        let attacked = wait_for_reads(&reads, 1).and_then(|()| {
            let before = reads.load(Ordering::Relaxed);
            attacker.attack(kind)?;
            // An attack may be shorter than a read. The second read from here on began after the
            // attack did, so the device stood it.
            wait_for_reads(&reads, before + 2)?;
            Ok(reads.load(Ordering::Relaxed) - before)
        });
        stop.store(true, Ordering::Release);
        other.join().map_err(|_| "the witness panicked")??;
        attacked
    })?;
    attacker.close()?;
    disk.close()?;
    println!("HOSTILE {kind}: as it should be; {during} reads of the other device meanwhile");
    Ok(())
}
