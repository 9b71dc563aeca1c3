//! Fuzz target: any bytes are patches of a good image.
use crate::judge::{Outcome, judge};
use crate::model::be;
use crate::mutations::GOOD;

/// Places that are worth patching: each table that the image names, by what it names.
fn tables(bytes: &[u8]) -> Vec<u64> {
    let mut places = vec![0, 24, 64];
    let tables = [be(bytes, 40, 8), be(bytes, 48, 8), be(bytes, 64, 8)];
    for table in tables.into_iter().filter(|at| *at != 0) {
        places.push(table);
        places.extend((0..8).map(|i| be(bytes, table + i * 8, 8) & 0x00ff_ffff_ffff_fe00));
    }
    places.retain(|at| *at < bytes.len() as u64);
    places
}

/// The first byte chooses the image; then every 8 bytes are a patch: where, how long, what.
fn image(input: &[u8]) -> Option<Vec<u8>> {
    let (choice, patches) = input.split_first()?;
    let mut bytes = GOOD[usize::from(*choice) % GOOD.len()].bytes.clone();
    let tables = tables(&bytes);
    for patch in patches.chunks_exact(8).take(16) {
        let base = tables[usize::from(patch[0]) % tables.len()];
        let at = base + u64::from(patch[1]) * [1, 8][usize::from(patch[2] & 1)];
        let old = be(&bytes, at, 8);
        let word = be(patch, 3, 4);
        let value = match patch[2] >> 1 & 7 {
            0 => word << 32,
            1 => old ^ 1 << (word % 64),
            2 => old.wrapping_add(512 << (word % 8)),
            3 => old & !(0xff << (word % 64)),
            4 => tables[word as usize % tables.len()] | (word >> 16 & 1) << 63,
            5 => tables[word as usize % tables.len()] | (word >> 16 & 3) << 62 | (word >> 20 & 1),
            6 => word,
            _ => u64::MAX << (word % 64),
        };
        for (i, byte) in value.to_be_bytes().into_iter().enumerate() {
            if let Some(to) = bytes.get_mut(at as usize + i) {
                *to = byte;
            }
        }
        if patch[7] == 255 {
            bytes.truncate((word as usize % bytes.len()).max(1));
        }
    }
    Some(bytes)
}

fn run(input: &[u8]) -> Outcome {
    image(input).map_or_else(Outcome::default, |bytes| judge(&bytes, &format!("{input:02x?}")))
}

/// What was found once.
#[test]
fn inputs_that_broke_something() {
    // A refcount table that is made anew had no room for blocks far behind the file's end.
    let far_blocks = [
        0x0c, 0x86, 0x86, 0x08, 0x60, 0x7d, 0x69, 0x9e, 0x87, 0xe7, 0x3b, 0xca, 0xcd, 0xb3, 0x24,
        0x64, 0x34, 0xab, 0x2e, 0x48, 0xff, 0xd9, 0xe8, 0xf0, 0xe5, 0xff, 0xc8, 0x32, 0x11, 0x53,
        0x2f, 0x4d, 0xb3, 0xb4, 0x83, 0x68, 0xeb, 0x7a, 0xbf, 0xb6, 0x19, 0xc3, 0x4d, 0x73, 0xc5,
        0xab, 0xfa, 0x1d, 0xf6, 0xae, 0xd3, 0x77, 0x07, 0xc9, 0x07,
    ];
    // Counts behind the file's end are leaks once the file is longer.
    let counts_behind = [
        0x6d, 0xd9, 0xaf, 0x61, 0x1d, 0xaf, 0x78, 0x67, 0xf7, 0x30, 0x2c, 0x89, 0xa0, 0x99, 0xd1,
        0xa2, 0x52, 0xe1, 0x18, 0x0c, 0x22,
    ];
    // The snapshot table and an L2 table in one cluster, and its count is 2.
    let one_cluster_of_two = [
        0xa5, 0x9d, 0x2b, 0x05, 0xa8, 0x5d, 0xa7, 0x9a, 0x67, 0x30, 0x08, 0xe4, 0x7a, 0xea, 0xa7,
        0x90, 0x17, 0xbf, 0x09, 0x85, 0x73, 0x68, 0xa2, 0x38, 0x9f, 0x25, 0x4e, 0x47, 0xfb, 0x77,
        0xea, 0x56, 0xd8, 0xc4, 0xc8, 0x11, 0xc7, 0xd0, 0x2a, 0xdc, 0x4a, 0xed, 0x0f, 0x5f, 0x70,
        0x60, 0xa5, 0x4c, 0xf1, 0xfe, 0x5b, 0xe6, 0xb4, 0x4e, 0x22, 0x94, 0x86, 0xb4, 0x41,
    ];
    for input in [&far_blocks[..], &counts_behind, &one_cluster_of_two] {
        run(input);
    }
}

#[test]
fn images() {
    bolero::check!().with_max_len(129).with_iterations(30).for_each(|input: &[u8]| _ = run(input));
}

#[test]
fn a_short_run_that_is_the_same_each_time() {
    let mut state = 99u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 56) as u8
    };
    let outcomes: Vec<Outcome> = (0..150)
        .map(|i| {
            let input: Vec<u8> = (0..1 + 8 * (1 + i % 6)).map(|_| next()).collect();
            run(&input)
        })
        .collect();
    let count = |f: fn(&Outcome) -> bool| outcomes.iter().filter(|o| f(o)).count();
    assert!(count(|o| o.opened) > 50, "hardly any was opened");
    assert!(count(|o| !o.opened) > 5, "hardly any was refused");
    assert!(count(|o| o.repaired && !o.clean) > 5, "hardly any was repaired");
}
