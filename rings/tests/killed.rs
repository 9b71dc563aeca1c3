//! A process that serves a ring is killed by SIGKILL at any instant, again and again. Its table
//! lies in a file that it has mapped: no request is lost, and none is answered twice.
// Mapped files are reached by address.
#![allow(unsafe_code)]

use std::collections::{BTreeSet, VecDeque};
use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use memmap2::MmapRaw;
use rings::mem::SharedMem;
use rings::{BackRing, FrontRing, Protocol, Table, slot_count};

/// Set in the process that is killed: the folder and a seed.
const ROLE: &str = "RINGBACK_TEST_RING_KILL";
const PAGES: usize = 2;
const KILLS: u32 = 60;
/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);
/// Where the test's own word lies behind the ring: how many lives the server had.
const LIVES: usize = PAGES * 4096;

struct Numbers;
impl Protocol for Numbers {
    const NAME: &'static str = "numbers";
    type Req = [u64; 14];
    type Rsp = [u64; 2];
}

fn request(id: u64) -> [u64; 14] {
    std::array::from_fn(|at| id.wrapping_mul(at as u64 + 1))
}

/// A part of a mapped file.
struct Mapped {
    map: MmapRaw,
    len: usize,
}

impl Mapped {
    fn new(path: &Path, len: usize) -> Mapped {
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path);
        let file = file.expect("a file");
        let all = (len + 4096).next_multiple_of(4096);
        file.set_len(all as u64).expect("its size");
        Mapped { map: MmapRaw::map_raw(&file).expect("a mapping"), len }
    }
    fn lives(&self) -> &std::sync::atomic::AtomicU32 {
        // SAFETY: behind the ring there is another page, of which this is the first word.
        unsafe { std::sync::atomic::AtomicU32::from_ptr(self.map.as_mut_ptr().add(LIVES).cast()) }
    }
}

// SAFETY: a mapping that stays in place, page-aligned and at least as long; reached by SharedMem.
unsafe impl SharedMem for Mapped {
    fn base(&self) -> *mut u8 {
        self.map.as_mut_ptr()
    }
    fn len(&self) -> usize {
        self.len
    }
}

fn slots() -> u32 {
    slot_count::<Numbers>(PAGES)
}

fn table_bytes() -> usize {
    Table::<[u64; 14], Mapped>::bytes(slots()).next_multiple_of(4096)
}

fn mix(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
    *state >> 33
}

/// The server: answers what it holds in any order, until it is killed.
fn serve(role: &str) {
    let (folder, seed) = role.split_once('|').expect("a folder and a seed");
    let (folder, mut seed) = (Path::new(folder), seed.parse::<u64>().expect("a seed"));
    let ring = Mapped::new(&folder.join("ring"), PAGES * 4096);
    ring.lives().fetch_add(1, Relaxed);
    let table = Table::open(Mapped::new(&folder.join("table"), table_bytes()), slots());
    let (mut ring, _) =
        BackRing::<Numbers, _, _>::attach(ring, table.expect("a table"), Default::default())
            .expect("a ring");
    let mut held = VecDeque::new();
    loop {
        match mix(&mut seed) % 4 {
            0 | 1 => held.extend(ring.take().expect("honest frontend")),
            2 if !held.is_empty() => {
                let at = mix(&mut seed) as usize % held.len();
                let taken: rings::Taken<[u64; 14]> = held.remove(at).expect("in range");
                ring.respond(taken.slot, &[taken.req[0], taken.req[13]]);
            }
            _ => _ = ring.publish(),
        }
    }
}

/// The frontend.
struct Front {
    ring: FrontRing<Numbers, Mapped>,
    /// What was asked and not answered.
    open: BTreeSet<u64>,
    next: u64,
}

impl Front {
    /// Takes what is answered.
    fn take(&mut self) {
        while let Some([id, proof]) = self.ring.take().expect("honest backend") {
            assert!(self.open.remove(&id), "request {id} was answered twice");
            assert_eq!(proof, request(id)[13], "request {id} was not kept whole");
        }
    }
    /// Asks for as much as there is room for.
    fn ask(&mut self) {
        while self.ring.push(&request(self.next)).is_ok() {
            self.open.insert(self.next);
            self.next += 1;
        }
        let _ = self.ring.publish();
    }
}

#[test]
fn a_killed_server_of_a_ring_has_a_successor() {
    if let Ok(role) = std::env::var(ROLE) {
        return serve(&role);
    }
    let folder = tempfile::tempdir().expect("a folder");
    let ring = || Mapped::new(&folder.path().join("ring"), PAGES * 4096);
    let word = ring();
    let table = Mapped::new(&folder.path().join("table"), table_bytes());
    drop(Table::<[u64; 14], _>::format(table, slots()).expect("room"));
    let front = FrontRing::<Numbers, _>::init(ring(), Default::default()).expect("a ring");
    let mut front = Front { ring: front, open: BTreeSet::new(), next: 1 };
    let mut seed = 11;
    for kill in 0..KILLS {
        let role = format!("{}|{}", folder.path().display(), mix(&mut seed));
        let mut command = Command::new(std::env::current_exe().expect("this program"));
        command.args(["--exact", "a_killed_server_of_a_ring_has_a_successor", "--nocapture"]);
        let mut child = command.env(ROLE, role).stdout(Stdio::null()).spawn().expect("itself");
        let begun = Instant::now();
        while word.lives().load(Relaxed) == kill {
            assert!(child.try_wait().expect("its state").is_none(), "it ended by itself");
            assert!(begun.elapsed() < PATIENCE, "it does not begin");
            std::thread::sleep(Duration::from_micros(50));
        }
        let (start, life) = (Instant::now(), Duration::from_micros(mix(&mut seed) % 8000));
        while start.elapsed() < life {
            front.take();
            front.ask();
        }
        // The last one answers all that is left.
        while kill + 1 == KILLS && !front.open.is_empty() {
            assert!(start.elapsed() < PATIENCE, "requests are lost: {:?}", front.open);
            front.take();
        }
        assert!(child.try_wait().expect("its state").is_none(), "it ended by itself");
        child.kill().expect("SIGKILL");
        child.wait().expect("an end");
    }
    eprintln!("{} requests, {KILLS} kills", front.next - 1);
    assert!(front.next > 5_000, "{} requests only", front.next);
}
