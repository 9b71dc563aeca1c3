//! Each job, while the guest writes.

use std::time::{Duration, Instant};

use super::*;

const XVDA: &str = "1/xvda";

/// What `qemu-img` calls a format.
fn qemu(format: &str) -> &str {
    if format == "vhd" { "vpc" } else { format }
}

#[test]
fn snapshots_lose_nothing() {
    for format in ["raw", "qcow2", "vhd"] {
        let folder = folder();
        image(folder.path(), format, "base", None);
        let guest = Guest::start(folder, &[&format!("{format}:base")]);
        let mut fio = guest.fio("xvda", 4, 1);
        let overlay_format = if format == "vhd" { "vhd" } else { "qcow2" };
        for overlay in ["one", "two", "three"] {
            let args =
                ["snapshot", "create", "--live", XVDA, "--overlay", overlay, "-O", overlay_format];
            let said = guest.ok(&args);
            assert!(said.contains("snapshot done"), "{said}");
            std::thread::sleep(Duration::from_millis(300));
        }
        assert!(fio.runs(), "fio has ended too early");
        fio.well();
        assert_eq!(guest.job(XVDA)["disk"], format!("{overlay_format}:{}", text(&guest.path("three"))));
        let seen = guest.copy("xvda", "seen");
        // What is below the newest is not locked for reading, and nobody can write to it.
        let base = guest.path("two");
        let written = run("qemu-io", &["-f", qemu(overlay_format), "-c", "write 0 4k", text(&base)]);
        assert!(String::from_utf8_lossy(&written.stderr).contains("lock"), "{written:?}");
        let kept = guest.end();
        let kept = kept.path();
        for overlay in ["one", "two", "three"] {
            check(&kept.join(overlay), overlay_format);
        }
        same((&seen, "raw"), (&kept.join("three"), qemu(overlay_format)));
    }
}

#[test]
fn a_paused_disk_waits_and_goes_on() {
    let folder = folder();
    image(folder.path(), "qcow2", "disk", None);
    let guest = Guest::start(folder, &["qcow2:disk"]);
    let mut fio = guest.fio("xvda", 4, 2);
    guest.ok(&["pause", "--live", XVDA]);
    assert_eq!(guest.job(XVDA)["state"], "paused");
    // Its files are let go: another program may have the image.
    check(&guest.path("disk"), "qcow2");
    // Who waits does not work.
    let before = cpu_of_backend(&guest);
    std::thread::sleep(Duration::from_millis(500));
    let used = cpu_of_backend(&guest) - before;
    assert!(used < Duration::from_millis(50), "{used:?} of processor time in a pause");
    assert!(guest.refused(&["pause", "--live", XVDA]).contains("a job runs already (pause)"));
    guest.ok(&["resume", "--live", XVDA]);
    assert!(guest.refused(&["resume", "--live", XVDA]).contains("not paused"));
    assert!(fio.runs(), "fio has ended too early");
    fio.well();
    guest.end();
}

/// Processor time of the backend that serves the guest.
fn cpu_of_backend(guest: &Guest) -> Duration {
    let parent = guest.child.as_ref().expect("running").id();
    let children = std::fs::read_to_string(format!("/proc/{parent}/task/{parent}/children"));
    let children = children.expect("its children");
    let mut ticks = 0;
    for pid in children.split_whitespace() {
        let line = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        if line.contains("\0backend\0") {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("its times");
            let after = stat.rsplit(')').next().expect("a name in brackets").to_owned();
            let fields: Vec<&str> = after.split_whitespace().collect();
            let number = |at: usize| fields[at].parse::<u64>().expect("a number");
            ticks += number(11) + number(12);
        }
    }
    // USER_HZ is 100 on all of Linux's platforms that we know.
    Duration::from_millis(ticks * 10)
}

/// A guest whose requests are held cannot close its disk; but it can be killed, and the backend
/// ends as it should.
#[test]
fn a_guest_can_be_killed_in_a_pause() {
    let folder = folder();
    image(folder.path(), "raw", "disk", None);
    let mut guest = Guest::start(folder, &["raw:disk"]);
    let _fio = guest.fio("xvda", 30, 3);
    guest.ok(&["pause", "--live", XVDA]);
    let parent = guest.child.as_ref().expect("running").id();
    let children = std::fs::read_to_string(format!("/proc/{parent}/task/{parent}/children"));
    for pid in children.expect("its children").split_whitespace() {
        let line = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        if line.contains("\0guest\0") {
            let pid = Pid::from_raw(pid.parse().expect("a number")).expect("a process");
            kill_process(pid, Signal::KILL).expect("SIGKILL");
        }
    }
    let begun = Instant::now();
    let status = guest.child.take().expect("running").wait().expect("an end");
    assert!(!status.success(), "a killed guest is no good end");
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
}
