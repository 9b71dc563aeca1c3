use super::*;
use crate::frame::Checksum;
use crate::proto::Extra;

/// A hash of this value.
fn hash(value: u8) -> Option<Hash> {
    Hash::of_extra(&Extra::Hash { kind: 1, algorithm: 1, value: value.into() })
}

fn frames(pool: &mut Pool, numbers: std::ops::Range<u8>, len: usize) -> VecDeque<Frame> {
    let frame = |number: u8| {
        let mut frame = pool.take().expect("a frame");
        frame.set_len(len);
        frame.fill(number);
        frame.offload.checksum = Checksum::Blank { start: number.into(), offset: 6 };
        frame.hash = hash(number);
        frame
    };
    numbers.map(frame).collect()
}

/// What may go now, by its numbers.
fn gone(held: &mut Held, pool: &mut Pool) -> Vec<u8> {
    let mut frames = VecDeque::new();
    held.take(&mut frames, 0, pool);
    let check = |frame: &Frame| {
        let start = u16::from(frame[0]);
        assert_eq!(frame.offload.checksum, Checksum::Blank { start, offset: 6 });
        assert!(frame.hash == hash(frame[0]) && frame.hash.is_some());
        assert!(frame.iter().all(|byte| *byte == frame[0]));
        frame[0]
    };
    let numbers = frames.iter().map(check).collect();
    frames.drain(..).for_each(|frame| pool.give(frame));
    numbers
}

#[test]
fn what_was_held_goes_oldest_first_and_what_comes_later_is_the_next_ones() {
    let mut pool = Pool::private(64);
    let hold = Hold::new(Then::Pass);
    let mut held = hold.lock();
    assert!(held.is_open());
    held.begin();
    held.keep(&mut frames(&mut pool, 1..4, 60), &mut pool);
    assert!(gone(&mut held, &mut pool).is_empty());
    assert_eq!(held.release(Then::Hold), Amount { packets: 3, bytes: 180 });
    // Of the next checkpoint.
    held.keep(&mut frames(&mut pool, 4..6, 60), &mut pool);
    assert_eq!(held.amount(), Amount { packets: 2, bytes: 120 });
    assert_eq!(gone(&mut held, &mut pool), [1, 2, 3]);
    assert!(!held.is_open());
    // Dropped are those alone that nobody has released.
    held.release(Then::Hold);
    held.keep(&mut frames(&mut pool, 6..9, 60), &mut pool);
    assert_eq!(held.discard(Then::Pass), Amount { packets: 3, bytes: 180 });
    assert_eq!((held.take_dropped(), held.take_dropped()), (3, 0));
    // Nothing overtakes what is still on its way.
    assert!(!held.is_open());
    held.keep(&mut frames(&mut pool, 9..10, 60), &mut pool);
    assert_eq!(gone(&mut held, &mut pool), [4, 5, 9]);
    assert!(held.is_open());
    assert_eq!((held.amount(), held.bytes, pool.free()), (Amount::default(), 0, 64));
}

#[test]
fn what_is_held_is_bounded_and_the_rest_stays() {
    let mut pool = Pool::private(300);
    let hold = Hold::new(Then::Hold);
    let mut held = hold.lock();
    let mut long = frames(&mut pool, 0..150, 65_535);
    long.append(&mut frames(&mut pool, 0..150, 65_535));
    let kept = held.keep(&mut long, &mut pool);
    assert_eq!((kept, long.len()), (BYTES / 65_535, 300 - BYTES / 65_535));
    let next = long.front().map(|frame| usize::from(frame[0]));
    assert_eq!(next, Some(kept - 150), "the order has changed");
    held.discard(Then::Hold);
    long.drain(..).for_each(|frame| pool.give(frame));
    for _ in 0..PACKETS / 128 {
        assert_eq!(held.keep(&mut frames(&mut pool, 0..128, 60), &mut pool), 128);
    }
    let mut one = frames(&mut pool, 0..1, 60);
    assert_eq!((held.keep(&mut one, &mut pool), one.len()), (0, 1));
    // With few frames left in the pool only some go.
    held.release(Then::Pass);
    let mut some = VecDeque::new();
    held.take(&mut some, pool.free() - 10, &mut pool);
    assert_eq!((some.len(), held.waiting.len()), (10, PACKETS - 10));
}
