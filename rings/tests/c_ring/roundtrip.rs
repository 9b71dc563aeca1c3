//! The round trip of `c_roundtrips` in `ring.c`, with this crate's ends.

use std::sync::Arc;

use rings::mem::HeapPages;
use rings::{BackRing, Corrupt, FrontRing, InFlight, Notify, Pending, Slot};

use super::c_ring::Toy;

/// What a backend keeps of a request of its own: here, the words that the answer needs. They do
/// not lie side by side: that would be loaded as one word of 16 bytes, and such a load waits until
/// both stores have left the processor.
#[derive(Default)]
#[repr(C)]
struct Held {
    first: u64,
    slot: Option<Slot>,
    last: u64,
}

/// `rounds` round trips of `batch` requests over `page`, both ends in this thread; the sum of
/// what came back and the number of notifications.
pub(crate) fn rust_roundtrips<T: InFlight<[u64; 14]>>(
    page: &Arc<HeapPages>,
    table: T,
    rounds: u64,
    batch: u32,
) -> Result<u64, Corrupt> {
    let mut front = FrontRing::<Toy, _>::init(page.clone(), Default::default()).expect("a ring");
    let (mut back, _) =
        BackRing::<Toy, _, T>::attach(page.clone(), table, Default::default()).expect("a ring");
    let mut held: Box<[_]> = (0..back.slots()).map(|_| Held::default()).collect();
    let mut count = 0;
    let (mut sum, mut id, mut events) = (0u64, 0u64, 0u64);
    for _ in 0..rounds {
        for _ in 0..batch {
            if front.push(&std::array::from_fn(|i| id + i as u64)).is_err() {
                break;
            }
            id += 1;
        }
        events += u64::from(front.publish() == Notify::Send);
        loop {
            back.take_all(|taken| {
                let (first, last) = (taken.req[0], taken.req[13]);
                held[count] = Held { first, slot: Some(taken.slot), last };
                count += 1;
            })?;
            let answers = held[..count].iter_mut().rev();
            back.respond_all(answers.filter_map(|h| Some((h.slot.take()?, [h.first, h.last]))));
            count = 0;
            events += u64::from(back.publish() == Notify::Send);
            if back.arm()? == Pending::Nothing {
                break;
            }
        }
        loop {
            front.take_all(|rsp| sum = sum.wrapping_add(rsp[0] ^ rsp[1]))?;
            if front.arm()? == Pending::Nothing {
                break;
            }
        }
    }
    Ok(sum.wrapping_add(events))
}
