//! Ctrl-C in the middle.

use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use super::{Place, Said};

/// Starts a command, interrupts it when `begun`, and says what it has said; it ends within a
/// second.
fn interrupted(place: &Place, args: &[&str], begun: impl Fn() -> bool) -> Said {
    let mut command = place.command(args);
    let mut child: Child =
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("ringback");
    let limit = Instant::now() + Duration::from_secs(30);
    while !begun() {
        assert!(child.try_wait().expect("a state").is_none(), "{args:?}: it has ended");
        assert!(Instant::now() < limit, "{args:?}: it has not begun");
        std::thread::sleep(Duration::from_millis(1));
    }
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("kill");
    let start = Instant::now();
    let output = child.wait_with_output().expect("ringback");
    let took = start.elapsed();
    assert!(took < Duration::from_secs(1), "{args:?}: it has taken {took:?}");
    Said::of(output)
}

fn size(place: &Place, name: &str) -> u64 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(place.path(name)).map_or(0, |m| m.blocks() * 512)
}

#[test]
fn a_convert_removes_its_target() {
    let place = Place::new();
    place.ok(&["create", "-o", "preallocation=falloc", "s.raw", "4G"]);
    let args = ["convert", "-S", "0", "-t", "none", "-O", "raw", "s.raw", "t.raw"];
    let said = interrupted(&place, &args, || size(&place, "t.raw") > 1 << 20);
    assert_eq!(said.code, 1, "{said:?}");
    assert!(said.err.contains("interrupted; t.raw was removed"), "{said:?}");
    assert!(!place.path("t.raw").exists());
}

#[test]
fn a_convert_into_what_is_there_leaves_it_and_says_so() {
    let place = Place::new();
    place.ok(&["create", "-o", "preallocation=falloc", "s.raw", "4G"]);
    place.ok(&["create", "t.raw", "4G"]);
    let args = ["convert", "-n", "-S", "0", "-t", "none", "-O", "raw", "s.raw", "t.raw"];
    let said = interrupted(&place, &args, || size(&place, "t.raw") > 1 << 20);
    assert_eq!(said.code, 1, "{said:?}");
    assert!(said.err.contains("it holds a part of the copy"), "{said:?}");
    assert!(place.path("t.raw").exists());
}

#[test]
fn a_create_removes_what_it_made() {
    let place = Place::new();
    let args = ["create", "-o", "preallocation=full", "a.raw", "16G"];
    let said = interrupted(&place, &args, || size(&place, "a.raw") > 1 << 20);
    assert_eq!(said.code, 1, "{said:?}");
    assert!(said.err.contains("a.raw was removed"), "{said:?}");
    assert!(!place.path("a.raw").exists());
}

#[test]
fn a_rebase_leaves_an_image_that_reads_as_before() {
    let place = Place::new();
    place.ok(&["create", "old.raw", "2G"]);
    let writes: Vec<String> =
        (0..64).map(|n| format!("write -P {} {}M 4M", n + 1, n * 32)).collect();
    let writes: Vec<&str> = writes.iter().map(String::as_str).collect();
    place.qemu_io("raw", "old.raw", &writes);
    place.ok(&["create", "new.raw", "2G"]);
    place.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "old.raw", "-F", "raw", "a.qcow2"]);
    let begun = || size(&place, "a.qcow2") > 4 << 20;
    let said = interrupted(&place, &["rebase", "-b", "new.raw", "-F", "raw", "a.qcow2"], begun);
    assert_eq!(said.code, 1, "{said:?}");
    assert!(said.err.contains("it still builds on what it did"), "{said:?}");
    place.assert_checked("a.qcow2", "qcow2");
    place.assert_same(("old.raw", "raw"), ("a.qcow2", "qcow2"));
}

#[test]
fn a_compressing_convert_removes_its_target() {
    let place = Place::new();
    place.ok(&["create", "-o", "preallocation=falloc", "s.raw", "2G"]);
    let writes: Vec<String> =
        (0..32).map(|n| format!("write -P {} {}M 8M", n + 1, n * 64)).collect();
    let writes: Vec<&str> = writes.iter().map(String::as_str).collect();
    place.qemu_io("raw", "s.raw", &writes);
    let args = ["convert", "-c", "-O", "qcow2", "s.raw", "t.qcow2"];
    let said = interrupted(&place, &args, || size(&place, "t.qcow2") > 200_000);
    assert_eq!(said.code, 1, "{said:?}");
    assert!(said.err.contains("t.qcow2 was removed"), "{said:?}");
    assert!(!place.path("t.qcow2").exists());
}
