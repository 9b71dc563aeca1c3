//! A bundled hypervisor, a backend and a guest, each in a thread of its own.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use blkback::frontend::{BlkFront, FrontOptions};
use blkback::{BlkBackend, Config, Open, SCRIPT};
use blktap::disk::MemDisk;
use blktap::{Disk, DiskQueue, Done, IoBuf, Op, Request};
use crossbeam::channel::{Sender, bounded};
use hypervisor::core::domains::Kind;
use hypervisor::embedded::{Backend, Frontend, HYPERVISOR_SOCKET, Link, Toolstack, serve};
use hypervisor::store::Tx;
use hypervisor::xenbus::toolstack::{self, Detached, Device, Force};
use hypervisor::xenbus::{self, DeviceId, Key, Nodesets, Options, Scope};

pub(crate) const DEVID: u32 = 51712;

pub(crate) fn until(what: &str, mut is: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !is() {
        assert!(Instant::now() < end, "not within 10 s: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub(crate) struct Rig {
    dir: tempfile::TempDir,
    hypervisor: Option<(OwnedFd, JoinHandle<()>)>,
    backend: Option<(Sender<()>, JoinHandle<()>)>,
    pub(crate) toolstack: Toolstack,
    pub(crate) domid: u16,
    pub(crate) guest: Option<Arc<Frontend>>,
}

/// Any `FORMAT:TARGET` is this disk.
pub(crate) fn always(disk: Arc<dyn Disk>) -> Arc<Open> {
    Arc::new(move |_| Ok(disk.clone()))
}

impl Rig {
    /// With a backend that opens by `open`, and no device yet.
    pub(crate) fn start(open: Arc<Open>) -> Rig {
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
        let backend = Some(serve_blocks(&socket, &run, open));
        Rig { dir, hypervisor: Some((hold, thread)), backend, toolstack, domid, guest }
    }
    /// With one disk, attached with these knobs and keys.
    pub(crate) fn with_disk(disk: Arc<dyn Disk>, knobs: &str, keys: &[(&str, &str)]) -> Rig {
        let rig = Rig::start(always(disk));
        rig.attach(knobs, keys);
        rig
    }
    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }
    fn id(&self) -> DeviceId {
        DeviceId { kind: "vbd", domid: self.domid, devid: DEVID }
    }
    pub(crate) fn attach(&self, knobs: &str, keys: &[(&str, &str)]) {
        let mut backend_keys: Vec<Key> = [
            ("params", "raw:/dev/null"),
            ("script", SCRIPT),
            ("mode", "w"),
            ("hotplug-status", "connected"),
            ("options", knobs),
        ]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into();
        backend_keys.retain(|(key, _)| !keys.iter().any(|(k, _)| k == key));
        backend_keys.extend(keys.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())));
        let frontend_keys = vec![("virtual-device".to_owned(), DEVID.to_string())];
        let device = Device { id: self.id(), backend: 0, backend_keys, frontend_keys };
        toolstack::attach(&self.toolstack.store().unwrap(), &device).unwrap();
    }
    pub(crate) fn detach(&self) -> Detached {
        let store = self.toolstack.store().unwrap();
        toolstack::detach(&store, &self.id(), 0, Duration::from_secs(5), Force::No).unwrap()
    }
    /// As SIGTERM does; the guest stays.
    pub(crate) fn stop_backend(&mut self) {
        if let Some((stop, thread)) = self.backend.take() {
            drop(stop);
            let _ = thread.join();
        }
    }
    pub(crate) fn guest(&self) -> Arc<Frontend> {
        self.guest.clone().unwrap()
    }
    pub(crate) fn connect(&self, options: FrontOptions) -> BlkFront {
        BlkFront::connect(self.guest(), DEVID, options).unwrap()
    }
    /// A key of the backend's directory.
    pub(crate) fn back_key(&self, key: &str) -> Option<String> {
        let path = format!("/local/domain/0/backend/{}/{key}", self.id());
        self.toolstack.store().unwrap().get(&path).unwrap()
    }
    /// A key of the frontend's directory.
    pub(crate) fn front_key(&self, key: &str) -> Option<String> {
        let path = format!("/local/domain/{}/device/vbd/{DEVID}/{key}", self.domid);
        self.toolstack.store().unwrap().get(&path).unwrap()
    }
    pub(crate) fn set_back_key(&self, key: &str, value: &str) {
        let path = format!("/local/domain/0/backend/{}/{key}", self.id());
        self.toolstack.store().unwrap().write(Tx::NONE, &path, value).unwrap();
    }
    /// Waits for a counter: requests are counted after they were answered.
    pub(crate) fn until_counted(&self, block: &str, name: &str, is: impl Fn(u64) -> bool) {
        until(&format!("the count of {name}"), || is(self.counter(block, name)));
    }
    /// The backend's counters of all queues, added up.
    pub(crate) fn counter(&self, block: &str, name: &str) -> u64 {
        let path = self.dir().join(format!("run/{}/vbd-{DEVID}.stats", self.domid));
        let mut reader = perf::page::Reader::open(&path).unwrap();
        let snapshot = reader.snapshot().unwrap();
        let json = serde_json::to_value(&snapshot).unwrap();
        sum(&json, block, name)
    }
}

/// Adds up the counter `name` of all blocks whose name begins with `block`.
fn sum(json: &serde_json::Value, block: &str, name: &str) -> u64 {
    let blocks = json["blocks"].as_array().unwrap_or_else(|| panic!("no blocks in {json}"));
    let chosen = blocks.iter().filter(|b| b["name"].as_str().unwrap().starts_with(block));
    let value = |b: &serde_json::Value| {
        let values = b["values"].as_array().unwrap();
        let found = values.iter().find(|v| v["name"] == name).and_then(|v| v["value"].as_u64());
        found.unwrap_or_else(|| panic!("no {name} in {b}"))
    };
    chosen.map(value).sum()
}

fn serve_blocks(socket: &Path, run: &Path, open: Arc<Open>) -> (Sender<()>, JoinHandle<()>) {
    let hypervisor = Arc::new(Backend::connect(socket).unwrap());
    let run_dir = run.to_owned();
    let config = Config { max_queues: 4, ..Config::default() };
    let backend = BlkBackend::new(hypervisor.clone(), config, run_dir.clone(), open);
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
        self.stop_backend();
        if let Some((hold, thread)) = self.hypervisor.take() {
            drop(hold);
            let _ = thread.join();
        }
    }
}

/// Carries out one request on memory of the test's and gives its errno.
pub(crate) fn perform(
    queue: &mut dyn DiskQueue,
    op: Op,
    offset: u64,
    bytes: &mut [u8],
    len: u64,
) -> i32 {
    // SAFETY: `bytes` lives until the request is done, which this function waits for.
    let buf = unsafe { IoBuf::new(bytes.as_mut_ptr(), bytes.len()) };
    let bufs = [buf];
    let with_data = matches!(op, Op::Read | Op::Write | Op::WriteFua);
    let bufs = if with_data { &bufs[..] } else { &[] };
    queue.submit(&Request { op, offset, len, bufs, token: 7 }).unwrap();
    let done = answers(queue, 1);
    assert_eq!(done[0].token, 7);
    done[0].errno
}

/// Waits for so many answers.
pub(crate) fn answers(queue: &mut dyn DiskQueue, count: usize) -> Vec<Done> {
    let mut done = Vec::new();
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        queue.poll(&mut done).unwrap();
        if done.len() >= count {
            return done;
        }
        assert!(Instant::now() < end, "{} of {count} answers", done.len());
        queue.wait(&[], Some(Duration::from_secs(1))).unwrap();
    }
}

pub(crate) fn write(queue: &mut dyn DiskQueue, offset: u64, bytes: &[u8]) -> i32 {
    let len = bytes.len() as u64;
    perform(queue, Op::Write, offset, &mut bytes.to_vec(), len)
}

pub(crate) fn read(queue: &mut dyn DiskQueue, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xee; len];
    assert_eq!(perform(queue, Op::Read, offset, &mut bytes, len as u64), 0);
    bytes
}

/// Bytes that differ from place to place.
pub(crate) fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mix = |n: u64| (n.wrapping_add(seed)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    (0..len as u64 / 8).flat_map(|n| mix(n).to_le_bytes()).collect()
}

/// A disk in memory of so many MiB.
pub(crate) fn memory(mib: usize) -> Arc<MemDisk> {
    MemDisk::new(mib << 20)
}

/// Compares and, where they differ, names the first place instead of printing all.
pub(crate) fn same(found: &[u8], expected: &[u8]) {
    assert_eq!(found.len(), expected.len());
    let differs = found.iter().zip(expected).position(|(a, b)| a != b);
    if let Some(at) = differs {
        panic!("byte {at} is {} and should be {}", found[at], expected[at]);
    }
}
