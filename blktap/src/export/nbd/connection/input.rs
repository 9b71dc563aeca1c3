//! Bytes that were received and not yet looked at.

use std::io::{self, IoSliceMut};

use super::super::transport::Transport;

/// Most that is received at once, beside a large payload.
const LEN: usize = 192 << 10;
/// What follows a payload that is being received is read only so far: more of it may be payload,
/// which is better received where it belongs.
const AHEAD: usize = 4096;
/// Rests of payload from this length on are large.
const LARGE: usize = 32 << 10;

/// See the module.
pub struct Input {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

/// What a receive has brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// So many bytes of payload, and perhaps more behind it.
    Payload(usize),
    /// The client has closed.
    End,
    /// Nothing.
    Nothing,
}

impl Input {
    /// With the bytes that came after the handshake.
    pub fn new(first: &[u8]) -> Input {
        let mut bytes = vec![0; LEN.max(first.len())].into_boxed_slice();
        bytes[..first.len()].copy_from_slice(first);
        Input { bytes, start: 0, end: first.len() }
    }

    /// What is there.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }
    /// The first `n` bytes were used.
    pub fn skip(&mut self, n: usize) {
        self.start = self.end.min(self.start.saturating_add(n));
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }
    /// Moves as much as there is into `into`: how much.
    pub fn move_to(&mut self, into: &mut [u8]) -> usize {
        let n = into.len().min(self.end - self.start);
        into[..n].copy_from_slice(&self.bytes[self.start..self.start + n]);
        self.skip(n);
        n
    }

    /// Receives into `payload` and, what comes behind it, into itself. The second answer: there
    /// may be more that the socket does not tell of.
    pub fn receive(
        &mut self,
        from: &mut Transport,
        payload: &mut [u8],
    ) -> io::Result<(Received, bool)> {
        if self.bytes.len() - self.end < AHEAD {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let (wanted, mut room) = (payload.len(), self.bytes.len() - self.end);
        if wanted >= LARGE {
            room = room.min(AHEAD);
        }
        let rest = &mut self.bytes[self.end..self.end + room];
        let mut pieces = [IoSliceMut::new(payload), IoSliceMut::new(rest)];
        let pieces = if wanted == 0 { &mut pieces[1..] } else { &mut pieces[..] };
        let got = match from.receive(pieces) {
            Ok(0) => return Ok((Received::End, false)),
            Ok(got) => got,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                return Ok((Received::Nothing, false));
            }
            Err(e) => return Err(e),
        };
        let paid = got.min(wanted);
        self.end += got - paid;
        Ok((Received::Payload(paid), got == wanted + room))
    }
}
