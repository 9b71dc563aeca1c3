//! What becomes of a request: judged against the export alone, before anything is done. Pure.

use super::proto::{MAX_PAYLOAD, REQUEST_MAGIC, RequestHeader, can, cmd, flag};

/// What a connection has agreed on, as far as requests depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// Bytes of the export.
    pub size: u64,
    /// Transmission flags ([`can`]).
    pub flags: u16,
    /// What ranges must be multiples of.
    pub alignment: u32,
    /// How replies are framed.
    pub replies: Replies,
    /// Metadata contexts that were chosen.
    pub contexts: usize,
}

/// How replies are framed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Replies {
    /// Simple replies only.
    Simple,
    /// Reads and block status by chunks.
    Structured,
}

/// When data is durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Force {
    /// After a flush.
    Later,
    /// When the reply is sent (NBD_CMD_FLAG_FUA).
    Now,
}

/// Whether zeroed ranges may be given back to the file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holes {
    /// They may.
    Allowed,
    /// NBD_CMD_FLAG_NO_HOLE: they stay allocated.
    Refused,
}

/// What is to be done. The range of everything but a flush lies inside the export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Work {
    Read,
    Write(Force),
    Flush,
    Trim(Force),
    WriteZeroes(Force, Holes),
    Cache,
    /// Only the first extent, and none longer than the request, if `one`.
    BlockStatus {
        one: bool,
    },
}

/// A judgement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Do it.
    Do(Work),
    /// Answer with this errno; so many bytes of payload follow, which are skipped.
    Refuse(i32, u32),
    /// The client is done.
    Disconnect,
    /// The connection cannot go on.
    Broken(Unreadable),
}

/// Requests after which nobody knows where the next one begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unreadable {
    /// Not [`REQUEST_MAGIC`].
    #[error("a request with the magic {0:#010x}")]
    Magic(u32),
    /// A payload that nobody may send.
    #[error("a write of {0} bytes, more than the limit of 32 MiB")]
    TooLong(u32),
}

/// Flags that a command may carry. FUA goes with all of them.
fn allowed_flags(command: u16) -> u16 {
    flag::FUA
        | match command {
            cmd::READ => flag::DF,
            cmd::WRITE_ZEROES => flag::NO_HOLE,
            cmd::BLOCK_STATUS => flag::REQ_ONE,
            _ => 0,
        }
}

/// Judges a request.
pub fn judge(header: &RequestHeader, terms: &Terms) -> Verdict {
    let (command, flags, len) = (header.command.get(), header.flags.get(), header.len.get());
    if header.magic.get() != REQUEST_MAGIC {
        return Verdict::Broken(Unreadable::Magic(header.magic.get()));
    }
    let payload = if command == cmd::WRITE { len } else { 0 };
    if payload > MAX_PAYLOAD {
        return Verdict::Broken(Unreadable::TooLong(len));
    }
    if command == cmd::DISC {
        return Verdict::Disconnect;
    }
    match permit(command, flags, header.offset.get(), len, terms) {
        Ok(work) => Verdict::Do(work),
        Err(errno) => Verdict::Refuse(errno, payload),
    }
}

fn permit(command: u16, flags: u16, offset: u64, len: u32, terms: &Terms) -> Result<Work, i32> {
    let has = |bit: u16| flags & bit != 0;
    if flags & !allowed_flags(command) != 0 || (has(flag::DF) && terms.flags & can::DF == 0) {
        return Err(libc::EINVAL);
    }
    let force = if has(flag::FUA) { Force::Now } else { Force::Later };
    let holes = if has(flag::NO_HOLE) { Holes::Refused } else { Holes::Allowed };
    let work = match command {
        cmd::READ => Work::Read,
        cmd::WRITE => Work::Write(force),
        cmd::FLUSH => return Ok(Work::Flush),
        cmd::TRIM => Work::Trim(force),
        cmd::WRITE_ZEROES => Work::WriteZeroes(force, holes),
        cmd::CACHE => Work::Cache,
        cmd::BLOCK_STATUS if terms.contexts > 0 => Work::BlockStatus { one: has(flag::REQ_ONE) },
        _ => return Err(libc::EINVAL),
    };
    let changes = matches!(work, Work::Write(_) | Work::Trim(_) | Work::WriteZeroes(..));
    if changes && terms.flags & can::READ_ONLY != 0 {
        return Err(libc::EPERM);
    }
    if matches!(work, Work::Trim(_)) && terms.flags & can::TRIM == 0 {
        return Err(libc::EINVAL);
    }
    let unit = u64::from(terms.alignment.max(1));
    if !offset.is_multiple_of(unit) || !u64::from(len).is_multiple_of(unit) {
        return Err(libc::EINVAL);
    }
    if (work == Work::Read && len > MAX_PAYLOAD) || (len == 0 && work_needs_bytes(work)) {
        return Err(libc::EINVAL);
    }
    match offset.checked_add(u64::from(len)) {
        Some(end) if end <= terms.size => Ok(work),
        // As the protocol asks: a write past the end lacks room, the rest is a wrong request.
        _ if matches!(work, Work::Write(_) | Work::WriteZeroes(..)) => Err(libc::ENOSPC),
        _ => Err(libc::EINVAL),
    }
}

/// An empty block status has no first extent to tell of.
fn work_needs_bytes(work: Work) -> bool {
    matches!(work, Work::BlockStatus { .. })
}
