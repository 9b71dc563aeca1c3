//! Event channels with the semantics of the 2-level ABI (event_channel.h).

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use crate::{DomId, Port};

/// Ports of a 64-bit domain; port 0 is never used.
pub const PORTS: usize = 4096;
const WORDS: usize = PORTS / 64;

/// Why an operation was refused; the errno that Xen gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EventError {
    /// ESRCH.
    #[error("no such domain")]
    BadDomain,
    /// EINVAL: no such port, or not in the state that the call needs.
    #[error("bad event channel port")]
    BadPort,
    /// ENOSPC.
    #[error("no free port")]
    NoSpace,
}

/// What a port is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Channel {
    /// Nothing.
    Free,
    /// Waits for `remote` to bind it.
    Unbound {
        /// Who may bind.
        remote: DomId,
    },
    /// Connected.
    Interdomain {
        /// The other end's domain.
        remote: DomId,
        /// The other end's port.
        port: Port,
    },
}

/// The port at which an event arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Raised {
    /// Whose port.
    pub domid: DomId,
    /// Which.
    pub port: Port,
    /// Whether the domain must be woken: it was not pending before and is not masked.
    pub upcall: bool,
}

/// One domain's ports.
#[derive(Debug)]
struct Table {
    channels: Vec<Channel>,
    pending: [u64; WORDS],
    mask: [u64; WORDS],
    selector: u64,
}

impl Table {
    fn new() -> Self {
        Table { channels: vec![Channel::Free], pending: [0; WORDS], mask: [0; WORDS], selector: 0 }
    }
    fn get(&self, port: Port) -> Channel {
        self.channels.get(port as usize).copied().unwrap_or(Channel::Free)
    }
    fn alloc(&mut self, channel: Channel) -> Result<Port, EventError> {
        let free = self.channels.iter().skip(1).position(|c| *c == Channel::Free);
        let port = match free {
            Some(i) => i + 1,
            None if self.channels.len() < PORTS => {
                self.channels.push(Channel::Free);
                self.channels.len() - 1
            }
            None => return Err(EventError::NoSpace),
        };
        self.channels[port] = channel;
        self.clear(port as Port);
        self.mask[port / 64] &= !(1 << (port % 64));
        Ok(port as Port)
    }
    fn clear(&mut self, port: Port) -> bool {
        let (word, bit) = (port as usize / 64, 1u64 << (port % 64));
        let was = self.pending[word] & bit != 0;
        self.pending[word] &= !bit;
        was
    }
    /// Sets pending; says whether the domain needs an upcall.
    fn raise(&mut self, port: Port) -> bool {
        let (word, bit) = (port as usize / 64, 1u64 << (port % 64));
        if self.pending[word] & bit != 0 {
            return false;
        }
        self.pending[word] |= bit;
        if self.mask[word] & bit != 0 {
            return false;
        }
        self.selector |= 1 << word;
        true
    }
}

/// All domains' event channels.
#[derive(Debug, Default)]
pub struct Events {
    tables: BTreeMap<DomId, Table>,
}

impl Events {
    /// No domain.
    pub fn new() -> Self {
        Self::default()
    }

    /// Gives a new domain its table.
    pub fn add_domain(&mut self, domid: DomId) {
        self.tables.entry(domid).or_insert_with(Table::new);
    }

    /// Closes every port of a domain and forgets it.
    pub fn remove_domain(&mut self, domid: DomId) {
        for port in self.ports(domid) {
            let _ = self.close(domid, port);
        }
        self.tables.remove(&domid);
    }

    /// Ports of a domain that are not free.
    pub fn ports(&self, domid: DomId) -> Vec<Port> {
        let Some(table) = self.tables.get(&domid) else { return Vec::new() };
        (1..table.channels.len() as Port).filter(|p| table.get(*p) != Channel::Free).collect()
    }

    fn table(&mut self, domid: DomId) -> Result<&mut Table, EventError> {
        self.tables.get_mut(&domid).ok_or(EventError::BadDomain)
    }

    /// What a port is; `Free` also where there is no such domain.
    pub fn channel(&self, domid: DomId, port: Port) -> Channel {
        self.tables.get(&domid).map_or(Channel::Free, |t| t.get(port))
    }

    /// EVTCHNOP_alloc_unbound: a port of `local` that `remote` may bind.
    pub fn alloc_unbound(&mut self, local: DomId, remote: DomId) -> Result<Port, EventError> {
        self.table(local)?.alloc(Channel::Unbound { remote })
    }

    /// EVTCHNOP_bind_interdomain: a port of `local` connected to `remote_port`. It starts
    /// pending, since an event may have been lost before.
    pub fn bind_interdomain(
        &mut self,
        local: DomId,
        remote: DomId,
        remote_port: Port,
    ) -> Result<Port, EventError> {
        let there = self.table(remote)?.get(remote_port);
        if there != (Channel::Unbound { remote: local }) {
            return Err(EventError::BadPort);
        }
        let port = self.table(local)?.alloc(Channel::Interdomain { remote, port: remote_port })?;
        self.table(remote)?.channels[remote_port as usize] =
            Channel::Interdomain { remote: local, port };
        self.table(local)?.raise(port);
        Ok(port)
    }

    /// EVTCHNOP_send. An unbound port swallows the event, as Xen's does.
    pub fn send(&mut self, local: DomId, port: Port) -> Result<Option<Raised>, EventError> {
        match self.table(local)?.get(port) {
            Channel::Free => Err(EventError::BadPort),
            Channel::Unbound { .. } => Ok(None),
            Channel::Interdomain { remote, port } => {
                let upcall = self.table(remote)?.raise(port);
                Ok(Some(Raised { domid: remote, port, upcall }))
            }
        }
    }

    /// EVTCHNOP_close. The other end becomes unbound again and can be bound anew.
    pub fn close(&mut self, local: DomId, port: Port) -> Result<(), EventError> {
        let table = self.table(local)?;
        let was = table.get(port);
        if was == Channel::Free {
            return Err(EventError::BadPort);
        }
        table.channels[port as usize] = Channel::Free;
        table.clear(port);
        if let Channel::Interdomain { remote, port } = was
            && let Ok(table) = self.table(remote)
        {
            table.channels[port as usize] = Channel::Unbound { remote: local };
        }
        Ok(())
    }

    /// Whether an event is pending, masked or not.
    pub fn pending(&self, domid: DomId, port: Port) -> bool {
        port_bit(self.tables.get(&domid).map(|t| &t.pending), port)
    }

    /// Holds events back.
    pub fn mask(&mut self, domid: DomId, port: Port) -> Result<(), EventError> {
        let (word, bit) = locate(port)?;
        self.table(domid)?.mask[word] |= bit;
        Ok(())
    }

    /// EVTCHNOP_unmask: lets events through; says whether one was waiting, which then counts as
    /// raised now.
    pub fn unmask(&mut self, domid: DomId, port: Port) -> Result<bool, EventError> {
        let (word, bit) = locate(port)?;
        let table = self.table(domid)?;
        let was_masked = table.mask[word] & bit != 0;
        table.mask[word] &= !bit;
        let waiting = was_masked && table.pending[word] & bit != 0;
        if waiting {
            table.selector |= 1 << word;
        }
        Ok(waiting)
    }

    /// Takes a pending event; says whether there was one.
    pub fn take(&mut self, domid: DomId, port: Port) -> Result<bool, EventError> {
        locate(port)?;
        Ok(self.table(domid)?.clear(port))
    }

    /// The lowest port that is pending and not masked, found through the selector as a guest's
    /// upcall handler does. The event stays pending.
    pub fn next_pending(&mut self, domid: DomId) -> Option<Port> {
        let table = self.tables.get_mut(&domid)?;
        while table.selector != 0 {
            let word = table.selector.trailing_zeros() as usize;
            let ready = table.pending[word] & !table.mask[word];
            if ready != 0 {
                return Some((word * 64) as Port + ready.trailing_zeros());
            }
            table.selector &= !(1 << word);
        }
        None
    }
}

fn locate(port: Port) -> Result<(usize, u64), EventError> {
    if port as usize >= PORTS {
        return Err(EventError::BadPort);
    }
    Ok((port as usize / 64, 1 << (port % 64)))
}

fn port_bit(words: Option<&[u64; WORDS]>, port: Port) -> bool {
    match (words, locate(port)) {
        (Some(words), Ok((word, bit))) => words[word] & bit != 0,
        _ => false,
    }
}
