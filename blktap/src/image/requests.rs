//! What a queue of an image is busy with: requests, and the groups of a request's writes that
//! become visible together.
use crate::disk::{IoBuf, Op};
use crate::formats::{Guard, Lease, Target};

/// Why a request waits without anything being on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Parked {
    No,
    /// For metadata.
    Load,
    /// For somebody else's clusters.
    Busy,
}

/// What a request has still to do after its data have moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Then {
    Answer,
    /// A change whose metadata is to be in the file, if there is any.
    Commit,
    /// A write that is to be durable.
    Flush,
}

/// Whom a request's end concerns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    /// The queue's user.
    User { token: u64 },
    /// A head or tail that is brought for a write.
    Copy { copy: u32 },
}

/// A request, of the user or of the queue itself.
#[derive(Debug)]
pub(super) struct Slot {
    pub owner: Owner,
    pub op: Op,
    pub then: Then,
    pub offset: u64,
    pub len: u64,
    /// How much of it was resolved and sent.
    pub sent: u64,
    /// What is on its way: transfers, jobs, groups.
    pub pending: u32,
    pub parked: Parked,
    pub errno: i32,
    pub lease: Option<Lease>,
    pub bufs: Vec<IoBuf>,
    /// How often the place was used: late messages to an earlier request are known by it.
    generation: u16,
}

impl Slot {
    fn idle() -> Slot {
        Slot {
            owner: Owner::User { token: 0 },
            op: Op::Read,
            then: Then::Answer,
            offset: 0,
            len: 0,
            sent: 0,
            pending: 0,
            parked: Parked::No,
            errno: 0,
            lease: None,
            bufs: Vec::new(),
            generation: 0,
        }
    }
}

/// Writes under one guard.
#[derive(Debug)]
pub(super) struct Group {
    pub slot: u32,
    pub guard: Option<Guard>,
    pub pending: u32,
    pub errno: i32,
    /// Copies whose memory its writes use.
    pub copies: Vec<u32>,
}

/// The memory of the head and tail that a write brings along, and the write that waits for them.
#[derive(Debug)]
pub(super) struct Copy {
    pub group: u32,
    /// Head, then tail.
    pub memory: Memory,
    pub head: u32,
    pub tail: u32,
    /// Reads that are not done.
    pub reads: u32,
    /// The piece of the change: its place in the request, bytes, where it goes.
    pub at: u64,
    pub len: u64,
    pub target: Target,
}

/// Bytes that direct I/O takes.
#[derive(Debug, Default)]
pub(super) struct Memory(Vec<Page>);

#[repr(C, align(4096))]
#[derive(Clone, Debug)]
struct Page([u8; 4096]);

impl Memory {
    /// `len` zero bytes.
    pub(super) fn zeroes(len: usize) -> Memory {
        Memory(vec![Page([0; 4096]); len.div_ceil(4096)])
    }
    /// Its first byte.
    pub(super) fn addr(&mut self) -> *mut u8 {
        self.0.as_mut_ptr().cast()
    }
}

/// Things in numbered places that are used again.
#[derive(Debug)]
pub(super) struct Slab<T> {
    items: Vec<Option<T>>,
    free: Vec<u32>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Slab { items: Vec::new(), free: Vec::new() }
    }
}

impl<T> Slab<T> {
    pub(super) fn insert(&mut self, item: T) -> u32 {
        match self.free.pop() {
            Some(index) => {
                self.items[index as usize] = Some(item);
                index
            }
            None => {
                self.items.push(Some(item));
                (self.items.len() - 1) as u32
            }
        }
    }
    pub(super) fn get_mut(&mut self, index: u32) -> Option<&mut T> {
        self.items.get_mut(index as usize)?.as_mut()
    }
    pub(super) fn remove(&mut self, index: u32) -> Option<T> {
        let item = self.items.get_mut(index as usize)?.take()?;
        self.free.push(index);
        Some(item)
    }
    /// Takes everything out.
    pub(super) fn drain(&mut self) -> impl Iterator<Item = T> {
        self.free.clear();
        std::mem::take(&mut self.items).into_iter().flatten()
    }
}

/// The requests of a queue. Those of the user are limited; the queue's own are few for each.
#[derive(Debug)]
pub(super) struct Slots {
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// Of the user, in use.
    pub users: u32,
}

impl Slots {
    pub(super) fn new(depth: u32) -> Slots {
        Slots {
            slots: (0..depth).map(|_| Slot::idle()).collect(),
            free: (0..depth).rev().collect(),
            users: 0,
        }
    }

    /// A slot for a request; its list of buffers is empty.
    pub(super) fn take(&mut self, owner: Owner, op: Op, offset: u64, len: u64) -> u32 {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::idle());
            (self.slots.len() - 1) as u32
        });
        self.users += u32::from(matches!(owner, Owner::User { .. }));
        let slot = &mut self.slots[index as usize];
        let then = if op == Op::WriteFua { Then::Flush } else { Then::Answer };
        (slot.owner, slot.op, slot.then, slot.offset, slot.len) = (owner, op, then, offset, len);
        (slot.sent, slot.pending, slot.errno) = (0, 0, 0);
        (slot.parked, slot.lease) = (Parked::No, None);
        slot.generation = (slot.generation + 1) & 0x7fff;
        slot.bufs.clear();
        index
    }

    pub(super) fn get(&self, index: u32) -> &Slot {
        &self.slots[index as usize]
    }
    pub(super) fn get_mut(&mut self, index: u32) -> &mut Slot {
        &mut self.slots[index as usize]
    }

    /// What messages to a request are addressed to: below 2^31.
    pub(super) fn key(&self, index: u32) -> u32 {
        u32::from(self.slots[index as usize].generation) << 16 | index
    }

    /// The place of the request with this key, if that is still the same one and waits.
    pub(super) fn parked(&self, key: u32) -> Option<u32> {
        let index = key & 0xffff;
        let slot = self.slots.get(index as usize)?;
        let same = u32::from(slot.generation) == key >> 16;
        (same && slot.parked != Parked::No).then_some(index)
    }

    /// Whether the user's requests all wait for somebody else's clusters, with nothing on its way.
    pub(super) fn all_wait_for_others(&self) -> bool {
        let waits = |s: &&Slot| s.parked == Parked::Busy && s.pending == 0;
        self.slots.iter().filter(waits).count() as u32 == self.users
    }

    pub(super) fn free(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        self.users -= u32::from(matches!(slot.owner, Owner::User { .. }));
        slot.parked = Parked::No;
        self.free.push(index);
    }
}
