//! The two xenstore directories of one device.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::machine::{Hotplug, Phase, Seen, State};
use crate::DomId;
use crate::store::{Client, Error, Tx};

/// A key and its value, to be written into the backend's directory.
pub type Key = (String, String);

/// Which device: its kind's directory, the frontend's domain, and its number there.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeviceId {
    /// `vbd`, `vif`, ...
    pub kind: &'static str,
    /// The frontend's domain.
    pub domid: DomId,
    /// The device's number within its domain.
    pub devid: u32,
}

impl DeviceId {
    /// The device's file of this kind in the run directory: `DOMID/KIND-DEVID.EXTENSION`.
    pub fn file(&self, run_dir: &Path, extension: &str) -> PathBuf {
        run_dir.join(format!("{}/{}-{}.{extension}", self.domid, self.kind, self.devid))
    }
}

impl std::fmt::Display for DeviceId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}/{}", self.kind, self.domid, self.devid)
    }
}

/// The two xenstore directories of one device.
#[derive(Clone)]
pub struct Nodes {
    store: Arc<Client>,
    id: DeviceId,
    backend: String,
    frontend: String,
    home: String,
}

impl Nodes {
    /// Finds the frontend's directory by the backend's `frontend` key. `home` is this domain's
    /// own path (`/local/domain/0`).
    pub fn open(store: Arc<Client>, home: &str, id: DeviceId) -> Result<Nodes, Error> {
        let backend = format!("{home}/backend/{id}");
        let frontend = store.get(&format!("{backend}/frontend"))?.unwrap_or_default();
        Ok(Nodes { store, id, backend, frontend, home: home.to_owned() })
    }

    /// Which device.
    pub fn id(&self) -> &DeviceId {
        &self.id
    }
    /// The backend's directory.
    pub fn backend_path(&self) -> &str {
        &self.backend
    }
    /// The frontend's directory.
    pub fn frontend_path(&self) -> &str {
        &self.frontend
    }
    /// The connection.
    pub fn store(&self) -> &Arc<Client> {
        &self.store
    }

    /// A key of the backend's directory.
    pub fn own(&self, key: &str) -> Result<Option<String>, Error> {
        self.store.get(&format!("{}/{key}", self.backend))
    }

    /// A key of the frontend's directory. Its value is the guest's: believe nothing.
    pub fn front(&self, key: &str) -> Result<Option<String>, Error> {
        self.store.get(&format!("{}/{key}", self.frontend))
    }

    /// Writes keys of the backend's directory in one transaction, unless the directory is gone:
    /// a write would bring it back and leave a stale node behind.
    pub fn write(&self, keys: &[Key]) -> Result<(), Error> {
        if keys.is_empty() { Ok(()) } else { self.put(keys, None) }
    }

    /// Writes keys and our state, all in one transaction. `seen` is the state that was ours. A
    /// toolstack that has written Closing since then waits for what follows it, and is not
    /// answered with less. One that has made the directory anew is not answered at all: what would
    /// be said is of another device.
    pub fn write_state(
        &self,
        keys: &[Key],
        state: State,
        seen: Option<State>,
    ) -> Result<(), Error> {
        self.put(keys, Some((state, seen)))
    }

    fn put(&self, keys: &[Key], state: Option<(State, Option<State>)>) -> Result<(), Error> {
        let path = |key: &str| format!("{}/{key}", self.backend);
        self.store.transaction(|tx| {
            if self.store.get_in(tx, &path("frontend"))?.is_none() {
                return Ok(());
            }
            let write =
                || keys.iter().try_for_each(|(key, value)| self.store.write(tx, &path(key), value));
            let Some((state, seen)) = state else { return write() };
            let now = self.store.get_in(tx, &path("state"))?.map(|s| State::parse(&s));
            let new = |what| now == Some(what) && seen != now;
            if new(State::Initialising) {
                return Ok(());
            }
            write()?;
            if new(State::Closing) && !matches!(state, State::Closing | State::Closed) {
                return Ok(());
            }
            self.store.write(tx, &path("state"), state.to_string())
        })
    }

    /// Writes `error/backend/KIND/DOMID/DEVID/error`, as Linux's xenbus_dev_fatal does.
    pub fn report(&self, reason: &str) -> Result<(), Error> {
        let path = format!("{}/error/backend/{}/error", self.home, self.id);
        self.store.write(Tx::NONE, &path, reason)
    }

    /// Looks at what the handshake depends on in `phase`, and at nothing else: each look is on
    /// the way of a guest that waits to close.
    pub fn look(&self, phase: Phase, fault: bool) -> Result<Seen, Error> {
        let own = self.own("state")?;
        let frontend = match self.frontend.as_str() {
            "" => None,
            _ => self.front("state")?,
        };
        let hotplug = match phase {
            Phase::New | Phase::Waiting => self.hotplug()?,
            _ => Hotplug::Ready,
        };
        let online = phase != Phase::Closed || self.own("online")?.as_deref() != Some("0");
        Ok(Seen {
            frontend: frontend.map(|s| State::parse(&s)),
            own: own.map(|s| State::parse(&s)),
            online,
            hotplug,
            fault,
        })
    }

    fn hotplug(&self) -> Result<Hotplug, Error> {
        let ready = self.own("hotplug-status")?.as_deref() == Some("connected");
        // Without a script there is nothing to wait for.
        let ready = ready || self.own("script")?.is_none();
        Ok(if ready { Hotplug::Ready } else { Hotplug::Pending })
    }
}
