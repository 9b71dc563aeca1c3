//! Reading tables of segments that lie in granted pages (blkif's indirect descriptors).

use core::fmt;

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::PAGE_SIZE;
use crate::mem::SharedRead;

/// Entries of type `S` that fit into one page.
pub const fn per_page<S>() -> usize {
    PAGE_SIZE / size_of::<S>()
}

/// Pages that a table of `count` entries takes.
pub const fn pages_for<S>(count: usize) -> usize {
    count.div_ceil(per_page::<S>())
}

/// Why a table was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum IndirectError {
    /// It has no entries.
    Empty,
    /// It has more entries than were offered.
    TooMany {
        /// Entries that it claims.
        count: usize,
        /// Entries that were offered.
        most: usize,
    },
    /// There are fewer pages than its entries need.
    MissingPage {
        /// Pages that it needs.
        needed: usize,
        /// Pages that there are.
        found: usize,
    },
}

impl fmt::Display for IndirectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            IndirectError::Empty => f.write_str("indirect request without segments"),
            IndirectError::TooMany { count, most } => {
                write!(f, "indirect request of {count} segments, {most} were offered")
            }
            IndirectError::MissingPage { needed, found } => {
                write!(f, "indirect request needs {needed} pages, has {found}")
            }
        }
    }
}
impl core::error::Error for IndirectError {}

/// Copies a table of `count` entries into the front of `into`, each page once, and gives the
/// copy: the only thing to look at, since the other side can change the pages at any time.
///
/// Each of `pages` is memory and the byte offset of the page in it. `into.len()` is the most
/// entries that are accepted. Pages beyond those needed are not touched.
pub fn read_table<'a, 'b, S, M>(
    pages: impl IntoIterator<Item = (&'a M, usize)>,
    count: usize,
    into: &'b mut [S],
) -> Result<&'b [S], IndirectError>
where
    S: FromBytes + IntoBytes + Immutable,
    M: SharedRead + ?Sized + 'a,
{
    let most = into.len();
    let table = match count {
        0 => return Err(IndirectError::Empty),
        _ => into.get_mut(..count).ok_or(IndirectError::TooMany { count, most })?,
    };
    let mut pages = pages.into_iter();
    for (found, part) in table.chunks_mut(per_page::<S>()).enumerate() {
        let needed = pages_for::<S>(count);
        let (memory, offset) = pages.next().ok_or(IndirectError::MissingPage { needed, found })?;
        memory.copy_out(offset, part.as_mut_bytes());
    }
    Ok(table)
}

#[cfg(test)]
#[path = "indirect_tests.rs"]
mod tests;
