//! The block device (VIRTIO 1.2, 5.2): features, configuration space, requests.
// Names the guest's memory to the disk's queue.
#![allow(unsafe_code)]

use std::mem::offset_of;

use virtio_bindings::virtio_blk as c;
use virtio_bindings::virtio_config::{VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::memory::Memory;
use super::ring::{Broken, Chain, Desc};
use crate::disk::{Geometry, IoBuf};

/// Bytes of a sector, whatever the block size.
pub const SECTOR: u64 = 512;
/// Bytes of the configuration space, with all that we say.
pub const CONFIG_BYTES: usize = offset_of!(c::virtio_blk_config, zoned);
/// Where its one writable byte is: 1 for writeback, 0 for writethrough.
pub const WCE_AT: usize = offset_of!(c::virtio_blk_config, wce);
/// Answers: VIRTIO_BLK_S_*.
pub const OK: u8 = c::VIRTIO_BLK_S_OK as u8;
/// The disk could not, or the request was none.
pub const IOERR: u8 = c::VIRTIO_BLK_S_IOERR as u8;
/// There is no such operation here.
pub const UNSUPP: u8 = c::VIRTIO_BLK_S_UNSUPP as u8;

/// Segments of a request: what a ring of 128, QEMU's, has room for.
const SEG_MAX: u32 = 126;
/// Bytes of a segment.
const SIZE_MAX: u32 = 4 << 20;
/// Sectors of a discard or zeroing: 1 GiB.
const RANGE_MAX: u32 = 1 << 21;
/// struct virtio_blk_outhdr: type, priority, sector.
const HEADER: usize = 16;
/// struct virtio_blk_discard_write_zeroes: sector, count, flags.
const RANGE: usize = 16;
/// Bytes of a disk's id.
pub const ID_BYTES: usize = c::VIRTIO_BLK_ID_BYTES as usize;

/// A feature's bit.
pub const fn bit(number: u32) -> u64 {
    1 << number
}

/// What the driver may take up, but for the bits of vhost itself.
pub fn features(geometry: &Geometry, queues: u16) -> u64 {
    let always = [
        c::VIRTIO_BLK_F_SIZE_MAX,
        c::VIRTIO_BLK_F_SEG_MAX,
        c::VIRTIO_BLK_F_BLK_SIZE,
        c::VIRTIO_BLK_F_FLUSH,
        c::VIRTIO_BLK_F_TOPOLOGY,
        c::VIRTIO_BLK_F_CONFIG_WCE,
        VIRTIO_RING_F_INDIRECT_DESC,
        VIRTIO_RING_F_EVENT_IDX,
        VIRTIO_F_VERSION_1,
        VIRTIO_F_RING_PACKED,
    ];
    let mut all = always.into_iter().map(bit).fold(0, |all, bit| all | bit);
    if queues > 1 {
        all |= bit(c::VIRTIO_BLK_F_MQ);
    }
    match geometry.read_only {
        true => all |= bit(c::VIRTIO_BLK_F_RO),
        false => {
            all |= bit(c::VIRTIO_BLK_F_WRITE_ZEROES);
            all |= geometry.discard.map_or(0, |_| bit(c::VIRTIO_BLK_F_DISCARD));
        }
    }
    all
}

/// Whether writes may stay in a cache until a flush, by what was agreed (5.2.5.2).
pub fn may_cache(features: u64) -> bool {
    features & (bit(c::VIRTIO_BLK_F_FLUSH) | bit(c::VIRTIO_BLK_F_CONFIG_WCE)) != 0
}

/// struct virtio_blk_config.
pub fn config(geometry: &Geometry, queues: u16, writeback: bool) -> [u8; CONFIG_BYTES] {
    let mut bytes = [0; CONFIG_BYTES];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    let physical = geometry.physical_block.max(geometry.logical_block);
    let exponent = (physical / geometry.logical_block).max(1).ilog2() as u8;
    let granularity = geometry.discard.unwrap_or(0).max(geometry.logical_block);
    let minimum = (physical / geometry.logical_block).clamp(1, u32::from(u16::MAX)) as u16;
    macro_rules! set {
        ($field:ident, $value:expr) => {
            put(offset_of!(c::virtio_blk_config, $field), &$value.to_le_bytes())
        };
    }
    set!(capacity, (geometry.size / SECTOR));
    set!(size_max, SIZE_MAX);
    set!(seg_max, SEG_MAX);
    set!(blk_size, geometry.logical_block);
    set!(physical_block_exp, exponent);
    set!(min_io_size, minimum);
    set!(wce, u8::from(writeback));
    set!(num_queues, queues);
    set!(max_discard_sectors, RANGE_MAX);
    set!(max_discard_seg, 1u32);
    set!(discard_sector_alignment, (granularity / SECTOR as u32));
    set!(max_write_zeroes_sectors, RANGE_MAX);
    set!(max_write_zeroes_seg, 1u32);
    set!(write_zeroes_may_unmap, 1u8);
    bytes
}

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    Read,
    Write,
    Flush,
    Id,
    Discard,
    /// And whether its place may be given back.
    Zero {
        unmap: bool,
    },
}

/// A request whose memory is all there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// What to do; `Err`: nothing, but to answer this.
    pub work: Result<Work, u8>,
    /// Bytes on the disk.
    pub offset: u64,
    pub len: u64,
    /// Guest address of the status byte.
    pub status: u64,
    /// Bytes that the device writes before it.
    pub room: u32,
}

/// Begins to bring a request's header here.
#[inline]
pub fn prefetch(memory: &Memory, chain: &Chain) {
    if let Some(first) = chain.readable().first()
        && let Some(place) = memory.place(first.addr, 1)
    {
        place.prefetch(0);
    }
}

/// Reads a request; its data are named in `bufs`. `Err`: it cannot even be answered.
pub fn parse(memory: &Memory, chain: &Chain, bufs: &mut Vec<IoBuf>) -> Result<Request, Broken> {
    bufs.clear();
    let (readable, writable) = (chain.readable(), chain.writable());
    let last = writable.last().ok_or(Broken::Request("has no byte for its status"))?;
    let status = last.addr.checked_add(u64::from(last.len) - 1);
    let status = status.filter(|at| memory.place(*at, 1).is_some());
    let status = status.ok_or(Broken::Outside { addr: last.addr, len: u64::from(last.len) })?;
    let room = sum(writable) - 1;
    let Ok(written) = u32::try_from(room) else {
        return Err(Broken::Request("has more than 4 GiB to be written"));
    };
    let mut header = [0; HEADER];
    gather(memory, readable, 0, &mut header)?
        .ok_or(Broken::Request("is shorter than its header"))?;
    let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
    let (kind, sector) = (u32::from_le_bytes([t0, t1, t2, t3]), u64::from_le_bytes(sector));
    let mut request = Request { work: Err(IOERR), offset: 0, len: 0, status, room: written };
    let data = sum(readable) - HEADER as u64;
    match kind {
        c::VIRTIO_BLK_T_IN | c::VIRTIO_BLK_T_OUT => {
            let (work, descs, skip, len) = match kind {
                c::VIRTIO_BLK_T_IN => (Work::Read, writable, 0, room),
                _ => (Work::Write, readable, HEADER as u64, data),
            };
            name(memory, descs, skip, len, bufs)?;
            if let Some(offset) = sector.checked_mul(SECTOR)
                && len.is_multiple_of(SECTOR)
            {
                (request.work, request.offset, request.len) = (Ok(work), offset, len);
            }
        }
        c::VIRTIO_BLK_T_FLUSH => request.work = Ok(Work::Flush),
        c::VIRTIO_BLK_T_GET_ID => {
            name(memory, writable, 0, room.min(ID_BYTES as u64), bufs)?;
            request.work = Ok(Work::Id);
        }
        c::VIRTIO_BLK_T_DISCARD | c::VIRTIO_BLK_T_WRITE_ZEROES => {
            let mut range = [0; RANGE];
            if data == RANGE as u64
                && gather(memory, readable, HEADER as u64, &mut range)?.is_some()
            {
                ranged(&mut request, kind, range);
            }
        }
        _ => request.work = Err(UNSUPP),
    }
    Ok(request)
}

/// 5.2.6.2: one range, for `max_discard_seg` is 1.
fn ranged(request: &mut Request, kind: u32, range: [u8; RANGE]) {
    let [s0, s1, s2, s3, s4, s5, s6, s7, c0, c1, c2, c3, flags @ ..] = range;
    let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    let count = u32::from_le_bytes([c0, c1, c2, c3]);
    let flags = u32::from_le_bytes(flags);
    let unmap = flags & c::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
    let discard = kind == c::VIRTIO_BLK_T_DISCARD;
    if flags & !c::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 || (discard && unmap) {
        request.work = Err(UNSUPP);
    } else if let Some(offset) = sector.checked_mul(SECTOR)
        && count <= RANGE_MAX
    {
        (request.offset, request.len) = (offset, u64::from(count) * SECTOR);
        request.work = Ok(if discard { Work::Discard } else { Work::Zero { unmap } });
    }
}

fn sum(descs: &[Desc]) -> u64 {
    descs.iter().map(|d| u64::from(d.len)).sum()
}

/// The parts of `descs` from `skip` on, `len` bytes at most.
fn parts(descs: &[Desc], mut skip: u64, mut len: u64) -> impl Iterator<Item = (u64, u64)> {
    descs.iter().filter_map(move |d| {
        let over = skip.min(u64::from(d.len));
        skip -= over;
        let here = (u64::from(d.len) - over).min(len);
        len -= here;
        // It does not wrap: what does is in no region.
        (here > 0).then_some((d.addr.wrapping_add(over), here))
    })
}

/// Copies bytes out of several descriptors. `None`: there are not so many.
#[inline]
fn gather(
    memory: &Memory,
    descs: &[Desc],
    skip: u64,
    into: &mut [u8],
) -> Result<Option<()>, Broken> {
    let mut at = 0;
    for (addr, len) in parts(descs, skip, into.len() as u64) {
        let end = at + len as usize;
        let place = memory.place(addr, len as usize).ok_or(Broken::Outside { addr, len })?;
        place.read(0, &mut into[at..end]);
        at = end;
    }
    Ok((at == into.len()).then_some(()))
}

/// Names the memory of several descriptors.
#[inline]
fn name(
    memory: &Memory,
    descs: &[Desc],
    skip: u64,
    len: u64,
    bufs: &mut Vec<IoBuf>,
) -> Result<(), Broken> {
    for (addr, len) in parts(descs, skip, len) {
        // SAFETY: a queue's thread keeps its memory mapped until its disk's queue is dropped.
        let each = |start, len| bufs.push(unsafe { IoBuf::new(start, len) });
        memory.pieces(addr, len, each).ok_or(Broken::Outside { addr, len })?;
    }
    Ok(())
}

/// Writes a disk's id where a GET_ID wants it: what `bufs` name, cut or filled up with zeroes.
pub fn write_id(memory: &Memory, chain: &Chain, id: &[u8; ID_BYTES], room: u32) {
    let mut rest = &id[..ID_BYTES.min(room as usize)];
    for (addr, len) in parts(chain.writable(), 0, rest.len() as u64) {
        let (here, more) = rest.split_at(len as usize);
        if let Some(place) = memory.place(addr, here.len()) {
            place.write(0, here);
        }
        rest = more;
    }
}
