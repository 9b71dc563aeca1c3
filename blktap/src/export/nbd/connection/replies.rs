//! From the disk to the client.

use std::io::{self, IoSlice};

use rustix::event::PollFlags;

use super::super::transport::{MAX_PIECES, Woken};
use super::{Cause, Connection};

impl Connection<'_> {
    /// Queues a reply without data.
    pub(super) fn reply(&mut self, slot: u32, errno: i32) {
        self.slots.get_mut(slot).reply(errno, self.terms.replies);
        self.out.push_back(slot);
    }

    /// Sends all replies that are ready. Says whether slots came free.
    pub(super) fn send(&mut self) -> Result<bool, Cause> {
        let mut freed = false;
        while !self.out.is_empty() {
            match self.send_some() {
                Ok(some) => freed |= some,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.wait_to_send()?,
                Err(e) => return Err(Cause::Socket(e)),
            }
        }
        loop {
            match self.transport.flush() {
                Ok(()) => return Ok(freed),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.wait_to_send()?,
                Err(e) => return Err(Cause::Socket(e)),
            }
        }
    }

    fn send_some(&mut self) -> io::Result<bool> {
        let mut pieces = [IoSlice::new(&[]); MAX_PIECES];
        let (mut count, mut skip) = (0, self.sent);
        for slot in self.out.iter().take(MAX_PIECES / 2) {
            for piece in self.slots.get(*slot).pieces() {
                let cut = skip.min(piece.len());
                skip -= cut;
                if cut < piece.len() {
                    pieces[count] = IoSlice::new(&piece[cut..]);
                    count += 1;
                }
            }
        }
        let mut sent = self.sent + self.transport.send(&pieces[..count])?;
        let mut freed = false;
        while let Some(slot) = self.out.front().copied() {
            let len = self.slots.get(slot).reply_len();
            if sent < len {
                break;
            }
            sent -= len;
            self.out.pop_front();
            self.slots.give_back(slot);
            freed = true;
        }
        self.sent = sent;
        Ok(freed)
    }

    /// The client does not read: nothing else is to be done until it does, or the server ends.
    fn wait_to_send(&mut self) -> Result<(), Cause> {
        let stop = if self.stopped.is_none() { Some(self.stop) } else { None };
        match self.transport.wait(PollFlags::OUT, stop, self.stopped).map_err(Cause::Socket)? {
            Woken::Ready => Ok(()),
            Woken::Late => Err(Cause::Stuck),
            Woken::Stop => {
                self.end_for_server();
                Ok(())
            }
        }
    }
}
