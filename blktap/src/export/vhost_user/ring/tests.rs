//! Both rings against drivers written by the specification: random work, random kills; and
//! random descriptor tables against a model that says which are chains.

use std::fs::File;

use proptest::prelude::*;
use rustix::fs::{MemfdFlags, memfd_create};

use super::*;
use crate::export::vhost_user::memory::{Described, Place, Region};

const GUEST: u64 = 0x10_0000;
const BYTES: u64 = 1 << 18;
const DESC: usize = 0;
const DRIVER: usize = 0x4000;
const DEVICE: usize = 0x8000;
const TABLE: usize = 0xc000;
const DATA: usize = 0x1_0000;
const RECORD: usize = 0x3_0000;

fn memory() -> (Memory, Window) {
    let fd = memfd_create("ring", MemfdFlags::CLOEXEC).unwrap();
    let file = File::from(fd);
    file.set_len(BYTES).unwrap();
    let mut memory = Memory::default();
    let what = Described { guest: GUEST, user: 0, len: BYTES, offset: 0 };
    memory.add(Region::map(what, &file).unwrap()).unwrap();
    let all = memory.window(0, BYTES as usize).unwrap();
    (memory, all)
}

fn layout(all: &Window, size: u16, events: Events, parts: (usize, usize, usize)) -> Layout {
    let record = all.part(RECORD, stride(size) as usize).unwrap();
    Layout {
        size,
        desc: all.part(DESC, parts.0).unwrap(),
        driver: all.part(DRIVER, parts.1).unwrap(),
        device: all.part(DEVICE, parts.2).unwrap(),
        events,
        inflight: Some(Area(record)),
    }
}

fn put16(p: Place<'_>, at: usize, value: u16) {
    p.write(at, &value.to_le_bytes());
}
fn get16(p: Place<'_>, at: usize) -> u16 {
    let mut bytes = [0; 2];
    p.read(at, &mut bytes);
    u16::from_le_bytes(bytes)
}
fn put_desc(p: Place<'_>, at: usize, addr: u64, len: u32, words: [u16; 2]) {
    p.write(at, &addr.to_le_bytes());
    p.write(at + 8, &len.to_le_bytes());
    put16(p, at + 12, words[0]);
    put16(p, at + 14, words[1]);
}

/// The driver's side of a ring. Buffers have numbers of their own, which are their addresses.
trait Driver {
    type Ring: Ring;
    fn new(size: u16) -> Self;
    fn device(all: &Window, size: u16, events: Events, base: u32) -> Result<Self::Ring, Broken>;
    /// SET_VRING_BASE of a ring that was never used.
    const BASE: u32;
    /// Makes a buffer of so many descriptors available, if there is room.
    fn offer(&mut self, p: Place<'_>, number: u32, descs: u16) -> bool;
    /// The next buffer that was used: its number, and bytes.
    fn collect(&mut self, p: Place<'_>) -> Option<(u32, u32)>;
    /// Undoes what of the record a publication does last, as a kill just before would.
    fn cut_short(p: Place<'_>, size: u16, before: &[u8]);
    /// And so that the driver cannot see it, though all before that was done: `ring` and
    /// `before` (the record) are from before the publication.
    fn unsee(p: Place<'_>, ring: &[u8], before: &[u8]);
}

struct SplitDriver {
    size: u16,
    free: Vec<u16>,
    /// By head: number, descriptors.
    held: Vec<Option<(u32, Vec<u16>)>>,
    available: u16,
    used: u16,
}

impl Driver for SplitDriver {
    type Ring = Split;
    const BASE: u32 = 0;
    fn new(size: u16) -> Self {
        let held = vec![None; usize::from(size)];
        SplitDriver { size, free: (0..size).collect(), held, available: 0, used: 0 }
    }
    fn device(all: &Window, size: u16, events: Events, base: u32) -> Result<Split, Broken> {
        Split::new(layout(all, size, events, Split::bytes(size)), base)
    }
    fn offer(&mut self, p: Place<'_>, number: u32, descs: u16) -> bool {
        if self.free.len() < usize::from(descs) {
            return false;
        }
        let list: Vec<u16> = self.free.drain(..usize::from(descs)).collect();
        for (n, at) in list.iter().enumerate() {
            let next = list.get(n + 1).copied();
            let addr = GUEST + DATA as u64 + u64::from(number);
            let flags = if next.is_some() { chain::NEXT } else { chain::WRITE };
            put_desc(p, DESC + 16 * usize::from(*at), addr, 8, [flags, next.unwrap_or(0)]);
        }
        put16(p, DRIVER + 4 + 2 * usize::from(self.available % self.size), list[0]);
        self.available = self.available.wrapping_add(1);
        put16(p, DRIVER + 2, self.available);
        let head = usize::from(list[0]);
        self.held[head] = Some((number, list));
        true
    }
    fn collect(&mut self, p: Place<'_>) -> Option<(u32, u32)> {
        if get16(p, DEVICE + 2) == self.used {
            return None;
        }
        let at = DEVICE + 4 + 8 * usize::from(self.used % self.size);
        let mut bytes = [0; 4];
        p.read(at + 4, &mut bytes);
        let (number, list) = self.held[usize::from(get16(p, at))].take().expect("in flight");
        self.free.extend(list);
        self.used = self.used.wrapping_add(1);
        Some((number, u32::from_le_bytes(bytes)))
    }
    fn cut_short(p: Place<'_>, _: u16, before: &[u8]) {
        // The used index is shown, and nothing of the record has followed.
        p.write(RECORD, before);
    }
    fn unsee(p: Place<'_>, ring: &[u8], _: &[u8]) {
        p.write(DEVICE + 2, &ring[DEVICE + 2..DEVICE + 4]);
    }
}

struct PackedDriver {
    size: u16,
    free: Vec<u16>,
    room: u16,
    /// By id: number, descriptors.
    held: Vec<Option<(u32, u16)>>,
    available: (u16, bool),
    used: (u16, bool),
}

impl PackedDriver {
    fn step(&self, place: (u16, bool), by: u16) -> (u16, bool) {
        match place.0 + by {
            at if at >= self.size => (at - self.size, !place.1),
            at => (at, place.1),
        }
    }
}

impl Driver for PackedDriver {
    type Ring = Packed;
    const BASE: u32 = 0x8000_8000;
    fn new(size: u16) -> Self {
        let (free, held) = ((0..size).rev().collect(), vec![None; usize::from(size)]);
        PackedDriver { size, free, room: size, held, available: (0, true), used: (0, true) }
    }
    fn device(all: &Window, size: u16, events: Events, base: u32) -> Result<Packed, Broken> {
        Packed::new(layout(all, size, events, Packed::bytes(size)), base)
    }
    fn offer(&mut self, p: Place<'_>, number: u32, descs: u16) -> bool {
        if self.room < descs {
            return false;
        }
        let Some(id) = self.free.pop() else { return false };
        let mut at = self.available;
        let mut first = None;
        for n in 0..descs {
            let more = if n + 1 < descs { chain::NEXT } else { chain::WRITE };
            let flags = more | if at.1 { 1 << 7 } else { 1 << 15 };
            let addr = GUEST + DATA as u64 + u64::from(number);
            let to = DESC + 16 * usize::from(at.0);
            // The id of all but the last does not matter; the first's flags go last.
            let shown = if n == 0 { get16(p, to + 14) } else { flags };
            put_desc(p, to, addr, 8, [if n + 1 < descs { 0x7777 } else { id }, shown]);
            first.get_or_insert((to + 14, flags));
            at = self.step(at, 1);
        }
        let (to, flags) = first.expect("a descriptor");
        put16(p, to, flags);
        (self.available, self.room) = (at, self.room - descs);
        self.held[usize::from(id)] = Some((number, descs));
        true
    }
    fn collect(&mut self, p: Place<'_>) -> Option<(u32, u32)> {
        let at = DESC + 16 * usize::from(self.used.0);
        let flags = get16(p, at + 14);
        let wrap = self.used.1;
        if (flags & 1 << 7 != 0) != wrap || (flags & 1 << 15 != 0) != wrap {
            return None;
        }
        let mut bytes = [0; 4];
        p.read(at + 8, &mut bytes);
        let id = get16(p, at + 12);
        let (number, descs) = self.held[usize::from(id)].take().expect("in flight");
        self.free.push(id);
        self.room += descs;
        self.used = self.step(self.used, descs);
        Some((number, u32::from_le_bytes(bytes)))
    }
    fn cut_short(p: Place<'_>, size: u16, before: &[u8]) {
        // The flags are shown; old_free_head, old_used_idx, old_used_wrap_counter and the
        // buffers' inflight have not followed.
        let old = |at: usize, len: usize| p.write(RECORD + at, &before[at..at + len]);
        old(14, 2);
        old(18, 2);
        old(21, 1);
        (0..usize::from(size)).for_each(|n| old(32 + 32 * n, 1));
    }
    fn unsee(p: Place<'_>, ring: &[u8], before: &[u8]) {
        let first = usize::from(u16::from_ne_bytes([before[18], before[19]]));
        let flags = DESC + 16 * first + 14;
        p.write(flags, &ring[flags..flags + 2]);
    }
}

/// What happens to a ring.
#[derive(Clone, Copy, Debug)]
enum Step {
    Offer(u16),
    Take,
    Put(usize),
    Publish,
    Collect,
    /// The device is killed, and its successor attaches.
    Kill,
    /// So, within a publication, and whether the driver sees that.
    KillPublishing(bool),
    /// The ring is stopped and started: what was taken is answered first.
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (1u16..4).prop_map(Step::Offer),
        4 => Just(Step::Take),
        4 => (0usize..8).prop_map(Step::Put),
        3 => Just(Step::Publish),
        2 => Just(Step::Collect),
        1 => Just(Step::Kill),
        1 => proptest::bool::ANY.prop_map(Step::KillPublishing),
        1 => Just(Step::Restart),
    ]
}

/// A driver, its device, and what both believe.
struct World<D: Driver> {
    memory: Memory,
    all: Window,
    size: u16,
    driver: D,
    ring: D::Ring,
    chain: Chain,
    /// Taken by this device: id and number.
    taken: Vec<(u16, u32)>,
    next: u32,
    used: Vec<u32>,
}

impl<D: Driver> World<D> {
    fn new(size: u16, events: Events) -> Self {
        let (memory, all) = memory();
        let ring = D::device(&all, size, events, D::BASE).unwrap();
        World {
            memory,
            all,
            size,
            driver: D::new(size),
            ring,
            chain: Chain::new(),
            taken: Vec::new(),
            next: 0,
            used: Vec::new(),
        }
    }

    fn take(&mut self) -> bool {
        let id = self.ring.take(&self.memory, &mut self.chain).expect("an honest driver");
        let Some(id) = id else { return false };
        let desc = self.chain.writable()[0];
        let number = (desc.addr - GUEST - DATA as u64) as u32;
        assert!(self.taken.iter().all(|(i, n)| *i != id && *n != number), "{number} twice");
        self.taken.push((id, number));
        true
    }

    fn put(&mut self, which: usize) {
        if !self.taken.is_empty() {
            let (id, number) = self.taken.remove(which % self.taken.len());
            self.ring.put(id, number + 1);
        }
    }

    fn collect(&mut self) {
        while let Some((number, bytes)) = self.driver.collect(self.all.place()) {
            assert_eq!(bytes, number + 1);
            self.used.push(number);
        }
    }

    fn attach(&mut self, events: Events, base: u32) {
        self.taken.clear();
        self.ring = D::device(&self.all, self.size, events, base).expect("its own record");
    }

    fn settle(&mut self) {
        while self.take() {}
        while !self.taken.is_empty() {
            self.put(0);
        }
        let _ = self.ring.publish();
        self.collect();
    }

    fn carry_out(&mut self, step: Step, events: Events) {
        match step {
            Step::Offer(descs) => {
                let place = self.all.place();
                self.next += u32::from(self.driver.offer(place, self.next, descs));
            }
            Step::Take => {
                self.take();
            }
            Step::Put(which) => self.put(which),
            Step::Publish => drop(self.ring.publish()),
            Step::Collect => self.collect(),
            Step::Kill => self.attach(events, 0x1234_0000),
            Step::KillPublishing(seen) => {
                let place = self.all.place();
                let mut record = vec![0; stride(self.size) as usize];
                let mut ring = vec![0; TABLE];
                place.read(RECORD, &mut record);
                place.read(0, &mut ring);
                let _ = self.ring.publish();
                D::cut_short(place, self.size, &record);
                if !seen {
                    D::unsee(place, &ring, &record);
                }
                self.attach(events, 0x1234_0000);
            }
            Step::Restart => {
                while !self.taken.is_empty() {
                    self.put(0);
                }
                let _ = self.ring.publish();
                self.ring.settle();
                let base = self.ring.base();
                self.attach(events, base);
            }
        }
    }
}

/// Whatever happens, each buffer is used exactly once.
fn every_buffer_once<D: Driver>(size: u16, events: Events, steps: &[Step]) {
    let mut world = World::<D>::new(size, events);
    for step in steps {
        world.carry_out(*step, events);
    }
    world.settle();
    world.used.sort_unstable();
    assert_eq!(world.used, (0..world.next).collect::<Vec<_>>());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]
    #[test]
    fn split_uses_every_buffer_once(steps in prop::collection::vec(step(), 0..300)) {
        every_buffer_once::<SplitDriver>(8, Events::Index, &steps);
    }

    #[test]
    fn packed_uses_every_buffer_once(
        steps in prop::collection::vec(step(), 0..300),
        size in 3u16..9,
    ) {
        every_buffer_once::<PackedDriver>(size, Events::Flags, &steps);
    }
}

#[test]
fn a_predecessors_buffers_come_in_their_order() {
    fn check<D: Driver>() {
        let mut world = World::<D>::new(8, Events::Index);
        for n in 0..4 {
            assert!(world.driver.offer(world.all.place(), n, 1 + n as u16 % 2));
        }
        (0..3).for_each(|_| assert!(world.take()));
        world.put(1);
        let _ = world.ring.publish();
        world.attach(Events::Index, 0);
        while world.take() {}
        let numbers: Vec<u32> = world.taken.iter().map(|(_, number)| *number).collect();
        assert_eq!(numbers, [0, 2, 3]);
    }
    check::<SplitDriver>();
    check::<PackedDriver>();
}

#[test]
fn a_driver_is_told_when_it_asked() {
    let mut world = World::<SplitDriver>::new(8, Events::Index);
    let place = world.all.clone();
    let serve = |world: &mut World<SplitDriver>| {
        let number = world.next;
        world.next += 1;
        assert!(world.driver.offer(world.all.place(), number, 1) && world.take());
        world.put(0);
        let told = world.ring.publish();
        world.collect();
        told
    };
    // used_event is 0: the first; then it asks for the fourth.
    assert_eq!(serve(&mut world), Notify::Send);
    put16(place.place(), DRIVER + 4 + 16, 3);
    assert_eq!(serve(&mut world), Notify::Skip);
    assert_eq!(serve(&mut world), Notify::Skip);
    assert_eq!(serve(&mut world), Notify::Send);
    // And the device asks for the next one.
    assert_eq!(world.ring.arm(), Pending::Nothing);
    assert_eq!(get16(place.place(), DEVICE + 4 + 64), 4);
    assert!(world.driver.offer(place.place(), 99, 1));
    assert_eq!(world.ring.arm(), Pending::Work);
}

#[test]
fn a_packed_driver_is_told_at_its_descriptor_and_around_the_end() {
    let mut world = World::<PackedDriver>::new(4, Events::Index);
    let place = world.all.clone();
    let serve = |world: &mut World<PackedDriver>| {
        let number = world.next;
        world.next += 1;
        assert!(world.driver.offer(world.all.place(), number, 1) && world.take());
        world.put(0);
        let told = world.ring.publish();
        world.collect();
        told
    };
    put16(place.place(), DRIVER + 2, 1);
    assert_eq!(serve(&mut world), Notify::Skip, "it wants none");
    put16(place.place(), DRIVER + 2, 0);
    assert_eq!(serve(&mut world), Notify::Send, "it wants all");
    // Descriptor 0 of the next round, whose wrap counter is 0.
    put16(place.place(), DRIVER + 2, 2);
    put16(place.place(), DRIVER, 0);
    assert_eq!(serve(&mut world), Notify::Skip);
    assert_eq!(serve(&mut world), Notify::Skip);
    assert_eq!(serve(&mut world), Notify::Send);
    world.ring.disarm();
    assert_eq!(get16(place.place(), DEVICE + 2), 1);
    assert_eq!(world.ring.arm(), Pending::Nothing);
    assert_eq!(get16(place.place(), DEVICE + 2), 0);
}

/// A descriptor as a model has it.
#[derive(Clone, Copy, Debug)]
struct Any {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

fn any() -> impl Strategy<Value = Any> {
    let addr = prop_oneof![
        6 => Just(GUEST + DATA as u64),
        3 => Just(GUEST + TABLE as u64),
        1 => Just(GUEST + BYTES - 16),
        1 => proptest::num::u64::ANY,
    ];
    let len = prop_oneof![4 => 1u32..4096, 4 => (0u32..6).prop_map(|n| n * 16), 1 => Just(0), 1 => Just(u32::MAX)];
    let flags = prop_oneof![4 => Just(1u16), 3 => Just(3), 3 => Just(2), 2 => Just(4), 1 => Just(0), 1 => 0u16..8];
    (addr, len, flags, 0u16..10).prop_map(|(addr, len, flags, next)| Any { addr, len, flags, next })
}

/// The pieces of a chain as 2.7.5 has it, or nothing.
fn model(table: &[Any], indirect: &[Any]) -> Option<Vec<(u64, u32, bool)>> {
    fn walk(table: &[Any], out: &mut Vec<(u64, u32, bool)>) -> Option<Option<Any>> {
        let mut at = 0usize;
        let mut seen = std::collections::HashSet::new();
        loop {
            if !seen.insert(at) {
                return None;
            }
            let d = *table.get(at)?;
            if d.flags & 4 != 0 {
                return Some(Some(d));
            }
            if d.len == 0 {
                return None;
            }
            out.push((d.addr, d.len, d.flags & 2 != 0));
            if d.flags & 1 == 0 {
                return Some(None);
            }
            at = usize::from(d.next);
        }
    }
    let mut out = Vec::new();
    if let Some(d) = walk(table, &mut out)? {
        // The indirect descriptor is the last, and its table whole and in the memory.
        let inside = d
            .addr
            .checked_sub(GUEST)
            .is_some_and(|from| from.checked_add(u64::from(d.len)).is_some_and(|end| end <= BYTES));
        if d.flags & 1 != 0 || d.len == 0 || d.len % 16 != 0 || !inside {
            return None;
        }
        if d.addr != GUEST + TABLE as u64 {
            // What lies elsewhere is zeroes: empty descriptors.
            return None;
        }
        let count = (d.len / 16) as usize;
        let zero = Any { addr: 0, len: 0, flags: 0, next: 0 };
        let table: Vec<Any> =
            indirect.iter().copied().chain(std::iter::repeat(zero)).take(count).collect();
        if walk(&table, &mut out)?.is_some() {
            return None;
        }
    }
    let sorted = out.windows(2).all(|w| w[0].2 <= w[1].2);
    sorted.then_some(out)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn chains_are_what_the_specification_says(
        direct in prop::collection::vec(any(), 8),
        indirect in prop::collection::vec(any(), 5),
    ) {
        let (memory, all) = memory();
        let place = all.place();
        for (table, descs) in [(DESC, &direct), (TABLE, &indirect)] {
            for (n, d) in descs.iter().enumerate() {
                put_desc(place, table + 16 * n, d.addr, d.len, [d.flags, d.next]);
            }
        }
        put16(place, DRIVER + 2, 1);
        let mut ring = SplitDriver::device(&all, 8, Events::Flags, 0).unwrap();
        let mut chain = Chain::new();
        let taken = ring.take(&memory, &mut chain);
        let piece = |writable| move |d: &Desc| (d.addr, d.len, writable);
        let got: Vec<_> = chain.readable().iter().map(piece(false))
            .chain(chain.writable().iter().map(piece(true))).collect();
        match model(&direct, &indirect) {
            Some(wanted) => {
                prop_assert_eq!(taken, Ok(Some(0)));
                prop_assert_eq!(got, wanted);
            }
            None => prop_assert!(taken.is_err(), "{:?}", got),
        }
    }
}
