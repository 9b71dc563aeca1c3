//! Bytes that both ends can make: what is downloaded.

/// A number that depends on each bit of `n` (splitmix64's last step).
fn mix(n: u64) -> u64 {
    let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}

/// Fills `into` with the bytes from `at` on of the endless sequence that `seed` names: 64-bit words,
/// low byte first, word n being splitmix64's n-th of that seed.
pub fn fill(seed: u64, at: u64, into: &mut [u8]) {
    let word = |n: u64| {
        mix(seed.wrapping_add((n.wrapping_add(1)).wrapping_mul(0x9e37_79b9_7f4a_7c15)))
            .to_le_bytes()
    };
    let (mut number, skip) = (at / 8, (at % 8) as usize);
    let head = if skip == 0 { 0 } else { into.len().min(8 - skip) };
    if head > 0 {
        into[..head].copy_from_slice(&word(number)[skip..skip + head]);
        number += 1;
    }
    for bytes in into[head..].chunks_mut(8) {
        bytes.copy_from_slice(&word(number)[..bytes.len()]);
        number += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_what_the_whole_has_there() {
        let mut whole = [0; 100];
        fill(7, 0, &mut whole);
        for at in 0..100 {
            for len in 0..=100 - at {
                let mut part = [0; 100];
                fill(7, at as u64, &mut part[..len]);
                assert_eq!(part[..len], whole[at..at + len], "{len} at {at}");
            }
        }
    }

    #[test]
    fn it_is_splitmix64() {
        // The first of seed 1234567, as its authors publish it.
        let mut word = [0; 8];
        fill(1_234_567, 0, &mut word);
        assert_eq!(u64::from_le_bytes(word), 6_457_827_717_110_365_317);
    }
}
