//! Both sides of a ring, the kernel's written by hand; over memory of this process.

use proptest::prelude::*;

use super::*;

const PLACES: Places = Places { producer: 0, consumer: 64, flags: 128, entries: 192 };
const SIZE: u32 = 8;

fn memory() -> Memory {
    Memory::zeroed(4096).unwrap()
}

fn mapped(places: Places, size: u32) -> Mapped {
    Mapped { memory: memory(), places, size }
}

fn word(ring: &Ring<u64>, at: usize) -> &AtomicU32 {
    ring.memory.word(at).unwrap()
}

/// A ring whose indices begin at `start` on both sides.
fn producer(start: u32) -> Producer<u64> {
    let mut ring = Producer::new("fill", mapped(PLACES, SIZE)).unwrap();
    (ring.0.own, ring.0.other) = (start, start);
    word(&ring.0, PLACES.producer).store(start, Ordering::Relaxed);
    word(&ring.0, PLACES.consumer).store(start, Ordering::Relaxed);
    ring
}

fn consumer(start: u32) -> Consumer<u64> {
    let mut ring = Consumer::new("completion", mapped(PLACES, SIZE)).unwrap();
    (ring.0.own, ring.0.other) = (start, start);
    word(&ring.0, PLACES.producer).store(start, Ordering::Relaxed);
    word(&ring.0, PLACES.consumer).store(start, Ordering::Relaxed);
    ring
}

proptest! {
    /// The kernel takes what was published, in order, over the indices' end too.
    #[test]
    fn what_is_pushed_is_seen_once_published(
        start in prop_oneof![Just(0), Just(u32::MAX - 3), any::<u32>()],
        steps in prop::collection::vec((0u32..12, 0u32..12), 1..40),
    ) {
        let mut ring = producer(start);
        let (mut kernel, mut next, mut expected) = (start, 0u64, 0u64);
        for (pushes, takes) in steps {
            for _ in 0..pushes {
                let room = ring.pending().unwrap() < SIZE;
                prop_assert_eq!(ring.push(&next).unwrap(), room);
                next += u64::from(room);
            }
            let _ = ring.publish().unwrap();
            let shown = word(&ring.0, PLACES.producer).load(Ordering::Relaxed);
            for _ in 0..takes.min(shown.wrapping_sub(kernel)) {
                let got: u64 = ring.0.memory.get(ring.0.at(kernel)).unwrap();
                prop_assert_eq!(got, expected);
                expected += 1;
                kernel = kernel.wrapping_add(1);
            }
            word(&ring.0, PLACES.consumer).store(kernel, Ordering::Relaxed);
            prop_assert_eq!(u64::from(ring.pending().unwrap()), next - expected);
        }
    }

    #[test]
    fn what_the_kernel_publishes_is_taken_in_order(
        start in prop_oneof![Just(0), Just(u32::MAX - 3), any::<u32>()],
        steps in prop::collection::vec((0u32..12, 0u32..12), 1..40),
    ) {
        let mut ring = consumer(start);
        let (mut kernel, mut next, mut expected) = (start, 0u64, 0u64);
        for (puts, takes) in steps {
            let free = word(&ring.0, PLACES.consumer).load(Ordering::Relaxed);
            let room = SIZE - kernel.wrapping_sub(free);
            for _ in 0..puts.min(room) {
                prop_assert!(ring.0.memory.put(ring.0.at(kernel), &next));
                next += 1;
                kernel = kernel.wrapping_add(1);
            }
            word(&ring.0, PLACES.producer).store(kernel, Ordering::Relaxed);
            for _ in 0..takes {
                let there = expected < next;
                prop_assert_eq!(ring.pop().unwrap(), there.then_some(expected));
                expected += u64::from(there);
            }
            ring.release().unwrap();
        }
    }

    /// Whatever the other side's index is: an error or entries of the ring, and no more than it has.
    #[test]
    fn an_index_that_cannot_be_is_an_error(start in any::<u32>(), index in any::<u32>()) {
        let mut ring = consumer(start);
        word(&ring.0, PLACES.producer).store(index, Ordering::Relaxed);
        let ahead = index.wrapping_sub(start);
        if ahead > SIZE {
            let error = ring.pop().unwrap_err().to_string();
            prop_assert!(error.contains("completion") && error.contains(&index.to_string()));
        } else {
            for _ in 0..ahead {
                prop_assert_eq!(ring.pop().unwrap(), Some(0));
            }
            prop_assert_eq!(ring.pop().unwrap(), None);
        }
        let ring = producer(start);
        word(&ring.0, PLACES.consumer).store(index, Ordering::Relaxed);
        let behind = start.wrapping_sub(index);
        prop_assert_eq!(ring.pending().ok(), (behind <= SIZE).then_some(behind));
    }
}

#[test]
fn the_kernel_is_told_when_it_asks() {
    let mut ring = producer(0);
    assert!(!ring.publish().unwrap());
    word(&ring.0, PLACES.flags).store(1, Ordering::Relaxed);
    assert!(ring.publish().unwrap());
}

#[test]
fn a_ring_lies_in_its_mapping() {
    let places = Places { entries: 4096 - 63, ..PLACES };
    assert!(Producer::<u64>::new("fill", mapped(places, SIZE)).is_err());
    let places = Places { entries: 4096 - 64, ..PLACES };
    assert!(Producer::<u64>::new("fill", mapped(places, SIZE)).is_ok());
    let places = Places { flags: 4096, ..PLACES };
    assert!(Producer::<u64>::new("fill", mapped(places, SIZE)).is_err());
    assert!(Producer::<u64>::new("fill", mapped(PLACES, 6)).is_err());
}

#[test]
fn memory_is_what_lies_in_it() {
    let memory = memory();
    assert!(memory.write(4090, b"abcdef") && !memory.write(4091, b"abcdef"));
    let mut back = [0; 6];
    assert!(memory.read(4090, &mut back) && !memory.read(usize::MAX, &mut back));
    assert_eq!(&back, b"abcdef");
    assert!(memory.word(2).is_none(), "no word is there");
    assert_eq!(memory.get::<u64>(4092), None);
}
