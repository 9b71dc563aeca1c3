//! Lists of descriptors with one more.
use std::io;
use std::os::fd::BorrowedFd;

use crate::engine::MAX_WATCHES;

/// Calls `wait` with `fds` and `one` behind them. Few are the rule, and a long list takes time.
pub(super) fn with_one_more<'a>(
    fds: &[BorrowedFd<'a>],
    one: BorrowedFd<'a>,
    wait: impl FnOnce(&[BorrowedFd<'a>]) -> io::Result<u64>,
) -> io::Result<u64> {
    match fds {
        [] => wait(&[one]),
        [a] => wait(&[*a, one]),
        [a, b] => wait(&[*a, *b, one]),
        _ if fds.len() >= MAX_WATCHES - 1 => {
            Err(io::Error::new(io::ErrorKind::InvalidInput, "more than 62 descriptors"))
        }
        _ => {
            let mut all = [one; MAX_WATCHES];
            all[..fds.len()].copy_from_slice(fds);
            wait(&all[..=fds.len()])
        }
    }
}
