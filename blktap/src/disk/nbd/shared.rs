//! What all queues of a disk share: how to connect, and what may have been lost.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustls::ClientConfig;
use zerocopy::IntoBytes;

use super::NbdOptions;
use super::address::Encryption;
use super::connect::{Facts, Link, Replies, Talk, connect};
use crate::export::nbd::proto::{REQUEST_MAGIC, RequestHeader, cmd};
use crate::export::nbd::tls;
use crate::export::nbd::transport::Transport;

/// See the module.
pub(super) struct Shared {
    pub options: NbdOptions,
    tls: Option<Arc<ClientConfig>>,
    facts: Facts,
    /// Every connection there is.
    members: Mutex<Vec<Weak<OwnedFd>>>,
    /// Changes that were answered, over all queues, and how many of them a flush covers.
    answered: AtomicU64,
    flushed: AtomicU64,
    /// The errno of all flushes to come, 0 while nothing is lost.
    lost: AtomicI32,
}

/// A connection, known to all queues.
pub(super) struct Member {
    pub transport: Transport,
    socket: Arc<OwnedFd>,
}

/// Whether the other side has hung up, whatever is still to be read.
fn is_gone(socket: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(socket, PollFlags::RDHUP)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut fds, Some(&now)).is_ok_and(|n| n > 0)
}

impl Member {
    pub fn is_gone(&self) -> bool {
        is_gone(&self.socket)
    }
}

impl Shared {
    /// Connects for the first time.
    pub fn open(options: NbdOptions) -> io::Result<(Arc<Shared>, Member)> {
        let tls = match (options.target.encryption, &options.target.certificates) {
            (Encryption::Plain, _) => None,
            (Encryption::Tls, Some(folder)) => Some(tls::client(folder).map_err(io::Error::other)?),
            (Encryption::Tls, None) => {
                let text = "TLS needs certificates: add ?tls-certificates=DIR";
                return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
            }
        };
        let link = connect(&options.target, tls.as_ref(), options.handshake, Replies::Structured)?;
        let shared = Arc::new(Shared {
            options,
            tls,
            facts: link.facts,
            members: Mutex::default(),
            answered: AtomicU64::new(0),
            flushed: AtomicU64::new(0),
            lost: AtomicI32::new(0),
        });
        let member = shared.enter(link)?;
        Ok((shared, member))
    }

    pub fn facts(&self) -> Facts {
        self.facts
    }

    /// Another connection, to the same disk.
    pub fn connect(&self) -> io::Result<Member> {
        let link = connect(
            &self.options.target,
            self.tls.as_ref(),
            self.options.handshake,
            Replies::Structured,
        )?;
        if link.facts != self.facts {
            let text = "the server has come back with another disk";
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        // Where nobody has stayed connected, it may be another server.
        if self.members().iter().all(|socket| is_gone(socket)) {
            self.lose();
        }
        self.enter(link)
    }

    fn enter(&self, link: Link) -> io::Result<Member> {
        let socket = Arc::new(link.transport.as_fd().try_clone_to_owned()?);
        self.members.lock().push(Arc::downgrade(&socket));
        Ok(Member { transport: link.transport, socket })
    }

    fn members(&self) -> Vec<Arc<OwnedFd>> {
        let mut members = self.members.lock();
        members.retain(|socket| socket.strong_count() > 0);
        members.iter().filter_map(Weak::upgrade).collect()
    }

    /// A queue is done with its connection: it is kept for the next one, or closed as the
    /// protocol asks.
    pub fn leave(&self, mut member: Member, spare: &Mutex<Option<Member>>) {
        let mut spare = spare.lock();
        if spare.is_none() {
            *spare = Some(member);
            return;
        }
        let request = RequestHeader {
            magic: REQUEST_MAGIC.into(),
            command: cmd::DISC.into(),
            ..RequestHeader::default()
        };
        let mut talk = Talk::new(&mut member.transport, self.options.handshake);
        if let Err(e) = talk.send(request.as_bytes()) {
            tracing::debug!("nbd: disconnecting: {e}");
        }
        member.transport.close();
    }

    /// Whether anybody is connected.
    pub fn is_connected(&self) -> bool {
        !self.members().is_empty()
    }

    /// A connection is gone: what was answered and not flushed may be too.
    pub fn lose(&self) {
        let flushed = self.flushed.load(Ordering::Acquire);
        if self.answered.load(Ordering::Acquire) > flushed
            && self.lost.swap(libc::EIO, Ordering::AcqRel) == 0
        {
            tracing::error!(
                "nbd: {:?}: a connection was lost with writes that were not flushed: all flushes \
                 fail from now on",
                self.options.target.place
            );
        }
    }

    /// A change was answered, and is not known to be durable.
    pub fn note_change(&self) {
        self.answered.fetch_add(1, Ordering::AcqRel);
    }

    /// How many there were.
    pub fn changes(&self) -> u64 {
        self.answered.load(Ordering::Acquire)
    }

    /// The server has answered a flush that began after so many changes: its errno.
    pub fn note_flush(&self, changes: u64) -> i32 {
        let members = self.members();
        if members.len() > 1 && members.iter().any(|socket| is_gone(socket)) {
            self.lose();
        }
        let lost = self.lost();
        if lost == 0 {
            self.flushed.fetch_max(changes, Ordering::AcqRel);
        }
        lost
    }

    /// The errno of every flush.
    pub fn lost(&self) -> i32 {
        self.lost.load(Ordering::Acquire)
    }
}
