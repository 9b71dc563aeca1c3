//! The frontend's side of xenbus, as all devices have it: pieces that a frontend puts together, each
//! of which reads or writes a few keys.

mod connection;

pub use connection::Connection;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, after, select};
use parking_lot::Mutex;
use rustix::event::{EventfdFlags, eventfd};

use super::{Key, State};
use crate::DomId;
use crate::store::{Client, Error, Tx, Watched};

/// How often a state is looked at even if no watch fires.
const LOOK: Duration = Duration::from_millis(100);
/// The same of a connected backend.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// A device's two directories, as the frontend finds them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// The frontend's directory, below the domain's own.
    pub front: String,
    /// The backend's directory.
    pub back: String,
    /// The backend's domain.
    pub backend: DomId,
}

impl Node {
    /// Reads where the backend of the device `devid` of `kind` (`vbd`, `vif` ...) is. NotFound:
    /// there is no such device.
    pub fn find(store: &Client, kind: &str, devid: u32) -> io::Result<Node> {
        let front = format!("device/{kind}/{devid}");
        let missing = |key: &str| {
            io::Error::new(io::ErrorKind::NotFound, format!("{front}/{key} is not in xenstore"))
        };
        let back = store.get(&format!("{front}/backend"))?.ok_or_else(|| missing("backend"))?;
        let id = store.get(&format!("{front}/backend-id"))?;
        let backend = id.and_then(|id| id.trim().parse().ok());
        Ok(Node { backend: backend.ok_or_else(|| missing("backend-id"))?, front, back })
    }

    /// The backend's state; `Unknown` when its directory is gone.
    pub fn backend_state(&self, store: &Client) -> Result<State, Error> {
        let state = store.get(&format!("{}/state", self.back))?;
        Ok(state.map_or(State::Unknown, |s| State::parse(&s)))
    }

    /// The frontend's own state.
    pub fn own_state(&self, store: &Client) -> Result<State, Error> {
        let state = store.get(&format!("{}/state", self.front))?;
        Ok(state.map_or(State::Unknown, |s| State::parse(&s)))
    }

    /// Writes the frontend's state.
    pub fn set_state(&self, store: &Client, state: State) -> Result<(), Error> {
        store.write(Tx::NONE, &format!("{}/state", self.front), state.to_string())
    }

    /// Waits until the backend's state is one that `wanted` likes. TimedOut after `patience`,
    /// with what the backend has written to its error node, if it has.
    pub fn wait_backend(
        &self,
        store: &Client,
        patience: Duration,
        wanted: impl Fn(State) -> bool,
    ) -> io::Result<State> {
        let token = "wait-backend";
        let path = format!("{}/state", self.back);
        store.watch(&path, token)?;
        let result = self.wait_watched(store, patience, wanted);
        store.unwatch(&path, token)?;
        result
    }

    fn wait_watched(
        &self,
        store: &Client,
        patience: Duration,
        wanted: impl Fn(State) -> bool,
    ) -> io::Result<State> {
        let end = Instant::now() + patience;
        loop {
            let state = self.backend_state(store)?;
            if wanted(state) {
                return Ok(state);
            }
            if Instant::now() >= end {
                let text = format!("{}: the backend stays in state {state}", self.front);
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
            if bell(store, LOOK) && store.inbox().take().contains(&Watched::Closed) {
                return Err(io::Error::new(io::ErrorKind::BrokenPipe, "xenstored is gone"));
            }
        }
    }

    /// A key of the backend's directory, if it is there and may be read.
    pub fn back_key(&self, store: &Client, key: &str) -> Option<String> {
        store.get(&format!("{}/{key}", self.back)).ok().flatten()
    }

    /// A key of the frontend's own directory.
    pub fn front_key(&self, store: &Client, key: &str) -> Option<String> {
        store.get(&format!("{}/{key}", self.front)).ok().flatten()
    }

    /// Writes one key of the frontend's own directory.
    pub fn set_front_key(&self, store: &Client, key: &str, value: &str) -> Result<(), Error> {
        store.write(Tx::NONE, &format!("{}/{key}", self.front), value)
    }

    /// Writes keys below the frontend's directory and its state in one transaction, after removing
    /// those of an earlier life that `is_choice` knows by name.
    pub fn choose(
        &self,
        store: &Client,
        keys: &[Key],
        is_choice: impl Fn(&str) -> bool,
        state: State,
    ) -> Result<(), Error> {
        store.transaction(|tx| {
            for name in store.list(tx, &self.front)? {
                if is_choice(&name) {
                    store.remove(tx, &format!("{}/{name}", self.front))?;
                }
            }
            for (key, value) in keys {
                store.write(tx, &format!("{}/{key}", self.front), value)?;
            }
            store.write(tx, &format!("{}/state", self.front), state.to_string())
        })
    }

    /// The error of a backend that did not connect, in its own words where they can be read.
    pub fn refused(&self, store: &Client) -> io::Error {
        // Readable only where the backend's domain allows it; its log says the same.
        let path = self
            .back
            .find("/backend/")
            .map(|at| format!("{}/error{}/error", &self.back[..at], &self.back[at..]));
        let why = path.and_then(|path| store.get(&path).ok().flatten());
        let why = why.unwrap_or_else(|| "see the backend's log".into());
        io::Error::new(io::ErrorKind::ConnectionRefused, format!("{}: {why}", self.front))
    }

    /// Closes a device politely: 5, the backend's 5, 6, the backend's 6.
    pub fn close(&self, store: &Client, patience: Duration) -> io::Result<()> {
        let gone = |s| matches!(s, State::Closed | State::Unknown);
        self.set_state(store, State::Closing)?;
        self.wait_backend(store, patience, |s| s == State::Closing || gone(s))?;
        self.set_state(store, State::Closed)?;
        self.wait_backend(store, patience, gone).map(drop)
    }

    /// Watches a connected backend until `stop` closes: `tell` hears its state whenever anything of
    /// it may have changed, and None when xenstored is gone, which is the last.
    pub fn watch(
        &self,
        store: &Client,
        stop: &Receiver<()>,
        mut tell: impl FnMut(Option<State>),
    ) -> Result<(), Error> {
        store.watch(&self.back, "backend")?;
        let inbox = store.inbox().clone();
        loop {
            select! {
                recv(stop) -> _ => return Ok(()),
                recv(inbox.bell()) -> _ => {}
                recv(after(LOOK_AGAIN)) -> _ => {}
            }
            if inbox.take().contains(&Watched::Closed) {
                tell(None);
                return Ok(());
            }
            tell(Some(self.backend_state(store)?));
        }
    }
}

/// Waits for the inbox's bell for up to `limit`; whether it rang.
fn bell(store: &Client, limit: Duration) -> bool {
    store.inbox().bell().recv_timeout(limit).is_ok()
}

/// How far a connected device has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// It works.
    Connected,
    /// The backend wants to close: what is in flight is answered, nothing new is taken.
    Closing,
    /// Nothing will be answered.
    Broken,
}

/// How a frontend's device fares: told by whoever watches its backend, asked by its queues.
pub struct Health {
    stage: AtomicU8,
    reason: Mutex<Option<String>>,
    wake: OwnedFd,
}

impl Health {
    /// Of a connected device.
    pub fn new() -> io::Result<Health> {
        Ok(Health {
            stage: AtomicU8::new(0),
            reason: Mutex::new(None),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }
    /// How far it has come.
    pub fn stage(&self) -> Stage {
        match self.stage.load(Ordering::Acquire) {
            0 => Stage::Connected,
            1 => Stage::Closing,
            _ => Stage::Broken,
        }
    }
    /// Readable for good once it is broken.
    pub fn wake(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
    /// Why the device is disabled.
    pub fn reason(&self) -> Option<String> {
        self.reason.lock().clone()
    }
    /// Disables the device; the first reason stays.
    pub fn fail(&self, reason: String) {
        let mut first = self.reason.lock();
        if first.is_none() {
            tracing::error!("{reason}; the device is disabled");
            *first = Some(reason);
        }
        drop(first);
        self.raise(2);
    }
    /// What the backend's state, or that there is no xenstored any more, says of it.
    pub fn told(&self, state: Option<State>) {
        match state {
            Some(State::Closing) => self.raise(1),
            Some(State::Closed | State::Unknown) => {
                self.fail("the backend has closed the device".into());
            }
            Some(_) => {}
            None => self.fail("xenstored is gone".into()),
        }
    }
    fn raise(&self, stage: u8) {
        if self.stage.fetch_max(stage, Ordering::AcqRel) < stage
            && stage == 2
            && let Err(e) = rustix::io::write(&self.wake, &1u64.to_ne_bytes())
        {
            tracing::debug!("waking the queues: {e}");
        }
    }
}
