//! The processes: a hypervisor, a backend, and this one as toolstack and guests.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use hypervisor::core::domains::Kind;
use hypervisor::embedded::{HYPERVISOR_SOCKET, Toolstack, serve};
use hypervisor::store::{Client, Tx};
use hypervisor::xenbus::toolstack::{Device, attach};
use hypervisor::xenbus::{DeviceId, State};

use crate::guest::Domain;
use crate::image::Image;
use crate::process::{Holdings, Process};

const ROLE: &str = "RINGBACK_HOSTILE_ROLE";
const RUN_DIR: &str = "RINGBACK_HOSTILE_RUN_DIR";
/// How long anything may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// What another process of this program is.
pub fn role() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let dir = PathBuf::from(std::env::var(RUN_DIR).unwrap());
    match role.as_str() {
        "hypervisor" => {
            let served = serve(&dir, std::io::stdin().as_fd());
            std::process::exit(i32::from(served.is_err()));
        }
        "guest" => crate::kills::guest(),
        other => panic!("no role {other}"),
    }
}

/// Starts this program in a role.
pub fn in_role(role: &str, run: &Path, stdin: Stdio) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "role", "--nocapture", "--quiet"])
        .env(ROLE, role)
        .env(RUN_DIR, run)
        .stdin(stdin)
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

/// Waits for something to become true.
pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "it took too long: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub struct Rig {
    pub toolstack: Toolstack,
    pub store: Client,
    pub backend: Child,
    hypervisor: Child,
    stop: Option<OwnedFd>,
    dir: tempfile::TempDir,
}

impl Rig {
    /// `args` are the backend's after `backend blk --any`.
    pub fn start(args: &[&str]) -> Rig {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("run");
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let hypervisor = in_role("hypervisor", &run, Stdio::from(read));
        let socket = run.join(HYPERVISOR_SOCKET);
        until("the hypervisor listens", || Toolstack::connect(&socket).is_ok());
        let toolstack = Toolstack::connect(&socket).unwrap();
        let store = toolstack.store().unwrap();
        let backend = backend(dir.path(), args);
        let stop = Some(write);
        let rig = Rig { toolstack, store, backend, hypervisor, stop, dir };
        until("the backend serves", || {
            rig.process().threads().iter().any(|(name, _)| name == "control")
        });
        rig
    }
    /// What the backend holds once it has come to rest.
    pub fn holdings_at_rest(&self) -> Holdings {
        let mut last = self.process().holdings();
        let mut same = 0;
        until("the backend is at rest", || {
            std::thread::sleep(Duration::from_millis(10));
            let now = self.process().holdings();
            same = if now == last { same + 1 } else { 0 };
            last = now;
            same == 8
        });
        last
    }
    /// The backend's process.
    pub fn process(&self) -> Process {
        Process(self.backend.id())
    }
    pub fn run_dir(&self) -> PathBuf {
        self.dir.path().join("run")
    }
    pub fn domain(&self, name: &str) -> Domain {
        Domain::new(&self.toolstack, name)
    }
    /// A domain that no process acts as yet.
    pub fn bare_domain(&self, name: &str) -> u16 {
        self.toolstack.create_domain(None, Kind::Guest, name).unwrap()
    }
    pub fn image(&self, name: &str, len: usize) -> Image {
        Image::new(&self.dir.path().join(name), len)
    }
    /// Gives a domain a disk, as `ringback attach` does.
    pub fn attach(&self, domid: u16, devid: u32, image: &Path, options: &str) {
        let keys = [
            ("params", format!("raw:{}", image.display())),
            ("mode", "w".to_owned()),
            ("options", options.to_owned()),
        ];
        let backend_keys = keys.into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
        let id = DeviceId { kind: "vbd", domid, devid };
        attach(&self.store, &Device { id, backend: 0, backend_keys, frontend_keys: vec![] })
            .unwrap();
    }
    fn backend_path(domid: u16, devid: u32) -> String {
        format!("/local/domain/0/backend/vbd/{domid}/{devid}")
    }
    /// The backend's state of a device.
    pub fn state(&self, domid: u16, devid: u32) -> Option<State> {
        let path = format!("{}/state", Self::backend_path(domid, devid));
        self.store.get(&path).unwrap().map(|s| State::parse(&s))
    }
    /// Waits for a state of the backend.
    pub fn wait(&self, domid: u16, devid: u32, state: State) {
        let start = Instant::now();
        while self.state(domid, devid) != Some(state) {
            if start.elapsed() > PATIENCE {
                let (now, error) = (self.state(domid, devid), self.error(domid, devid));
                panic!("no {state:?} of {domid}/{devid}: {now:?}, {error:?}\n{}", self.log());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    fn error_path(domid: u16, devid: u32) -> String {
        format!("/local/domain/0/error/backend/vbd/{domid}/{devid}/error")
    }
    /// The text of the device's error node.
    pub fn error(&self, domid: u16, devid: u32) -> Option<String> {
        self.store.get(&Self::error_path(domid, devid)).unwrap()
    }
    pub fn clear_error(&self, domid: u16, devid: u32) {
        self.store.remove(Tx::NONE, &Self::error_path(domid, devid)).unwrap();
    }
    /// Takes a device away whose frontend has closed or is gone.
    pub fn detach(&self, domid: u16, devid: u32) {
        let path = Self::backend_path(domid, devid);
        self.store.remove(Tx::NONE, &path).unwrap();
    }
    /// What the backends have logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("backend.log")).unwrap_or_default()
    }
}

fn backend(dir: &Path, args: &[&str]) -> Child {
    let log =
        std::fs::File::options().create(true).append(true).open(dir.join("backend.log")).unwrap();
    Command::new(env!("CARGO_BIN_EXE_ringback"))
        .arg("--run-dir")
        .arg(dir.join("backends"))
        .arg("--hypervisor")
        .arg(dir.join("run").join(HYPERVISOR_SOCKET))
        .args(["backend", "blk", "--any", "--set", "poll_us=0"])
        .args(args)
        .stdin(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap()
}

impl Drop for Rig {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the backend's log:\n{}", self.log());
        }
        let _ = self.backend.kill();
        let _ = self.backend.wait();
        self.stop = None;
        let _ = self.hypervisor.wait();
    }
}
