//! `ringback bench net` in its smallest form.

use std::process::Command;

#[test]
fn a_row_without_kept_pages_and_one_with_them() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ringback"));
    command.args(["bench", "net", "--json", "--rounds", "1", "--seconds", "0.1"]);
    command.args(["--pages", "1", "--pages", "4", "--size", "1500", "--size", "64k"]);
    let ended = command.output().expect("the bench");
    let errors = String::from_utf8_lossy(&ended.stderr);
    assert!(ended.status.success(), "{errors}");
    let document: serde_json::Value = serde_json::from_slice(&ended.stdout).expect("JSON");
    assert_eq!((&document["schema"], &document["bench"]), (&1.into(), &"net".into()));
    let rows = document["rows"].as_array().expect("rows");
    assert_eq!(rows.len(), 8, "{document}");
    for (number, row) in rows.iter().enumerate() {
        let value = |name: &str| row[name].as_f64().unwrap_or_else(|| panic!("{name}: {row}"));
        let gso = number >= 4;
        assert_eq!(row["gso"], gso);
        assert_eq!(value("bytes"), if gso { 65_214.0 } else { 1500.0 });
        assert_eq!(value("ring_pages"), if number % 4 < 2 { 1.0 } else { 4.0 });
        assert_eq!(row["staging"], if number % 2 == 0 { "off" } else { "on" });
        assert!(value("packets_per_s") > 100.0 && value("gbit_per_s") > 0.0, "{row}");
        assert!(value("guest_cpu_us") > 0.0 && value("backend_cpu_us") > 0.0, "{row}");
        assert!(value("guest_calls") > 0.0 && value("backend_calls") > 0.0, "{row}");
    }
    // With all pages kept nothing is copied by the hypervisor, which is asked for nothing then.
    for pair in rows.chunks(2) {
        let calls = |row: &serde_json::Value| row["backend_calls"].as_f64();
        assert!(calls(&pair[1]) < calls(&pair[0]), "{document}");
    }
}

#[test]
fn what_makes_no_sense_is_refused() {
    for wrong in [["--pages", "2"], ["--seconds", "0"], ["--size", "9000"]] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ringback"));
        let ended = command.args(["bench", "net"]).args(wrong).output().expect("the bench");
        assert!(!ended.status.success() && ended.stdout.is_empty(), "{wrong:?}");
        assert!(String::from_utf8_lossy(&ended.stderr).contains(wrong[0]), "{wrong:?}");
    }
}
