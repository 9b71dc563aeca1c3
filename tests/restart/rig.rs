//! The processes: a hypervisor, a guest with its load, and one backend after the other.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use hypervisor::core::domains::Kind;
use hypervisor::embedded::{HYPERVISOR_SOCKET, Toolstack};
use hypervisor::store::Client;
use hypervisor::xenbus::DeviceId;
use hypervisor::xenbus::keys::key;
use hypervisor::xenbus::toolstack::{self, Device};

use crate::plan::{DiskPlan, DiskReport, Grants, GuestPlan, Line, Task};

pub const RINGBACK: &str = env!("CARGO_BIN_EXE_ringback");
/// Bytes of the disk.
pub const SIZE: u64 = 24 << 20;
/// xvda.
pub const DEVID: u32 = 51712;
/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// What is served, and how.
#[derive(Clone, Copy)]
pub struct Scene {
    pub format: &'static str,
    pub grants: Grants,
    pub queues: u32,
    pub order: u32,
    /// Knobs of the backend.
    pub set: &'static str,
    pub seed: u64,
    /// Of random I/O.
    pub seconds: f64,
}

/// A process that ends with this value.
pub struct Running(pub Child);

impl Running {
    /// SIGKILL, and its end.
    pub fn kill(&mut self) {
        self.0.kill().expect("SIGKILL");
        self.0.wait().expect("an end");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.kill_guest();
            let mut said = String::new();
            if let Some(mut lines) = self.lines.take() {
                let _ = lines.read_to_string(&mut said);
            }
            let last: String = said.lines().last().unwrap_or_default().chars().take(2000).collect();
            eprintln!("the guest's last words:\n{last}\nthe backends' log:\n{}", self.log());
        }
    }
}

pub struct Rig {
    pub scene: Scene,
    pub dir: tempfile::TempDir,
    pub store: Client,
    guest: Option<Running>,
    lines: Option<BufReader<std::process::ChildStdout>>,
    _toolstack: Toolstack,
    _hypervisor: Running,
}

pub fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begun.elapsed() < PATIENCE, "it took too long: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn well(args: &[&str]) {
    let output = Command::new(RINGBACK).args(args).output().expect("ringback");
    assert!(output.status.success(), "{args:?}: {output:?}");
}

pub fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

impl Rig {
    /// A guest at work, whose disk is to be served.
    pub fn start(scene: Scene) -> Rig {
        // On a real file system: past the page cache a request lasts.
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
        let run = dir.path().join("run");
        let mut hypervisor = Command::new(RINGBACK);
        hypervisor.env("RINGBACK_LOG", "warn");
        hypervisor.arg("--run-dir").arg(&run).arg("hypervisor").stdin(Stdio::null());
        let hypervisor = Running(hypervisor.spawn().expect("the hypervisor"));
        let socket = run.join(HYPERVISOR_SOCKET);
        let toolstack = until("the hypervisor listens", || Toolstack::connect(&socket).ok());
        let store = toolstack.store().expect("a store");
        let domid = toolstack.create_domain(None, Kind::Guest, "guest").expect("a domain");
        let identity = toolstack.connect_domain(domid).expect("an identity");
        let image = dir.path().join("disk");
        well(&["disk", "create", "-f", scene.format, text(&image), &SIZE.to_string()]);
        let device = Device {
            id: DeviceId { kind: "vbd", domid, devid: DEVID },
            backend: 0,
            backend_keys: vec![
                key("params", format!("{}:{}", scene.format, image.display())),
                key("script", blkback::SCRIPT),
                key("dev", "xvda"),
                key("mode", "w"),
                key("options", format!("max_queues={}", scene.queues)),
                key("hotplug-status", "connected"),
            ],
            frontend_keys: vec![key("virtual-device", DEVID)],
        };
        toolstack::attach(&store, &device).expect("attach");
        let disk = DiskPlan {
            vdev: "xvda".into(),
            devid: DEVID,
            task: Task::Write,
            queues: scene.queues,
            ring_page_order: scene.order,
            grants: scene.grants,
            depth: 32,
            span: SIZE,
            work: u64::MAX / 4,
            seconds: Some(scene.seconds),
            seed: scene.seed,
            cpus: Vec::new(),
        };
        let plan = GuestPlan { disks: vec![disk], vifs: Vec::new(), nbd: None };
        let plan = serde_json::to_string(&plan).expect("JSON");
        let mut guest = Command::new(RINGBACK);
        guest.args(["guest", &plan]).stdin(Stdio::from(identity)).stdout(Stdio::piped());
        let mut guest = guest.spawn().expect("the guest");
        let lines = guest.stdout.take().map(BufReader::new);
        Rig {
            scene,
            dir,
            store,
            guest: Some(Running(guest)),
            lines,
            _toolstack: toolstack,
            _hypervisor: hypervisor,
        }
    }

    fn ringback(&self) -> Command {
        let log = std::fs::File::options().create(true).append(true).open(self.path("log"));
        let mut command = Command::new(RINGBACK);
        command.arg("--run-dir").arg(self.path("backends"));
        command.arg("--hypervisor").arg(self.path("run").join(HYPERVISOR_SOCKET));
        command.env("RINGBACK_LOG", "info").env("NO_COLOR", "1");
        command.stdin(Stdio::null()).stderr(log.expect("a log"));
        command
    }

    /// Starts a backend for the guest.
    pub fn backend(&self) -> Running {
        let mut command = self.ringback();
        command.args(["backend", "blk", "--domid", "1", "--set", self.scene.set]);
        Running(command.spawn().expect("a backend"))
    }

    /// Starts a daemon, which starts backends.
    pub fn daemon(&self) -> Running {
        let mut command = self.ringback();
        command.args(["daemon", "--set", self.scene.set]);
        Running(command.spawn().expect("a daemon"))
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
    /// Where the tables of what is in flight are.
    pub fn table(&self) -> PathBuf {
        self.path(&format!("backends/1/vbd-{DEVID}.inflight"))
    }
    /// What the backends have logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }
    /// What they have said to the guest's administrator.
    pub fn error(&self) -> Option<String> {
        let path = format!("/local/domain/0/error/backend/vbd/1/{DEVID}/error");
        self.store.get(&path).expect("the store")
    }
    /// Whether the guest has seen its disk connected, and has begun.
    pub fn guest_works(&self) -> bool {
        let path = format!("/local/domain/1/device/vbd/{DEVID}/state");
        self.store.get(&path).expect("the store").as_deref() == Some("4")
    }
    /// How often a backend has begun to serve the guest's rings.
    pub fn begins(&self) -> usize {
        let log = self.log();
        log.matches(": connected with ").count() + log.matches(": attached with ").count()
    }
    /// Requests that were served again, by the log.
    pub fn replays(&self) -> u64 {
        let log = self.log();
        let words = log.split(" queue(s), ").skip(1);
        words.filter_map(|rest| rest.split(' ').next()?.parse::<u64>().ok()).sum()
    }
    pub fn guest_runs(&mut self) -> bool {
        let guest = &mut self.guest.as_mut().expect("a guest").0;
        guest.try_wait().expect("its state").is_none()
    }
    /// Ends the guest.
    pub fn kill_guest(&mut self) {
        self.guest = None;
    }

    /// Waits for the guest's report, and for its end. A backend must serve it.
    pub fn report(&mut self) -> DiskReport {
        let report = self.lines.take().expect("its output").lines().find_map(|line| {
            let line = line.expect("a line");
            match serde_json::from_str(&line).expect("a line of the guest") {
                Line::Report(mut report) => report.disks.pop(),
                Line::Progress(_) | Line::Serving => None,
            }
        });
        let log = self.log();
        let report = report.unwrap_or_else(|| panic!("the guest has ended without a word\n{log}"));
        let status = self.guest.take().expect("a guest").0.wait().expect("its end");
        assert!(status.success(), "the guest: {status}\n{log}");
        report
    }
}
