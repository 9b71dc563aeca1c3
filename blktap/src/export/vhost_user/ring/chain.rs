//! Chains of descriptors, copied out of the table once and judged there.

use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

use super::super::memory::{Memory, Place};
use super::{Broken, MAX_CHAIN};

/// Bytes of a descriptor, in both kinds of ring.
pub const DESC: usize = 16;

/// Flags of a descriptor.
pub const NEXT: u16 = VRING_DESC_F_NEXT as u16;
/// It is written by the device.
pub const WRITE: u16 = VRING_DESC_F_WRITE as u16;
/// It names a table.
pub const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

/// Memory of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Desc {
    /// Guest address.
    pub addr: u64,
    /// Bytes, not 0.
    pub len: u32,
}

/// A descriptor as it lies in its table. The last two words are `flags` and `next` in a split
/// ring, `id` and `flags` in a packed one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Raw {
    pub addr: u64,
    pub len: u32,
    pub words: [u16; 2],
}

impl Raw {
    /// The `index`th of a table that has it.
    #[inline]
    pub fn at(table: Place<'_>, index: usize) -> Raw {
        let mut bytes = [0; DESC];
        table.read(index * DESC, &mut bytes);
        let [a0, a1, a2, a3, a4, a5, a6, a7, l0, l1, l2, l3, x0, x1, y0, y1] = bytes;
        Raw {
            addr: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            len: u32::from_le_bytes([l0, l1, l2, l3]),
            words: [u16::from_le_bytes([x0, x1]), u16::from_le_bytes([y0, y1])],
        }
    }
}

/// A request's memory: what the device reads, then what it writes.
#[derive(Debug, Default)]
pub struct Chain {
    descs: Vec<Desc>,
    readable: usize,
}

impl Chain {
    /// With room for the longest.
    pub fn new() -> Chain {
        Chain { descs: Vec::with_capacity(MAX_CHAIN), readable: 0 }
    }
    /// What the device reads.
    pub fn readable(&self) -> &[Desc] {
        &self.descs[..self.readable]
    }
    /// What the device writes.
    pub fn writable(&self) -> &[Desc] {
        &self.descs[self.readable..]
    }
    /// For the next one.
    pub fn clear(&mut self) {
        self.descs.clear();
        self.readable = 0;
    }

    /// Another descriptor that names memory.
    #[inline]
    pub fn push(&mut self, addr: u64, len: u32, flags: u16) -> Result<(), Broken> {
        if self.descs.len() >= MAX_CHAIN {
            return Err(Broken::Long(MAX_CHAIN));
        }
        if len == 0 {
            return Err(Broken::Empty);
        }
        if flags & WRITE == 0 {
            if self.readable < self.descs.len() {
                return Err(Broken::Order);
            }
            self.readable += 1;
        }
        self.descs.push(Desc { addr, len });
        Ok(())
    }
}

/// The table that an indirect descriptor names, and how many entries it has.
pub fn table<'a>(memory: &'a Memory, addr: u64, len: u32) -> Result<(Place<'a>, u16), Broken> {
    let count = len as usize / DESC;
    if count == 0 || !(len as usize).is_multiple_of(DESC) {
        return Err(Broken::Indirect("its bytes are no number of descriptors"));
    }
    if count > MAX_CHAIN {
        return Err(Broken::Long(MAX_CHAIN));
    }
    let outside = Broken::Outside { addr, len: u64::from(len) };
    let place = memory.place(addr, len as usize).ok_or(outside)?;
    Ok((place, count as u16))
}
