use super::*;

#[test]
fn every_knob_takes_its_default() {
    for knob in Config::KNOBS.iter().filter(|k| k.default != "CPUs") {
        let mut config = Config::default();
        config.set(knob.name, knob.default).unwrap();
        assert_eq!(config, Config::default(), "{}", knob.name);
    }
}

#[test]
fn lists_and_refusals() {
    let mut config = Config::default();
    config.set_all("cache=writeback,poll_us=0,cpus=0+1").unwrap();
    assert_eq!((config.cache, config.poll_us), (Cache::Writeback, 0));
    assert_eq!(config.placement.cpus, [0, 1]);
    let refusal = config.set("poll_us", "-1").unwrap_err();
    assert_eq!(refusal, "poll_us: -1 is not one of its values (0 to 10000)");
    assert!(config.set("max_indirect_segments", "5").is_err());
    assert!(config.set_all("speed").unwrap_err().contains("name=value"));
    assert!(config.set("speed", "9").unwrap_err().contains("poll_us"));
    assert!(config.set("node", "one").is_err());
    for (text, size) in [("4096", 4096), ("64k", 65536), ("2M", 2 << 20), ("1G", 1 << 30)] {
        config.set("l2_cache_size", text).unwrap();
        assert_eq!(config.l2_cache_size, L2Cache::Bytes(size));
    }
    config.set("l2_cache_size", "all").unwrap();
    assert_eq!(config.l2_cache_size, L2Cache::All);
    for bad in ["", "M", "4095", "2000G", "-1", "17179869184G", "\u{e4}"] {
        assert!(config.set("l2_cache_size", bad).is_err(), "{bad}");
    }
    config.set_all("node=1,grants=map,cache=none").unwrap();
    assert_eq!(config.placement.node, Some(1));
    assert!(config.agrees().unwrap_err().starts_with("grants=map: not with cache=none"));
    config.set_all("cache=writeback,node=none").unwrap();
    assert_eq!((config.agrees(), config.placement.node), (Ok(()), None));
}

#[test]
fn filters_have_knobs() {
    let mut config = Config::default();
    config.set_all("iops_total=1000,bps_write_max=20M,bps_write=10M,throttle_group=g").unwrap();
    assert_eq!(
        config.limits.to_string(),
        "iops_total=1000,bps_write=10485760,bps_write_max=20971520,bps_write_max_length=1"
    );
    assert_eq!(config.throttle_group.as_deref(), Some("g"));
    config.set("bps_write_max", "1M").unwrap();
    assert!(config.agrees().unwrap_err().contains("less than bps_write"));
    config.set_all("changed_block_log=/var/a.log,changed_block_granularity=1M").unwrap();
    let ChangedLog::In(path) = &config.changed else { panic!("{:?}", config.changed) };
    let options = config.log_options(path);
    assert_eq!((options.name.as_str(), options.granularity_bits), ("a", 20));
    for (knob, bad) in [
        ("changed_block_log", "a.log"),
        ("changed_block_granularity", "3K"),
        ("changed_block_granularity", "256"),
        ("throttle_group", ""),
        ("iops_read", "many"),
    ] {
        assert!(config.set(knob, bad).is_err(), "{knob}={bad}");
    }
}
