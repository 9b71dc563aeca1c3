//! A bundled hypervisor, a backend and a guest, each in a thread of its own.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{Sender, bounded};
use hypervisor::core::domains::Kind;
use hypervisor::embedded::{Backend, Frontend, HYPERVISOR_SOCKET, Link, Toolstack, serve};
use hypervisor::store::Tx;
use hypervisor::xenbus::toolstack::{self, Detached, Device, Force};
use hypervisor::xenbus::{self, DeviceId, Key, Nodesets, Options, Scope, State};
use hypervisor::{Guest, Hypervisor};
use netback::{
    Config, EndpointQueue, Frame, FrontOptions, FrontQueue, NetBackend, NetFront, Open, Pool,
};
use perf::snapshot::Number;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::{Value, json};

pub(crate) const DEVID: u32 = 0;
/// How long anything may take.
pub(crate) const LIMIT: Duration = Duration::from_secs(20);

pub(crate) fn until(what: &str, mut is: impl FnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !is() {
        assert!(Instant::now() < end, "not within {LIMIT:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// How a backend sees the hypervisor.
type Seen = dyn Fn(Arc<dyn Hypervisor>) -> Arc<dyn Hypervisor> + Send + Sync;

pub(crate) struct Rig {
    dir: tempfile::TempDir,
    hypervisor: Option<(OwnedFd, JoinHandle<()>)>,
    backend: Option<(Sender<()>, JoinHandle<()>)>,
    open: Arc<Open>,
    seen: Box<Seen>,
    pub(crate) toolstack: Toolstack,
    pub(crate) domid: u16,
    pub(crate) guest: Option<Arc<Frontend>>,
}

impl Rig {
    /// With a backend and one vif, whose node has these keys beside the usual ones.
    pub(crate) fn start(kind: &str, keys: &[(&str, &str)]) -> Rig {
        Rig::with(netback::opener(), |hypervisor| hypervisor, kind, keys)
    }
    /// The same with a backend that opens what vifs connect to by `open`, and sees the hypervisor
    /// through `seen`.
    pub(crate) fn with(
        open: Arc<Open>,
        seen: impl Fn(Arc<dyn Hypervisor>) -> Arc<dyn Hypervisor> + Send + Sync + 'static,
        kind: &str,
        keys: &[(&str, &str)],
    ) -> Rig {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("run");
        let (stop, hold) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let folder = run.clone();
        let thread = std::thread::spawn(move || {
            use std::os::fd::AsFd;
            serve(&folder, stop.as_fd()).unwrap();
        });
        let socket = run.join(HYPERVISOR_SOCKET);
        until("the hypervisor listens", || Toolstack::connect(&socket).is_ok());
        let toolstack = Toolstack::connect(&socket).unwrap();
        let domid = toolstack.create_domain(None, Kind::Guest, "guest").unwrap();
        let link = Link::new(toolstack.connect_domain(domid).unwrap()).unwrap();
        let guest = Some(Arc::new(Frontend::new(link)));
        let seen: Box<Seen> = Box::new(seen);
        let backend = Some(serve_vifs(seen(connect(&run)), &run, open.clone()));
        let hypervisor = Some((hold, thread));
        let rig = Rig { dir, hypervisor, backend, open, seen, toolstack, domid, guest };
        rig.attach(DEVID, kind, keys);
        rig
    }
    pub(crate) fn id(&self, devid: u32) -> DeviceId {
        DeviceId { kind: "vif", domid: self.domid, devid }
    }
    pub(crate) fn attach(&self, devid: u32, kind: &str, keys: &[(&str, &str)]) {
        let mut backend_keys: Vec<Key> = [
            ("type", kind),
            ("script", netback::SCRIPT),
            ("hotplug-status", "connected"),
            ("options", "max_queues=4"),
        ]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into();
        backend_keys.retain(|(key, _)| !keys.iter().any(|(k, _)| k == key));
        backend_keys.extend(keys.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())));
        let mtu = keys.iter().find(|(key, _)| *key == "mtu");
        let mut frontend_keys = vec![("mac".to_owned(), "00:16:3e:00:00:01".to_owned())];
        frontend_keys.extend(mtu.map(|(key, value)| ((*key).to_owned(), (*value).to_owned())));
        let device = Device { id: self.id(devid), backend: 0, backend_keys, frontend_keys };
        toolstack::attach(&self.toolstack.store().unwrap(), &device).unwrap();
    }
    pub(crate) fn detach(&self) -> Detached {
        let store = self.toolstack.store().unwrap();
        toolstack::detach(&store, &self.id(DEVID), 0, LIMIT, Force::No).unwrap()
    }
    /// Ends the backend and starts another one, which goes on with the same rings.
    pub(crate) fn restart(&mut self) {
        if let Some((stop, thread)) = self.backend.take() {
            drop(stop);
            thread.join().unwrap();
        }
        let run = self.dir.path().join("run");
        let hypervisor = (self.seen)(connect(&run));
        self.backend = Some(serve_vifs(hypervisor, &run, self.open.clone()));
    }
    /// Removes what a backend leaves for its successor.
    pub(crate) fn lose_what_is_left(&self) {
        let path = self.dir.path().join(format!("run/{}/vif-{DEVID}.inflight", self.domid));
        std::fs::remove_file(path).unwrap();
    }
    pub(crate) fn guest(&self) -> Arc<Frontend> {
        self.guest.clone().unwrap()
    }
    pub(crate) fn connect(&self, options: &FrontOptions) -> NetFront {
        NetFront::connect(&*self.guest(), DEVID, options).unwrap()
    }
    /// Takes a vif away against the guest's will, as `xl destroy` does.
    pub(crate) fn remove(&self, devid: u32) {
        let (store, patience) = (self.toolstack.store().unwrap(), Duration::from_millis(50));
        toolstack::detach(&store, &self.id(devid), 0, patience, Force::Yes).unwrap();
    }
    /// The backend's counters: of each block its name, and each one's name and value.
    pub(crate) fn stats(&self, devid: u32) -> Vec<(String, Vec<(String, u64)>)> {
        let path = self.dir.path().join(format!("run/{}/vif-{devid}.stats", self.domid));
        let Ok(mut reader) = perf::page::Reader::open(&path) else { return Vec::new() };
        let value = |v: perf::snapshot::Value| match v.number {
            Number::Value { value } => Some((v.name, value)),
            Number::Distribution(_) => None,
        };
        let blocks = reader.snapshot().unwrap().blocks.into_iter();
        blocks.map(|b| (b.name, b.values.into_iter().filter_map(value).collect())).collect()
    }
    /// One of them, of all queues together.
    pub(crate) fn counter(&self, devid: u32, name: &str) -> u64 {
        let blocks = self.stats(devid).into_iter();
        blocks.flat_map(|(_, values)| values).filter(|(n, _)| n == name).map(|(_, v)| v).sum()
    }
    /// Those that are not 0, for an error's text; a vif that a fault has ended has none.
    pub(crate) fn counters(&self, devid: u32) -> String {
        let mut text = self.error(devid).unwrap_or_default();
        for (block, values) in self.stats(devid) {
            for (name, value) in values.into_iter().filter(|(_, value)| *value > 0) {
                text += &format!("{block}.{name}={value} ");
            }
        }
        text
    }
    /// What the backend has told the guest's administrator.
    pub(crate) fn error(&self, devid: u32) -> Option<String> {
        let path = format!("/local/domain/0/error/backend/{}/error", self.id(devid));
        self.toolstack.store().unwrap().get(&path).unwrap()
    }
    /// A frontend that has closed wants to connect again.
    pub(crate) fn begin_anew(&self, devid: u32) {
        let path = format!("device/vif/{devid}/state");
        let state = State::Initialising.to_string();
        self.guest().store().unwrap().write(Tx::NONE, &path, &state).unwrap();
    }
    /// The control socket of a vif.
    pub(crate) fn socket(&self, devid: u32) -> std::path::PathBuf {
        self.dir.path().join(format!("run/{}/vif-{devid}.sock", self.domid))
    }
    /// Asks the vif over its control socket.
    pub(crate) fn ask(&self, request: &Value) -> Value {
        let stream = UnixStream::connect(self.socket(DEVID)).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        (&stream).write_all(format!("{request}\n").as_bytes()).unwrap();
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }
    /// Asks for a new value of a knob of the running vif; why it was refused.
    pub(crate) fn try_set(&self, knob: &str, value: &str) -> Result<(), String> {
        let answer = self.ask(&json!({"command": "set", "knob": knob, "value": value}));
        answer.get("error").map_or(Ok(()), |error| Err(error.to_string()))
    }
    /// Changes a knob of the running vif.
    pub(crate) fn set(&self, knob: &str, value: &str) {
        assert_eq!(self.try_set(knob, value), Ok(()), "{knob}={value}");
    }
    /// A key of the backend's directory.
    pub(crate) fn back_key(&self, key: &str) -> Option<String> {
        let path = format!("/local/domain/0/backend/{}/{key}", self.id(DEVID));
        self.toolstack.store().unwrap().get(&path).unwrap()
    }
}

/// A backend's connection to the hypervisor.
fn connect(run: &Path) -> Arc<dyn Hypervisor> {
    Arc::new(Backend::connect(&run.join(HYPERVISOR_SOCKET)).unwrap())
}

fn serve_vifs(
    hypervisor: Arc<dyn Hypervisor>,
    run: &Path,
    open: Arc<Open>,
) -> (Sender<()>, JoinHandle<()>) {
    let run_dir = run.to_owned();
    let config = Config { max_queues: 4, ..Config::default() };
    let backend = NetBackend::new(hypervisor.clone(), config, run_dir.clone(), open);
    let options = Options { scope: Scope::All, nodes: Nodesets::Ours, run_dir };
    let (stop, stopped) = bounded(1);
    let thread = std::thread::spawn(move || {
        xenbus::serve(&*hypervisor, &backend, &options, &stopped).unwrap();
    });
    (stop, thread)
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.guest = None;
        if let Some((stop, thread)) = self.backend.take() {
            drop(stop);
            let _ = thread.join();
        }
        if let Some((hold, thread)) = self.hypervisor.take() {
            drop(hold);
            let _ = thread.join();
        }
    }
}

/// A queue with frames of its own.
pub(crate) struct Driver {
    pub(crate) queue: FrontQueue,
    pub(crate) pool: Pool,
    pub(crate) sent: VecDeque<Frame>,
    pub(crate) got: VecDeque<Frame>,
}

impl Driver {
    pub(crate) fn new(queue: FrontQueue, frames: usize) -> Driver {
        let lists = || VecDeque::with_capacity(frames);
        Driver { queue, pool: Pool::private(frames), sent: lists(), got: lists() }
    }
    /// A frame with these bytes, to be sent.
    pub(crate) fn frame(&mut self, bytes: &[u8]) -> Frame {
        let mut frame = self.pool.take().expect("a frame");
        frame.set_len(bytes.len());
        frame.copy_from_slice(bytes);
        frame
    }
    /// Moves what can be moved; whether anything came.
    pub(crate) fn turn(&mut self) -> bool {
        self.queue.send(&mut self.sent, &mut self.pool).unwrap();
        let (before, room) = (self.got.len(), self.pool.free());
        self.queue.receive(&mut self.got, room, &mut self.pool).unwrap();
        self.got.len() > before
    }
    pub(crate) fn sleep(&self, limit: Duration) {
        let waits = self.queue.waits();
        let own = waits.deadline.map(|at| at.saturating_duration_since(Instant::now()));
        let limit = own.map_or(limit, |own| own.min(limit));
        let limit = Timespec::try_from(limit).unwrap();
        let mut fds = [PollFd::from_borrowed_fd(waits.readable.unwrap(), PollFlags::IN)];
        let _ = poll(&mut fds, Some(&limit));
    }
    /// Works until so many frames have come.
    pub(crate) fn until_got(&mut self, count: usize) {
        let end = Instant::now() + LIMIT;
        loop {
            let came = self.turn();
            if self.got.len() >= count {
                return;
            }
            if came {
                continue;
            }
            let left = end.saturating_duration_since(Instant::now());
            assert!(
                !left.is_zero(),
                "{} of {count} frames came; {} are to be sent; {:?}",
                self.got.len(),
                self.sent.len(),
                self.queue.totals()
            );
            self.sleep(left);
        }
    }
}
