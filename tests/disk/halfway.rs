//! Ctrl-C at many moments of the commands that change an image in place: afterwards it is sound,
//! nobody has it locked, and it is as before or as it was to become.

use std::cell::Cell;
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::{Place, Said};

/// How many moments.
const MOMENTS: u32 = 8;
/// A second signal would end a command at once; the first one waits for so long at most.
const PATIENCE: Duration = Duration::from_secs(5);

/// Bytes that the disk has when it is interrupted, and those of its snapshot `s`.
const NOW: (&str, &str) = ("now.raw", "raw");
const THEN: (&str, &str) = ("then.raw", "raw");
const IMAGE: (&str, &str) = ("a.qcow2", "qcow2");

/// An image with a snapshot, a bitmap and so many small clusters that nothing is done at once.
fn place() -> Place {
    let place = Place::new();
    let options = "cluster_size=512,preallocation=metadata";
    place.qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, "a.qcow2", "24M"]);
    place.qemu_io("qcow2", "a.qcow2", &["write -P 1 0 2M", "write -P 2 23M 1M"]);
    place.qemu_img(&["convert", "-O", "raw", "a.qcow2", "then.raw"]);
    place.ok(&["snapshot", "create", "a.qcow2", "s"]);
    place.qemu_io("qcow2", "a.qcow2", &["write -P 3 1M 3M", "write -P 4 20M 1M"]);
    place.qemu_img(&["convert", "-O", "raw", "a.qcow2", "now.raw"]);
    place.qemu_img(&["bitmap", "--add", "-g", "512", "a.qcow2", "b"]);
    place.qemu_io("qcow2", "a.qcow2", &["write -P 4 20M 512k"]);
    place
}

/// How a command ended that was interrupted.
struct Ended {
    said: Said,
    /// It had not come as far as to hear of signals.
    killed: bool,
    took: Duration,
    /// Whether it was running when it was interrupted.
    met: bool,
}

impl Ended {
    /// Soon, as one that says why; or before it had touched anything.
    fn assert_well(&self, what: &str, is_as_before: impl Fn() -> bool) {
        assert!(self.took < PATIENCE, "{what}: it has taken {:?}", self.took);
        if self.killed {
            assert!(is_as_before(), "{what}: killed after it had begun");
            return;
        }
        let told = self.said.code == 0 || self.said.err.contains("interrupted");
        assert!(told && self.said.code <= 1, "{what}: {:?}", self.said);
    }
}

fn interrupt_after(place: &Place, args: &[&str], delay: Duration) -> Ended {
    let mut command = place.command(args);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = child.expect("ringback");
    std::thread::sleep(delay);
    let met = child.try_wait().expect("a state").is_none();
    if met {
        kill_process(Pid::from_child(&child), Signal::INT).expect("kill");
    }
    let start = Instant::now();
    let output = child.wait_with_output().expect("ringback");
    let killed = output.status.signal() == Some(Signal::INT.as_raw());
    Ended { said: Said::of(output), killed, took: start.elapsed(), met }
}

/// Interrupts a command that changes `files` at moments from its beginning to its end, each time
/// with the files as they are now. `judge` is told whether it was done, as the command has it.
fn at_each_moment(place: &Place, args: &[&str], files: &[&str], judge: impl Fn(bool)) {
    let before: Vec<Vec<u8>> = files.iter().map(|f| place.bytes(f)).collect();
    let restore = || {
        for (file, bytes) in files.iter().zip(&before) {
            std::fs::write(place.path(file), bytes).expect("the file as it was");
        }
    };
    let start = Instant::now();
    place.ok(args);
    let whole = start.elapsed();
    judge(true);
    // Another time it may take longer, or not so long: the machine does other things as well.
    let inside = [4, 2, 8, 1].into_iter().any(|quarters| {
        let moments = (0..MOMENTS).map(|n| whole * quarters * n / (4 * MOMENTS));
        let inside = moments.filter(|delay| {
            restore();
            let ended = interrupt_after(place, args, *delay);
            let what = format!("{args:?} after {delay:?} of {whole:?}");
            let same = || files.iter().zip(&before).all(|(f, bytes)| place.bytes(f) == *bytes);
            ended.assert_well(&what, same);
            if !ended.killed {
                judge(ended.said.code == 0);
            }
            ended.met && !ended.killed
        });
        inside.count() > 1
    });
    assert!(inside, "{args:?}: it was over before it was interrupted: {whole:?}");
    restore();
}

/// Sound to us and to QEMU, and locked by nobody.
fn assert_sound(place: &Place) {
    let said = place.disk(&["check", "a.qcow2"]);
    assert!(matches!(said.code, 0 | 3), "{said:?}");
    let said = place.tool("qemu-img", &["check", "-f", "qcow2", "a.qcow2"]);
    assert!(matches!(said.code, 0 | 3), "{said:?}");
    place.qemu_io("qcow2", "a.qcow2", &["flush"]);
}

fn names(place: &Place, what: &str) -> Vec<String> {
    let listed = place.ok(&[what, "list", "--json", "a.qcow2"]).json();
    let all = listed[format!("{what}s")].as_array().cloned().expect("a list");
    all.iter().map(|one| one["name"].as_str().expect("a name").to_owned()).collect()
}

fn assert_snapshot_reads(place: &Place, name: &str, expected: (&str, &str)) {
    place.ok(&["convert", "-l", name, "-O", "raw", "a.qcow2", "snapshot.raw"]);
    place.assert_same(("snapshot.raw", "raw"), expected);
    std::fs::remove_file(place.path("snapshot.raw")).expect("the copy");
}

#[test]
fn a_snapshot_is_made_or_not() {
    let place = place();
    at_each_moment(&place, &["snapshot", "create", "a.qcow2", "t"], &["a.qcow2"], |done| {
        assert_sound(&place);
        place.assert_same(IMAGE, NOW);
        assert_snapshot_reads(&place, "s", THEN);
        let made = names(&place, "snapshot").contains(&"t".to_owned());
        assert_eq!(made, done);
        if made {
            assert_snapshot_reads(&place, "t", NOW);
        }
    });
}

#[test]
fn a_snapshot_is_gone_back_to_or_not() {
    let place = place();
    // No snapshot has the bitmap.
    place.ok(&["bitmap", "remove", "a.qcow2", "b"]);
    at_each_moment(&place, &["snapshot", "apply", "a.qcow2", "s"], &["a.qcow2"], |done| {
        assert_sound(&place);
        assert_snapshot_reads(&place, "s", THEN);
        place.assert_same(IMAGE, if done { THEN } else { NOW });
    });
}

#[test]
fn a_snapshot_is_forgotten_or_not() {
    let place = place();
    at_each_moment(&place, &["snapshot", "delete", "a.qcow2", "s"], &["a.qcow2"], |done| {
        assert_sound(&place);
        place.assert_same(IMAGE, NOW);
        assert_eq!(names(&place, "snapshot").is_empty(), done);
        if !done {
            assert_snapshot_reads(&place, "s", THEN);
        }
    });
}

#[test]
fn a_bitmap_is_there_or_not() {
    let place = place();
    let expect = |name: &str, is_there: bool| {
        assert_sound(&place);
        place.assert_same(IMAGE, NOW);
        assert_eq!(names(&place, "bitmap").contains(&name.to_owned()), is_there, "{name}");
    };
    let add = ["bitmap", "add", "-g", "512", "a.qcow2", "c"];
    at_each_moment(&place, &add, &["a.qcow2"], |done| expect("c", done));
    let remove = ["bitmap", "remove", "a.qcow2", "b"];
    at_each_moment(&place, &remove, &["a.qcow2"], |done| expect("b", !done));
}

#[test]
fn a_disk_has_its_old_or_its_new_size() {
    let place = place();
    // Neither is possible with a snapshot of another size, or a bitmap.
    place.ok(&["snapshot", "delete", "a.qcow2", "s"]);
    place.ok(&["bitmap", "remove", "a.qcow2", "b"]);
    let size = || place.ok(&["info", "--json", "a.qcow2"]).json()["virtual-size"].clone();
    let bytes = place.bytes("now.raw");
    std::fs::write(place.path("less.raw"), &bytes[..10 << 20]).expect("a file");
    let less = ("less.raw", "raw");
    let grow = ["resize", "a.qcow2", "4G"];
    at_each_moment(&place, &grow, &["a.qcow2"], |done| {
        assert_sound(&place);
        assert_eq!(size(), if done { 4u64 << 30 } else { 24 << 20 });
        place.assert_same(IMAGE, NOW);
    });
    let shrink = ["resize", "--shrink", "a.qcow2", "10M"];
    at_each_moment(&place, &shrink, &["a.qcow2"], |done| {
        assert_sound(&place);
        assert_eq!(size(), if done { 10u64 << 20 } else { 24 << 20 });
        place.assert_same(IMAGE, less);
        // What is kept of a larger disk is all of it.
        if !done {
            place.assert_same(IMAGE, NOW);
        }
    });
}

#[test]
fn a_vhd_has_its_old_or_its_new_size() {
    let place = Place::new();
    place.sample("now.raw");
    place.ok(&["convert", "-O", "vhd", "now.raw", "a.vhd"]);
    let size = || place.ok(&["info", "--json", "a.vhd"]).json()["virtual-size"].clone();
    let old = size();
    // A table of 2 MiB, for which blocks have to make room.
    let grow = ["resize", "a.vhd", "1000G"];
    at_each_moment(&place, &grow, &["a.vhd"], |done| {
        assert_eq!(place.disk(&["check", "a.vhd"]).code, 0);
        let now = size();
        assert_eq!(now == old, !done, "{now}");
        place.assert_same(("a.vhd", "vpc"), NOW);
        place.qemu_io("vpc", "a.vhd", &["flush"]);
    });
}

#[test]
fn a_commit_is_begun_again() {
    let place = Place::new();
    place.ok(&["create", "-f", "qcow2", "base.qcow2", "256M"]);
    place.qemu_io("qcow2", "base.qcow2", &["write -P 1 0 32M"]);
    place.ok(&["create", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "a.qcow2"]);
    let writes: Vec<String> =
        (0..16).map(|n| format!("write -P {} {}M 4M", n + 2, n * 16 + 3)).collect();
    place.qemu_io("qcow2", "a.qcow2", &writes.iter().map(String::as_str).collect::<Vec<_>>());
    place.qemu_img(&["convert", "-O", "raw", "a.qcow2", "now.raw"]);
    let stopped = Cell::new(0);
    at_each_moment(&place, &["commit", "a.qcow2"], &["a.qcow2", "base.qcow2"], |done| {
        assert_sound(&place);
        place.assert_checked("base.qcow2", "qcow2");
        place.assert_same(IMAGE, NOW);
        if !done {
            stopped.set(stopped.get() + 1);
            place.ok(&["commit", "a.qcow2"]);
            assert_sound(&place);
            place.assert_same(IMAGE, NOW);
        }
        place.assert_same(("base.qcow2", "qcow2"), NOW);
    });
    assert!(stopped.get() > 0, "no commit was stopped");
}

/// Damages refcounts: every third cluster of the first 38,000 has one too many, and as many
/// others have none.
fn damage(place: &Place) {
    let mut bytes = place.bytes("a.qcow2");
    let number = |bytes: &[u8], at: usize| {
        let eight = bytes[at..at + 8].try_into().expect("eight bytes");
        u64::from_be_bytes(eight) as usize
    };
    let table = number(&bytes, 48);
    for block in 0..150 {
        let at = number(&bytes, table + block * 8);
        // The header's own are needed to open the image.
        for entry in (0..256).step_by(3).skip(usize::from(block == 0) * 20) {
            bytes[at + entry * 2 + 1] += 1;
            bytes[at + entry * 2 + 3] = 0;
        }
    }
    std::fs::write(place.path("a.qcow2"), bytes).expect("the damaged image");
}

#[test]
fn a_repair_makes_nothing_worse() {
    let place = place();
    place.ok(&["bitmap", "remove", "a.qcow2", "b"]);
    damage(&place);
    let found = place.disk(&["check", "--json", "a.qcow2"]);
    let corruptions = |said: &Said| said.json()["corruptions"].as_u64().unwrap_or(0);
    let all = corruptions(&found);
    assert!(found.code == 2 && all > 5_000, "{} corruptions", all);
    at_each_moment(&place, &["check", "--repair", "a.qcow2"], &["a.qcow2"], |done| {
        let now = place.disk(&["check", "--json", "a.qcow2"]);
        assert!(corruptions(&now) <= all);
        if done {
            assert_eq!(now.code, 0, "{now:?}");
        } else {
            place.ok(&["check", "--repair", "a.qcow2"]);
        }
        assert_sound(&place);
        place.assert_same(IMAGE, NOW);
        assert_snapshot_reads(&place, "s", THEN);
    });
}
