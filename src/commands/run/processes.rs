//! The processes of a run. None outlives another by more than a moment: backend and guest end
//! with this process and with the hypervisor, the hypervisor with this process, and this process
//! ends all when one of them ends too early.

use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, after, bounded, select};
use hypervisor::core::domains::Kind;
use hypervisor::embedded::{HYPERVISOR_SOCKET, Toolstack};
use hypervisor::store::Client;

use super::super::Result;
use super::PATIENCE;
use super::plan::Line;

/// How often it is looked whether a process has ended.
const LOOK: Duration = Duration::from_millis(20);
/// How long after one process's end the others' words and ends are waited for.
const GRACE: Duration = Duration::from_millis(200);

/// What [`Processes::next_line`] waits for.
pub enum Said {
    /// The guest has said something.
    Line(Line),
    /// The user wants to end.
    Interrupted,
}

/// See the module.
pub struct Processes {
    run_dir: PathBuf,
    hypervisor: Option<Child>,
    backends: Vec<(&'static str, Child)>,
    guest: Option<Child>,
    /// The hypervisor ends when this is closed.
    hold: Option<OwnedFd>,
    toolstack: Option<Toolstack>,
    lines: Option<Receiver<std::result::Result<Line, String>>>,
    stop: Receiver<()>,
}

fn this_program() -> Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    if std::env::var_os("RINGBACK_LOG").is_none() {
        command.env("RINGBACK_LOG", "warn");
    }
    command.stdin(Stdio::null()).stdout(Stdio::null());
    Ok(command)
}

impl Processes {
    /// Starts the hypervisor, which will remove `folder`.
    pub fn start(folder: &Path, stop: Receiver<()>) -> Result<Processes> {
        let run_dir = folder.join("run");
        let (read, hold) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        let hypervisor = this_program()?
            .arg("--run-dir")
            .arg(&run_dir)
            .args(["hypervisor", "--throw-away"])
            .arg(folder)
            .stdin(Stdio::from(read))
            .spawn()?;
        let mut processes = Processes {
            run_dir,
            hypervisor: Some(hypervisor),
            backends: Vec::new(),
            guest: None,
            hold: Some(hold),
            toolstack: None,
            lines: None,
            stop,
        };
        let end = Instant::now() + PATIENCE;
        loop {
            processes.look()?;
            match Toolstack::connect(&processes.socket()) {
                Ok(toolstack) => {
                    processes.toolstack = Some(toolstack);
                    return Ok(processes);
                }
                Err(e) if Instant::now() > end => return Err(e.into()),
                Err(_) => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    fn socket(&self) -> PathBuf {
        self.run_dir.join(HYPERVISOR_SOCKET)
    }
    fn toolstack(&self) -> Result<&Toolstack> {
        self.toolstack.as_ref().ok_or_else(|| "the hypervisor has ended".into())
    }
    /// A connection to the store.
    pub fn store(&self) -> Result<Client> {
        Ok(self.toolstack()?.store()?)
    }
    /// A domain and the connection that acts as it.
    pub fn create_domain(&self, name: &str) -> Result<(u16, OwnedFd)> {
        let toolstack = self.toolstack()?;
        let domid = toolstack.create_domain(None, Kind::Guest, name)?;
        Ok((domid, toolstack.connect_domain(domid)?))
    }
    /// Starts the backend of a domain's disks, which may open backing files in these folders, with
    /// these knobs.
    pub fn start_blk(
        &mut self,
        domid: u16,
        folders: impl Iterator<Item = PathBuf>,
        knobs: &[&str],
    ) -> Result<()> {
        let folders = folders.flat_map(|f| ["--allow-backing".into(), f.into_os_string()]);
        let knobs = knobs.iter().flat_map(|k| ["--set".into(), OsString::from(k)]);
        self.start_backend("block backend", "blk", domid, folders.chain(knobs))
    }
    /// Starts the backend of a domain's vifs.
    pub fn start_net(&mut self, domid: u16) -> Result<()> {
        self.start_backend("network backend", "net", domid, std::iter::empty())
    }
    fn start_backend(
        &mut self,
        name: &'static str,
        kind: &str,
        domid: u16,
        more: impl Iterator<Item = OsString>,
    ) -> Result<()> {
        let me = std::process::id().to_string();
        let backend = this_program()?
            .arg("--run-dir")
            .arg(&self.run_dir)
            .arg("--hypervisor")
            .arg(self.socket())
            .args(["--end-with", &me, "backend", kind, "--domid", &domid.to_string()])
            .args(more)
            .spawn()?;
        self.backends.push((name, backend));
        Ok(())
    }
    /// Starts the guest's process, which becomes the domain.
    pub fn start_guest(&mut self, identity: OwnedFd, plan: &str) -> Result<()> {
        let me = std::process::id().to_string();
        let mut guest = this_program()?
            .args(["--end-with", &me, "guest", plan])
            .stdin(Stdio::from(identity))
            .stdout(Stdio::piped())
            .spawn()?;
        let (send, lines) = bounded(16);
        let out = guest.stdout.take().ok_or("the guest has no standard output")?;
        self.guest = Some(guest);
        std::thread::Builder::new().name("guest's words".into()).spawn(move || {
            for line in BufReader::new(out).lines() {
                let line = line.map_err(|e| e.to_string());
                let line = line.and_then(|l| serde_json::from_str(&l).map_err(|e| e.to_string()));
                if send.send(line).is_err() {
                    return;
                }
            }
        })?;
        self.lines = Some(lines);
        Ok(())
    }

    /// Asks the guest to end by itself.
    pub fn stop_guest(&mut self) -> Result<()> {
        use rustix::process::{Pid, Signal, kill_process};
        if let Some(pid) = self.guest.as_ref().and_then(|guest| Pid::from_raw(guest.id() as i32)) {
            kill_process(pid, Signal::TERM)?;
        }
        Ok(())
    }

    /// Waits for the guest's next line. Fails when a process has ended that should not have.
    pub fn next_line(&mut self) -> Result<Said> {
        let lines = self.lines.clone().ok_or("there is no guest")?;
        loop {
            select! {
                recv(lines) -> line => match line {
                    Ok(line) => return Ok(Said::Line(line.map_err(|e| format!("guest: {e}"))?)),
                    // It has closed its output: its end is near.
                    Err(_) => return Err(self.who_ended()?.into()),
                },
                recv(self.stop) -> _ => return Ok(Said::Interrupted),
                recv(after(LOOK)) -> _ => {}
            }
            if self.look().is_err() {
                // After a report all may end.
                let end = Instant::now() + GRACE;
                while let Ok(line) = lines.recv_deadline(end) {
                    if let Ok(Line::Report(report)) = line {
                        return Ok(Said::Line(Line::Report(report)));
                    }
                }
                return Err(self.who_ended()?.into());
            }
        }
    }

    /// Which process has ended first, as far as can be told: with the hypervisor all end, with
    /// the guest the backend.
    fn who_ended(&mut self) -> Result<String> {
        let end = Instant::now() + GRACE;
        loop {
            let first = [("hypervisor", &mut self.hypervisor), ("guest", &mut self.guest)];
            let first = first.into_iter().filter_map(|(name, child)| Some((name, child.as_mut()?)));
            let backends = self.backends.iter_mut().map(|(name, child)| (*name, child));
            for (name, child) in first.chain(backends) {
                if let Some(status) = child.try_wait()? {
                    return Ok(format!("the {name} has ended too early ({status})"));
                }
            }
            if Instant::now() > end {
                return Ok("the guest has closed its output".into());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Fails if the hypervisor or a backend has ended.
    fn look(&mut self) -> Result<()> {
        let hypervisor = self.hypervisor.iter_mut().map(|child| ("hypervisor", child));
        let backends = self.backends.iter_mut().map(|(name, child)| (*name, child));
        for (name, child) in hypervisor.chain(backends) {
            if let Some(status) = child.try_wait()? {
                return Err(format!("the {name} has ended too early ({status})").into());
            }
        }
        Ok(())
    }

    /// Waits for the guest's end and the backends', which end with it. Fails where one does not
    /// end well.
    pub fn end_guest(&mut self) -> Result<()> {
        wait("guest", self.guest.take())?;
        self.backends.drain(..).try_for_each(|(name, child)| wait(name, Some(child)))
    }

    /// Ends the hypervisor, which removes the folder.
    pub fn end_hypervisor(&mut self) -> Result<()> {
        (self.toolstack, self.hold) = (None, None);
        wait("hypervisor", self.hypervisor.take())
    }
}

fn wait(name: &str, child: Option<Child>) -> Result<()> {
    let Some(mut child) = child else { return Ok(()) };
    let end = Instant::now() + PATIENCE;
    loop {
        match child.try_wait()? {
            Some(status) if status.success() => return Ok(()),
            Some(status) => return Err(format!("the {name} has failed ({status})").into()),
            None if Instant::now() > end => {
                child.kill()?;
                child.wait()?;
                return Err(format!("the {name} does not end").into());
            }
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        let backends = self.backends.iter_mut().map(|(_, child)| child);
        for child in self.guest.iter_mut().chain(backends) {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
        (self.toolstack, self.hold) = (None, None);
        if let Err(e) = wait("hypervisor", self.hypervisor.take()) {
            tracing::debug!("{e}");
        }
    }
}
