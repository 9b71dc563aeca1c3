//! `ringback run` with real processes: what it verifies, what it leaves, and that it sees faults.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// A place for the run's temporary folder, in which nothing may be left.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Place {
        Place { dir: tempfile::tempdir().expect("a folder") }
    }
    fn tmp(&self) -> PathBuf {
        let tmp = self.dir.path().join("tmp");
        fs::create_dir_all(&tmp).expect("a folder");
        tmp
    }
    fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::write(&path, content).expect("a file");
        path
    }
    fn ringback(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ringback"));
        command.env("TMPDIR", self.tmp()).stdin(Stdio::null());
        command
    }
    fn run(&self, toml: &str, args: &[&str]) -> Output {
        let file = self.file("guest.toml", toml);
        self.ringback().arg("run").arg(file).args(args).output().expect("ringback")
    }
    /// Nothing is left in the temporary folder, and no process works in it.
    fn assert_left_nothing(&self, limit: Duration) {
        let end = Instant::now() + limit;
        loop {
            let left: Vec<_> = fs::read_dir(self.tmp()).expect("a folder").flatten().collect();
            let running = self.processes();
            if left.is_empty() && running.is_empty() {
                return;
            }
            assert!(Instant::now() < end, "left: {left:?}, running: {running:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    /// Processes (not ended ones) with this place's folder in their environment.
    fn processes(&self) -> Vec<(u32, String)> {
        let mark = format!("TMPDIR={}", self.tmp().display());
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").expect("/proc").flatten() {
            let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
            let Ok(environ) = fs::read(entry.path().join("environ")) else { continue };
            if environ.split(|b| *b == 0).any(|v| v == mark.as_bytes()) {
                let cmdline = fs::read(entry.path().join("cmdline")).unwrap_or_default();
                let words = cmdline.split(|b| *b == 0).map(String::from_utf8_lossy);
                found.push((pid, words.collect::<Vec<_>>().join(" ")));
            }
        }
        found
    }
    /// The process that runs as `role`.
    fn process(&self, role: &str) -> u32 {
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            let is = |(_, words): &&(u32, String)| words.contains(role);
            if let Some((pid, _)) = self.processes().iter().find(is) {
                return *pid;
            }
            assert!(Instant::now() < end, "no process runs as {role}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn document(output: &Output) -> serde_json::Value {
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|e| panic!("{e}: {}{}", stdout(output), stderr(output)))
}

#[test]
fn without_arguments_it_verifies_every_byte_and_leaves_nothing() {
    let place = Place::new();
    let start = Instant::now();
    let output = place.ringback().output().expect("ringback");
    assert!(output.status.success(), "{}{}", stdout(&output), stderr(&output));
    assert!(start.elapsed() < Duration::from_secs(30));
    let text = stdout(&output);
    let last = text.lines().last().expect("a line");
    let words: Vec<&str> = last.split(' ').collect();
    let ["verified", mib, "MiB,", requests, "requests,", "0", "errors"] = words[..] else {
        panic!("the last line is {last:?}");
    };
    assert!(mib.parse::<u64>().expect("MiB") > 192, "{last}");
    assert!(requests.parse::<u64>().expect("requests") > 1000, "{last}");
    assert_eq!(stderr(&output), "");
    place.assert_left_nothing(Duration::ZERO);
}

#[test]
fn several_disks_as_the_file_says() {
    let place = Place::new();
    let toml = "[guest]\nname = \"two\"\ncpus = [0]\nbackend_cpus = [0]\n\
        [[disk]]\nvdev = \"xvda\"\nqueues = 1\nring_page_order = 0\ngrants = \"copy\"\n\
        size_mib = 4\nwork_mib = 16\ndepth = 3\n\
        [[disk]]\nvdev = \"xvdb\"\nqueues = 4\nring_page_order = 2\nsize_mib = 4\nseconds = 0.5\n";
    let output = place.run(toml, &["--json"]);
    let document = document(&output);
    assert!(output.status.success(), "{document}");
    assert_eq!((&document["schema"], &document["errors"]), (&1.into(), &0.into()));
    let shape = |n: usize| {
        let disk = &document["disks"][n];
        let number = |key: &str| disk[key].as_u64().expect("a number");
        (
            disk["vdev"].as_str(),
            number("queues"),
            number("ring_pages"),
            disk["persistent"].as_bool(),
        )
    };
    assert_eq!(shape(0), (Some("xvda"), 1, 1, Some(false)));
    assert_eq!(shape(1), (Some("xvdb"), 4, 4, Some(true)));
    assert_eq!(document["compared_bytes"], 8 << 20);
    for disk in document["disks"].as_array().expect("disks") {
        assert!(disk["flushes"].as_u64() > Some(0), "{disk}");
        // Twice the whole disk at least.
        assert!(disk["verified_bytes"].as_u64() >= Some(8 << 20), "{disk}");
    }
    place.assert_left_nothing(Duration::ZERO);
}

#[test]
fn a_wrong_file_is_refused_by_the_name_of_what_is_wrong() {
    let place = Place::new();
    for (toml, named) in [
        ("[guest]\ncolour = 3\n", "colour"),
        ("[[disk]]\nqueue = 3\n", "queue"),
        ("[[disk]]\nqueues = 0\n", "queues is 0; it must be 1 to 64"),
        ("[[disk]]\nring_page_order = 9\n", "ring_page_order is 9"),
        ("[[disk]]\ngrants = \"gift\"\n", "gift"),
        ("[[vif]]\nmac = \"01:0:0:0:0:0\"\n", "vif 0: mac is \"01:0:0:0:0:0\""),
        ("[[vif]]\nendpoint = \"moon\"\n", "moon"),
        ("[[vif]]\nmtu = 100\n", "vif 0: mtu is 100; it must be 1280 to 65535"),
        ("[[vif]]\nping_sizes = [65508]\n", "vif 0: ping_sizes is 65508"),
        ("[[disk]]\nvdev = \"floppy\"\n", "vdev"),
        ("[[disk]]\n[[disk]]\n", "there are two of that name"),
        ("[[disk]]\ntarget = \"floppy:x\"\n", "format \"floppy\""),
        ("[[disk]]\ntarget = \"qcow2:/dev/null\"\n", "/dev/null"),
        ("[[disk]]\ntarget = \"raw:/nowhere\"\n", "/nowhere: no such file"),
    ] {
        let output = place.run(toml, &[]);
        assert_eq!(output.status.code(), Some(1), "{toml}");
        assert!(stderr(&output).contains(named), "{toml}: {}", stderr(&output));
        place.assert_left_nothing(Duration::ZERO);
    }
}

/// An image of the user's, with content.
fn precious(place: &Place) -> (PathBuf, Vec<u8>) {
    let content: Vec<u8> = (0..3 << 20).map(|n: u32| (n / 7 % 251) as u8).collect();
    (place.file("precious.img", &content), content)
}

#[test]
fn a_named_image_is_copied_or_read_and_written_only_when_told() {
    let place = Place::new();
    let (path, content) = precious(&place);
    let target = format!("raw:{}", path.display());
    for args in [&["--disk", &*target][..], &["--disk", &*target, "--read-only"]] {
        let output = place.run("[[disk]]\nsize_mib = 2\nwork_mib = 8\n", args);
        assert!(output.status.success(), "{args:?}: {}", stderr(&output));
        assert!(fs::read(&path).expect("the image") == content, "{args:?} changed the image");
        place.assert_left_nothing(Duration::ZERO);
    }
    let args = ["--disk", &*target, "--overwrite"];
    let output = place.run("[[disk]]\nsize_mib = 2\nwork_mib = 8\n", &args);
    assert!(output.status.success(), "{}", stderr(&output));
    let now = fs::read(&path).expect("the image");
    assert!(now[..2 << 20] != content[..2 << 20] && now[2 << 20..] == content[2 << 20..]);
}

#[test]
fn images_of_each_format_are_worked_on_by_an_overlay() {
    let place = Place::new();
    let (raw, content) = precious(&place);
    let ringback_disk = |args: &[&str]| {
        let output = place.ringback().arg("disk").args(args).output().expect("ringback");
        assert!(output.status.success(), "{args:?}: {}", stderr(&output));
    };
    let raw = raw.to_str().expect("a path");
    for format in ["qcow", "qcow2", "vhd"] {
        let path = place.dir.path().join(format);
        let path = path.to_str().expect("a path");
        ringback_disk(&["convert", "-O", format, raw, path]);
        let before = fs::read(path).expect("the image");
        let target = format!("{format}:{path}");
        let toml = "[[disk]]\nsize_mib = 2\nwork_mib = 8\n";
        for args in [&["--disk", &*target][..], &["--disk", &*target, "--read-only"]] {
            let output = place.run(toml, args);
            assert!(output.status.success(), "{args:?}: {}", stderr(&output));
            assert!(fs::read(path).expect("the image") == before, "{args:?} changed the image");
            place.assert_left_nothing(Duration::ZERO);
        }
        if format == "qcow" {
            continue;
        }
        let output = place.run(toml, &["--disk", &*target, "--overwrite"]);
        assert!(output.status.success(), "{}", stderr(&output));
        let copy = place.dir.path().join("copy");
        ringback_disk(&["convert", "-O", "raw", path, copy.to_str().expect("a path")]);
        let now = fs::read(copy).expect("a copy");
        assert!(now[..2 << 20] != content[..2 << 20] && now[2 << 20..] == content[2 << 20..]);
    }
}

/// A run that goes on until something ends it.
fn endless(place: &Place) -> Child {
    let file = place.file("guest.toml", "[[disk]]\nsize_mib = 8\nwork_mib = 1000000\n");
    let mut command = place.ringback();
    command.arg("run").arg(file).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.process_group(0);
    command.spawn().expect("ringback")
}

fn signal(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(pid as i32).expect("a process");
    rustix::process::kill_process(pid, signal).expect("kill");
}

#[test]
fn whoever_is_killed_the_others_end_within_a_second_and_leave_nothing() {
    for (role, told) in
        [(" hypervisor ", "hypervisor"), (" backend ", "backend"), (" guest ", "guest")]
    {
        let place = Place::new();
        let child = endless(&place);
        place.process(" guest ");
        std::thread::sleep(Duration::from_millis(300));
        signal(place.process(role), rustix::process::Signal::KILL);
        place.assert_left_nothing(Duration::from_secs(1));
        let output = child.wait_with_output().expect("ringback");
        assert_eq!(output.status.code(), Some(1), "{role}");
        assert!(stderr(&output).contains(told), "{role}: {}", stderr(&output));
    }
}

#[test]
fn when_the_run_itself_is_killed_nothing_is_left() {
    let place = Place::new();
    let mut child = endless(&place);
    place.process(" guest ");
    std::thread::sleep(Duration::from_millis(300));
    child.kill().expect("kill");
    child.wait().expect("ringback");
    place.assert_left_nothing(Duration::from_secs(1));
}

#[test]
fn an_interrupt_ends_all() {
    let place = Place::new();
    let child = endless(&place);
    place.process(" guest ");
    std::thread::sleep(Duration::from_millis(300));
    // As a terminal does: to the whole group.
    let group = rustix::process::Pid::from_raw(child.id() as i32).expect("a process");
    rustix::process::kill_process_group(group, rustix::process::Signal::INT).expect("kill");
    let output = child.wait_with_output().expect("ringback");
    assert!(!output.status.success());
    place.assert_left_nothing(Duration::from_secs(1));
}

/// A program where every user can run it.
fn public_copy(place: &Place) -> PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let path = place.dir.path().join("ringback");
    fs::copy(env!("CARGO_BIN_EXE_ringback"), &path).expect("a copy");
    for open in [place.dir.path(), &path, &place.tmp()] {
        fs::set_permissions(open, fs::Permissions::from_mode(0o777)).expect("a mode");
    }
    path
}

/// A program for a user without any capability.
fn unprivileged(program: &Path) -> Command {
    if !rustix::process::geteuid().is_root() {
        return Command::new(program);
    }
    let mut setpriv = Command::new("setpriv");
    setpriv.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all"]);
    setpriv.arg(program);
    setpriv
}

#[test]
fn it_needs_no_privileges() {
    let place = Place::new();
    let program = public_copy(&place);
    let mut command = unprivileged(&program);
    command.env_clear().env("TMPDIR", place.tmp()).args(["run", "--json"]);
    let output = command.output().expect("setpriv");
    let document = document(&output);
    assert!(output.status.success(), "{document}{}", stderr(&output));
    assert_eq!(document["errors"], 0);
    let vif = &document["vifs"][0];
    assert_eq!((&vif["ping_loss"], &vif["address"]), (&0.into(), &"10.0.2.15".into()), "{vif}");
    assert_eq!(vif["largest_ping"], 65_507);
    for way in ["download", "upload"] {
        assert_eq!(vif[way]["checksum_ok"], true, "{way}: {vif}");
        assert_eq!(vif[way]["bytes"], 32 << 20, "{way}: {vif}");
    }
    place.assert_left_nothing(Duration::ZERO);
}

#[test]
fn several_vifs_as_the_file_says() {
    let place = Place::new();
    let small = "download_mib = 2\nupload_mib = 1\npings = 2\n";
    let toml = format!(
        "[[disk]]\nsize_mib = 4\nwork_mib = 4\n\
         [[vif]]\nqueues = 1\nmac = \"00:16:3e:1:2:3\"\n{small}\
         [[vif]]\nqueues = 4\nmtu = 9000\nping_sizes = [1, 8972, 8973]\n{small}"
    );
    let output = place.run(&toml, &["--json"]);
    let document = document(&output);
    assert!(output.status.success(), "{document}{}", stderr(&output));
    let vifs = document["vifs"].as_array().expect("vifs");
    assert_eq!(vifs.len(), 2);
    for (vif, (queues, pings)) in vifs.iter().zip([(1, 10), (4, 6)]) {
        assert_eq!((&vif["queues"], &vif["pings"]), (&queues.into(), &pings.into()), "{vif}");
        assert_eq!((&vif["ping_loss"], &vif["errors"]), (&0.into(), &0.into()), "{vif}");
        assert_eq!(vif["download"]["checksum_ok"], true, "{vif}");
        assert_eq!(vif["upload"]["checksum_ok"], true, "{vif}");
        assert!(vif["gso_frames"].as_u64() > Some(0), "nothing left unsegmented: {vif}");
    }
    place.assert_left_nothing(Duration::ZERO);
}

/// With the feature `test-faults`, whose build honours RINGBACK_TEST_FAULT.
#[cfg(feature = "test-faults")]
mod faults {
    use super::*;

    fn run(fault: &str) -> Output {
        let place = Place::new();
        let file = place.file("guest.toml", "[[disk]]\nsize_mib = 4\nwork_mib = 8\n");
        let mut command = place.ringback();
        command.env("RINGBACK_TEST_FAULT", fault).arg("run").arg(file);
        let output = command.output().expect("ringback");
        place.assert_left_nothing(Duration::ZERO);
        output
    }

    #[test]
    fn each_fault_turns_the_run_red() {
        for (fault, told) in [
            ("flip", "the right block with 1 wrong byte(s)"),
            ("lose", "zeroes instead of generation"),
            ("fail", "write of"),
            ("drop-flushes", "the image has: block at"),
        ] {
            let output = run(fault);
            let text = stderr(&output);
            assert_eq!(output.status.code(), Some(1), "{fault}: {}{text}", stdout(&output));
            assert!(text.contains(told), "{fault}: {text}");
            let text = stdout(&output);
            assert!(!text.lines().last().expect("a line").ends_with(" 0 errors"), "{text}");
        }
    }

    #[test]
    fn a_power_cut_loses_nothing_that_was_flushed() {
        let output = run("cut");
        assert!(output.status.success(), "{}{}", stdout(&output), stderr(&output));
    }
}

#[test]
fn the_hypervisor_of_its_own_serves_until_a_signal() {
    let place = Place::new();
    let run = place.dir.path().join("run");
    let mut command = place.ringback();
    let mut child = command.arg("--run-dir").arg(&run).arg("hypervisor").spawn().expect("it");
    let socket = |name: &str| Path::new(&run).join(name).exists();
    let end = Instant::now() + Duration::from_secs(10);
    while !socket("hypervisor.sock") || !socket("xenstored.sock") {
        assert!(Instant::now() < end, "no socket");
        std::thread::sleep(Duration::from_millis(10));
    }
    signal(child.id(), rustix::process::Signal::TERM);
    assert!(child.wait().expect("its end").success());
    assert!(!socket("hypervisor.sock") && !socket("xenstored.sock"));
}
