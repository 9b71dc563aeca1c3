//! The reading half: as many reads in flight as there are free buffers.
// Names the buffers' memory to a queue.
#![allow(unsafe_code)]

use std::io;

use super::pipe::{Buffer, Next, ReaderEnds};
use super::runs::{Examine, join};
use super::{CopyError, Part, Piece, Plan, What};
use crate::disk::{Disk, DiskQueue, Done, IoBuf, Op, Request};

/// Longest stretch that a plan is asked for at once, and longest piece without data.
const AHEAD: u64 = 1 << 30;

/// What becomes of the bytes.
pub(super) struct Mode<'a> {
    examine: Examine<'a>,
}

impl<'a> Mode<'a> {
    pub(super) fn new(examine: Examine<'a>) -> Self {
        Mode { examine }
    }
}

pub(super) struct Reader<'a> {
    /// First: dropped before the buffers that it reads into.
    queue: Box<dyn DiskQueue>,
    /// What is being read; a request's token is its place.
    reading: Vec<Option<Piece>>,
    plan: Plan<'a>,
    mode: Mode<'a>,
    /// Planned and not yet begun, the next one last.
    parts: Vec<Part>,
    /// Where the parts begin.
    at: u64,
    len: u64,
    piece: u64,
    number: u64,
    done: Vec<Done>,
}

/// Whether there is anybody to read for.
enum Wanted {
    Yes,
    No,
}

impl<'a> Reader<'a> {
    pub(super) fn new(
        disk: &dyn Disk,
        len: u64,
        piece: usize,
        plan: Plan<'a>,
        mode: Mode<'a>,
    ) -> Result<Reader<'a>, CopyError> {
        let queue = disk.queue(128).map_err(CopyError::other("open a queue of the source"))?;
        Ok(Reader {
            queue,
            reading: Vec::new(),
            plan,
            mode,
            parts: Vec::new(),
            at: 0,
            len,
            piece: piece as u64,
            number: 0,
            done: Vec::new(),
        })
    }

    /// Reads all of it. An error is the last thing that is sent.
    pub(super) fn run(mut self, ends: ReaderEnds) {
        if let Err(e) = self.read_all(&ends) {
            ends.read.send(Err(e));
        }
    }

    fn read_all(&mut self, ends: &ReaderEnds) -> Result<(), CopyError> {
        loop {
            ends.free.calm();
            if let Wanted::No = self.begin(ends)? {
                return Ok(());
            }
            self.queue.submit_all().map_err(CopyError::other("read"))?;
            if let Wanted::No = self.end(ends)? {
                return Ok(());
            }
            if self.at >= self.len && self.queue.in_flight() == 0 {
                return Ok(());
            }
            let wait = self.queue.wait(&[ends.free.event()], None);
            wait.map_err(CopyError::other("wait for reads"))?;
        }
    }

    /// Begins as many pieces as there are free buffers.
    fn begin(&mut self, ends: &ReaderEnds) -> Result<Wanted, CopyError> {
        while self.at < self.len && self.queue.in_flight() < 128 {
            let buffer = match ends.free.next() {
                Next::Item(buffer) => buffer,
                Next::Nothing => return Ok(Wanted::Yes),
                Next::End => return Ok(Wanted::No),
            };
            let part = self.next_part()?;
            let piece = Piece {
                number: self.number,
                offset: self.at,
                len: part.len,
                runs: Vec::new(),
                buffer,
            };
            self.number += 1;
            self.at += part.len;
            if part.what == What::Data {
                self.read(piece)?;
            } else if !ends.read.send(Ok(Piece { runs: vec![part], ..piece })) {
                return Ok(Wanted::No);
            }
        }
        Ok(Wanted::Yes)
    }

    /// The next part, cut to what one piece may hold.
    fn next_part(&mut self) -> Result<Part, CopyError> {
        if self.parts.is_empty() {
            let range = self.at..self.len.min(self.at + AHEAD);
            let mut planned = Vec::new();
            (self.plan)(range.clone(), &mut planned)
                .map_err(CopyError::other("find out what is allocated"))?;
            let mut left = range.end - range.start;
            for part in planned {
                let len = part.len.min(left);
                left -= len;
                if len > 0 {
                    join(&mut self.parts, Part { len, ..part });
                }
            }
            self.parts.reverse();
        }
        let Some(part) = self.parts.pop() else {
            let source = io::Error::other("the map ends early");
            return Err(CopyError::Other { what: "find out what is allocated", source });
        };
        let limit = match part.what {
            What::Data => self.piece - self.at % self.piece,
            What::Zero | What::Skip => AHEAD,
        };
        if part.len > limit {
            self.parts.push(Part { len: part.len - limit, ..part });
        }
        Ok(Part { len: part.len.min(limit), ..part })
    }

    fn read(&mut self, piece: Piece) -> Result<(), CopyError> {
        let token = match self.reading.iter().position(Option::is_none) {
            Some(free) => free,
            None => {
                self.reading.push(None);
                self.reading.len() - 1
            }
        };
        let piece = self.reading[token].insert(piece);
        // SAFETY: the buffer stays in `reading` until the request is done; the queue is dropped
        // before it.
        let buf = unsafe { IoBuf::new(piece.buffer.addr(), piece.len as usize) };
        let request = Request {
            op: Op::Read,
            offset: piece.offset,
            len: piece.len,
            bufs: &[buf],
            token: token as u64,
        };
        let full = |_| CopyError::other("read")(io::Error::other("the queue has no room"));
        self.queue.submit(&request).map_err(full)
    }

    /// Sends on what has been read.
    fn end(&mut self, ends: &ReaderEnds) -> Result<Wanted, CopyError> {
        self.done.clear();
        self.queue.poll(&mut self.done).map_err(CopyError::other("read"))?;
        for done in &self.done {
            let Some(mut piece) = self.reading.get_mut(done.token as usize).and_then(Option::take)
            else {
                continue;
            };
            let (offset, len) = (piece.offset, piece.len);
            let failed = |source| CopyError::Read { offset, len, source };
            if done.errno != 0 {
                return Err(failed(io::Error::from_raw_os_error(done.errno)));
            }
            let bytes = data(&piece.buffer, len);
            self.mode.examine.runs(offset, bytes, &mut piece.runs).map_err(failed)?;
            if !ends.read.send(Ok(piece)) {
                return Ok(Wanted::No);
            }
        }
        Ok(Wanted::Yes)
    }
}

fn data(buffer: &Buffer, len: u64) -> &[u8] {
    &buffer.bytes()[..len as usize]
}
