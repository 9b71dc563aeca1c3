use super::*;
use crate::mem::{HeapPages, SharedMem};
use alloc::vec;
use alloc::vec::Vec;
use core::cell::Cell;

fn filled(pages: usize) -> HeapPages {
    let mem = HeapPages::new(pages);
    for i in 0..pages * PAGE_SIZE / 8 {
        mem.write(i * 8, &(i as u64).to_le_bytes());
    }
    mem
}

#[test]
fn counts_at_every_edge_are_judged() {
    let mem = filled(3);
    let all: Vec<_> = (0..3).map(|p| (&mem, p * PAGE_SIZE)).collect();
    for count in 0..=1600usize {
        for (pages, most) in [(0, 1024), (1, 1024), (2, 1024), (3, 1536), (2, 600)] {
            let mut into = vec![u64::MAX; most];
            let got = read_table(all[..pages].iter().copied(), count, &mut into);
            let expected = if count == 0 {
                Err(IndirectError::Empty)
            } else if count > most {
                Err(IndirectError::TooMany { count, most })
            } else if count > pages * 512 {
                Err(IndirectError::MissingPage { needed: count.div_ceil(512), found: pages })
            } else {
                Ok((0..count as u64).collect::<Vec<_>>())
            };
            assert_eq!(got.map(<[u64]>::to_vec), expected, "{count} in {pages} of {most}");
            if count <= 512 && pages > 0 {
                assert!(into[count.min(most)..].iter().all(|v| *v == u64::MAX));
            }
        }
    }
}

#[test]
fn each_page_is_asked_for_once_and_only_if_needed() {
    let mem = filled(2);
    let asked = Cell::new(0);
    let pages = (0..2).map(|p| {
        asked.set(asked.get() + 1);
        (&mem, p * PAGE_SIZE)
    });
    let mut into = [0u64; 512];
    read_table(pages, 512, &mut into).expect("one page");
    assert_eq!(asked.get(), 1);
}

#[test]
fn entries_that_do_not_divide_a_page_do_not_cross_it() {
    let mem = filled(2);
    assert_eq!(per_page::<[u8; 12]>(), 341);
    assert_eq!(pages_for::<[u8; 12]>(342), 2);
    let mut into = [[0u8; 12]; 342];
    let table = read_table([(&mem, 0), (&mem, PAGE_SIZE)], 342, &mut into).expect("table");
    assert_eq!(table[341][..8], 512u64.to_le_bytes());
}
