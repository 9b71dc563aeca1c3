use std::sync::Arc;

use rings::mem::HeapPages;

use super::*;

const STRIDE: usize = 64;
const ADDRESS: u64 = 0x7000_0000;

/// A device by hand, which says what a test wants.
struct Device {
    memory: Arc<HeapPages>,
    seen: u16,
    used: u16,
}

impl Device {
    fn word(&self, at: usize) -> u32 {
        u32::from_le(self.memory.word(at).load(Ordering::Acquire))
    }
    fn set_word(&self, at: usize, word: u32) {
        self.memory.word(at).store(word.to_le(), Ordering::Release);
    }
    fn available(&self) -> u16 {
        (self.word(AVAIL) >> 16) as u16
    }
    /// What it is lent: the numbers with their addresses, lengths and flags.
    fn lent(&mut self) -> Vec<(u16, u64, u32, u16)> {
        let mut lent = Vec::new();
        while self.seen != self.available() {
            let mut entry = [0; 2];
            let at = AVAIL + ENTRIES + AVAIL_BYTES * usize::from(self.seen % SIZE);
            self.memory.read(at, &mut entry);
            let number = u16::from_le_bytes(entry);
            let mut desc = [0; DESC_BYTES];
            self.memory.read(DESC + DESC_BYTES * usize::from(number), &mut desc);
            let [address, rest] =
                [0, 8].map(|at| u64::from_le_bytes([0, 1, 2, 3, 4, 5, 6, 7].map(|n| desc[at + n])));
            lent.push((number, address, rest as u32, (rest >> 32) as u16));
            self.seen = self.seen.wrapping_add(1);
        }
        lent
    }
    /// Writes an entry and shows it.
    fn give(&mut self, id: u32, len: u32) {
        let at = USED + ENTRIES + USED_BYTES * usize::from(self.used % SIZE);
        self.memory.write(at, &id.to_le_bytes());
        self.memory.write(at + 4, &len.to_le_bytes());
        self.used = self.used.wrapping_add(1);
        self.show(self.used, 0);
    }
    fn show(&self, index: u16, flags: u16) {
        self.set_word(USED, u32::from(index) << 16 | u32::from(flags));
    }
}

fn ring(events: Events, writer: Writer) -> (Ring<Arc<HeapPages>>, Device) {
    let bytes = BYTES + STRIDE * usize::from(SIZE);
    let memory = Arc::new(HeapPages::new(bytes.div_ceil(rings::PAGE_SIZE)));
    let place = Place { ring: 0, buffers: BYTES, stride: STRIDE, address: ADDRESS };
    let ring = Ring::new(memory.clone(), place, events, writer);
    (ring, Device { memory, seen: 0, used: 0 })
}

#[test]
fn a_device_finds_what_it_is_lent() {
    for (writer, flags) in [(Writer::Driver, 0), (Writer::Device, 2)] {
        let (mut ring, mut device) = ring(Events::Index, writer);
        ring.write(7, b"seven");
        ring.lend(7, 5);
        ring.lend(0, 64);
        assert_eq!(device.lent(), [], "nothing is seen that was not published");
        assert_eq!(ring.publish(), Notify::Send, "it has asked for the first");
        let at = |number: u64| ADDRESS + BYTES as u64 + number * STRIDE as u64;
        assert_eq!(device.lent(), [(7, at(7), 5, flags), (0, at(0), 64, flags)]);
        assert_eq!(ring.publish(), Notify::Skip, "nothing is new");
        let mut bytes = [0; 5];
        device.memory.read(BYTES + 7 * STRIDE, &mut bytes);
        assert_eq!(&bytes, b"seven");
        assert_eq!(ring.outside(), 2);
    }
}

#[test]
fn buffers_come_back_in_any_order() {
    let (mut ring, mut device) = ring(Events::Index, Writer::Device);
    (0..4).for_each(|number| ring.lend(number, 64));
    assert_eq!(ring.publish(), Notify::Send);
    assert_eq!(ring.take(), Ok(None));
    for (id, len) in [(2, 0), (0, 64), (3, 1)] {
        device.give(id, len);
    }
    for (number, len) in [(2, 0), (0, 64), (3, 1)] {
        assert_eq!(ring.take(), Ok(Some(Used { number, len })));
    }
    assert_eq!((ring.take(), ring.outside()), (Ok(None), 1));
    // And are lent again.
    ring.lend(0, 10);
    let _ = ring.publish();
    assert_eq!(device.lent().last().map(|lent| (lent.0, lent.2)), Some((0, 10)));
    device.give(0, 10);
    assert_eq!(ring.take(), Ok(Some(Used { number: 0, len: 10 })));
}

#[test]
fn indexes_go_round() {
    let (mut ring, mut device) = ring(Events::Index, Writer::Device);
    (0..SIZE).for_each(|number| ring.lend(number, 64));
    let _ = ring.publish();
    // More than twice over 65536, in batches that divide nothing.
    for round in 0..3000u32 {
        let batch = 1 + round % 77;
        let lent = device.lent();
        assert!(!lent.is_empty());
        let numbers: Vec<u16> = lent.iter().map(|lent| lent.0).collect();
        let back = numbers.len().min(batch as usize);
        device.seen = device.seen.wrapping_sub((numbers.len() - back) as u16);
        for number in &numbers[..back] {
            device.give((*number).into(), round % 65);
        }
        for number in &numbers[..back] {
            let used = Used { number: *number, len: (round % 65) as usize };
            assert_eq!(ring.take(), Ok(Some(used)), "round {round}");
            ring.lend(*number, 64);
        }
        assert_eq!(ring.take(), Ok(None));
        assert_eq!(ring.outside(), SIZE);
        let _ = ring.publish();
    }
}

#[test]
fn an_index_beyond_what_is_lent_is_named() {
    let (mut ring, mut device) = ring(Events::Index, Writer::Device);
    (0..3).for_each(|number| ring.lend(number, 64));
    // What was not shown is not counted.
    device.show(1, 0);
    assert_eq!(ring.take(), Err(Broken::Index(1, 0)));
    let _ = ring.publish();
    for index in [4, 300, 0x8000, 0xffff] {
        device.show(index, 0);
        assert_eq!(ring.take(), Err(Broken::Index(index, 3)));
    }
    device.give(1, 1);
    assert_eq!(ring.take(), Ok(Some(Used { number: 1, len: 1 })));
    // It goes backwards.
    device.show(0, 0);
    assert_eq!(ring.take(), Err(Broken::Index(0xffff, 2)));
}

#[test]
fn a_buffer_that_is_none_or_not_lent_is_named() {
    for (id, broken) in [
        (u32::from(SIZE), Broken::Number(256)),
        (0xffff, Broken::Number(0xffff)),
        // Not its lower half.
        (0x1_0000, Broken::Number(0x1_0000)),
        (u32::MAX, Broken::Number(u32::MAX)),
        (9, Broken::NotLent(9)),
    ] {
        let (mut ring, mut device) = ring(Events::Index, Writer::Device);
        (0..3).for_each(|number| ring.lend(number, 64));
        let _ = ring.publish();
        device.give(id, 1);
        assert_eq!(ring.take(), Err(broken));
    }
    // The same one twice.
    let (mut ring, mut device) = ring(Events::Flags, Writer::Driver);
    (0..3).for_each(|number| ring.lend(number, 64));
    let _ = ring.publish();
    device.give(1, 0);
    device.give(1, 0);
    assert_eq!(ring.take(), Ok(Some(Used { number: 1, len: 0 })));
    assert_eq!(ring.take(), Err(Broken::NotLent(1)));
}

#[test]
fn a_length_beyond_the_buffer_is_named() {
    for len in [65, 0x1_0000, u32::MAX] {
        let (mut ring, mut device) = ring(Events::Index, Writer::Device);
        ring.lend(5, 64);
        let _ = ring.publish();
        device.give(5, len);
        assert_eq!(ring.take(), Err(Broken::Length(5, len, 64)));
    }
}

#[test]
fn what_a_device_makes_of_the_drivers_part_is_not_read() {
    let (mut ring, mut device) = ring(Events::Index, Writer::Device);
    (0..3).for_each(|number| ring.lend(number, 64));
    let _ = ring.publish();
    // Descriptors, entries and index of what is available.
    device.memory.write(DESC, &[0xff; DESC_BYTES * SIZE as usize]);
    device.memory.write(AVAIL, &[0xff; ENTRIES + AVAIL_BYTES * SIZE as usize + 2]);
    device.give(2, 64);
    assert_eq!(ring.take(), Ok(Some(Used { number: 2, len: 64 })));
    ring.lend(2, 64);
    let _ = ring.publish();
    assert_eq!(device.available(), 4);
}

#[test]
fn a_kick_where_the_device_asks_by_index() {
    let (mut ring, mut device) = ring(Events::Index, Writer::Driver);
    // It has asked for the buffer with index 2, the third.
    device.set_word(AVAIL_EVENT, 2);
    let mut kicked = Vec::new();
    for number in 0..5 {
        ring.lend(number, 1);
        kicked.push(ring.publish());
    }
    let (send, skip) = (Notify::Send, Notify::Skip);
    assert_eq!(kicked, [skip, skip, send, skip, skip]);
    // One of a batch.
    device.set_word(AVAIL_EVENT, 8);
    (5..9).for_each(|number| ring.lend(number, 1));
    assert_eq!(ring.publish(), send);
    // Flags are not looked at.
    device.show(0, 1);
    device.set_word(AVAIL_EVENT, 9);
    ring.lend(9, 1);
    assert_eq!(ring.publish(), send);
    assert_eq!(device.lent().len(), 10);
}

#[test]
fn a_kick_over_the_end_of_indexes() {
    for (event, new, old, kick) in [
        (0xffff, 0, 0xffff, true),
        (0xfffe, 0, 0xffff, false),
        (0, 1, 0xfff0, true),
        (1, 1, 0xfff0, false),
        (0xfff0, 0xfff0, 0xfff0, false),
        (0x7fff, 0x8000, 0x7fff, true),
    ] {
        assert_eq!(passed(event, new, old), kick, "{event:#x} from {old:#x} to {new:#x}");
    }
}

#[test]
fn a_kick_where_the_device_asks_by_flag() {
    let (mut ring, device) = ring(Events::Flags, Writer::Driver);
    ring.lend(0, 1);
    assert_eq!(ring.publish(), Notify::Send);
    device.show(0, 1);
    ring.lend(1, 1);
    assert_eq!(ring.publish(), Notify::Skip);
}

#[test]
fn it_is_told_of_the_next_buffer_when_it_asks() {
    let (mut by_index, mut device) = ring(Events::Index, Writer::Device);
    (0..8).for_each(|number| by_index.lend(number, 64));
    let _ = by_index.publish();
    assert_eq!(by_index.arm(), Pending::Nothing);
    assert_eq!(device.word(USED_EVENT), 0);
    device.give(0, 1);
    device.give(1, 1);
    assert_eq!(by_index.arm(), Pending::Work, "one has come meanwhile");
    assert!(matches!(by_index.take(), Ok(Some(_))));
    assert_eq!(by_index.arm(), Pending::Work, "and another one");
    assert!(matches!(by_index.take(), Ok(Some(_))));
    assert_eq!(by_index.arm(), Pending::Nothing);
    assert_eq!(device.word(USED_EVENT), 2, "the third");

    let (mut by_flag, device) = ring(Events::Flags, Writer::Device);
    assert_eq!(device.word(AVAIL) & 1, 1, "not before it asks");
    by_flag.lend(0, 64);
    let _ = by_flag.publish();
    assert_eq!(device.word(AVAIL), 1 << 16 | 1);
    assert_eq!(by_flag.arm(), Pending::Nothing);
    assert_eq!(device.word(AVAIL), 1 << 16);
    by_flag.lend(1, 64);
    let _ = by_flag.publish();
    assert_eq!(device.word(AVAIL), 2 << 16, "it still asks");
    by_flag.disarm();
    assert_eq!(device.word(AVAIL), 2 << 16 | 1);
}
