//! Payload in memory that others may change meanwhile: named by address, never as a slice.
#![allow(unsafe_code)]

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::AsRawFd;

use libc::iovec;

use super::{MAX_PIECES, Transport};

/// Bytes that pass between such memory and TLS at once: a record of it.
const STAGE: usize = 16 << 10;

fn header(pieces: &[iovec]) -> libc::msghdr {
    // SAFETY: all zeroes is an empty msghdr.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = pieces.as_ptr().cast_mut();
    message.msg_iovlen = pieces.len().min(MAX_PIECES);
    message
}

fn retried(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        if let Ok(n) = usize::try_from(call()) {
            return Ok(n);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

impl Transport {
    /// As [`send`](Self::send).
    ///
    /// # Safety
    /// The memory that `from` names can be read; its bytes may change.
    pub unsafe fn send_raw(&mut self, from: &[iovec]) -> io::Result<usize> {
        if self.tls.is_none() {
            let (fd, message) = (self.fd.as_raw_fd(), header(from));
            let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
            // SAFETY: the caller's promise; the kernel copies.
            return retried(|| unsafe { libc::sendmsg(fd, &raw const message, flags) });
        }
        let mut stage = [0u8; STAGE];
        let mut filled = 0;
        for piece in from {
            let n = piece.iov_len.min(STAGE - filled);
            // SAFETY: the caller's promise, and `n` fits both.
            unsafe {
                std::ptr::copy(piece.iov_base.cast::<u8>(), stage[filled..].as_mut_ptr(), n);
            }
            filled += n;
        }
        self.send(&[IoSlice::new(&stage[..filled])])
    }

    /// As [`receive`](Self::receive).
    ///
    /// # Safety
    /// The memory that `into` names can be written.
    pub unsafe fn receive_raw(&mut self, into: &[iovec]) -> io::Result<usize> {
        if self.tls.is_none() {
            let (fd, mut message) = (self.fd.as_raw_fd(), header(into));
            // SAFETY: the caller's promise; the kernel copies.
            return retried(|| unsafe { libc::recvmsg(fd, &raw mut message, libc::MSG_DONTWAIT) });
        }
        let mut stage = [0u8; STAGE];
        let room = into.iter().fold(0usize, |sum, piece| sum.saturating_add(piece.iov_len));
        let got = self.receive(&mut [IoSliceMut::new(&mut stage[..room.min(STAGE)])])?;
        let mut rest = &stage[..got];
        for piece in into {
            let (here, after) = rest.split_at(piece.iov_len.min(rest.len()));
            // SAFETY: the caller's promise, and `here` is no longer than the piece.
            unsafe {
                std::ptr::copy(here.as_ptr(), piece.iov_base.cast::<u8>(), here.len());
            }
            rest = after;
        }
        Ok(got)
    }
}
