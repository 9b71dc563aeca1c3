//! Watch events on their way from the connection to whoever handles them.
//!
//! Guests cause watch events as fast as they can write (XSA-349: an unbounded watch queue ate the
//! backend's memory). Equal events that nobody has taken yet are one event, and past a limit
//! they all become one: "look at everything again".

use std::collections::{HashSet, VecDeque};

use crossbeam::channel::{Receiver, Sender, TrySendError, bounded};
use parking_lot::Mutex;

/// Events kept apart before they become [`Watched::Everything`].
const LIMIT: usize = 1024;

/// What to look at again.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Watched {
    /// The node at `path`, or something below the watched node, changed.
    Path {
        /// The path as the watch reports it.
        path: String,
        /// The token that the watch was set with.
        token: String,
    },
    /// So much changed that events were dropped: look at everything.
    Everything,
    /// xenstored is gone; no event will follow.
    Closed,
}

#[derive(Default)]
struct Pending {
    queue: VecDeque<(String, String)>,
    known: HashSet<(String, String)>,
    overflowed: bool,
    closed: bool,
}

/// Pending watch events. One side posts, the other waits for [`bell`](Self::bell) and takes.
pub struct Inbox {
    pending: Mutex<Pending>,
    ring: Sender<()>,
    bell: Receiver<()>,
}

impl Default for Inbox {
    fn default() -> Self {
        let (ring, bell) = bounded(1);
        Inbox { pending: Mutex::default(), ring, bell }
    }
}

impl Inbox {
    /// Rings when there is something to take.
    pub fn bell(&self) -> &Receiver<()> {
        &self.bell
    }

    /// Takes what is pending, oldest first.
    pub fn take(&self) -> Vec<Watched> {
        let mut pending = self.pending.lock();
        let mut out = Vec::new();
        if std::mem::take(&mut pending.overflowed) {
            out.push(Watched::Everything);
        }
        pending.known.clear();
        out.extend(pending.queue.drain(..).map(|(path, token)| Watched::Path { path, token }));
        if pending.closed {
            out.push(Watched::Closed);
        }
        out
    }

    /// Adds an event unless an equal one is pending.
    pub(crate) fn post(&self, path: String, token: String) {
        let mut pending = self.pending.lock();
        let event = (path, token);
        if pending.overflowed || pending.known.contains(&event) {
            return;
        }
        if pending.queue.len() >= LIMIT {
            pending.queue.clear();
            pending.known.clear();
            pending.overflowed = true;
        } else {
            pending.known.insert(event.clone());
            pending.queue.push_back(event);
        }
        drop(pending);
        self.wake();
    }

    /// Says that no event will come any more.
    pub(crate) fn close(&self) {
        self.pending.lock().closed = true;
        self.wake();
    }

    fn wake(&self) {
        match self.ring.try_send(()) {
            // Full: it rings already.
            Ok(()) | Err(TrySendError::Full(())) | Err(TrySendError::Disconnected(())) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(path: &str) -> Watched {
        Watched::Path { path: path.into(), token: "t".into() }
    }

    #[test]
    fn equal_events_are_one() {
        let inbox = Inbox::default();
        for p in ["a", "b", "a", "a"] {
            inbox.post(p.into(), "t".into());
        }
        assert_eq!(inbox.bell().try_recv(), Ok(()));
        assert_eq!(inbox.take(), [path("a"), path("b")]);
        inbox.post("a".into(), "t".into());
        assert_eq!(inbox.take(), [path("a")]);
    }

    #[test]
    fn xsa_349_a_flood_becomes_one_event() {
        let inbox = Inbox::default();
        for i in 0..100_000 {
            inbox.post(format!("device/vbd/{i}"), "t".into());
        }
        assert_eq!(inbox.take(), [Watched::Everything]);
        assert!(inbox.take().is_empty());
        inbox.close();
        assert_eq!(inbox.take(), [Watched::Closed]);
    }
}
