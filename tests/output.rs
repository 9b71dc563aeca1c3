//! Readers of the program's output that go away, and output that cannot be written: the work is done all
//! the same, and nothing panics.

use std::fs::OpenOptions;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

const RINGBACK: &str = env!("CARGO_BIN_EXE_ringback");

/// A pipe that nobody reads.
fn unread() -> OwnedFd {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    writer.into()
}

fn ringback(folder: &Path, words: &[&str]) -> Command {
    let mut command = Command::new(RINGBACK);
    command.args(words).current_dir(folder).env("RINGBACK_RUN", folder.join("run"));
    command.env("TMPDIR", folder).stdin(Stdio::null());
    command
}

/// Without a reader of its output, and with one of its errors.
fn unheard(folder: &Path, words: &[&str]) -> (Option<i32>, String) {
    let ended = ringback(folder, words).stdout(unread()).stderr(Stdio::piped()).output();
    let ended = ended.expect("ringback");
    (ended.status.code(), String::from_utf8_lossy(&ended.stderr).into_owned())
}

#[test]
fn commands_do_their_work_unheard() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    let quiet = |words: &[&str], code: i32| {
        assert_eq!(unheard(folder, words), (Some(code), String::new()), "{words:?}");
    };
    quiet(&["--help"], 0);
    quiet(&["disk", "create", "-f", "qcow2", "a", "1M"], 0);
    quiet(&["disk", "snapshot", "create", "a", "one"], 0);
    quiet(&["disk", "snapshot", "list", "a"], 0);
    for show in ["info", "map", "check"] {
        quiet(&["disk", show, "a"], 0);
        quiet(&["disk", show, "--json", "a"], 0);
    }
    quiet(&["disk", "resize", "a", "2M"], 0);
    quiet(&["disk", "create", "-f", "raw", "b", "1M"], 0);
    quiet(&["disk", "convert", "-O", "raw", "a", "c"], 0);
    assert_eq!(folder.join("c").metadata().expect("an image").len(), 2 << 20);
    // What a command finds is its exit status, whoever reads the words.
    std::fs::write(folder.join("b"), [1; 1 << 20]).expect("an image");
    quiet(&["disk", "compare", "-f", "raw", "-F", "raw", "b", "c"], 1);
    quiet(&["list"], 0);
    let (code, error) = unheard(folder, &["disk", "info", "none"]);
    assert!(code == Some(1) && error.contains("none") && !error.contains("panic"), "{error}");
}

fn ends(mut command: Command) -> ExitStatus {
    let mut child = command.spawn().expect("ringback");
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(status) = child.try_wait().expect("its status") {
            return status;
        }
        if Instant::now() > end {
            child.kill().expect("a signal");
            panic!("it goes on");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// It would go on for ever.
#[test]
fn rates_end_with_their_reader() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut command =
        ringback(folder.path(), &["stats", "--json", "--count", "100000", "--interval", "0.01"]);
    command.stdout(unread());
    assert!(ends(command).success());
}

#[test]
fn a_full_disk_is_an_error() {
    let folder = tempfile::tempdir().expect("a folder");
    let full = || OpenOptions::new().write(true).open("/dev/full").expect("/dev/full");
    for words in [&["list"][..], &["list", "--json"]] {
        let ended = ringback(folder.path(), words).stdout(full()).output().expect("ringback");
        let error = String::from_utf8_lossy(&ended.stderr);
        assert_eq!(ended.status.code(), Some(1), "{words:?}");
        assert!(error.starts_with("ringback: standard output: No space left"), "{error}");
    }
}

/// All processes of a run have nobody to tell anything.
#[test]
fn a_run_with_nobody_to_tell() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("guest.toml");
    std::fs::write(&file, "[[disk]]\nvdev = \"xvda\"\nwork_mib = 16\n").expect("a file");
    let mut command = ringback(folder.path(), &["-v", "run", "--progress", "guest.toml"]);
    command.env_remove("RINGBACK_LOG").stdout(unread()).stderr(unread());
    assert!(ends(command).success());
}

/// Nobody reads its addresses: what was begun is served all the same.
#[test]
fn a_guest_is_served_unheard() {
    let folder = tempfile::tempdir().expect("a folder");
    let disks = "[[disk]]\nvdev = \"xvda\"\n[[disk]]\nvdev = \"xvdb\"\n";
    std::fs::write(folder.path().join("guest.toml"), disks).expect("a file");
    let mut command = ringback(folder.path(), &["run", "--nbd", "ring", "guest.toml"]);
    let mut child = command.stdout(unread()).spawn().expect("ringback");
    let copies = || {
        let uri = "nbd+unix:///xvdb?socket=ring";
        let mut copy = ringback(folder.path(), &["disk", "convert", "-O", "raw", uri, "copy"]);
        copy.stderr(Stdio::null()).status().expect("ringback").success()
    };
    let end = Instant::now() + Duration::from_secs(60);
    let mut copied = false;
    while !copied && Instant::now() < end && child.try_wait().expect("its status").is_none() {
        copied = copies();
    }
    // By now it has said all that it had to say.
    let copied_again = copied && copies();
    let pid = rustix::process::Pid::from_child(&child);
    let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    let status = child.wait().expect("its status");
    assert!(copied_again && status.success(), "{status}");
    let copy = folder.path().join("copy").metadata().expect("the copy");
    assert!(copy.len() > 0);
}
