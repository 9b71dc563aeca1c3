//! Frames out of a stream of bytes.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;

use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use thiserror::Error;

use super::LENGTH;
use crate::frame::{Frame, MAX_FRAME, Pool};
use crate::proto::ETHERNET_HEADER;

/// Bytes that are read ahead: two frames of the greatest length, or many short ones.
const BYTES: usize = 2 * (LENGTH + MAX_FRAME);

/// What the peer says has no meaning.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("it announces a frame of {0} bytes; the longest has {MAX_FRAME}")]
pub(super) struct TooLong(u32);

/// Bytes that have come.
#[derive(Default)]
pub(super) struct Input {
    /// Without memory until something comes.
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

impl Input {
    fn bytes(&self) -> &[u8] {
        self.buffer.get(self.start..self.end).unwrap_or_default()
    }

    /// The length of the next frame, if its head is here.
    fn length(&self) -> Option<u32> {
        let head = self.bytes().first_chunk::<LENGTH>()?;
        Some(u32::from_be_bytes(*head))
    }

    /// Whether a whole frame is here, or a length that is none.
    pub(super) fn has_frame(&self) -> bool {
        self.length().is_some_and(|len| {
            len as usize > MAX_FRAME || self.bytes().len() >= LENGTH + len as usize
        })
    }

    pub(super) fn clear(&mut self) {
        (self.start, self.end) = (0, 0);
    }

    /// Takes whole frames until there are `most`, or none in the pool; how many were none: shorter than
    /// an Ethernet header.
    pub(super) fn take(
        &mut self,
        frames: &mut VecDeque<Frame>,
        most: usize,
        pool: &mut Pool,
    ) -> Result<u64, TooLong> {
        let mut dropped = 0;
        while frames.len() < most && self.has_frame() {
            let Some(len) = self.length() else { break };
            if len as usize > MAX_FRAME {
                return Err(TooLong(len));
            }
            let end = LENGTH + len as usize;
            if (len as usize) < ETHERNET_HEADER {
                dropped += u64::from(len > 0);
            } else {
                let Some(mut frame) = pool.take() else { break };
                frame.set_len(len as usize);
                frame.copy_from_slice(&self.bytes()[LENGTH..end]);
                frames.push_back(frame);
            }
            self.start += end;
        }
        Ok(dropped)
    }

    /// Reads what has come; 0: nothing ever will. Only when there is no whole frame.
    pub(super) fn fill(&mut self, socket: BorrowedFd<'_>) -> Result<usize, Errno> {
        self.buffer.resize(BYTES, 0);
        self.buffer.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        let room = &mut self.buffer[self.end..];
        let (_, came) = recv(socket, room, RecvFlags::DONTWAIT)?;
        self.end += came;
        Ok(came)
    }
}
