//! docs/tuning.md says what the code does.

#[test]
fn the_table_of_knobs_is_the_codes_own() {
    let page = include_str!("../docs/tuning.md");
    let table = blkback::config::markdown();
    assert!(
        page.contains(&table),
        "docs/tuning.md: put the output of `ringback knobs --markdown` there"
    );
}

#[test]
fn every_counter_that_a_knob_names_exists() {
    use perf::Block;
    let fields = [
        blkback::QueueCounters::FIELDS,
        rings::RingCounters::FIELDS,
        rings::persistent::PoolCounters::FIELDS,
        blktap::engine::EngineCounters::FIELDS,
    ];
    let known = |name: &str| fields.iter().any(|f| f.iter().any(|field| field.name == name));
    for knob in blkback::config::KNOBS {
        for name in knob.shows_in.split([',', ' ']).filter(|w| w.contains('_')) {
            assert!(known(name), "{} shows in {name}, which no counter is called", knob.name);
        }
    }
}
