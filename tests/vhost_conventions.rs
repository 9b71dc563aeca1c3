//! `ringback export vhost-user-blk` by the back-end program conventions of QEMU's vhost-user
//! document: what management tools rely on.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::symlink;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ringback"));
    command.args(["export", "vhost-user-blk"]).env("RINGBACK_LOG", "warn").stdin(Stdio::null());
    command
}

fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    File::create(folder.path().join("disk")).and_then(|f| f.set_len(1 << 20)).expect("an image");
    folder
}

fn capabilities(command: &mut Command) -> Value {
    let output = command.output().expect("ringback");
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).expect("JSON")
}

#[test]
fn capabilities_are_told_whatever_else_is_said() {
    let told = capabilities(program().arg("--print-capabilities"));
    assert_eq!(told["type"], "block");
    assert_eq!(told["features"], serde_json::json!(["blk-file", "read-only"]));
    let odd = ["--fd", "x", "--socket-path", "/y", "--print-capabilities", "--no-such", "a", "b"];
    assert_eq!(capabilities(program().args(odd)), told);
}

#[test]
fn the_descriptor_names_the_program_under_its_own_name() {
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/vhost-user/50-ringback-blk.json");
    let text = std::fs::read(path).expect("the descriptor");
    let descriptor: Value = serde_json::from_slice(&text).expect("JSON");
    let binary = Path::new(descriptor["binary"].as_str().expect("a path"));
    assert!(binary.is_absolute(), "{binary:?}");
    let folder = folder();
    let link = folder.path().join(binary.file_name().expect("a name"));
    symlink(env!("CARGO_BIN_EXE_ringback"), &link).expect("a link");
    let told = capabilities(Command::new(link).arg("--print-capabilities"));
    assert_eq!(told["type"], descriptor["type"]);
}

/// Asks for the features: whether somebody answers.
fn greet(socket: &mut UnixStream) {
    socket.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
    let message: Vec<u8> = [1u32, 1, 0].iter().flat_map(|w| w.to_ne_bytes()).collect();
    socket.write_all(&message).expect("a message is taken");
    let mut answer = [0; 20];
    socket.read_exact(&mut answer).expect("an answer");
    assert_eq!(answer[..4], 1u32.to_ne_bytes());
}

fn with_fd(fd: impl AsFd + AsRawFd, image: &Path) -> Child {
    fcntl_setfd(&fd, FdFlags::empty()).expect("a descriptor");
    let number = fd.as_raw_fd().to_string();
    let image = image.to_str().expect("UTF-8");
    program()
        .args(["--cache", "writeback", "--fd", &number, "--blk-file", image])
        .spawn()
        .expect("ringback")
}

#[test]
fn a_connected_socket_is_served_until_its_front_end_goes() {
    let folder = folder();
    let (mut ours, theirs) = UnixStream::pair().expect("sockets");
    let mut child = with_fd(theirs, &folder.path().join("disk"));
    greet(&mut ours);
    drop(ours);
    assert!(child.wait().expect("its end").success());
}

#[test]
fn a_listening_socket_is_served_until_sigterm() {
    let folder = folder();
    let path = folder.path().join("sock");
    let listener = UnixListener::bind(&path).expect("a socket");
    let mut child = with_fd(listener, &folder.path().join("disk"));
    for _ in 0..2 {
        greet(&mut UnixStream::connect(&path).expect("a connection"));
    }
    kill_process(Pid::from_child(&child), Signal::TERM).expect("SIGTERM");
    assert!(child.wait().expect("its end").success());
    assert!(path.exists(), "the socket is not ours");
}

#[test]
fn what_cannot_be_served_is_refused_at_once() {
    let folder = folder();
    let image = folder.path().join("disk");
    let fails = |args: &[&str], why: &str| {
        let output = program().args(args).arg(&image).output().expect("ringback");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains(why), "{args:?}: {said}");
    };
    fails(&["--fd", "987"], "--fd 987: it is no open socket");
    fails(&[], "--socket-path");
    fails(&["--socket-path", "/no/such/folder/sock"], "/no/such/folder/sock: ");
    fails(&["--socket-path", "/tmp/x", "--num-queues", "65"], "65");
    let missing = folder.path().join("missing");
    let missing = missing.to_str().expect("UTF-8");
    let output = program().args(["--socket-path", "/tmp/x", missing]).output().expect("ringback");
    assert!(!output.status.success());
}
