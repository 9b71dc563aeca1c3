//! A disk's model: its bytes in memory, and random requests on both.
use blktap::{DiskQueue, Op, Request};
use proptest::prelude::*;

use super::{Memory, Scattered, pattern, perform, request};

/// Bytes of the modelled disk.
pub const SIZE: u64 = 1 << 20;

/// One request of a random run.
#[derive(Clone, Debug)]
pub struct Step {
    op: Op,
    block: u64,
    blocks: u64,
    odd: usize,
    cuts: Vec<usize>,
    seed: u64,
}

/// Random requests in units of `block`.
pub fn steps(block: u64) -> impl Strategy<Value = Vec<Step>> {
    let op = prop_oneof![
        4 => Just(Op::Read),
        4 => Just(Op::Write),
        1 => Just(Op::WriteFua),
        1 => Just(Op::Flush),
        1 => Just(Op::Discard),
        1 => Just(Op::WriteZeroes),
    ];
    let odd = prop_oneof![Just(0usize), Just(512), Just(8), Just(3)];
    let cuts = prop::collection::vec(1usize..9, 0..12);
    let step = (op, 0..SIZE / block, 1u64..40, odd, cuts, any::<u64>()).prop_map(
        move |(op, at, blocks, odd, cuts, seed)| {
            let blocks = blocks.min(SIZE / block - at);
            Step { op, block: at, blocks, odd, cuts, seed }
        },
    );
    prop::collection::vec(step, 1..30)
}

/// Piece lengths in 512-byte units that sum up to `len`.
fn cut(len: usize, cuts: &[usize]) -> Vec<usize> {
    let (mut lens, mut left) = (Vec::new(), len);
    for c in cuts {
        let n = (c * 512).min(left);
        if n > 0 {
            lens.push(n);
            left -= n;
        }
    }
    if left > 0 {
        lens.push(left);
    }
    lens
}

/// Carries out `steps` on the (zeroed) disk and on a model, and compares.
pub fn run(queue: &mut dyn DiskQueue, block: u64, steps: &[Step]) {
    let mut model = vec![0u8; SIZE as usize];
    for (n, s) in steps.iter().enumerate() {
        let (offset, len) = (s.block * block, (s.blocks * block) as usize);
        let range = offset as usize..offset as usize + len;
        match s.op {
            Op::Read => {
                let mut m = Scattered::new(&cut(len, &s.cuts), s.odd);
                let bufs = m.bufs();
                assert_eq!(perform(queue, &request(Op::Read, offset, &bufs, n as u64)), 0);
                assert!(m.get() == model[range], "step {n} {s:?}");
            }
            Op::Write | Op::WriteFua => {
                let data = pattern(s.seed, len);
                let mut m = Scattered::new(&cut(len, &s.cuts), s.odd);
                m.set(&data);
                let bufs = m.bufs();
                assert_eq!(perform(queue, &request(s.op, offset, &bufs, n as u64)), 0);
                model[range].copy_from_slice(&data);
            }
            _ => {
                let r = Request { op: s.op, offset, len: len as u64, bufs: &[], token: n as u64 };
                assert_eq!(perform(queue, &r), 0, "step {n} {s:?}");
                // A raw file's discarded range reads as zeroes (the contract allows old data).
                if s.op != Op::Flush {
                    model[range].fill(0);
                }
            }
        }
    }
    let mut m = Memory::new(SIZE as usize, 0);
    let whole = [m.buf()];
    assert_eq!(perform(queue, &request(Op::Read, 0, &whole, 0)), 0);
    assert!(m.slice() == model, "the whole disk");
}
