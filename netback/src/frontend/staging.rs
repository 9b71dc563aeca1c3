//! Has the backend keep a frontend's pages mapped (netif.h, "Static Grants"): all packets go through
//! the same ones.

use std::io;
use std::sync::Arc;

use hypervisor::{Access, DomId, GrantedPages, Guest};
use zerocopy::IntoBytes;

use super::control::Control;
use crate::ctrl::lists::MAX_LIST;
use crate::proto::{
    CTRL_ADD_GREF_MAPPING, CTRL_GET_GREF_MAPPING_SIZE, CTRL_STATUS_SUCCESS, GREF_READONLY,
    GrefEntry,
};

/// Names the pages of each queue, of packets from the guest and to it, to the backend; which of them it
/// keeps mapped. One that keeps none, or refuses some, copies them.
pub(super) fn announce(
    guest: &dyn Guest,
    backend: DomId,
    control: &mut Control,
    queues: &[[Arc<dyn GrantedPages>; 2]],
) -> io::Result<Vec<Vec<GrefEntry>>> {
    let list = guest.grant(backend, 1, Access::ReadWrite)?;
    let numbers = 0..queues.len() as u32;
    numbers.zip(queues).map(|(number, pages)| queue(control, &list, number, pages)).collect()
}

fn queue(
    control: &mut Control,
    list: &Arc<dyn GrantedPages>,
    number: u32,
    pages: &[Arc<dyn GrantedPages>; 2],
) -> io::Result<Vec<GrefEntry>> {
    let answer = control.ask(CTRL_GET_GREF_MAPPING_SIZE, [number, 0, 0])?;
    let most = if answer.status == CTRL_STATUS_SUCCESS { answer.data as usize } else { 0 };
    let mut entries = choose(most, pages.each_ref().map(|pages| pages.refs()));
    let mut kept = 0;
    for some in entries.chunks(MAX_LIST) {
        list.write(0, some.as_bytes());
        let data = [number, list.refs()[0], some.len() as u32];
        if control.ask(CTRL_ADD_GREF_MAPPING, data)?.status != CTRL_STATUS_SUCCESS {
            break;
        }
        kept += some.len();
    }
    entries.truncate(kept);
    Ok(entries)
}

/// Which of the pages of both directions, where no more than `most` are kept: the first ones, which are
/// used first.
fn choose(most: usize, [tx, rx]: [&[u32]; 2]) -> Vec<GrefEntry> {
    let half = most / 2;
    let for_tx = if tx.len() <= half { tx.len() } else { most.saturating_sub(rx.len()).max(half) };
    let entry = |flags| move |gref: &u32| GrefEntry { gref: *gref, flags, status: 0 };
    let tx = tx.iter().take(for_tx).map(entry(GREF_READONLY));
    let most_rx = most - tx.len();
    tx.chain(rx.iter().take(most_rx).map(entry(0))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_directions_get_their_share_of_what_is_kept() {
        let (tx, rx): (Vec<u32>, Vec<u32>) = ((0..100).collect(), (1000..1300).collect());
        for (most, wanted) in [(0, (0, 0)), (1, (0, 1)), (100, (50, 50)), (250, (100, 150))]
            .into_iter()
            .chain([(320, (100, 220)), (400, (100, 300)), (5000, (100, 300))])
        {
            let entries = choose(most, [&tx, &rx]);
            let counts = entries.iter().fold((0, 0), |(tx, rx), entry| {
                assert_eq!(entry.flags == GREF_READONLY, entry.gref < 100);
                if entry.gref < 100 { (tx + 1, rx) } else { (tx, rx + 1) }
            });
            assert_eq!(counts, wanted, "{most}");
        }
        // What one does not need the other has.
        assert_eq!(choose(200, [&rx, &tx[..20]]).len(), 200);
        assert_eq!(choose(2, [&tx, &[]]).len(), 2);
    }
}
