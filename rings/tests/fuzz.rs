//! Fuzz target: any bytes are operations of two ring ends and of a lying peer, judged by the model
//! in `world`, which says for each index whether it is accepted and for each operation what must
//! come back.
//!
//! `cargo test` replays the corpus in `__fuzz__`, a run that is the same each time and a short
//! random one. Longer:
//! `BOLERO_RANDOM_TEST_TIME_MS=600000 BOLERO_RANDOM_ITERATIONS=1000000000 cargo test --release -p ringback-rings --test fuzz`, or
//! guided by coverage: `cargo bolero test -p ringback-rings ring_indices --sanitizer NONE`.

mod world;

use world::{Op, World};

/// Every 6 bytes are an operation.
fn decode(bytes: &[u8]) -> impl Iterator<Item = Op> {
    bytes.chunks_exact(6).map(|c| {
        let number = i32::from_le_bytes([c[2], c[3], c[4], c[5]]);
        match c[0] % 23 {
            0..=2 => Op::Push,
            3 => Op::PublishRequests,
            4..=6 => Op::Take,
            7 | 8 => Op::Respond(c[1]),
            9 => Op::PublishResponses,
            10 | 11 => Op::TakeResponse,
            12 => Op::ArmBack(c[1]),
            13 => Op::ArmFront(c[1]),
            14 if c[1] & 1 == 0 => Op::DisarmBack,
            14 => Op::DisarmFront,
            15 if c[1] & 1 == 0 => Op::PollBack,
            15 => Op::PollFront,
            // Small lies are the interesting ones.
            16 if c[1] & 1 == 0 => Op::LieRequests(number),
            16 => Op::LieRequests(i32::from(c[2] as i8)),
            17 if c[1] & 1 == 0 => Op::LieResponses(number),
            17 => Op::LieResponses(i32::from(c[2] as i8)),
            18 => Op::LieEvent(c[1] & 1 == 0, number as u32),
            19 => Op::TakeAll,
            20 => Op::RespondAll(c[1]),
            21 => Op::TakeAllResponses,
            _ => Op::Scribble(c[1], u64::from(number as u32)),
        }
    })
}

/// The first 4 bytes are where the indices start. Gives how many lies were refused.
fn run(input: &[u8]) -> u32 {
    let Some((start, ops)) = input.split_first_chunk() else { return 0 };
    let mut world = World::new(u32::from_le_bytes(*start).min(u32::MAX - 1));
    decode(ops).take(2000).for_each(|op| world.step(op));
    world.refused
}

#[test]
fn ring_indices() {
    bolero::check!()
        .with_max_len(6004)
        .with_iterations(1000)
        .for_each(|input: &[u8]| _ = run(input));
}

#[test]
fn a_short_run_that_is_the_same_each_time() {
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 56) as u8
    };
    let refused: u32 = (0..300)
        .map(|_| {
            let input: Vec<u8> = (0..1800).map(|_| next()).collect();
            run(&input)
        })
        .sum();
    assert!(refused > 1000, "the run hardly lied: {refused}");
}
