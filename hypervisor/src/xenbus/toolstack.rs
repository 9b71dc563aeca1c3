//! What a toolstack does for a device, for guests without one: makes the two directories, and
//! takes the device away again.

use std::time::{Duration, Instant};

use super::machine::State;
use super::nodes::{DeviceId, Key};
use crate::DomId;
use crate::store::{Client, Error, Permission, Rights, Tx};

/// A device to attach.
pub struct Device {
    /// Which one.
    pub id: DeviceId,
    /// The backend's domain.
    pub backend: DomId,
    /// Keys for the backend's directory beside those of every device.
    pub backend_keys: Vec<Key>,
    /// Keys for the frontend's directory beside those of every device.
    pub frontend_keys: Vec<Key>,
}

fn directories(store: &Client, id: &DeviceId, backend: DomId) -> Result<(String, String), Error> {
    let back = format!("{}/backend/{id}", store.domain_path(backend)?);
    let front = format!("{}/device/{}/{}", store.domain_path(id.domid)?, id.kind, id.devid);
    Ok((back, front))
}

/// Makes a device's two directories in one transaction. Fails with EEXIST if either is there.
pub fn attach(store: &Client, device: &Device) -> Result<(), Error> {
    let Device { id, backend, .. } = device;
    let (back, front) = directories(store, id, *backend)?;
    let owner = |domid, reader| {
        [
            Permission { domid, rights: Rights::None },
            Permission { domid: reader, rights: Rights::Read },
        ]
    };
    let common = |other: &str, other_id: DomId, path_key: &str, id_key: &str| {
        vec![
            (path_key.to_owned(), other.to_owned()),
            (id_key.to_owned(), other_id.to_string()),
            ("state".to_owned(), State::Initialising.to_string()),
        ]
    };
    let mut back_keys = common(&front, id.domid, "frontend", "frontend-id");
    back_keys.push(("online".to_owned(), "1".to_owned()));
    back_keys.extend(device.backend_keys.iter().cloned());
    let mut front_keys = common(&back, *backend, "backend", "backend-id");
    front_keys.extend(device.frontend_keys.iter().cloned());
    store.transaction(|tx| {
        for (path, keys, owner) in [
            (&back, &back_keys, owner(*backend, id.domid)),
            (&front, &front_keys, owner(id.domid, *backend)),
        ] {
            if store.get_in(tx, &format!("{path}/state"))?.is_some() {
                return Err(Error::Refused { path: path.clone(), errno: 17 });
            }
            store.remove(tx, path)?;
            store.mkdir(tx, path)?;
            store.set_permissions(tx, path, &owner)?;
            for (key, value) in keys {
                let path = format!("{path}/{key}");
                store.write(tx, &path, value)?;
                store.set_permissions(tx, &path, &owner)?;
            }
        }
        Ok(())
    })
}

/// How a detach ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detached {
    /// Both ends closed.
    Closed,
    /// The guest did not let go within the time (its device is in use); nothing was removed.
    Refused,
}

/// Asks both ends to close, waits for it, and removes both directories. With `force` they are
/// removed even if the guest does not answer: the frontend's first, as `xl destroy` does.
pub fn detach(
    store: &Client,
    id: &DeviceId,
    backend: DomId,
    patience: Duration,
    force: Force,
) -> Result<Detached, Error> {
    let (back, front) = directories(store, id, backend)?;
    if store.get(&format!("{back}/state"))?.is_none() {
        return Err(Error::Refused { path: back, errno: 2 });
    }
    store.transaction(|tx| {
        store.write(tx, &format!("{back}/online"), "0")?;
        store.write(tx, &format!("{back}/state"), State::Closing.to_string())
    })?;
    if !wait_closed(store, &back, patience)? {
        if force == Force::No {
            return Ok(Detached::Refused);
        }
        store.remove(Tx::NONE, &front)?;
        wait_closed(store, &back, patience)?;
    }
    store.remove(Tx::NONE, &front)?;
    store.remove(Tx::NONE, &back)?;
    Ok(Detached::Closed)
}

/// Whether a detach goes on against the guest's will.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Force {
    /// A guest that uses the device keeps it.
    No,
    /// The device goes.
    Yes,
}

fn wait_closed(store: &Client, back: &str, patience: Duration) -> Result<bool, Error> {
    let end = Instant::now() + patience;
    loop {
        let state = store.get(&format!("{back}/state"))?;
        if state.is_none_or(|s| State::parse(&s) == State::Closed) {
            return Ok(true);
        }
        if Instant::now() > end {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
