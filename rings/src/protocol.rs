//! What a ring carries, and how many of it.

use core::fmt;
use core::marker::PhantomData;

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::PAGE_SIZE;
use crate::mem::{Entry, Region, Row, SharedMem};

/// Bytes before the first slot (`offsetof(struct sring, ring)` in io/ring.h).
pub(crate) const HEADER: usize = 64;

/// A device's ring protocol: the arguments of `DEFINE_RING_TYPES`.
///
/// Both types are plain bytes (zerocopy): any bytes are a valid value, and a value has no
/// padding, so that no byte of this process's memory ever leaks into a slot.
pub trait Protocol: 'static {
    /// Name for errors and logs, `blkif` say.
    const NAME: &'static str;
    /// A request as it lies in a slot.
    type Req: FromBytes + IntoBytes + Immutable + Copy + Send + 'static;
    /// A response as it lies in a slot.
    type Rsp: FromBytes + IntoBytes + Immutable + Copy + Send + 'static;
}

const fn larger(a: usize, b: usize) -> usize {
    if a > b { a } else { b }
}

/// Bytes of a slot: the size of the C union of request and response.
pub const fn slot_size<P: Protocol>() -> usize {
    let size = larger(size_of::<P::Req>(), size_of::<P::Rsp>());
    let align = larger(align_of::<P::Req>(), align_of::<P::Rsp>());
    assert!(size > 0, "a slot holds something");
    size.next_multiple_of(align)
}

/// The slots of a ring of `P`.
pub(crate) struct Slots<P>(PhantomData<fn() -> P>);
impl<P: Protocol> Entry for Slots<P> {
    const STRIDE: usize = slot_size::<P>();
}

/// The slots of a ring over all of `memory`.
pub(crate) fn slots_of<P: Protocol, M: SharedMem>(
    memory: M,
) -> Result<Row<M, Slots<P>>, SizeError> {
    let count = slots_in::<P>(memory.len())?;
    Ok(Row::new(Region::new(memory), HEADER, count))
}

/// Slots of a ring of `pages` pages: as many as fit, rounded down to a power of two
/// (`__CONST_RING_SIZE` in io/ring.h). 0 where none fits.
pub const fn slot_count<P: Protocol>(pages: usize) -> u32 {
    let bytes = pages.saturating_mul(PAGE_SIZE).saturating_sub(HEADER);
    let fit = bytes / slot_size::<P>();
    let fit = if fit > 1 << 31 { 1 << 31 } else { fit as u32 };
    if fit == 0 { 0 } else { 1 << fit.ilog2() }
}

/// The memory is no ring of this protocol: it is not 1, 2, 4 ... pages, or holds no slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SizeError {
    /// Name of the protocol.
    pub ring: &'static str,
    /// Bytes of the memory.
    pub bytes: usize,
}

impl fmt::Display for SizeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes are no {} ring of 2^N pages", self.bytes, self.ring)
    }
}
impl core::error::Error for SizeError {}

fn slots_in<P: Protocol>(bytes: usize) -> Result<u32, SizeError> {
    let pages = bytes / PAGE_SIZE;
    let count = slot_count::<P>(pages);
    if !bytes.is_multiple_of(PAGE_SIZE) || !pages.is_power_of_two() || count == 0 {
        return Err(SizeError { ring: P::NAME, bytes });
    }
    Ok(count)
}

/// The other side's producer index is impossible (`RING_REQUEST_PROD_OVERFLOW`,
/// `RING_RESPONSE_PROD_OVERFLOW`): it is lying or broken, and the ring is of no more use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Corrupt {
    /// Name of the protocol.
    pub ring: &'static str,
    /// Which index: `req_prod`, `rsp_prod`, or a byte ring's.
    pub index: &'static str,
    /// Its value.
    pub found: u32,
    /// The least value that it could have.
    pub least: u32,
    /// How much above `least` (wrapping) it could be.
    pub room: u32,
}

impl fmt::Display for Corrupt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Corrupt { ring, index, found, least, room } = self;
        let most = least.wrapping_add(*room);
        write!(f, "corrupt {ring} ring: {index} is {found}, possible is {least} to {most}")
    }
}
impl core::error::Error for Corrupt {}

#[cfg(test)]
mod tests {
    use super::*;

    struct Of<const N: usize>;
    impl<const N: usize> Protocol for Of<N> {
        const NAME: &'static str = "test";
        type Req = [u8; N];
        type Rsp = [u8; 1];
    }

    #[test]
    fn slot_counts_are_those_of_the_known_devices() {
        // blkif 112, x86_32's 108, netif tx 12, netif rx 8, usbif 112, vscsiif 252.
        assert_eq!(slot_count::<Of<112>>(1), 32);
        assert_eq!(slot_count::<Of<112>>(16), 512);
        assert_eq!(slot_count::<Of<108>>(1), 32);
        assert_eq!(slot_count::<Of<12>>(1), 256);
        assert_eq!(slot_count::<Of<8>>(1), 256);
        assert_eq!(slot_count::<Of<252>>(1), 16);
        assert_eq!(slot_count::<Of<4032>>(1), 1);
        assert_eq!(slot_count::<Of<4033>>(1), 0);
    }

    #[test]
    fn only_powers_of_two_of_pages_are_rings() {
        assert_eq!(slots_in::<Of<112>>(8192), Ok(64));
        for bytes in [0, 1, 4095, 3 * 4096, 4097] {
            assert_eq!(slots_in::<Of<112>>(bytes), Err(SizeError { ring: "test", bytes }));
        }
    }

    #[test]
    fn a_slot_is_padded_to_the_larger_alignment() {
        struct Mixed;
        impl Protocol for Mixed {
            const NAME: &'static str = "mixed";
            type Req = [u8; 9];
            type Rsp = [u32; 1];
        }
        assert_eq!(slot_size::<Mixed>(), 12);
    }
}
