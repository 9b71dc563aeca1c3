//! Both ends of a ring against the model in `world`, for operations in any order, with indices
//! that wrap, and with a peer that lies.

mod world;

use proptest::prelude::*;
use world::{Op, World};

fn honest() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => Just(Op::Push),
        2 => Just(Op::PublishRequests),
        4 => Just(Op::Take),
        4 => any::<u8>().prop_map(Op::Respond),
        2 => Just(Op::PublishResponses),
        4 => Just(Op::TakeResponse),
        1 => prop_oneof![Just(Op::TakeAll), Just(Op::TakeAllResponses)],
        1 => any::<u8>().prop_map(Op::RespondAll),
        1 => any::<u8>().prop_map(Op::ArmBack),
        1 => any::<u8>().prop_map(Op::ArmFront),
        1 => prop_oneof![
            Just(Op::DisarmBack), Just(Op::DisarmFront), Just(Op::PollBack), Just(Op::PollFront)
        ],
    ]
}

fn hostile() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => honest(),
        1 => prop_oneof![-200i32..200, any::<i32>()].prop_map(Op::LieRequests),
        1 => prop_oneof![-200i32..200, any::<i32>()].prop_map(Op::LieResponses),
        1 => (any::<bool>(), any::<u32>()).prop_map(|(r, v)| Op::LieEvent(r, v)),
        1 => (any::<u8>(), any::<u64>()).prop_map(|(s, v)| Op::Scribble(s, v)),
    ]
}

/// Indices that wrap during the run as often as not.
fn start() -> impl Strategy<Value = u32> {
    prop_oneof![Just(0), (0u32..300).prop_map(|n| u32::MAX - 1 - n), 0..u32::MAX]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn honest_ends_agree_with_the_model(start in start(), ops in prop::collection::vec(honest(), 1..600)) {
        let mut world = World::new(start);
        ops.into_iter().for_each(|op| world.step(op));
        prop_assert_eq!(world.refused, 0);
    }

    #[test]
    fn a_lying_end_is_judged_as_the_model_says(start in start(), ops in prop::collection::vec(hostile(), 1..300)) {
        let mut world = World::new(start);
        ops.into_iter().for_each(|op| world.step(op));
    }
}
