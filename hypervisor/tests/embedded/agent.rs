//! Real processes for the tests: the test binary runs itself in a role, and does what it is
//! told over a Unix socket, a line each way.
// Mapped pages are reached by address.
#![allow(unsafe_code)]

use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hypervisor::embedded::{
    Backend, Frontend, HYPERVISOR_SOCKET, Link, STORE_SOCKET, Toolstack, serve,
};
use hypervisor::{
    Access, Buffer, CopyOp, Direction, EventChannel, GrantedPages, Grants, Guest, Hypervisor,
    Mapping, Source, Transfer,
};
use rustix::event::{PollFd, PollFlags, poll};

const ROLE: &str = "RINGBACK_TEST_ROLE";
const CONTROL: &str = "RINGBACK_TEST_CONTROL";
const RUN_DIR: &str = "RINGBACK_TEST_RUN_DIR";

/// A hypervisor's process with its run folder, and a toolstack in this one.
pub(crate) struct Rig {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) hypervisor: Child,
    stop: Option<OwnedFd>,
}

pub(crate) struct Agent {
    pub(crate) child: Child,
    lines: BufReader<UnixStream>,
}

fn spawn(role: &str, dir: &Path, stdin: Stdio) -> (Child, PathBuf, UnixListener) {
    let control = tempfile::Builder::new().prefix("agent").tempdir().unwrap().keep();
    let path = control.join("control");
    let listener = UnixListener::bind(&path).unwrap();
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "role", "--nocapture", "--quiet"])
        .env(ROLE, role)
        .env(CONTROL, &path)
        .env(RUN_DIR, dir)
        .stdin(stdin)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    (child, control, listener)
}

impl Rig {
    pub(crate) fn start() -> Rig {
        let dir = tempfile::tempdir().unwrap();
        let (hypervisor, stop) = Rig::hypervisor(&dir.path().join("run"));
        let rig = Rig { dir, hypervisor, stop: Some(stop) };
        until("the hypervisor listens", || Toolstack::connect(&rig.socket()).is_ok());
        rig
    }
    fn hypervisor(run: &Path) -> (Child, OwnedFd) {
        let (stop_read, stop_write) =
            rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let (hypervisor, control, _) = spawn("hypervisor", run, Stdio::from(stop_read));
        std::fs::remove_dir_all(control).unwrap();
        (hypervisor, stop_write)
    }
    /// Another hypervisor in the same folder.
    pub(crate) fn restart(&mut self) {
        let (hypervisor, stop) = Rig::hypervisor(&self.run_dir());
        (self.hypervisor, self.stop) = (hypervisor, Some(stop));
        until("the hypervisor listens", || Toolstack::connect(&self.socket()).is_ok());
    }
    pub(crate) fn run_dir(&self) -> PathBuf {
        self.dir.path().join("run")
    }
    pub(crate) fn socket(&self) -> PathBuf {
        self.run_dir().join(HYPERVISOR_SOCKET)
    }
    pub(crate) fn store_socket(&self) -> PathBuf {
        self.run_dir().join(STORE_SOCKET)
    }
    pub(crate) fn toolstack(&self) -> Toolstack {
        Toolstack::connect(&self.socket()).unwrap()
    }
    /// A process that acts as the domain.
    pub(crate) fn guest(&self, domid: u16) -> Agent {
        let socket = self.toolstack().connect_domain(domid).unwrap();
        Agent::new(spawn("guest", &self.run_dir(), Stdio::from(socket)))
    }
    /// A process of domain 0.
    pub(crate) fn backend(&self) -> Agent {
        Agent::new(spawn("backend", &self.run_dir(), Stdio::null()))
    }
    /// A backend's process of another domain.
    pub(crate) fn driver(&self, domid: u16) -> Agent {
        let socket = self.toolstack().connect_domain(domid).unwrap();
        Agent::new(spawn("driver", &self.run_dir(), Stdio::from(socket)))
    }
    pub(crate) fn kill_hypervisor(&mut self) {
        self.hypervisor.kill().unwrap();
        self.hypervisor.wait().unwrap();
    }
    /// Asks the hypervisor to end and waits for it.
    pub(crate) fn stop(&mut self) -> bool {
        self.stop = None;
        self.hypervisor.wait().unwrap().success()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.stop = None;
        let _ = self.hypervisor.wait();
    }
}

impl Agent {
    fn new((child, control, listener): (Child, PathBuf, UnixListener)) -> Agent {
        let (stream, _) = listener.accept().unwrap();
        std::fs::remove_dir_all(control).unwrap();
        Agent { child, lines: BufReader::new(stream) }
    }
    /// Has something done; the answer, or what went wrong.
    pub(crate) fn try_ask(&mut self, command: &str) -> Result<String, String> {
        writeln!(self.lines.get_mut(), "{command}").unwrap();
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        match line.trim_end_matches('\n').split_once(' ') {
            Some(("ok", rest)) => Ok(rest.to_owned()),
            Some((_, rest)) => Err(rest.to_owned()),
            None => Err(format!("the agent is gone during {command:?}")),
        }
    }
    pub(crate) fn ask(&mut self, command: &str) -> String {
        self.try_ask(command).unwrap_or_else(|e| panic!("{command}: {e}"))
    }
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits up to a second, which is how soon anybody must notice anything.
pub(crate) fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(1), "not within a second: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub(crate) fn readable(fd: impl AsFd, ms: i64) -> bool {
    let limit = rustix::time::Timespec { tv_sec: ms / 1000, tv_nsec: ms % 1000 * 1_000_000 };
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    poll(&mut fds, Some(&limit)).unwrap() > 0
}

/// The body of the test named `role`: a process in a role does not return from it.
pub(crate) fn role() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let dir = PathBuf::from(std::env::var(RUN_DIR).unwrap());
    if role == "hypervisor" {
        let served = serve(&dir, std::io::stdin().as_fd());
        std::process::exit(i32::from(served.is_err()));
    }
    let control = UnixStream::connect(std::env::var(CONTROL).unwrap()).unwrap();
    let inherited = || std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    let mut hands = match role.as_str() {
        "guest" => Hands::guest(give_up_stdin(inherited())),
        "driver" => Hands::backend(Backend::new(Link::new(give_up_stdin(inherited())).unwrap())),
        _ => Hands::backend(Backend::connect(&dir.join(HYPERVISOR_SOCKET)).unwrap()),
    };
    let mut out = control.try_clone().unwrap();
    for line in BufReader::new(control).lines() {
        let answer = match hands.obey(&line.unwrap()) {
            Ok(text) => format!("ok {text}"),
            Err(e) => format!("err {e}"),
        };
        if writeln!(out, "{answer}").is_err() {
            break;
        }
    }
    std::process::exit(0);
}

/// The socket came as standard input, whose descriptor would keep the domain alive.
fn give_up_stdin(fd: OwnedFd) -> OwnedFd {
    let null = std::fs::File::open("/dev/null").unwrap();
    rustix::stdio::dup2_stdin(null).unwrap();
    fd
}

enum Side {
    Guest(Frontend),
    Backend(Backend, Box<dyn Grants>),
}

struct Hands {
    side: Side,
    lifeline: OwnedFd,
    granted: Vec<Option<Arc<dyn GrantedPages>>>,
    mapped: Vec<Option<Mapping>>,
    buffer: Option<Buffer>,
    channels: Vec<Box<dyn EventChannel>>,
}

fn access(word: &str) -> Access {
    if word == "ro" { Access::ReadOnly } else { Access::ReadWrite }
}

fn text<E: std::fmt::Display>(e: E) -> String {
    e.to_string()
}

impl Hands {
    fn new(side: Side, lifeline: OwnedFd) -> Hands {
        let (granted, mapped, channels) = Default::default();
        Hands { side, lifeline, granted, mapped, buffer: None, channels }
    }
    fn guest(fd: OwnedFd) -> Hands {
        let guest = Frontend::new(Link::new(fd).unwrap());
        let lifeline = guest.lifeline().unwrap();
        Hands::new(Side::Guest(guest), lifeline)
    }
    fn backend(backend: Backend) -> Hands {
        let lifeline = backend.lifeline().unwrap();
        let grants = backend.grants().unwrap();
        Hands::new(Side::Backend(backend, grants), lifeline)
    }
    fn grants(&self) -> &dyn Grants {
        match &self.side {
            Side::Backend(_, grants) => grants.as_ref(),
            Side::Guest(_) => panic!("a guest maps nothing"),
        }
    }
    fn frontend(&self) -> &Frontend {
        match &self.side {
            Side::Guest(guest) => guest,
            Side::Backend(..) => panic!("a backend grants nothing"),
        }
    }
    fn store(&self) -> hypervisor::store::Client {
        match &self.side {
            Side::Guest(guest) => guest.store().unwrap(),
            Side::Backend(backend, _) => backend.store().unwrap(),
        }
    }

    fn obey(&mut self, line: &str) -> Result<String, String> {
        let words: Vec<&str> = line.split(' ').collect();
        let n = |i: usize| words[i].parse::<usize>().unwrap();
        match words[0] {
            "grant" => {
                let pages = self.frontend().grant(n(1) as u16, n(2), access(words[3]));
                let pages = pages.map_err(text)?;
                let refs: Vec<_> = pages.refs().iter().map(u32::to_string).collect();
                self.granted.push(Some(pages));
                Ok(refs.join(","))
            }
            "fill" => {
                let pages = self.granted[n(1)].as_ref().unwrap();
                pages.write(0, &vec![n(2) as u8; pages.len()]);
                Ok(String::new())
            }
            "peek" => {
                let mut byte = [0];
                self.granted[n(1)].as_ref().unwrap().read(n(2), &mut byte);
                Ok(byte[0].to_string())
            }
            "revoke" => {
                self.granted[n(1)] = None;
                Ok(String::new())
            }
            "alloc" => {
                let channel = self.frontend().alloc_unbound(n(1) as u16).map_err(text)?;
                self.channels.push(channel);
                Ok(self.channels.last().unwrap().port().to_string())
            }
            "read" => Ok(self
                .store()
                .get(words[1])
                .map_err(text)?
                .unwrap_or_else(|| "nothing".to_owned())),
            "write" => self
                .store()
                .write(hypervisor::store::Tx::NONE, words[1], words[2])
                .map(|()| String::new())
                .map_err(text),
            "lifeline" => Ok(readable(&self.lifeline, n(1) as i64).to_string()),
            "descriptors" => Ok(open_descriptors().to_string()),
            _ => self.obey_events(&words),
        }
    }

    fn obey_events(&mut self, words: &[&str]) -> Result<String, String> {
        let n = |i: usize| words[i].parse::<usize>().unwrap();
        match words[0] {
            "bind" => {
                let Side::Backend(backend, _) = &self.side else { panic!("a guest binds") };
                let channel = backend.bind(n(1) as u16, n(2) as u32).map_err(text)?;
                self.channels.push(channel);
                Ok(self.channels.last().unwrap().port().to_string())
            }
            "unbind" => {
                drop(self.channels.remove(n(1)));
                Ok(String::new())
            }
            "notify" => {
                for _ in 0..n(2) {
                    self.channels[n(1)].notify().map_err(text)?;
                }
                Ok(String::new())
            }
            "wait" => Ok(readable(self.channels[n(1)].as_fd(), n(2) as i64).to_string()),
            "ack" => self.channels[n(1)].acknowledge().map(|b| b.to_string()).map_err(text),
            _ => self.obey_backend(words),
        }
    }

    fn obey_backend(&mut self, words: &[&str]) -> Result<String, String> {
        let n = |i: usize| words[i].parse::<usize>().unwrap();
        let refs = |i: usize| words[i].split(',').map(|r| r.parse().unwrap()).collect::<Vec<u32>>();
        match words[0] {
            "map" => {
                let mapping =
                    self.grants().map(n(1) as u16, &refs(2), access(words[3])).map_err(text)?;
                self.mapped.push(Some(mapping));
                Ok(String::new())
            }
            "look" => {
                let mapping = self.mapped[n(1)].as_ref().unwrap();
                assert!(n(2) < mapping.pages() * 4096);
                // SAFETY: in range of a live mapping.
                Ok(unsafe { mapping.base().add(n(2)).read_volatile() }.to_string())
            }
            "poke" => {
                let mapping = self.mapped[n(1)].as_ref().unwrap();
                assert!(n(2) < mapping.pages() * 4096 && mapping.access() == Access::ReadWrite);
                // SAFETY: in range of a live writable mapping.
                unsafe { mapping.base().add(n(2)).write_volatile(n(3) as u8) };
                Ok(String::new())
            }
            "unmap" => {
                let mapping = self.mapped[n(1)].take().unwrap();
                mapping.unmap().map(|()| String::new()).map_err(text)
            }
            "harden" => harden(self.mapped[n(1)].as_ref().unwrap()),
            "copy" => self.copy(n(1) as u16, &refs(2), words[3], n(4)),
            "transfer" => {
                let ends = [1, 3].map(|at| (n(at) as u16, refs(at + 1)));
                self.transfer(&ends[0], &ends[1], n(5) as u16, n(6) as u16)
            }
            "maps" => Ok(ringback_maps().to_string()),
            other => panic!("unknown command {other}"),
        }
    }

    /// Copies a page's bytes from `offset` on but for the last `skip` bytes from each of one domain's
    /// pages to the begin of each of another's; the answer: a status each.
    fn transfer(
        &mut self,
        from: &(u16, Vec<u32>),
        to: &(u16, Vec<u32>),
        offset: u16,
        skip: u16,
    ) -> Result<String, String> {
        if self.buffer.is_none() {
            self.buffer = Some(self.grants().buffer(64 * 4096).map_err(text)?);
        }
        let op = |(source, target): (&u32, &u32)| Transfer {
            source: Source::Page { domid: from.0, gref: *source, offset },
            gref: *target,
            offset: 0,
            len: 4096 - offset - skip,
            status: 99,
        };
        let mut ops: Vec<_> = from.1.iter().zip(&to.1).map(op).collect();
        let buffer = self.buffer.as_ref().unwrap();
        self.grants().transfer(to.0, buffer, &mut ops).map_err(text)?;
        let statuses: Vec<_> = ops.iter().map(|o| o.status.to_string()).collect();
        Ok(statuses.join(","))
    }

    /// Copies whole pages from (`from`) or to (`to`) grants; in the second case of one byte.
    /// The answer: a status each, then the first byte of each page of the buffer.
    fn copy(
        &mut self,
        domid: u16,
        refs: &[u32],
        direction: &str,
        byte: usize,
    ) -> Result<String, String> {
        if self.buffer.is_none() {
            self.buffer = Some(self.grants().buffer(64 * 4096).map_err(text)?);
        }
        let buffer = self.buffer.as_ref().unwrap();
        let direction = match direction {
            "from" => Direction::FromGrant,
            _ => Direction::ToGrant,
        };
        if direction == Direction::ToGrant {
            // SAFETY: the buffer is this process's own.
            unsafe { buffer.base().write_bytes(byte as u8, buffer.len()) };
        }
        let op = |(i, gref): (usize, &u32)| CopyOp {
            gref: *gref,
            offset: 0,
            len: 4096,
            at: i * 4096,
            direction,
            status: 99,
        };
        let mut ops: Vec<_> = refs.iter().enumerate().map(op).collect();
        self.grants().copy(domid, buffer, &mut ops).map_err(text)?;
        let statuses: Vec<_> = ops.iter().map(|o| o.status.to_string()).collect();
        // SAFETY: in range of the buffer.
        let byte = |i| unsafe { buffer.base().add(i * 4096).read_volatile() };
        let bytes: Vec<_> = (0..refs.len()).map(|i| byte(i).to_string()).collect();
        Ok(format!("{} {}", statuses.join(","), bytes.join(",")))
    }
}

/// What a backend that wants more than it was given tries on a read-only mapping.
fn harden(mapping: &Mapping) -> Result<String, String> {
    use rustix::mm::{MprotectFlags, mprotect};
    // SAFETY: only the protection of pages that nobody refers to would change.
    let changed = unsafe {
        mprotect(mapping.base().cast(), 4096, MprotectFlags::READ | MprotectFlags::WRITE)
    };
    if changed.is_ok() {
        return Err("a read-only mapping could be made writable".into());
    }
    for entry in std::fs::read_dir("/proc/self/fd").unwrap() {
        let path = entry.unwrap().path();
        let name = std::fs::read_link(&path).unwrap_or_default();
        if !name.to_string_lossy().starts_with("/memfd:ringback-") {
            continue;
        }
        let Ok(file) = std::fs::File::options().read(true).write(true).open(&path) else {
            continue;
        };
        let written = std::os::unix::fs::FileExt::write_at(&file, &[1], 0);
        if written.is_ok() {
            return Err("a read-only arena could be written".into());
        }
    }
    Ok(String::new())
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Mappings of arenas in this process.
fn ringback_maps() -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|l| l.contains("/memfd:ringback-") && !l.contains("buffer")).count()
}
