//! The name tap-ctl: its commands' effects and outputs, in blktap's forms.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// A run folder, and the program under its other name.
struct Taps {
    folder: TempDir,
}

impl Taps {
    fn new() -> Taps {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
        let name = folder.path().join("tap-ctl");
        symlink(env!("CARGO_BIN_EXE_ringback"), name).expect("a link");
        Taps { folder }
    }
    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
    fn image(&self, name: &str, size: u64) -> PathBuf {
        let path = self.path(name);
        std::fs::File::create(&path).expect("a file").set_len(size).expect("its size");
        path
    }
    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(self.path("tap-ctl"));
        command.args(args).env("RINGBACK_RUN", self.path("run")).env("RINGBACK_LOG", "warn");
        command.stdin(Stdio::null());
        command
    }
    fn try_to(&self, args: &[&str]) -> Output {
        self.command(args).output().expect("tap-ctl")
    }
    /// A command that must succeed: what it prints.
    fn run(&self, args: &[&str]) -> String {
        let Output { status, stdout, stderr } = self.try_to(args);
        assert!(status.success(), "{args:?}: {}", String::from_utf8_lossy(&stderr));
        String::from_utf8(stdout).expect("UTF-8").trim_end().to_owned()
    }
    fn refusal(&self, args: &[&str]) -> String {
        let Output { status, stderr, .. } = self.try_to(args);
        assert_eq!(status.code(), Some(1), "{args:?}");
        String::from_utf8(stderr).expect("UTF-8")
    }
}

impl Drop for Taps {
    fn drop(&mut self) {
        // Whatever a failed test left.
        for line in String::from_utf8_lossy(&self.try_to(&["list"]).stdout).lines() {
            let pid = line.strip_prefix("pid=").and_then(|l| l.split(' ').next()?.parse().ok());
            if let Some(pid) = pid.and_then(rustix::process::Pid::from_raw) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

fn within(what: &str, limit: Duration, done: impl Fn() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < limit, "{what}: not within {limit:?}");
        sleep(Duration::from_millis(20));
    }
}

fn qemu_io(uri: &str, command: &str) -> Command {
    let mut io = Command::new("qemu-io");
    io.args(["-f", "raw", "-c", command, uri]).stdin(Stdio::null()).stdout(Stdio::null());
    io
}

fn well(command: &mut Command) {
    let status = command.status().expect("qemu-io: install qemu-utils");
    assert!(status.success(), "{command:?}");
}

#[test]
fn a_tapdisk_from_spawn_to_its_end() {
    let taps = Taps::new();
    let image = taps.image("disk.raw", 4 << 20);
    assert_eq!(taps.run(&["check"]), "ok");
    assert_eq!(taps.run(&["list"]), "");
    let pid = taps.run(&["spawn"]);
    assert_eq!(taps.run(&["list"]), format!("pid={pid}"));
    let at = ["-p", &pid, "-m", "3"];
    let on = |command: &'static str| taps.run(&[&[command][..], &at].concat());
    assert_eq!(on("attach"), "");
    assert_eq!(taps.run(&["list"]), format!("pid={pid} minor=3 state=0x2"));
    assert!(taps.refusal(&["attach", "-p", &pid, "-m", "3"]).contains("attached already"));
    assert!(taps.refusal(&["pause", "-p", &pid, "-m", "3"]).contains("no image open"));
    let args = format!("aio:{}", text(&image));
    taps.run(&[&["open"][..], &at, &["-D", "-a", &args]].concat());
    let row = |state: &str| format!("pid={pid} minor=3 state={state} args={args}");
    assert_eq!(taps.run(&["list"]), row("0"));
    assert_eq!(taps.run(&["list", "-t", "aio", "-f", text(&image), "-m", "3"]), row("0"));
    assert_eq!(taps.run(&["list", "-t", "vhd"]), "");
    let uri = format!("nbd+unix:///?socket={}/run/blktap/nbd{pid}.3", text(taps.folder.path()));
    well(&mut qemu_io(&uri, "write -P 7 0 64k"));
    on("pause");
    assert_eq!(taps.run(&["list"]), row("0x2a"));
    let mut writer = qemu_io(&uri, "write -P 8 64k 64k").spawn().expect("qemu-io");
    sleep(Duration::from_millis(400));
    assert!(writer.try_wait().expect("its state").is_none(), "a paused disk answers nothing");
    on("unpause");
    assert!(writer.wait().expect("its end").success());
    assert_eq!(taps.run(&["list"]), row("0"));
    let stats: Value = serde_json::from_str(&on("stats")).expect("a dictionary");
    assert_eq!((&stats["name"], &stats["secs"][1]), (&args.as_str().into(), &256.into()));
    assert_eq!(stats["images"][0]["hits"][1], 2);
    assert!(taps.refusal(&["detach", "-p", &pid, "-m", "3"]).contains("close it first"));
    on("close");
    assert_eq!(taps.run(&["list"]), format!("pid={pid} minor=3 state=0x2"));
    let bytes = std::fs::read(&image).expect("the image");
    assert!(
        bytes[..65536].iter().all(|b| *b == 7) && bytes[65536..131_072].iter().all(|b| *b == 8)
    );
    on("detach");
    within("its end", Duration::from_secs(5), || !Path::new(&format!("/proc/{pid}/exe")).exists());
    assert_eq!(taps.run(&["list"]), "");
}

#[test]
fn create_takes_free_minors_and_destroy_leaves_nothing() {
    let taps = Taps::new();
    let vhd = taps.path("a.vhd");
    let made = Command::new(env!("CARGO_BIN_EXE_ringback"))
        .args(["disk", "create", "-f", "vhd", text(&vhd), "8M"])
        .stdout(Stdio::null())
        .status();
    assert!(made.expect("ringback").success());
    let raw = taps.image("b.raw", 4 << 20);
    let log = taps.path("b.log");
    let (vhd, raw) = (format!("vhd:{}", text(&vhd)), format!("aio:{}", text(&raw)));
    let first = taps.run(&["create", "-a", &vhd]);
    let copy = taps.image("copy.raw", 4 << 20);
    let mirror = format!("raw:{}", text(&copy));
    let second = taps.run(&["create", "-D", "-C", text(&log), "-2", &mirror, "-a", &raw]);
    let list = taps.run(&["list"]);
    let rows: Vec<Vec<&str>> = list.lines().map(|line| line.split(' ').collect()).collect();
    let mut minors: Vec<&str> = rows.iter().map(|row| row[1]).collect();
    minors.sort_unstable();
    assert_eq!(minors, ["minor=0", "minor=1"], "{list}");
    for socket in [&first, &second] {
        well(&mut qemu_io(&format!("nbd+unix:///?socket={socket}"), "write -P 1 1M 4k"));
    }
    // The same image again: locked, and nothing is left of the attempt.
    assert!(taps.refusal(&["create", "-R", "-a", &vhd]).contains("lock"));
    assert_eq!(taps.run(&["list"]).lines().count(), 2);
    // A table for people, with blktap's columns.
    let on_terminal = format!("{} list -m 0", text(&taps.path("tap-ctl")));
    let table = Command::new("script")
        .args(["-qec", &on_terminal, "/dev/null"])
        .env("RINGBACK_RUN", taps.path("run"))
        .stdin(Stdio::null())
        .output()
        .expect("script: install bsdutils");
    let table = String::from_utf8(table.stdout).expect("UTF-8");
    let columns: Vec<&str> = table.split_whitespace().collect();
    let pid = rows.iter().find(|row| row[1] == "minor=0").expect("a row")[0];
    let pid = pid.strip_prefix("pid=").expect("a pid");
    assert_eq!(columns, [pid, "0", "0", "vhd", vhd.strip_prefix("vhd:").expect("a path")]);
    for row in rows {
        let [pid, minor] = [row[0], row[1]].map(|v| v.split_once('=').expect("a value").1);
        taps.run(&["destroy", "-p", pid, "-m", minor]);
    }
    let shown = Command::new(env!("CARGO_BIN_EXE_ringback"))
        .args(["changed-log", "show", text(&log)])
        .output()
        .expect("ringback");
    let shown = String::from_utf8(shown.stdout).expect("UTF-8");
    assert!(shown.contains("exact: yes") && shown.contains("changed: 65536"), "{shown}");
    assert_eq!(std::fs::read(&copy).expect("the mirror")[1 << 20], 1);
    let left = || {
        let names = std::fs::read_dir(taps.path("run/blktap")).expect("a folder").flatten();
        let mut names: Vec<_> =
            names.map(|e| e.file_name().into_string().expect("a name")).collect();
        names.sort();
        names
    };
    within("nothing is left", Duration::from_secs(5), || left() == ["lock", "tapdisk.log"]);
}

#[test]
fn a_killed_tapdisk_is_cleared_away() {
    let taps = Taps::new();
    let image = taps.image("disk.raw", 1 << 20);
    let socket = taps.run(&["create", "-D", "-a", &format!("raw:{}", text(&image))]);
    let list = taps.run(&["list"]);
    let pid = list.split(' ').next().and_then(|p| p.strip_prefix("pid=")?.parse().ok());
    let pid = rustix::process::Pid::from_raw(pid.expect("a pid")).expect("a pid");
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("killed");
    let gone = || !Path::new(&format!("/proc/{}/exe", pid.as_raw_nonzero())).exists();
    within("its end", Duration::from_secs(5), gone);
    assert_eq!(taps.run(&["list"]), "");
    assert!(!Path::new(&socket).exists(), "its socket is left");
    assert!(taps.refusal(&["stats", "-p", "1", "-m", "0"]).contains("tapdisk 1: nobody serves it"));
}

#[test]
fn an_image_becomes_a_device_or_the_reason_is_told_and_nothing_is_left() {
    let taps = Taps::new();
    let image = taps.image("disk.raw", 1 << 20);
    let run = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ringback"));
        let output = command.args(args).env("RINGBACK_RUN", taps.path("run")).output();
        output.expect("ringback")
    };
    let made = run(&["disk", "connect", "--cached", text(&image)]);
    if made.status.success() {
        let device = String::from_utf8(made.stdout).expect("UTF-8").trim().to_owned();
        let ended = run(&["disk", "disconnect", &device]);
        assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
    } else {
        let why = String::from_utf8_lossy(&made.stderr).into_owned();
        assert!(why.contains("this kernel has no nbd driver: modprobe nbd"), "{why}");
    }
    within("nothing is left", Duration::from_secs(5), || taps.run(&["list"]).is_empty());
    let refused = run(&["disk", "connect", "--device", "/dev/sda", text(&image)]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("name it as /dev/nbdN"));
}

/// Whether another program may write to a file: nobody has it locked.
fn is_free(image: &Path) -> bool {
    let status = qemu_io(text(image), "write -P 9 128k 4k").stderr(Stdio::null()).status();
    status.expect("qemu-io: install qemu-utils").success()
}

#[test]
fn a_paused_image_is_closed_and_may_be_another_afterwards() {
    let taps = Taps::new();
    let [first, second] = ["a.raw", "b.raw"].map(|name| taps.image(name, 4 << 20));
    let pid = taps.run(&["spawn"]);
    let at = ["-p", &pid, "-m", "0"];
    let on = |command: &'static str| taps.run(&[&[command][..], &at].concat());
    on("attach");
    taps.run(&[&["open"][..], &at, &["-a", &format!("aio:{}", text(&first))]].concat());
    let uri = format!("nbd+unix:///?socket={}/run/blktap/nbd{pid}.0", text(taps.folder.path()));
    well(&mut qemu_io(&uri, "write -P 7 0 64k"));
    assert!(!is_free(&first), "an open image is not locked");
    let other = format!("aio:{}", text(&second));
    let refused = taps.refusal(&["unpause", "-p", &pid, "-m", "0", "-a", &other]);
    assert!(refused.contains("pause it first"), "{refused}");
    on("pause");
    on("pause");
    assert!(is_free(&first), "a paused image is locked");
    // Opened again, it is read as it is now.
    on("unpause");
    assert!(!is_free(&first), "an open image is not locked");
    well(&mut qemu_io(&uri, "read -P 9 128k 4k"));
    on("pause");
    let small = taps.image("small.raw", 1 << 20);
    let wrong = format!("aio:{}", text(&small));
    let refused = taps.refusal(&["unpause", "-p", &pid, "-m", "0", "-a", &wrong]);
    assert!(refused.contains("1048576 bytes"), "{refused}");
    std::fs::copy(&first, &second).expect("a copy");
    let mut writer = qemu_io(&uri, "write -P 8 64k 64k").spawn().expect("qemu-io");
    taps.run(&["unpause", "-p", &pid, "-m", "0", "-a", &other]);
    assert!(writer.wait().expect("its end").success());
    assert_eq!(taps.run(&["list"]), format!("pid={pid} minor=0 state=0 args={other}"));
    assert!(is_free(&first) && !is_free(&second));
    // Closed while it is paused, with a request that waits.
    on("pause");
    let mut writer = qemu_io(&uri, "write -P 6 1M 64k").spawn().expect("qemu-io");
    sleep(Duration::from_millis(200));
    on("close");
    assert!(writer.wait().expect("its end").success());
    on("detach");
    let bytes = std::fs::read(&second).expect("the image");
    let all =
        |from: usize, len: usize, byte: u8| bytes[from..from + len].iter().all(|b| *b == byte);
    assert!(all(0, 65536, 7) && all(65536, 65536, 8) && all(1 << 20, 65536, 6));
    assert_eq!(std::fs::read(&first).expect("the image")[65536], 0);
}

#[test]
fn an_image_that_is_gone_when_it_is_closed_holds_nobody_up() {
    let taps = Taps::new();
    let image = taps.image("a.raw", 4 << 20);
    let socket = taps.run(&["create", "-a", &format!("aio:{}", text(&image))]);
    let list = taps.run(&["list"]);
    let pid = list.split(' ').next().and_then(|p| p.strip_prefix("pid=")).expect("a pid");
    let at = ["-p", pid, "-m", "0"];
    taps.run(&[&["pause"][..], &at].concat());
    std::fs::remove_file(&image).expect("removed");
    let uri = format!("nbd+unix:///?socket={socket}");
    let mut writer = qemu_io(&uri, "write -P 6 1M 64k");
    let mut writer = writer.stderr(Stdio::null()).spawn().expect("qemu-io");
    sleep(Duration::from_millis(200));
    let refused = taps.refusal(&[&["unpause"][..], &at].concat());
    assert!(refused.contains("a.raw"), "{refused}");
    let begin = Instant::now();
    taps.try_to(&[&["close"][..], &at].concat());
    assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
    assert!(!writer.wait().expect("its end").success(), "written to nothing");
    taps.run(&[&["detach"][..], &at].concat());
}

#[test]
fn minors_are_set_aside_and_have_names() {
    let taps = Taps::new();
    let image = taps.image("a.raw", 4 << 20);
    let args = format!("aio:{}", text(&image));
    let name = taps.run(&["allocate"]);
    assert!(name.ends_with("run/blktap/tapdev0"), "{name}");
    let other = taps.path("disk-b");
    assert_eq!(taps.run(&["allocate", "-d", text(&other)]), text(&other));
    // Others leave them alone.
    let socket = taps.run(&["create", "-D", "-a", &args]);
    assert!(socket.ends_with(".2"), "{socket}");
    let list = taps.run(&["list"]);
    let pid = list.split(' ').next().and_then(|p| p.strip_prefix("pid=")).expect("a pid");
    taps.run(&["destroy", "-p", pid, "-m", "2"]);
    let pid = taps.run(&["spawn"]);
    let at = ["-p", &pid, "-m", "1"];
    taps.run(&[&["attach"][..], &at].concat());
    taps.run(&[&["open"][..], &at, &["-r", "-a", &args]].concat());
    well(&mut qemu_io(&format!("nbd+unix:///?socket={}", text(&other)), "write -P 5 0 4k"));
    assert!(taps.refusal(&["free", "-m", "1"]).contains("detach it first"));
    taps.run(&[&["close"][..], &at].concat());
    assert!(!other.exists() && other.symlink_metadata().is_ok(), "it leads to nothing");
    taps.run(&[&["detach"][..], &at].concat());
    within("its end", Duration::from_secs(5), || taps.run(&["list"]).is_empty());
    for minor in ["0", "1"] {
        taps.run(&["free", "-m", minor]);
        assert!(taps.refusal(&["free", "-m", minor]).contains("is not set aside"));
    }
    assert!(other.symlink_metadata().is_err() && Path::new(&name).symlink_metadata().is_err());
    assert_eq!(std::fs::read(&image).expect("the image")[0], 5);
    let devices = std::fs::read_to_string("/proc/devices").expect("devices");
    if devices.lines().any(|line| line.trim().ends_with(" nbd")) {
        assert!(taps.run(&["major", "-b"]).parse::<u32>().is_ok());
    } else {
        assert!(taps.refusal(&["major"]).contains("this kernel has no nbd driver"));
    }
    assert!(taps.refusal(&["major", "-c"]).contains("no character devices"));
}

/// A tmpfs, gone with this.
struct Small(PathBuf);

impl Small {
    fn new(at: PathBuf, options: &str) -> Small {
        std::fs::create_dir(&at).expect("a folder");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", options, "none"]).arg(&at);
        let mounted = mount.status().expect("mount");
        assert!(mounted.success(), "mounting a tmpfs needs root");
        Small(at)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_standby_takes_over_from_an_image_without_room() {
    let taps = Taps::new();
    let small = Small::new(taps.path("small"), "size=4m");
    let first = small.0.join("first.raw");
    std::fs::File::create(&first).expect("a file").set_len(16 << 20).expect("its size");
    let second = taps.path("second.qcow2");
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b", text(&first), text(&second)])
        .status();
    assert!(made.expect("qemu-img: install qemu-utils").success());
    let (one, two) = (format!("aio:{}", text(&first)), format!("qcow2:{}", text(&second)));
    let args = ["create", "-s", "-2", &two, "-a", &one, "--allow-backing", text(&small.0)];
    let stranger = taps.path("stranger.qcow2");
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", text(&stranger), "16M"])
        .status();
    assert!(made.expect("qemu-img").success());
    let wrong = format!("qcow2:{}", text(&stranger));
    let refused = taps.refusal(&["create", "-s", "-2", &wrong, "-a", &one]);
    assert!(refused.contains("does not build on"), "{refused}");
    let socket = taps.run(&args);
    let list = taps.run(&["list"]);
    let pid = list.split(' ').next().and_then(|p| p.strip_prefix("pid=")).expect("a pid");
    let uri = format!("nbd+unix:///?socket={socket}");
    let failed_over = || {
        let stats = taps.run(&["stats", "-p", pid, "-m", "0"]);
        serde_json::from_str::<Value>(&stats).expect("a dictionary")["failed_over"].clone()
    };
    well(&mut qemu_io(&uri, "write -P 1 0 2M"));
    assert_eq!(failed_over(), 0);
    // Four times as much as there is room for.
    well(qemu_io(&uri, "write -P 2 1M 8M").args(["-c", "write -P 3 9M 7M", "-c", "flush"]));
    assert_eq!(failed_over(), 1);
    for read in ["read -P 1 0 1M", "read -P 2 1M 8M", "read -P 3 9M 7M"] {
        well(&mut qemu_io(&uri, read));
    }
    // Opened again it is the second one.
    taps.run(&["pause", "-p", pid, "-m", "0"]);
    taps.run(&["unpause", "-p", pid, "-m", "0"]);
    assert!(taps.run(&["list"]).ends_with(&format!("args={two}")));
    well(&mut qemu_io(&uri, "read -P 3 9M 7M"));
    taps.run(&["destroy", "-p", pid, "-m", "0"]);
    let checked = Command::new("qemu-img").args(["check", "-q", text(&second)]).status();
    assert!(checked.expect("qemu-img").success());
    drop(small);
}

#[test]
fn a_standby_that_cannot_take_over_holds_nobody_up() {
    let taps = Taps::new();
    let small = Small::new(taps.path("small"), "size=2m");
    let first = small.0.join("first.raw");
    std::fs::File::create(&first).expect("a file").set_len(8 << 20).expect("its size");
    let second = taps.path("second.qcow2");
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b", text(&first), text(&second)])
        .status();
    assert!(made.expect("qemu-img: install qemu-utils").success());
    let (one, two) = (format!("aio:{}", text(&first)), format!("qcow2:{}", text(&second)));
    let allowed = ["--allow-backing", text(&small.0)];
    let socket = taps.run(&[&["create", "-s", "-2", &two, "-a", &one][..], &allowed].concat());
    let list = taps.run(&["list"]);
    let pid = list.split(' ').next().and_then(|p| p.strip_prefix("pid=")).expect("a pid");
    std::fs::remove_file(&second).expect("removed");
    let uri = format!("nbd+unix:///?socket={socket}");
    let mut writer =
        qemu_io(&uri, "write -P 6 0 4M").stderr(Stdio::null()).spawn().expect("qemu-io");
    sleep(Duration::from_secs(1));
    assert!(writer.try_wait().expect("its state").is_none(), "it does not wait");
    let begin = Instant::now();
    taps.run(&["destroy", "-p", pid, "-m", "0"]);
    assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
    assert!(!writer.wait().expect("its end").success(), "written to nothing");
    drop(small);
}
