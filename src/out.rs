//! What commands say. Whoever reads it may go away (`| head`, a closed terminal): the work goes on, with
//! nobody told of it, and only what does nothing but talk ends ([`is_heard`]).

use std::fmt::Arguments;
use std::io::{self, ErrorKind, Write};

use parking_lot::Mutex;

/// Why standard output takes nothing more.
static FAULT: Mutex<Option<io::Error>> = Mutex::new(None);

/// A line on standard output.
macro_rules! outln {
    ($($word:tt)*) => { $crate::out::say(format_args!("{}\n", format_args!($($word)*))) };
}

/// A part of a line, or several, on standard output.
macro_rules! out {
    ($($word:tt)*) => { $crate::out::say(format_args!($($word)*)) };
}

/// A line on standard error.
macro_rules! errln {
    ($($word:tt)*) => { $crate::out::warn(format_args!("{}\n", format_args!($($word)*))) };
}

/// A part of a line on standard error.
macro_rules! err {
    ($($word:tt)*) => { $crate::out::warn(format_args!($($word)*)) };
}

/// See `out!`.
pub fn say(words: Arguments<'_>) {
    if is_heard() {
        keep(io::stdout().lock().write_fmt(words));
    }
}

/// See `err!`. Who cannot be told of a fault here cannot be told of this one either.
pub fn warn(words: Arguments<'_>) {
    let _ = io::stderr().lock().write_fmt(words);
}

/// Whether standard output still takes something.
pub fn is_heard() -> bool {
    FAULT.lock().is_none()
}

/// Writes what is buffered. A reader who has gone has had enough; all else (a full disk) is an error.
pub fn finish() -> io::Result<()> {
    keep(io::stdout().lock().flush());
    let fault = FAULT.lock().take();
    fault.filter(|e| e.kind() != ErrorKind::BrokenPipe).map_or(Ok(()), Err)
}

fn keep(written: io::Result<()>) {
    if let Err(e) = written {
        FAULT.lock().get_or_insert(e);
    }
}
