//! docs/tuning.md says what the code does.

use hypervisor::xenbus::knobs::Knobs;
use perf::{Block, Field};

#[test]
fn the_tables_of_knobs_are_the_codes_own() {
    let page = include_str!("../docs/tuning.md");
    for table in [blkback::Config::markdown(), netback::Config::markdown()] {
        assert!(
            page.contains(&table),
            "docs/tuning.md: put the output of `ringback knobs --markdown` there"
        );
    }
}

/// Each counter that a knob of `C` names is one of `fields`.
fn exist<C: Knobs>(fields: &[&[Field]]) {
    let known = |name: &str| fields.iter().any(|f| f.iter().any(|field| field.name == name));
    for knob in C::KNOBS {
        for name in knob.shows_in.split([',', ' ']).filter(|w| w.contains('_')) {
            assert!(known(name), "{} shows in {name}, which no counter is called", knob.name);
        }
    }
}

#[test]
fn every_counter_that_a_knob_names_exists() {
    exist::<blkback::Config>(&[
        blkback::QueueCounters::FIELDS,
        rings::RingCounters::FIELDS,
        rings::persistent::PoolCounters::FIELDS,
        blktap::engine::EngineCounters::FIELDS,
    ]);
    exist::<netback::Config>(&[netback::QueueCounters::FIELDS, rings::RingCounters::FIELDS]);
}
