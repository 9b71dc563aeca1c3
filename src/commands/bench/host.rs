//! Our side of `ringback bench blk` and `net`: a hypervisor, a backend and a guest, each a process of
//! its own, as under `ringback run`.

use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use blktap::storage::Access;
use hypervisor::DomId;
use hypervisor::core::domains::Kind;
use hypervisor::embedded::{HYPERVISOR_SOCKET, Toolstack};
use hypervisor::xenbus::toolstack::{self, Device};
use hypervisor::xenbus::{DeviceId, Key};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::front::Plan;
use super::load::{Load, Measured};
use crate::cli::Placement;

/// The number of `xvda`.
pub const DEVID: u32 = 51712;
/// How long a process may take to be there.
const PATIENCE: Duration = Duration::from_secs(10);

/// A process that ends with this one.
pub struct Held {
    pub child: Child,
    /// Its standard input: when it closes, the hypervisor ends.
    pub hold: Option<ChildStdin>,
}

impl Held {
    pub fn spawn(command: &mut Command) -> io::Result<Held> {
        let mut child = command.spawn().map_err(|e| {
            let program = command.get_program().to_string_lossy().into_owned();
            io::Error::new(e.kind(), format!("{program}: {e}"))
        })?;
        let hold = child.stdin.take();
        Ok(Held { child, hold })
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if self.hold.take().is_some() {
            // It ends by itself.
            let ended = || !matches!(self.child.try_wait(), Ok(None));
            if until("the end of a process", ended).is_ok() {
                return;
            }
        }
        // It fails where the process has ended by itself.
        if let Err(e) = self.child.kill().and_then(|()| self.child.wait()) {
            tracing::debug!("ending process {}: {e}", self.child.id());
        }
    }
}

/// Which end of the ring a process is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Guest,
    Backend,
}

/// Binds this thread, and so what it starts from now on, to the processor of one end.
pub fn place(placement: Placement, end: End) -> io::Result<()> {
    if placement == Placement::Free {
        return Ok(());
    }
    let mut set = rustix::thread::CpuSet::new();
    set.set(match end {
        End::Backend => 0,
        End::Guest => 1,
    });
    rustix::thread::sched_setaffinity(None, &set)
        .map_err(|e| io::Error::other(format!("--place pinned: two processors are needed: {e}")))
}

/// Waits until `is` says so.
pub fn until(what: &str, mut is: impl FnMut() -> bool) -> io::Result<()> {
    let end = Instant::now() + PATIENCE;
    while !is() {
        if Instant::now() > end {
            let text = format!("{what}: not within {} s", PATIENCE.as_secs());
            return Err(io::Error::new(io::ErrorKind::TimedOut, text));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// This program, in quiet; it ends with this process.
fn ourselves() -> io::Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    // That connections are told of no more is no news here: each measurement is one.
    command.env("RINGBACK_LOG", "warn,hypervisor::xenbus::log_limit=error");
    command.args(["--end-with", &std::process::id().to_string()]);
    Ok(command)
}

/// Runs a process of ours that prints one measurement.
pub fn measure<T: DeserializeOwned>(mut command: Command, stdin: Stdio) -> io::Result<T> {
    let mut child = command.stdin(stdin).stdout(Stdio::piped()).spawn()?;
    // The parent's copy of its standard input is in the command.
    drop(command);
    let mut text = String::new();
    if let Some(mut out) = child.stdout.take() {
        out.read_to_string(&mut text)?;
    }
    let status = child.wait()?;
    if !status.success() {
        return Err(io::Error::other(format!("a measuring process ended with {status}")));
    }
    Ok(serde_json::from_str(&text)?)
}

/// What our backend is to serve.
pub struct Served {
    /// FORMAT:TARGET.
    pub target: String,
    pub access: Access,
    /// The backend's knobs.
    pub options: String,
    /// How long the guest's side polls, where it is not the default.
    pub poll_us: Option<u32>,
}

/// A node's keys and their values.
type Keys<'a> = &'a [(&'a str, &'a str)];

/// A hypervisor's process, a guest's domain, and a process with a backend for it.
pub struct Machine {
    // Ended in this order.
    pub backend: Held,
    _keep: OwnedFd,
    toolstack: Toolstack,
    pub hypervisor: Held,
    domid: DomId,
    run_dir: PathBuf,
}

impl Machine {
    /// Starts the processes, with sockets in `folder`, which is removed at the end. `backend` is the
    /// backend's kind and what else its command says.
    pub fn start(folder: &Path, backend: &[&str]) -> io::Result<Machine> {
        let run_dir = folder.join("run");
        let mut command = ourselves()?;
        command.arg("--run-dir").arg(&run_dir).args(["hypervisor", "--throw-away"]).arg(folder);
        let hypervisor = Held::spawn(command.stdin(Stdio::piped()))?;
        let socket = run_dir.join(HYPERVISOR_SOCKET);
        until("the hypervisor's socket", || Toolstack::connect(&socket).is_ok())?;
        let toolstack = Toolstack::connect(&socket)?;
        let domid = toolstack.create_domain(None, Kind::Guest, "bench")?;
        // The domain lives as long as this connection.
        let keep = toolstack.connect_domain(domid)?;
        let mut command = ourselves()?;
        command.arg("--run-dir").arg(&run_dir).arg("--hypervisor").arg(&socket);
        command.arg("backend").args(backend).args(["--domid", &domid.to_string()]);
        let backend = Held::spawn(command.stdin(Stdio::null()))?;
        Ok(Machine { backend, _keep: keep, toolstack, hypervisor, domid, run_dir })
    }

    /// Gives the guest a device.
    pub fn attach(
        &self,
        kind: &'static str,
        devid: u32,
        (back, front): (Keys<'_>, Keys<'_>),
    ) -> io::Result<()> {
        let key = |(key, value): &(&str, &str)| -> Key { ((*key).to_owned(), (*value).to_owned()) };
        let device = Device {
            id: DeviceId { kind, domid: self.domid, devid },
            backend: 0,
            backend_keys: back.iter().map(key).collect(),
            frontend_keys: front.iter().map(key).collect(),
        };
        toolstack::attach(&self.toolstack.store()?, &device)?;
        Ok(())
    }

    /// The stats page of a device.
    pub fn stats(&self, kind: &str, devid: u32) -> PathBuf {
        self.run_dir.join(format!("{}/{kind}-{devid}.stats", self.domid))
    }

    /// One measurement by a new guest process of the same domain, which carries out a part of a bench.
    pub fn measure<T: DeserializeOwned>(&self, name: &str, plan: &impl Serialize) -> io::Result<T> {
        let domain = self.toolstack.connect_domain(self.domid)?;
        measure(part(name, plan)?, domain.into())
    }
}

/// A disk that is served by a backend process of ours.
pub struct Ours {
    machine: Machine,
    poll_us: Option<u32>,
}

impl Ours {
    /// Starts the processes, with sockets in `folder`, which is removed at the end.
    pub fn start(folder: &Path, served: &Served) -> io::Result<Ours> {
        let machine = Machine::start(folder, &["blk", "--null-disks"])?;
        let mode = if served.access == Access::ReadWrite { "w" } else { "r" };
        let keys = [
            ("params", served.target.as_str()),
            ("script", blkback::SCRIPT),
            ("mode", mode),
            ("hotplug-status", "connected"),
            ("options", served.options.as_str()),
        ];
        let number = DEVID.to_string();
        machine.attach("vbd", DEVID, (&keys, &[("virtual-device", &number)]))?;
        Ok(Ours { machine, poll_us: served.poll_us })
    }

    fn plan(&self, load: Load, idle: Option<f64>) -> Plan {
        let stats = self.machine.stats("vbd", DEVID);
        let (backend_pid, poll_us) = (self.machine.backend.child.id(), self.poll_us);
        Plan { devid: DEVID, load, backend_pid, stats, poll_us, idle }
    }

    /// One measurement by a new guest process of the same domain.
    pub fn measure(&self, load: Load, idle: Option<f64>) -> io::Result<Measured> {
        self.machine.measure("guest", &self.plan(load, idle))
    }
}

/// A process of this program that carries out a part of a bench.
pub fn part(name: &str, plan: &impl Serialize) -> io::Result<Command> {
    let mut command = ourselves()?;
    command.args(["bench", name]).arg(serde_json::to_string(plan)?);
    Ok(command)
}
