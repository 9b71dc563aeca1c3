use super::*;
use alloc::vec;
use zerocopy::IntoBytes;

#[test]
fn copies_of_every_alignment_and_length_are_exact() {
    let mem = HeapPages::new(1);
    for at in 0..17 {
        for len in 0..40 {
            let data: Vec<u8> = (0..len).map(|i| (i * 7 + at + 1) as u8).collect();
            mem.write(0, &[0xee; 64]);
            mem.write(at, &data);
            let mut all = [0; 64];
            mem.read(0, &mut all);
            let mut expected = vec![0xee; 64];
            expected[at..at + len].copy_from_slice(&data);
            assert_eq!(all[..], expected, "write at={at} len={len}");
            let mut back = vec![0; len];
            mem.read(at, &mut back);
            assert_eq!(back, data, "read at={at} len={len}");
        }
    }
}

#[test]
fn long_copies_are_exact_too() {
    let mem = HeapPages::new(2);
    let noise = |seed: usize, len: usize| -> Vec<u8> {
        (0..len).map(|i| (((i + seed) * 2_654_435_761) >> 7) as u8).collect()
    };
    for at in [0, 1, 8, 4093] {
        for len in [STRING - 1, STRING, STRING + 1, 1448, 4096] {
            let (before, data) = (noise(1, 2 * PAGE_SIZE), noise(at + len, len));
            mem.write(0, &before);
            mem.write(at, &data);
            let mut all = vec![0; 2 * PAGE_SIZE];
            mem.read(0, &mut all);
            let mut expected = before;
            expected[at..at + len].copy_from_slice(&data);
            assert!(all == expected, "write at={at} len={len}");
            let mut back = vec![0; len];
            mem.copy_out(at, &mut back);
            assert!(back == data, "read at={at} len={len}");
        }
    }
}

#[test]
fn typed_values_round_trip() {
    let region = Region::new(HeapPages::new(1));
    let value = [1u32, 2, 3, 4, 5];
    region.owner().write(64, value.as_bytes());
    for unit in [Unit::Four, Unit::One] {
        assert_eq!(region.load::<[u32; 5]>(64, unit), value);
    }
    assert_eq!(region.load::<u32>(68, Unit::Four), 2);
    region.owner().write(128, [7u64, 8].as_bytes());
    assert_eq!(region.load::<[u64; 2]>(128, Unit::Eight), [7, 8]);
    assert_eq!(region.load::<[u32; 4]>(128, Unit::One), [7, 0, 8, 0]);
    let large: [u64; 14] = core::array::from_fn(|i| i as u64 * 3);
    region.owner().write(1024, large.as_bytes());
    for unit in [Unit::Sixteen, Unit::Eight, Unit::Four, Unit::One] {
        assert_eq!(region.load::<[u64; 14]>(1024, unit), large);
    }
    region.owner().write(131, &[9; 3]);
    assert_eq!(region.word(132).load(Relaxed), 0x0909);
    assert_eq!(region.word(72).load(Relaxed), 3);
    assert_eq!(region.word64(64).load(Relaxed), 1 | 2 << 32);
}

#[test]
#[should_panic(expected = "bytes at")]
fn a_range_beyond_the_end_panics() {
    HeapPages::new(1).read(4090, &mut [0; 7]);
}

#[test]
#[should_panic(expected = "bytes at")]
fn an_offset_that_overflows_panics() {
    HeapPages::new(1).write(usize::MAX, &[0; 7]);
}

#[test]
#[should_panic(expected = "word at 2")]
fn a_word_that_is_not_aligned_panics() {
    HeapPages::new(1).word(2);
}

#[test]
fn both_holders_of_an_arc_see_one_memory() {
    let a = Arc::new(HeapPages::new(2));
    let b: Arc<dyn SharedMem> = a.clone();
    a.word(4096).store(7, Relaxed);
    assert_eq!(b.word(4096).load(Relaxed), 7);
    let mut byte = [0];
    b.copy_out(4096, &mut byte);
    assert_eq!((byte[0], b.length(), b.is_empty()), (7, 8192, false));
}

#[test]
fn the_unit_divides_size_and_stride() {
    for stride in 1..130 {
        for size in 1..130 {
            let unit = Unit::of(stride, size).bytes();
            let wide = if cfg!(target_arch = "x86_64") && size >= 64 { 16 } else { 8 };
            let largest = [wide, 8, 4, 1].into_iter().find(|u| stride % u == 0 && size % u == 0);
            assert_eq!(Some(unit), largest, "{stride} {size}");
        }
    }
}
