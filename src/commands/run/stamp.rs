//! Content that says where it belongs: each cell is made of its address, its generation and the
//! run's seed, so that a block that is lost, late, torn or misplaced is told from the right one.

use super::plan::{CELL, UNTOUCHED, ZEROED};

const MAGIC: u64 = u64::from_le_bytes(*b"RINGBACK");
/// So many wrong bytes do not make it another block.
const FEW: usize = 64;
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// Mixes the bits of a number (splitmix64's finish).
pub fn mix(mut n: u64) -> u64 {
    n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}

fn word(base: u64, at: u64) -> u64 {
    let n = base.wrapping_add(at.wrapping_mul(STEP));
    n ^ (n >> 29)
}

/// Fills a cell.
pub fn fill(cell: &mut [u8], seed: u64, number: u64, generation: u32) {
    let base = mix(seed ^ mix(number ^ (u64::from(generation) << 40)));
    let head = [MAGIC, number, u64::from(generation), seed];
    for (at, bytes) in cell.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        let n = head.get(at).copied().unwrap_or_else(|| word(base, at as u64));
        *bytes = n.to_le_bytes();
    }
}

/// What a cell must be: written in a generation, or zeroes.
pub fn expected(scratch: &mut [u8; CELL], seed: u64, number: u64, generation: u32) {
    match generation {
        UNTOUCHED | ZEROED => scratch.fill(0),
        generation => fill(scratch, seed, number, generation),
    }
}

/// Says what is wrong with a cell.
pub fn describe(found: &[u8], expected: &[u8], seed: u64, number: u64, generation: u32) -> String {
    let at = found.iter().zip(expected).position(|(a, b)| a != b).unwrap_or(0);
    let wrong = found.iter().zip(expected).filter(|(a, b)| a != b).count();
    let word = |n: usize| u64::from_le_bytes(found.as_chunks::<8>().0[n]);
    let is = if wrong <= FEW {
        format!("the right block with {wrong} wrong byte(s)")
    } else if found.iter().all(|b| *b == 0) {
        "zeroes".to_owned()
    } else if word(0) != MAGIC {
        "something that was never written here".to_owned()
    } else if word(3) != seed {
        "a block of another run".to_owned()
    } else if word(1) != number {
        format!("the block of {:#x}", word(1).wrapping_mul(CELL as u64))
    } else if word(2) != u64::from(generation) {
        format!("generation {}", word(2))
    } else {
        format!("the right block with {wrong} wrong byte(s)")
    };
    let should = match generation {
        UNTOUCHED | ZEROED => "zeroes".to_owned(),
        generation => format!("generation {generation}"),
    };
    format!(
        "block at {:#x}: {is} instead of {should}; first difference at byte {at}: {:#04x} instead \
         of {:#04x}",
        number * CELL as u64,
        found[at],
        expected[at]
    )
}

/// A number that depends on each byte and its place.
pub fn sum(bytes: &[u8]) -> u64 {
    let words = bytes.as_chunks::<8>().0.iter().map(|w| u64::from_le_bytes(*w));
    words.fold(STEP, |sum, w| (sum ^ w).wrapping_mul(0xff51_afd7_ed55_8ccd).rotate_left(23))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_fault_is_told_from_the_others() {
        let (mut right, mut other) = ([0; CELL], [0; CELL]);
        fill(&mut right, 1, 7, 3);
        let told = |found: &[u8; CELL]| describe(found, &right, 1, 7, 3);
        fill(&mut other, 1, 7, 2);
        assert!(told(&other).contains("block at 0x7000: generation 2 instead of generation 3"));
        fill(&mut other, 1, 8, 3);
        assert!(told(&other).contains("the block of 0x8000"));
        fill(&mut other, 2, 7, 3);
        assert!(told(&other).contains("another run"));
        assert!(told(&[0; CELL]).contains("zeroes instead of"));
        fill(&mut other, 1, 7, 3);
        other[4000] ^= 1;
        let text = told(&other);
        assert!(text.contains("1 wrong byte(s) instead of generation 3"), "{text}");
        assert!(text.contains("at byte 4000"), "{text}");
        assert_ne!(sum(&other), sum(&right));
    }
}
