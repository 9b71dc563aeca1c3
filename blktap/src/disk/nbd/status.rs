//! Asking a server how a range is kept.

use std::io;
use std::ops::Range;
use std::time::Duration;

use zerocopy::{FromBytes, IntoBytes};

use super::connect::{Extent, Talk, broken};
use super::shared::Member;
use crate::disk::{Kept, Region};
use crate::export::nbd::proto::{
    CHUNK_MAGIC, Chunk, REQUEST_MAGIC, RequestHeader, STATE_HOLE, STATE_ZERO, chunk, cmd, errno_of,
};

/// Most bytes of one question: lengths on the wire have 32 bits.
const MOST: u64 = 1 << 31;
/// Longest answer.
const MAX_CHUNK: u32 = 8 << 20;

/// Appends how the beginning of `range` is kept, as far as the server says at once.
pub(super) fn map(
    member: &mut Member,
    context: u32,
    range: Range<u64>,
    patience: Duration,
    out: &mut Vec<Region>,
) -> io::Result<()> {
    let len = range.end.saturating_sub(range.start).min(MOST) as u32;
    if len == 0 {
        return Ok(());
    }
    let request = RequestHeader {
        magic: REQUEST_MAGIC.into(),
        flags: 0.into(),
        command: cmd::BLOCK_STATUS.into(),
        // Queues count theirs from the bottom.
        cookie: u64::MAX.into(),
        offset: range.start.into(),
        len: len.into(),
    };
    let mut talk = Talk::new(&mut member.transport, patience);
    talk.send(request.as_bytes())?;
    let mut errno = 0;
    let first = out.len();
    loop {
        let head: Chunk = talk.read()?;
        let size = head.len.get();
        if head.magic.get() != CHUNK_MAGIC || head.cookie.get() != u64::MAX || size > MAX_CHUNK {
            return Err(broken("no answer to a block status"));
        }
        let mut data = vec![0; size as usize];
        talk.receive(&mut data)?;
        match head.kind.get() {
            chunk::BLOCK_STATUS => take(&data, context, u64::from(len), first, out)?,
            kind if kind & chunk::IS_ERROR != 0 => {
                let error = data.first_chunk().ok_or_else(|| broken("an error of no kind"))?;
                errno = errno_of(u32::from_be_bytes(*error));
            }
            _ => {}
        }
        if head.flags.get() & chunk::DONE != 0 {
            break;
        }
    }
    match errno {
        0 if out.len() > first => Ok(()),
        0 => Err(broken("a block status without extents")),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

fn take(
    data: &[u8],
    context: u32,
    len: u64,
    first: usize,
    out: &mut Vec<Region>,
) -> io::Result<()> {
    let (number, extents) = data.split_first_chunk().ok_or_else(|| broken("no context"))?;
    if u32::from_be_bytes(*number) != context {
        return Ok(());
    }
    let extents = <[Extent]>::ref_from_bytes(extents).map_err(|_| broken("a part of an extent"))?;
    let mut left = len;
    for [bytes, state] in extents {
        let bytes = u64::from(bytes.get()).min(left);
        if bytes == 0 {
            break;
        }
        left -= bytes;
        let state = state.get();
        let kept = match (state & STATE_HOLE != 0, state & STATE_ZERO != 0) {
            (true, true) => Kept::Hole,
            (false, true) => Kept::Zero,
            // Not allocated, and nobody says what is read there.
            (_, false) => Kept::Data,
        };
        match out[first..].last_mut() {
            Some(last) if last.kept == kept => last.len += bytes,
            _ => out.push(Region { len: bytes, kept }),
        }
    }
    Ok(())
}
