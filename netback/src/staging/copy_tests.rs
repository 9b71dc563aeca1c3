// The tests' own memory stands for granted pages.
#![allow(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use hypervisor::GrantRef;
use rings::mem::HeapPages;

use super::super::Run;
use super::*;
use crate::frame::Pool;

/// Pages of a guest from the reference 50 on, of which some can be mapped.
fn mapping(pages: &Arc<HeapPages>, first: usize, count: usize, access: Access) -> Memory {
    let keep = pages.clone();
    let unmap = move || {
        drop(keep);
        Ok(())
    };
    // SAFETY: pages of the heap, kept until it is unmapped.
    let mapping = unsafe {
        Mapping::new(pages.base().add(first * PAGE_SIZE), count, access, Box::new(unmap))
    };
    Memory::of(mapping).expect("memory")
}

const FIRST: GrantRef = 50;

/// Two pages to be read, two to be written, and two that are not mapped.
fn table() -> (Arc<HeapPages>, Staging<Memory>) {
    let pages = Arc::new(HeapPages::new(6));
    for page in 0..6 {
        pages.write(page * PAGE_SIZE, &[page as u8 + 1; PAGE_SIZE]);
    }
    let table = Staging::new(10);
    let run = |first: usize, access| {
        let refs = vec![FIRST + first as u32, FIRST + first as u32 + 1];
        Run::new(refs, access, mapping(&pages, first, 2, access))
    };
    table.add(vec![run(0, Access::ReadOnly), run(2, Access::ReadWrite)]);
    (pages, table)
}

fn op(frame: &Frame, page: u32, offset: u16, len: u16, direction: Direction) -> CopyOp {
    CopyOp { gref: FIRST + page, offset, len, at: frame.at(), direction, status: 77 }
}

/// Frames of these lengths.
fn frames(lens: &[usize]) -> (Pool, Vec<Frame>) {
    let mut pool = Pool::on_heap(lens.len());
    let frames = lens.iter().map(|len| {
        let mut frame = pool.take().expect("a frame");
        frame.set_len(*len);
        frame
    });
    let frames = frames.collect();
    (pool, frames)
}

/// Copies, and what the hypervisor was asked for.
fn copy(
    table: &Staging<Memory>,
    frames: &mut [Frame],
    ops: &mut [CopyOp],
) -> (Copied, Vec<GrantRef>) {
    let mut asked = Vec::new();
    let copied = table.copy(frames.iter_mut(), ops, &mut Split::default(), |rest| {
        for (number, op) in rest.iter_mut().enumerate() {
            asked.push(op.gref);
            op.status = -(number as i16);
        }
        Ok(())
    });
    (copied.expect("copied"), asked)
}

#[test]
fn a_packet_of_both_kinds_of_pages_has_each_byte_and_each_status_at_its_place() {
    let (_pages, table) = table();
    let (_pool, mut all) = frames(&[300, 100, 50]);
    use Direction::FromGrant;
    let at = |op: CopyOp, by: usize| CopyOp { at: op.at + by, ..op };
    let mut ops = [
        op(&all[0], 0, 5, 100, FromGrant),
        at(op(&all[0], 4, 0, 100, FromGrant), 100),
        at(op(&all[0], 3, 3996, 100, FromGrant), 200),
        op(&all[1], 5, 0, 100, FromGrant),
        op(&all[2], 2, 0, 50, FromGrant),
    ];
    let (copied, asked) = copy(&table, &mut all, &mut ops);
    assert_eq!((copied, asked), (Copied { staged: 3, copied: 2 }, vec![FIRST + 4, FIRST + 5]));
    assert_eq!(ops.map(|op| op.status), [0, 0, 0, -1, 0]);
    assert!(all[0][..100] == [1; 100] && all[0][200..] == [4; 100] && all[2][..] == [3; 50]);
    assert!(all[0][100..200].iter().chain(&all[1][..]).all(|byte| *byte == 0));
    assert_eq!(copied.calls(), 1);
}

#[test]
fn to_the_guest_only_pages_that_may_be_written() {
    let (pages, table) = table();
    let (_pool, mut all) = frames(&[60, 60]);
    all.iter_mut().for_each(|frame| frame.fill(9));
    let to = Direction::ToGrant;
    let mut ops = [op(&all[0], 0, 0, 60, to), op(&all[1], 3, 10, 60, to)];
    let (copied, asked) = copy(&table, &mut all, &mut ops);
    assert_eq!((copied, asked), (Copied { staged: 1, copied: 1 }, vec![FIRST]));
    let mut bytes = [0; 6 * PAGE_SIZE];
    pages.read(0, &mut bytes);
    let from = 3 * PAGE_SIZE + 10;
    assert!(bytes[from..from + 60] == [9; 60], "not written");
    let untouched = bytes.iter().enumerate().filter(|(at, _)| !(from..from + 60).contains(at));
    assert!(untouched.into_iter().all(|(at, byte)| usize::from(*byte) == at / PAGE_SIZE + 1));
}

#[test]
fn what_leaves_its_page_or_belongs_to_no_frame_is_left_to_the_grant_copy() {
    let (_pages, table) = table();
    let (_pool, mut all) = frames(&[200, 60]);
    use Direction::FromGrant;
    let beyond = op(&all[0], 1, 4000, 97, FromGrant);
    let stray = CopyOp { at: usize::MAX - 3, ..op(&all[0], 1, 0, 60, FromGrant) };
    let mut ops = [beyond, op(&all[1], 1, 4036, 60, FromGrant), stray];
    let (copied, _) = copy(&table, &mut all, &mut ops);
    assert_eq!(copied, Copied { staged: 1, copied: 2 });
    assert_eq!(ops.map(|op| op.status), [0, 0, -1]);
}

#[test]
fn all_or_nothing_in_the_table() {
    let (_pages, table) = table();
    let (_pool, mut all) = frames(&[60]);
    let mut ops = [op(&all[0], 0, 0, 60, Direction::FromGrant)];
    let (copied, asked) = copy(&table, &mut all, &mut ops);
    assert_eq!((copied.calls(), asked.len()), (0, 0), "the hypervisor was called for nothing");
    let (copied, asked) = copy(&Staging::new(10), &mut all, &mut ops);
    assert_eq!((copied, asked.len()), (Copied { staged: 0, copied: 1 }, 1));
    let mut ops = [op(&all[0], 5, 0, 60, Direction::FromGrant)];
    let fails = |_: &mut [CopyOp]| Err(io::Error::other("no"));
    assert!(table.copy(all.iter_mut(), &mut ops, &mut Split::default(), fails).is_err());
}

/// The guest writes the page while it is copied: each word is one that was there.
#[test]
fn a_page_that_changes_meanwhile_is_read_once() {
    let (pages, table) = table();
    let (_pool, mut all) = frames(&[4096]);
    let rounds = AtomicU64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for value in (0..=255u8).cycle() {
                pages.write(2 * PAGE_SIZE, &[value; PAGE_SIZE]);
                if rounds.load(Ordering::Relaxed) > 500 {
                    return;
                }
            }
        });
        for _ in 0..=501 {
            let mut ops = [op(&all[0], 2, 0, 4096, Direction::FromGrant)];
            copy(&table, &mut all, &mut ops);
            let whole = |word: &[u8]| word.iter().all(|byte| *byte == word[0]);
            assert!(all[0].chunks(8).all(whole), "a word was read in parts");
            rounds.fetch_add(1, Ordering::Relaxed);
        }
    });
}
