//! Disks of NBD servers.

mod address;
mod connect;
mod handover;
mod queue;
mod shared;
mod status;

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::{Disk, DiskQueue, Geometry, Region};
use crate::engine::MAX_DEPTH;
use crate::export::nbd::proto::can;
use crate::storage::Access;
pub use address::{Encryption, NbdTarget, NotATarget, Place};
pub use handover::Handover;
use queue::NbdQueue;
use shared::{Member, Shared};

/// How to use a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdOptions {
    /// Which server, and which of its exports.
    pub target: NbdTarget,
    /// For what.
    pub access: Access,
    /// How long requests wait for a server that is gone to come back.
    pub patience: Duration,
    /// How long connecting and the handshake may take.
    pub handshake: Duration,
}

impl NbdOptions {
    /// For reading and writing, with 30 s of patience and 10 s for a handshake.
    pub fn new(target: NbdTarget) -> Self {
        NbdOptions {
            target,
            access: Access::ReadWrite,
            patience: Duration::from_secs(30),
            handshake: Duration::from_secs(10),
        }
    }
}

/// An export of an NBD server.
///
/// **Connections.** Each queue has one of its own if the server says that they see each other's
/// flushed writes (NBD_FLAG_CAN_MULTI_CONN). Otherwise there is one queue at a time.
///
/// **When the server goes away** each queue connects anew, with growing pauses, and sends its
/// unanswered requests again, in their order; a request is answered with EIO when it has waited
/// for longer than [`patience`](NbdOptions::patience), and at once while the server is still
/// away after that. If it comes back with another size or other flags, everything fails.
///
/// **What was lost is not hidden.** A write that was answered and not flushed may have been only
/// in the memory of a server that has died, and nobody can tell a server that was restarted from
/// one that has only dropped a connection. So if any connection is lost while answered writes,
/// discards or zeroings have not been flushed, this flush and all later ones fail with EIO, on
/// all queues, as after any failed flush. (QEMU's client reconnects silently.) Requests that
/// are all flushed, or written with [`Op::WriteFua`](super::Op::WriteFua), survive a restart
/// unnoticed. Before a flush is answered, the other queues' connections are looked at too: a
/// server that has died meanwhile has hung up on them. (A host that has died without a word
/// is noticed only by TCP's own means.)
pub struct NbdDisk {
    shared: Arc<Shared>,
    /// A connection that no queue uses.
    spare: Arc<Mutex<Option<Member>>>,
}

impl NbdDisk {
    /// Connects, and agrees with the server.
    pub fn open(options: NbdOptions) -> io::Result<Arc<Self>> {
        let (shared, member) = Shared::open(options)?;
        Ok(Arc::new(NbdDisk { shared, spare: Arc::new(Mutex::new(Some(member))) }))
    }

    /// A connection for a queue or a question.
    fn member(&self) -> io::Result<Member> {
        // One that has been idle may have been dropped by the server.
        if let Some(member) = self.spare.lock().take() {
            if !member.is_gone() {
                return Ok(member);
            }
            self.shared.lose();
        } else if self.shared.facts().flags & can::MULTI_CONN == 0 && self.shared.is_connected() {
            let text = "the server has no multi-conn: there is one queue, and it is in use";
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, text));
        }
        self.shared.connect()
    }
}

impl Disk for NbdDisk {
    fn geometry(&self) -> Geometry {
        let facts = self.shared.facts();
        let logical = facts.minimum.max(512);
        let has = |flag| facts.flags & flag != 0;
        let read_only = self.shared.options.access == Access::ReadOnly || has(can::READ_ONLY);
        Geometry {
            size: facts.size - facts.size % u64::from(logical),
            logical_block: logical,
            physical_block: facts.preferred.clamp(logical, 1 << 20),
            memory_align: 1,
            discard: (has(can::TRIM) && !read_only).then_some(logical),
            secure_discard: false,
            read_only,
        }
    }

    /// The protocol tells the size once.
    fn refresh(&self) -> io::Result<Geometry> {
        Ok(self.geometry())
    }

    fn queue(&self, depth: u32) -> io::Result<Box<dyn DiskQueue>> {
        if !(1..=MAX_DEPTH).contains(&depth) {
            let text = format!("a queue holds 1 to {MAX_DEPTH} requests, not {depth}");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let member = self.member()?;
        let spare = Arc::clone(&self.spare);
        Ok(Box::new(NbdQueue::new(
            Arc::clone(&self.shared),
            member,
            self.geometry(),
            depth,
            spare,
        )?))
    }

    fn map(&self, range: Range<u64>, out: &mut Vec<Region>) -> io::Result<()> {
        let Some(context) = self.shared.facts().allocation else {
            return unknown(range, out);
        };
        let mut member = match self.member() {
            Err(e) if e.kind() == io::ErrorKind::ResourceBusy => return unknown(range, out),
            member => member?,
        };
        let patience = self.shared.options.patience;
        status::map(&mut member, context, range, patience, out)?;
        self.spare.lock().get_or_insert(member);
        Ok(())
    }
}

/// What is not known is data.
fn unknown(range: Range<u64>, out: &mut Vec<Region>) -> io::Result<()> {
    let len = range.end.saturating_sub(range.start);
    out.push(Region { len, kept: super::Kept::Data });
    Ok(())
}
