use core::sync::atomic::Ordering::Relaxed;

use super::*;
use crate::PAGE_SIZE;
use crate::mem::HeapPages;

/// Entries of N bytes.
struct Of<const N: usize>;
impl<const N: usize> Entry for Of<N> {
    const STRIDE: usize = N;
}

fn row<const N: usize>(first: usize, count: u32) -> Row<HeapPages, Of<N>> {
    Row::new(Region::new(HeapPages::new(1)), first, count)
}

#[test]
fn an_entry_keeps_what_is_stored_and_no_other_changes() {
    let row = row::<112>(64, 32);
    for n in 0..32 {
        row.store(n, &[u64::from(n); 14]);
    }
    // Of a smaller value the rest stays.
    row.store(5, &[77u64, 78]);
    for n in 0..32 {
        let rest = [u64::from(n); 14];
        let found: [u64; 14] = row.load(n);
        assert_eq!(found[2..], rest[2..]);
        assert_eq!(found[..2], if n == 5 { [77, 78] } else { [u64::from(n); 2] });
    }
}

#[test]
fn any_index_names_an_entry() {
    let row = row::<12>(64, 256);
    assert_eq!(row.count(), 256);
    for index in [0, 1, 255, 256, 257, u32::MAX - 256, u32::MAX] {
        row.store(index, &[index, !index, 7]);
        assert_eq!(row.load::<[u32; 3]>(index % 256), [index, !index, 7]);
        let at = 64 + (index % 256) as usize * 12;
        assert_eq!(row.region().word(at).load(Relaxed), index);
    }
}

#[test]
fn words_are_side_by_side() {
    let row = Row::<_, AtomicU32>::new(Region::new(HeapPages::new(1)), 4096 - 64, 16);
    for n in 0..32 {
        row.set_at(n, n);
    }
    assert_eq!(row.word_at(15).load(Relaxed), 31);
    assert_eq!(row.region().word(PAGE_SIZE - 4).load(Relaxed), 31);
}

#[test]
#[should_panic(expected = "4096 bytes at 16 of 4096")]
fn a_row_beyond_the_memory_is_refused() {
    let _ = row::<16>(16, 256);
}

#[test]
#[should_panic(expected = "is_power_of_two")]
fn a_row_of_an_odd_number_is_refused() {
    let _ = row::<16>(64, 24);
}
