//! Mirrors to servers' exports, and the end of a command by Ctrl-C.

use super::*;

const XVDA: &str = "1/xvda";

/// A server of an image, ended with this.
struct Server(Child);

impl Server {
    fn start(program: &str, args: &[&str], socket: &Path) -> Server {
        let mut command = Command::new(program);
        let child = command.args(args).stdin(Stdio::null()).stdout(Stdio::null()).spawn();
        let server = Server(child.unwrap_or_else(|e| panic!("{program}: {e}: install it")));
        let end = Instant::now() + Duration::from_secs(10);
        while std::os::unix::net::UnixStream::connect(socket).is_err() {
            assert!(Instant::now() < end, "{program} does not serve");
            std::thread::sleep(Duration::from_millis(20));
        }
        server
    }
    fn end(mut self) {
        kill_process(Pid::from_child(&self.0), Signal::TERM).expect("SIGTERM");
        self.0.wait().expect("an end");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A guest with an image that has some data.
fn guest() -> Guest {
    let folder = folder();
    image(folder.path(), "qcow2", "disk", None);
    let disk = folder.path().join("disk");
    well("qemu-io", &["-f", "qcow2", "-c", "write -P 5 3M 40M", text(&disk)]);
    Guest::start(folder, &["qcow2:disk"])
}

fn empty(path: &Path) {
    std::fs::File::create(path).and_then(|f| f.set_len(SIZE)).expect("a file");
}

/// The guest goes on in a server's export; what it reads there is in the server's file.
fn mirrored(serve: impl Fn(&str, &str) -> (String, Vec<String>)) {
    let guest = guest();
    let (target, socket) = (guest.path("target"), guest.path("target.sock"));
    empty(&target);
    let (program, args) = serve(text(&socket), text(&target));
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let server = Server::start(&program, &args, &socket);
    let mut fio = guest.fio("xvda", 5, 90);
    let name = format!("nbd:unix:{}", text(&socket));
    let said = guest.ok(&["mirror", "--live", XVDA, "--switch", "-n", &name]);
    assert!(said.contains("mirror done"), "{said}");
    assert!(fio.runs(), "fio has ended too early");
    fio.well();
    assert_eq!(guest.job(XVDA)["disk"], name.as_str());
    guest.copy("xvda", "seen");
    let folder = guest.end();
    server.end();
    same((&folder.path().join("seen"), "raw"), (&target, "raw"));
}

#[test]
fn a_guest_moves_to_an_export_of_qemu_nbd() {
    mirrored(|socket, target| {
        let args = ["-k", socket, "-f", "raw", "-t", "-e", "8", "--discard=unmap", target];
        ("qemu-nbd".into(), args.map(str::to_owned).into())
    });
}

#[test]
fn a_guest_moves_to_an_export_of_ours() {
    mirrored(|socket, target| {
        let args = ["export", "nbd", "-k", socket, "-f", "raw", target];
        (RINGBACK.into(), args.map(str::to_owned).into())
    });
}

#[test]
fn ctrl_c_cancels_the_job_that_the_command_waits_for() {
    let guest = guest();
    let (target, socket) = (guest.path("target"), guest.path("target.sock"));
    empty(&target);
    // So slow that the mirror does not end by itself.
    let delay = ["export", "nbd", "-k", text(&socket), "--delay-us", "400000", "-f", "raw"];
    let server = Server::start(RINGBACK, &[&delay[..], &[text(&target)]].concat(), &socket);
    let name = format!("nbd:unix:{}", text(&socket));
    let mut command = Command::new(RINGBACK);
    command.arg("--run-dir").arg(&guest.run_dir).stdin(Stdio::null());
    command.args(["disk", "mirror", "--live", XVDA, "--switch", "-n", &name]);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("ringback");
    let end = Instant::now() + Duration::from_secs(10);
    while guest.job(XVDA)["state"] != "running" {
        assert!(Instant::now() < end, "it does not begin: {}", guest.job(XVDA));
        std::thread::sleep(Duration::from_millis(20));
    }
    std::thread::sleep(Duration::from_millis(300));
    kill_process(Pid::from_child(&child), Signal::INT).expect("SIGINT");
    let output = child.wait_with_output().expect("an end");
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("cancelling") && error.contains("mirror: cancelled"), "{error}");
    let job = guest.job(XVDA);
    assert_eq!(job["state"], "cancelled", "{job}");
    assert!(job["disk"].as_str().expect("a name").ends_with("/disk"), "{job}");
    // The guest has its disk, and another job may begin.
    let seen = guest.copy("xvda", "seen");
    guest.ok(&["snapshot", "create", "--live", XVDA, "--overlay", "overlay"]);
    let folder = guest.end();
    server.end();
    same((&seen, "raw"), (&folder.path().join("overlay"), "qcow2"));
}
