//! Bytes in pages that are shared until they change: many states of one file cost little.
use std::io;
use std::sync::Arc;

/// Bytes of a page.
const PAGE: usize = 4096;
/// Most bytes that it holds: a test that wants more is wrong.
const LIMIT: u64 = 16 << 30;

type Page = [u8; PAGE];

/// A file's bytes in memory. What was never written takes none, and a copy shares its pages
/// with the original until one of them is written.
#[derive(Clone, Debug, Default)]
pub struct SparseBytes {
    /// Where there is none, and behind the last, zeroes.
    pages: Vec<Option<Arc<Page>>>,
    /// Bytes beyond it are zeroes in the pages too.
    len: u64,
}

impl SparseBytes {
    /// With these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        let mut sparse = SparseBytes::default();
        for (n, part) in bytes.chunks(PAGE).enumerate() {
            if part.iter().any(|b| *b != 0) {
                sparse.put(n, 0, part);
            }
        }
        sparse.len = bytes.len() as u64;
        sparse
    }

    /// Bytes.
    pub fn len(&self) -> u64 {
        self.len
    }
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Fills `into` from `offset` on; zeroes beyond the end.
    pub fn read(&self, offset: u64, into: &mut [u8]) {
        for (page, at, range) in pieces(offset, into.len()) {
            let here = &mut into[range];
            match self.pages.get(page).and_then(Option::as_deref) {
                Some(bytes) => here.copy_from_slice(&bytes[at..at + here.len()]),
                None => here.fill(0),
            }
        }
    }

    /// Writes `from` at `offset`, beyond the end too.
    pub fn write(&mut self, offset: u64, from: &[u8]) -> io::Result<()> {
        let end = end(offset, from.len() as u64)?;
        for (page, at, range) in pieces(offset, from.len()) {
            self.put(page, at, &from[range]);
        }
        self.len = self.len.max(end);
        Ok(())
    }

    /// Zeroes `len` bytes from `offset` on, as far as there are any.
    pub fn zero(&mut self, offset: u64, len: u64) {
        let end = offset.saturating_add(len).min(self.len);
        let len = usize::try_from(end.saturating_sub(offset)).unwrap_or(0);
        for (page, at, range) in pieces(offset, len) {
            match self.pages.get_mut(page) {
                Some(whole) if range.len() == PAGE => *whole = None,
                Some(Some(part)) => Arc::make_mut(part)[at..at + range.len()].fill(0),
                Some(None) => {}
                None => break,
            }
        }
    }

    /// Cuts or grows to `len` bytes.
    pub fn set_len(&mut self, len: u64) -> io::Result<()> {
        end(len, 0)?;
        if len < self.len {
            self.zero(len, self.len - len);
            self.pages.truncate(len.div_ceil(PAGE as u64) as usize);
        }
        self.len = len;
        Ok(())
    }

    /// All of them.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut all = vec![0; self.len as usize];
        self.read(0, &mut all);
        all
    }

    /// The pages that may hold anything else than zeroes: (offset, bytes).
    pub fn pages(&self) -> impl Iterator<Item = (u64, &[u8])> {
        let there = |(n, page): (usize, &'_ Option<Arc<Page>>)| page.is_some().then_some(n);
        self.pages.iter().enumerate().filter_map(there).filter_map(|n| {
            let at = (n * PAGE) as u64;
            let len = self.len.saturating_sub(at).min(PAGE as u64) as usize;
            self.pages[n].as_deref().map(|bytes| (at, &bytes[..len]))
        })
    }

    fn put(&mut self, page: usize, at: usize, bytes: &[u8]) {
        if self.pages.len() <= page {
            self.pages.resize(page + 1, None);
        }
        let page = self.pages[page].get_or_insert_with(|| Arc::new([0; PAGE]));
        Arc::make_mut(page)[at..at + bytes.len()].copy_from_slice(bytes);
    }
}

fn end(offset: u64, len: u64) -> io::Result<u64> {
    let end = offset.checked_add(len).filter(|end| *end <= LIMIT);
    end.ok_or_else(|| io::ErrorKind::FileTooLarge.into())
}

/// `len` bytes from `offset` on by pages: (page, first byte in it, range of the whole).
fn pieces(offset: u64, len: usize) -> impl Iterator<Item = (usize, usize, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == len {
            return None;
        }
        let at = offset + done as u64;
        let (page, start) = ((at / PAGE as u64) as usize, (at % PAGE as u64) as usize);
        let from = done;
        done += (PAGE - start).min(len - done);
        Some((page, start, from..done))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_reads_as_a_vector_does() {
        let (mut sparse, mut plain) = (SparseBytes::default(), Vec::new());
        let mut x = 1u64;
        for round in 0..2000u32 {
            x = x.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1442695040888963407);
            let (at, len) = ((x >> 33) % 40_000, ((x >> 20) % 9000) as usize);
            let end = at as usize + len;
            match round % 5 {
                0 => {
                    sparse.set_len(at).expect("small");
                    plain.resize(at as usize, 0);
                }
                1 => {
                    sparse.zero(at, len as u64);
                    let there = plain.len();
                    plain[(at as usize).min(there)..end.min(there)].fill(0);
                }
                _ => {
                    let bytes = vec![round as u8; len];
                    sparse.write(at, &bytes).expect("small");
                    plain.resize(plain.len().max(end), 0);
                    plain[at as usize..end].copy_from_slice(&bytes);
                }
            }
            assert!(sparse.to_vec() == plain, "round {round}");
        }
        let mut again = SparseBytes::default();
        for (at, bytes) in sparse.pages() {
            again.write(at, bytes).expect("small");
        }
        again.set_len(sparse.len()).expect("small");
        assert!(again.to_vec() == plain && SparseBytes::of(&plain).to_vec() == plain);
        assert!(sparse.write(u64::MAX - 1, &[1; 4]).is_err());
    }

    #[test]
    fn a_copy_keeps_what_it_was() {
        let mut bytes = SparseBytes::of(&[7; 10_000]);
        let copy = bytes.clone();
        bytes.write(4000, &[1; 200]).expect("small");
        bytes.zero(0, 100);
        assert!(copy.to_vec() == [7; 10_000]);
        assert!(bytes.to_vec() != copy.to_vec());
    }
}
