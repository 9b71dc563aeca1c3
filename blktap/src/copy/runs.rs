//! Which bytes of a piece are worth writing.
use std::io;

use super::{Look, Part, What};

/// How the bytes that were read are looked at.
pub(super) enum Examine<'a> {
    /// They are data.
    Nothing,
    /// So many zeroes at a multiple of themselves are not.
    Zeroes(usize),
    /// The caller knows.
    Look(Look<'a>),
}

impl Examine<'_> {
    pub(super) fn runs(
        &mut self,
        offset: u64,
        bytes: &[u8],
        out: &mut Vec<Part>,
    ) -> io::Result<()> {
        match self {
            Examine::Nothing => out.push(Part { len: bytes.len() as u64, what: What::Data }),
            Examine::Zeroes(unit) => find_zeroes(offset, bytes, *unit, out),
            Examine::Look(look) => look(offset, bytes, out)?,
        }
        Ok(())
    }
}

/// Appends the runs of `bytes` that are zeroes and that are not, in units of `unit` bytes of the
/// disk.
pub(crate) fn find_zeroes(offset: u64, bytes: &[u8], unit: usize, out: &mut Vec<Part>) {
    let unit = unit.max(512);
    // The first unit may have begun before this piece.
    let first = unit - (offset % unit as u64) as usize;
    let (head, rest) = bytes.split_at(first.min(bytes.len()));
    for chunk in std::iter::once(head).chain(rest.chunks(unit)).filter(|c| !c.is_empty()) {
        let what = if is_zero(chunk) { What::Zero } else { What::Data };
        join(out, Part { len: chunk.len() as u64, what });
    }
}

/// Whether all bytes are zeroes.
pub(super) fn is_zero(bytes: &[u8]) -> bool {
    // In large steps, which the compiler turns into wide loads; most data end it in the first.
    bytes.chunks(256).all(|c| c.iter().fold(0, |all, b| all | b) == 0)
}

pub(super) fn join(out: &mut Vec<Part>, part: Part) {
    match out.last_mut() {
        Some(last) if last.what == part.what => last.len += part.len,
        _ => out.push(part),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeroes_are_found_in_whole_units() {
        let mut bytes = vec![0; 16384];
        bytes[5000] = 1;
        bytes[16383] = 2;
        let runs = |offset, unit| {
            let mut out = Vec::new();
            find_zeroes(offset, &bytes, unit, &mut out);
            out.iter().map(|p| (p.len, p.what == What::Data)).collect::<Vec<_>>()
        };
        assert_eq!(runs(0, 4096), [(4096, false), (4096, true), (4096, false), (4096, true)]);
        assert_eq!(runs(8192, 16384), [(16384, true)]);
        // A unit that began before the piece ends in it.
        assert_eq!(runs(512, 4096)[..2], [(3584, false), (4096, true)]);
        assert_eq!(runs(0, 65536), [(16384, true)]);
    }
}
