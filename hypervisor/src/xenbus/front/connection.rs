//! A frontend's connection from the first look at its nodes to the last word.

use std::io;
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::{Sender, bounded};
use parking_lot::Mutex;

use super::Node;
use crate::Guest;
use crate::store::Client;
use crate::xenbus::{Key, State};

/// A device's connection. Whoever has one drops it before its rings and channels: a backend gives
/// up a device one of whose channels closes.
pub struct Connection {
    /// The device's directories.
    pub node: Node,
    /// Where they are.
    pub store: Client,
    /// How long each step of the backend may take.
    pub patience: Duration,
    /// Ends the watcher when dropped.
    stop: Mutex<Option<Sender<()>>>,
    watcher: Mutex<Option<JoinHandle<()>>>,
    ending: Mutex<Ending>,
}

/// What is left to be done when it is dropped.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ending {
    /// It has not come about.
    Early,
    /// The handshake.
    Polite,
    /// It has been closed, or is to be left as it is.
    Done,
}

impl Connection {
    /// Finds the guest's device `devid` of `kind`, which a toolstack has made, and waits until its
    /// backend says what it offers. A device that an earlier life of this guest left connected is
    /// connected anew. Each step of the backend may take `patience`.
    pub fn meet(
        guest: &dyn Guest,
        kind: &str,
        devid: u32,
        patience: Duration,
    ) -> io::Result<Connection> {
        let store = guest.store()?;
        let node = Node::find(&store, kind, devid)?;
        if node.own_state(&store)? != State::Initialising {
            node.set_state(&store, State::Initialising)?;
        }
        node.wait_backend(&store, patience, |s| s == State::InitWait)?;
        Ok(Connection {
            node,
            store,
            patience,
            stop: Mutex::new(None),
            watcher: Mutex::new(None),
            ending: Mutex::new(Ending::Early),
        })
    }

    /// A key of the backend's directory.
    pub fn back_key(&self, key: &str) -> Option<String> {
        self.node.back_key(&self.store, key)
    }

    /// Writes what was chosen, as [`Node::choose`] does, and waits for the backend to connect.
    /// Otherwise the device is [given up](Self::give_up).
    pub fn introduce(
        &self,
        keys: &[Key],
        is_choice: impl Fn(&str) -> bool,
        state: State,
    ) -> io::Result<()> {
        let settled = |s| matches!(s, State::Connected | State::Closing | State::Closed);
        let chosen = self.node.choose(&self.store, keys, is_choice, state).map_err(Into::into);
        let settle = |()| self.node.wait_backend(&self.store, self.patience, settled);
        let met = chosen.and_then(settle).and_then(|found| match found {
            State::Connected => Ok(()),
            _ => Err(self.node.refused(&self.store)),
        });
        met.inspect_err(|_| self.give_up())
    }

    /// Done with, so that the next connection begins anew.
    pub fn give_up(&self) {
        self.abandon();
        if let Err(e) = self.node.set_state(&self.store, State::Closed) {
            tracing::debug!("{}: {e}", self.node.front);
        }
    }

    /// Watches the connected backend by a thread of its own: `tell` hears what [`Node::watch`]
    /// tells. From now on the connection ends by the handshake.
    pub fn watch(
        &self,
        guest: &dyn Guest,
        mut tell: impl FnMut(&Client, &Node, Option<State>) + Send + 'static,
    ) -> io::Result<()> {
        *self.ending.lock() = Ending::Polite;
        let (stop, stopped) = bounded(0);
        let (store, node) = (guest.store()?, self.node.clone());
        let run = move || {
            if let Err(e) = node.watch(&store, &stopped, |state| tell(&store, &node, state)) {
                tracing::error!("{}: watching the backend: {e}", node.front);
                tell(&store, &node, None);
            }
        };
        let thread = std::thread::Builder::new().name("frontend".into()).spawn(run)?;
        (*self.stop.lock(), *self.watcher.lock()) = (Some(stop), Some(thread));
        Ok(())
    }

    fn end_watch(&self) {
        *self.stop.lock() = None;
        if let Some(thread) = self.watcher.lock().take()
            && thread.join().is_err()
        {
            tracing::error!("the watcher of a frontend panicked");
        }
    }

    /// Closes by the handshake and reports what went wrong, which `Drop` could only log.
    pub fn close(&self) -> io::Result<()> {
        self.abandon();
        self.end_watch();
        self.node.close(&self.store, self.patience)
    }

    /// Leaves the nodes as they are when it is dropped, as a kernel that starts another by kexec.
    pub fn abandon(&self) {
        *self.ending.lock() = Ending::Done;
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.end_watch();
        let ending = *self.ending.lock();
        match ending {
            Ending::Early => self.give_up(),
            Ending::Polite => {
                if let Err(e) = self.node.close(&self.store, self.patience) {
                    tracing::warn!("{}: closing: {e}", self.node.front);
                }
            }
            Ending::Done => {}
        }
    }
}
