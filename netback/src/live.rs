//! What a guest or an operator may change while a vif's queues run. Each queue's thread has what it
//! saw last and looks for a change once a round, by one load.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::config::Carrier;
use crate::hash::Spread;
use crate::kept::Kept;
use crate::negotiate::Multicast;
use crate::staging::{Memory, Staging};
use crate::tx::Group;

/// Most group addresses of one guest (xen-netback's `XEN_NETBK_MCAST_MAX`).
pub const MAX_GROUPS: usize = 64;
const BROADCAST: [u8; 6] = [0xff; 6];

/// One state of a vif.
#[derive(Clone)]
pub struct Wishes {
    /// How packets to the guest are spread over its queues.
    pub spread: Arc<Spread>,
    /// Which group addresses the guest gets.
    pub multicast: Multicast,
    /// Those that it has named, as often as it has.
    pub groups: Vec<[u8; 6]>,
    /// Bytes to leave free before each packet.
    pub headroom: u16,
    /// Whether the link is up.
    pub carrier: Carrier,
}

impl Default for Wishes {
    fn default() -> Wishes {
        Wishes {
            spread: Arc::default(),
            multicast: Multicast::Flood,
            groups: Vec::new(),
            headroom: 0,
            carrier: Carrier::Up,
        }
    }
}

impl Wishes {
    /// Whether the guest gets a frame. Broadcasts it always gets.
    pub fn wants(&self, frame: &[u8]) -> bool {
        if self.multicast == Multicast::Flood {
            return true;
        }
        frame
            .first_chunk()
            .is_none_or(|to| to[0] & 1 == 0 || *to == BROADCAST || self.groups.contains(to))
    }

    /// Changes the list; whether it was done. As in xen-netback an address that was named twice is
    /// wanted until it was taken back twice.
    pub fn change(&mut self, group: Group) -> bool {
        match group {
            Group::Add(address) => {
                let fits = self.groups.len() < MAX_GROUPS && address[0] & 1 != 0;
                if fits {
                    self.groups.push(address);
                }
                fits
            }
            Group::Remove(address) => {
                if let Some(at) = self.groups.iter().position(|known| *known == address) {
                    self.groups.swap_remove(at);
                }
                true
            }
        }
    }
}

/// See the module.
pub(crate) struct Live {
    changes: AtomicU64,
    wishes: Mutex<Arc<Wishes>>,
    kept: Kept,
    staging: Box<[Staging<Memory>]>,
}

/// What one thread has seen of it.
pub(crate) struct Seen {
    changes: u64,
    pub wishes: Arc<Wishes>,
}

impl Live {
    /// `kept` is where a successor finds what the guest has said through its rings; `staging` has a
    /// table for each queue.
    pub(crate) fn new(wishes: Wishes, kept: Kept, staging: Box<[Staging<Memory>]>) -> Live {
        Live { changes: AtomicU64::new(0), wishes: Mutex::new(Arc::new(wishes)), kept, staging }
    }

    /// The pages that each queue keeps mapped.
    pub(crate) fn staging(&self) -> &[Staging<Memory>] {
        &self.staging
    }

    /// Changes it for all; who looks after this has returned sees it.
    pub(crate) fn change<R>(&self, change: impl FnOnce(&mut Wishes) -> R) -> R {
        let mut wishes = self.wishes.lock();
        let result = change(Arc::make_mut(&mut wishes));
        self.kept.save(&wishes);
        self.changes.fetch_add(1, Ordering::Release);
        result
    }

    pub(crate) fn look(&self) -> Seen {
        let changes = self.changes.load(Ordering::Acquire);
        Seen { changes, wishes: self.wishes.lock().clone() }
    }

    /// Brings what a thread has seen up to date; whether it was not.
    pub(crate) fn refresh(&self, seen: &mut Seen) -> bool {
        let stale = self.changes.load(Ordering::Acquire) != seen.changes;
        if stale {
            *seen = self.look();
        }
        stale
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(last: u8) -> [u8; 6] {
        [1, 0, 0x5e, 0, 0, last]
    }

    #[test]
    fn who_names_groups_gets_those_broadcasts_and_its_own() {
        let mut wishes = Wishes { multicast: Multicast::Listed, ..Wishes::default() };
        assert!(wishes.change(Group::Add(group(1))));
        let to = |to: [u8; 6]| [&to[..], &[0; 54]].concat();
        let wanted = |wishes: &Wishes, last| wishes.wants(&to(group(last)));
        assert!(wanted(&wishes, 1) && !wanted(&wishes, 2));
        assert!(wishes.wants(&to(BROADCAST)) && wishes.wants(&to([2, 0, 0, 0, 0, 1])));
        // Named twice, taken back twice.
        assert!(wishes.change(Group::Add(group(1))));
        assert!(wishes.change(Group::Remove(group(1))) && wanted(&wishes, 1));
        assert!(wishes.change(Group::Remove(group(1))) && !wanted(&wishes, 1));
        assert!(wishes.change(Group::Remove(group(1))), "what is not there is gone");
        let all = Wishes { multicast: Multicast::Flood, ..wishes };
        assert!(wanted(&all, 2));
    }

    #[test]
    fn the_list_is_bounded_and_takes_groups_only() {
        let mut wishes = Wishes::default();
        assert!(!wishes.change(Group::Add([2, 0, 0, 0, 0, 1])));
        for n in 0..MAX_GROUPS {
            assert!(wishes.change(Group::Add(group(n as u8))));
        }
        assert!(!wishes.change(Group::Add(group(200))));
        assert_eq!(wishes.groups.len(), MAX_GROUPS);
        assert!(wishes.change(Group::Remove(group(3))) && wishes.change(Group::Add(group(200))));
    }

    #[test]
    fn a_change_is_seen_once() {
        let kept = Kept::new(Arc::new(rings::mem::HeapPages::new(1)));
        let live = Live::new(Wishes::default(), kept, Box::default());
        let mut seen = live.look();
        assert!(!live.refresh(&mut seen));
        live.change(|wishes| wishes.headroom = 5);
        assert_eq!(seen.wishes.headroom, 0);
        assert!(live.refresh(&mut seen) && !live.refresh(&mut seen));
        assert_eq!(seen.wishes.headroom, 5);
    }
}
