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
        assert_eq!(
            guest.job(XVDA)["disk"],
            format!("{overlay_format}:{}", text(&guest.path("three")))
        );
        let seen = guest.copy("xvda", "seen");
        // What is below the newest is not locked for reading, and nobody can write to it.
        let base = guest.path("two");
        let written =
            run("qemu-io", &["-f", qemu(overlay_format), "-c", "write 0 4k", text(&base)]);
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

/// base <- one <- two <- top, each with data of its own, and the guest writes into the top.
fn three_deep(format: &str) -> Guest {
    let folder = folder();
    let raw = if format == "qcow2" { "raw" } else { format };
    image(folder.path(), raw, "base", None);
    let base = folder.path().join("base");
    well("qemu-io", &["-f", qemu(raw), "-c", "write -P 9 1234k 9M", text(&base)]);
    let mut below = ("base", raw);
    for (n, name) in ["one", "two", "top"].into_iter().enumerate() {
        image(folder.path(), format, name, Some(below));
        below = (name, format);
        if format == "qcow2" {
            let at = n as u64 * (3 << 20);
            let (write, zero) =
                (format!("write -P {} {at} 7M", n + 1), format!("write -z {at} 70k"));
            let path = folder.path().join(name);
            well("qemu-io", &["-f", "qcow2", "-c", &write, "-c", &zero, text(&path)]);
        }
    }
    Guest::start(folder, &[&format!("{format}:top")])
}

/// Carries out a job while fio verifies; the guest's disk, and what it read at the end.
fn under_fio(guest: Guest, seed: u32, args: &[&str]) -> (tempfile::TempDir, String) {
    let mut fio = guest.fio("xvda", 5, seed);
    let said = guest.ok(args);
    assert!(said.contains(" done"), "{said}");
    assert!(fio.runs(), "fio has ended too early");
    fio.well();
    let disk = guest.job(XVDA)["disk"].as_str().expect("a name").to_owned();
    guest.copy("xvda", "seen");
    (guest.end(), disk)
}

/// The disk is clean, and reads as the guest read it.
fn judge(folder: &Path, disk: &str) {
    let (format, path) = disk.split_once(':').expect("FORMAT:PATH");
    if format != "raw" {
        check(Path::new(path), format);
    }
    same((&folder.join("seen"), "raw"), (Path::new(path), qemu(format)));
}

#[test]
fn a_mirror_is_switched_to() {
    for (n, format) in ["qcow2", "raw"].into_iter().enumerate() {
        let args = ["mirror", "--live", XVDA, "--switch", "-O", format, "copy"];
        let (folder, disk) = under_fio(three_deep("qcow2"), 10 + n as u32, &args);
        assert_eq!(disk, format!("{format}:{}", text(&folder.path().join("copy"))));
        judge(folder.path(), &disk);
    }
}

#[test]
fn a_mirror_is_equal_at_its_end() {
    let guest = three_deep("qcow2");
    let fio = guest.fio("xvda", 3, 20);
    guest.ok(&["mirror", "--live", XVDA, "--hold", "copy"]);
    assert_eq!(guest.job(XVDA)["state"], "ready");
    // It follows the guest.
    fio.well();
    guest.ok(&["complete", "--live", XVDA]);
    let end = Instant::now() + Duration::from_secs(10);
    while guest.job(XVDA)["state"] != "done" {
        assert!(Instant::now() < end, "{}", guest.job(XVDA));
        std::thread::sleep(Duration::from_millis(20));
    }
    guest.copy("xvda", "seen");
    let folder = guest.end();
    judge(folder.path(), &format!("qcow2:{}", text(&folder.path().join("copy"))));
    judge(folder.path(), &format!("qcow2:{}", text(&folder.path().join("top"))));
}

#[test]
fn a_commit_goes_on_below() {
    for (n, (base, deep)) in
        [("two", true), ("base", true), ("base", false)].into_iter().enumerate()
    {
        let guest = three_deep(if deep { "qcow2" } else { "vhd" });
        let path = guest.path(base);
        let args = ["commit", "--live", XVDA, "-b", text(&path)];
        let (folder, disk) = under_fio(guest, 30 + n as u32, &args);
        assert!(disk.ends_with(text(&path)), "{disk}");
        judge(folder.path(), &disk);
        if deep {
            // Who opens what the guest had finds the same.
            judge(folder.path(), &format!("qcow2:{}", text(&folder.path().join("top"))));
        } else {
            assert!(!folder.path().join("top").exists());
        }
    }
}

#[test]
fn a_stream_leaves_what_is_below() {
    let bases = [None, Some("base"), Some("one")];
    let all = ["qcow2", "vhd"].into_iter().flat_map(|format| bases.map(|base| (format, base)));
    for (n, (format, base)) in all.enumerate() {
        let guest = three_deep(format);
        let path = base.map(|base| guest.path(base));
        let mut args = vec!["stream", "--live", XVDA];
        if let Some(path) = &path {
            args.extend(["-b", text(path)]);
        }
        let (folder, disk) = under_fio(guest, 40 + n as u32, &args);
        judge(folder.path(), &disk);
        let info = well(RINGBACK, &["disk", "info", "--json", text(&folder.path().join("top"))]);
        let info: serde_json::Value = serde_json::from_str(&info).expect("JSON");
        let named = info["backing-filename"].as_str().map(|name| name.trim_start_matches("./"));
        assert_eq!(named, base, "{info}");
        if format == "vhd" && base.is_none() {
            // Others read its blocks without their bitmaps.
            let (seen, top) = (folder.path().join("seen"), folder.path().join("top"));
            let args = ["compare", "-f", "raw", "-F", "vpc", text(&seen), text(&top)];
            well("qemu-img", &args);
        }
    }
}

#[test]
fn layers_are_coalesced_one_after_the_other() {
    for format in ["qcow2", "vhd"] {
        let guest = three_deep(format);
        let mut fio = guest.fio("xvda", 6, 50);
        for layer in ["two", "one"] {
            let path = guest.path(layer);
            guest.ok(&["coalesce", "--live", XVDA, text(&path)]);
            std::fs::remove_file(path).expect("nobody needs it");
        }
        assert!(fio.runs(), "fio has ended too early");
        fio.well();
        guest.copy("xvda", "seen");
        let folder = guest.end();
        judge(folder.path(), &format!("{format}:{}", text(&folder.path().join("top"))));
    }
}

#[test]
fn disks_grow() {
    for format in ["raw", "qcow2", "vhd"] {
        let folder = folder();
        image(folder.path(), format, "disk", None);
        let guest = Guest::start(folder, &[&format!("{format}:disk")]);
        let mut fio = guest.fio("xvda", 3, 60);
        assert!(guest.refused(&["resize", "--live", XVDA, "1M"]).contains("only grow"));
        guest.ok(&["resize", "--live", XVDA, "+16M"]);
        assert!(fio.runs(), "fio has ended too early");
        fio.well();
        let info = well("qemu-img", &["info", "--output=json", "-f", "raw", &guest.uri("xvda")]);
        let info: serde_json::Value = serde_json::from_str(&info).expect("JSON");
        assert_eq!(info["virtual-size"].as_u64(), Some(SIZE + (16 << 20)), "{format}");
        guest.copy("xvda", "seen");
        let folder = guest.end();
        judge(folder.path(), &format!("{format}:{}", text(&folder.path().join("disk"))));
    }
}

/// Two disks that are written in turns: at any moment the second has what the first has, or the
/// write before.
#[test]
fn disks_are_taken_at_one_moment() {
    use blktap::{Disk, NbdDisk, NbdOptions, NbdTarget, blocking};
    let folder = folder();
    for name in ["a", "b"] {
        image(folder.path(), "raw", name, None);
    }
    let guest = Guest::start(folder, &["raw:a", "raw:b"]);
    let open = |vdev: &str| {
        let target = NbdTarget::parse(&guest.uri(vdev)).expect("an address");
        NbdDisk::open(NbdOptions::new(target)).expect("connect").queue(1).expect("queue")
    };
    let (mut a, mut b) = (open("xvda"), open("xvdb"));
    let stop = std::sync::atomic::AtomicBool::new(false);
    let written = std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut number = 0u64;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                number += 1;
                let text = number.to_le_bytes().repeat(512);
                blocking::write_at(&mut *a, 0, &text).expect("a write");
                blocking::write_at(&mut *b, 0, &text).expect("a write");
            }
            number
        });
        std::thread::sleep(Duration::from_millis(200));
        let said = guest.ok(&[
            "snapshot",
            "create",
            "--live",
            XVDA,
            "--overlay",
            "a1",
            "--live",
            "1/xvdb",
            "--overlay",
            "b1",
        ]);
        assert_eq!(said.matches("snapshot done").count(), 2, "{said}");
        // The second cannot: none is changed.
        std::fs::write(guest.path("b2"), "somebody's").expect("a file");
        let refused = guest.refused(&[
            "snapshot",
            "create",
            "--live",
            XVDA,
            "--overlay",
            "a2",
            "--live",
            "1/xvdb",
            "--overlay",
            "b2",
        ]);
        assert!(refused.contains("there is a file of that name"), "{refused}");
        std::thread::sleep(Duration::from_millis(200));
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        writer.join().expect("a writer")
    });
    let now = |device: &str| guest.job(device)["disk"].as_str().expect("a name").to_owned();
    assert!(now(XVDA).ends_with("/a1") && now("1/xvdb").ends_with("/b1"));
    assert!(!guest.path("a2").exists(), "it is not used");
    drop((a, b));
    let number = |name: &str| {
        let bytes = std::fs::read(guest.path(name)).expect("an image");
        u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes"))
    };
    let (a, b) = (number("a"), number("b"));
    assert!(a > 0 && a < written && (a == b || a == b + 1), "{a} and {b} of {written}");
    guest.end();
}

#[test]
fn an_overlay_takes_over_the_name() {
    let folder = folder();
    image(folder.path(), "qcow2", "disk", None);
    let guest = Guest::start(folder, &["qcow2:disk"]);
    let mut fio = guest.fio("xvda", 4, 70);
    for old in ["old-1", "old-2"] {
        let overlay = ["--overlay", "new", "--rename", old];
        guest.ok(&[&["snapshot", "create", "--live", XVDA], &overlay[..]].concat());
    }
    assert!(fio.runs(), "fio has ended too early");
    fio.well();
    assert!(!guest.path("new").exists());
    guest.copy("xvda", "seen");
    let folder = guest.end();
    // A guest that is started again by its configuration finds all of it.
    judge(folder.path(), &format!("qcow2:{}", text(&folder.path().join("disk"))));
    let guest = Guest::start(folder, &["qcow2:disk"]);
    let refused = guest.refused(&[
        "snapshot",
        "create",
        "--live",
        XVDA,
        "--overlay",
        "v",
        "-O",
        "vhd",
        "--rename",
        "old-3",
    ]);
    assert!(refused.contains("take over the name"), "{refused}");
    guest.end();
}

#[test]
fn jobs_are_cancelled() {
    let guest = three_deep("qcow2");
    let fio = guest.fio("xvda", 3, 80);
    guest.ok(&["mirror", "--live", XVDA, "--hold", "--switch", "copy"]);
    guest.ok(&["cancel", "--live", XVDA]);
    let end = Instant::now() + Duration::from_secs(10);
    while guest.job(XVDA)["state"] != "cancelled" {
        assert!(Instant::now() < end, "{}", guest.job(XVDA));
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(guest.job(XVDA)["disk"].as_str().expect("a name").ends_with("/top"));
    assert!(guest.refused(&["cancel", "--live", XVDA]).contains("no job runs"));
    fio.well();
    // Once more, into what the first has left.
    guest.ok(&["mirror", "--live", XVDA, "--switch", "-n", "copy"]);
    guest.copy("xvda", "seen");
    let folder = guest.end();
    judge(folder.path(), &format!("qcow2:{}", text(&folder.path().join("copy"))));
}
