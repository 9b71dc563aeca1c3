//! `ringback bench blk`: random 4 KiB requests from a guest's process to a backend's, beside
//! QEMU's storage daemon.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use blktap::storage::Access;
use serde::Serialize;

use super::host::{self, End, Ours, Served};
use super::load::{BLOCK, Load, Measured, Op};
use super::peer::Waiting;
use super::qemu::{self, Qemu};
use super::{Result, Scratch, alone, machine, median, peer, table};
use crate::cli::{self, BenchBlk, Placement};

/// Bytes of the null disk.
const NULL_SIZE: u64 = 1 << 40;
/// Bytes of the throw-away file: more than caches of the processor, less than memory.
const FILE_SIZE: u64 = 256 << 20;
/// Seconds before each measurement.
const WARM_UP: f64 = 0.2;

/// How both sides use the page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caching {
    /// Through it.
    Cached,
    /// O_DIRECT.
    Direct,
}

impl Caching {
    pub fn is_direct(self) -> bool {
        self == Caching::Direct
    }
}

/// A disk to measure.
#[derive(Clone, Debug)]
pub enum Disk {
    /// It does nothing and touches no payload.
    Null { size: u64 },
    /// A raw file, the same for the peer, which takes no lock: past the cache the place of a file
    /// on its device makes more of a difference than who serves it.
    File { path: PathBuf, cache: Caching, access: Access },
}

impl Disk {
    fn name(&self) -> &'static str {
        match self {
            Disk::Null { .. } => "null",
            Disk::File { cache: Caching::Cached, .. } => "cached file",
            Disk::File { cache: Caching::Direct, .. } => "O_DIRECT file",
        }
    }
    fn target(&self) -> Result<String> {
        match self {
            Disk::Null { size } => Ok(format!("null:{size}")),
            Disk::File { path, .. } => {
                let path = path.canonicalize()?;
                let text = path.to_str().ok_or("the path is not UTF-8")?;
                Ok(format!("raw:{text}"))
            }
        }
    }
    pub fn access(&self) -> Access {
        match self {
            Disk::Null { .. } => Access::ReadWrite,
            Disk::File { access, .. } => *access,
        }
    }
    fn options(&self, more: &[String]) -> String {
        let cache = match self {
            Disk::File { cache: Caching::Direct, .. } => "cache=none",
            _ => "cache=writeback",
        };
        let all = std::iter::once(cache).chain(more.iter().map(String::as_str));
        all.collect::<Vec<_>>().join(",")
    }
    fn span(&self) -> Result<u64> {
        match self {
            Disk::Null { size } => Ok(*size),
            Disk::File { path, .. } => Ok(std::fs::metadata(path)?.len()),
        }
    }
    /// Brings a file into the page cache once more before it is measured there, for a kernel may
    /// have taken idle pages back in the meantime (DAMON's proactive reclaim does).
    fn warm(&self) -> Result<()> {
        if let Disk::File { path, cache: Caching::Cached, .. } = self {
            std::io::copy(&mut std::fs::File::open(path)?, &mut std::io::sink())?;
        }
        Ok(())
    }
    /// How many times the peer we aim to be, at a depth.
    fn aim(&self, depth: u32) -> Option<f64> {
        match (self, depth) {
            (Disk::Null { .. }, 1 | 32) => Some(5.0),
            (Disk::File { cache: Caching::Cached, .. }, 32) => Some(3.0),
            _ => None,
        }
    }
}

/// One side's medians.
#[derive(Clone, Debug, Serialize)]
pub struct Side {
    pub iops: f64,
    /// Seconds of processor time for a million requests, by process.
    pub guest_cpu_s_per_million: f64,
    pub backend_cpu_s_per_million: f64,
    /// System calls on the data path a request, where they are counted.
    pub guest_calls: Option<f64>,
    pub backend_calls: Option<f64>,
    /// Times a thread went to sleep, a request.
    pub guest_sleeps: f64,
    pub backend_sleeps: f64,
}

impl Side {
    fn of(all: &[Measured]) -> Side {
        let by = |f: &dyn Fn(&Measured) -> f64| median(all.iter().map(f).collect());
        let a_request = |m: &Measured, n: u64| n as f64 / (m.requests as f64).max(1.0);
        let calls = |f: &dyn Fn(&Measured) -> Option<u64>| {
            let all: Option<Vec<f64>> = all.iter().map(|m| Some(a_request(m, f(m)?))).collect();
            all.map(median)
        };
        Side {
            iops: by(&iops),
            guest_cpu_s_per_million: by(&|m| a_request(m, m.guest.cpu_ns) / 1e3),
            backend_cpu_s_per_million: by(&|m| a_request(m, m.backend.cpu_ns) / 1e3),
            guest_calls: calls(&|m| m.guest_calls),
            backend_calls: calls(&|m| m.backend_calls),
            guest_sleeps: by(&|m| a_request(m, m.guest.sleeps)),
            backend_sleeps: by(&|m| a_request(m, m.backend.sleeps)),
        }
    }
}

fn iops(m: &Measured) -> f64 {
    m.requests as f64 / m.seconds
}

/// A peer's medians.
#[derive(Clone, Debug, Serialize)]
pub struct Peer {
    pub client: Waiting,
    pub side: Side,
    /// Median of the rounds' ratios of IOPS, ours to its.
    pub ratio: f64,
}

/// A line of the table.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    pub disk: &'static str,
    pub op: Op,
    pub depth: u32,
    pub ringback: Side,
    /// QEMU, by each of the ways in which its client can wait.
    pub qemu: Vec<Peer>,
    pub aim: Option<f64>,
    /// Of a file's reads: by the engine alone, in one thread.
    pub alone_iops: Option<f64>,
}

/// Runs all cases, or the idle one.
pub fn run(options: &BenchBlk) -> Result {
    if !(options.seconds > 0.0 && options.seconds <= 3600.0) {
        return Err("--seconds: more than 0 and at most 3600".into());
    }
    if options.idle {
        return idle(options);
    }
    let version = match options.peer {
        cli::Peer::Qemu if !peer::BUILT => {
            return Err("--peer qemu: built without the feature bench-peers".into());
        }
        cli::Peer::Qemu => Some(qemu::version()?),
        cli::Peer::None => None,
    };
    let place = Scratch::new(Some(Path::new("/var/tmp")))?;
    let (disks, ops) = disks(options, place.path())?;
    let depths = if options.depth.is_empty() { vec![1, 32] } else { options.depth.clone() };
    let mut rows = Vec::new();
    if !options.json {
        table::heading(options, version.as_deref());
    }
    for disk in &disks {
        let pair = Pair::start(disk, options)?;
        for depth in &depths {
            for op in &ops {
                let row = pair.row(*op, *depth)?;
                if !options.json {
                    table::row(&row);
                }
                rows.push(row);
            }
        }
    }
    if options.json {
        let document = serde_json::json!({
            "schema": 2, "bench": "blk", "machine": machine(), "qemu": version,
            "pinned": options.place == Placement::Pinned, "seconds": options.seconds, "rounds": options.rounds, "rows": rows,
        });
        outln!("{document}");
    }
    Ok(ExitCode::SUCCESS)
}

/// The disks to measure, and what is done to them.
fn disks(options: &BenchBlk, place: &Path) -> Result<(Vec<Disk>, Vec<Op>)> {
    let null = Disk::Null { size: NULL_SIZE };
    let both = |path: &Path, access| {
        let file = |cache| Disk::File { path: path.to_owned(), cache, access };
        [Caching::Cached, Caching::Direct].map(file)
    };
    if options.disk.is_empty() {
        let path = place.join("disk");
        make_file(&path)?;
        let files = both(&path, Access::ReadWrite);
        return Ok((std::iter::once(null).chain(files).collect(), vec![Op::Read, Op::Write]));
    }
    let mut disks = Vec::new();
    let mut ops = vec![Op::Read, Op::Write];
    for named in &options.disk {
        if named == Path::new("null") {
            disks.push(null.clone());
            continue;
        }
        // Somebody's file is only read.
        ops.truncate(1);
        disks.extend(both(named, Access::ReadOnly));
    }
    Ok((disks, ops))
}

/// How our backend is to serve a disk.
fn served(disk: &Disk, options: &BenchBlk) -> Result<Served> {
    Ok(Served {
        target: disk.target()?,
        access: disk.access(),
        options: disk.options(&options.set),
        poll_us: options.front_poll_us,
    })
}

/// A file without holes, in the page cache. Written a block at a time, for what was written in
/// one go becomes one large folio, and ext4 then goes through the state of all its blocks at each
/// write of one (20 us and more): the same for both sides, and nothing of theirs.
fn make_file(path: &Path) -> Result<()> {
    let mut file = std::fs::File::create_new(path)?;
    (0..FILE_SIZE / BLOCK).try_for_each(|n| file.write_all(&[n as u8 | 1; BLOCK as usize]))?;
    Ok(file.sync_all()?)
}

/// The two sides, started once for each disk; the one that is not measured sleeps.
struct Pair<'a> {
    disk: &'a Disk,
    options: &'a BenchBlk,
    ours: Ours,
    qemu: Option<Qemu>,
    _folders: [Scratch; 2],
}

impl<'a> Pair<'a> {
    fn start(disk: &'a Disk, options: &'a BenchBlk) -> Result<Pair<'a>> {
        if let Disk::File { path, .. } = disk {
            // What the last disk's writes left is not to be written during this one's turn.
            std::fs::File::open(path)?.sync_all()?;
        }
        let folders = [Scratch::new(None)?, Scratch::new(None)?];
        host::place(options.place, End::Backend)?;
        let ours = Ours::start(folders[0].path(), &served(disk, options)?)?;
        let qemu = match options.peer {
            cli::Peer::Qemu => Some(Qemu::start(folders[1].path(), disk)?),
            cli::Peer::None => None,
        };
        // The guests and clients that will be started.
        host::place(options.place, End::Guest)?;
        Ok(Pair { disk, options, ours, qemu, _folders: folders })
    }

    fn row(&self, op: Op, depth: u32) -> Result<Row> {
        let span = self.disk.span()?;
        let load = Load { op, depth, span, warm_up: WARM_UP, seconds: self.options.seconds };
        // Its client must choose, where our frontend adapts.
        let mut theirs = [(Waiting::Sleeping, Vec::new()), (Waiting::Polling, Vec::new())];
        let (mut ours, mut alone) = (Vec::new(), Vec::new());
        for round in 0..self.options.rounds.max(1) {
            self.disk.warm()?;
            // Who begins changes with each round.
            if round % 2 == 0 {
                ours.push(self.ours.measure(load, None)?);
            }
            if let Some(qemu) = &self.qemu {
                for (waiting, all) in &mut theirs {
                    all.push(qemu.measure(load, *waiting)?);
                }
            }
            if round % 2 == 1 {
                ours.push(self.ours.measure(load, None)?);
            }
            if let (Disk::File { path, cache, .. }, Op::Read) = (self.disk, op) {
                alone.push(iops(&alone::measure(path, *cache, load)?));
            }
        }
        let peer = |(client, all): &(Waiting, Vec<Measured>)| {
            let ratios = ours.iter().zip(all).map(|(o, t)| iops(o) / iops(t)).collect();
            Peer { client: *client, side: Side::of(all), ratio: median(ratios) }
        };
        Ok(Row {
            disk: self.disk.name(),
            op,
            depth,
            ringback: Side::of(&ours),
            qemu: theirs.iter().filter(|(_, all)| !all.is_empty()).map(peer).collect(),
            aim: self.disk.aim(depth),
            alone_iops: (!alone.is_empty()).then(|| median(alone)),
        })
    }
}

/// A device that is connected and has nothing to do.
fn idle(options: &BenchBlk) -> Result {
    let disk = Disk::Null { size: NULL_SIZE };
    let folder = Scratch::new(None)?;
    let ours = Ours::start(folder.path(), &served(&disk, options)?)?;
    let load = Load { op: Op::Read, depth: 32, span: NULL_SIZE, warm_up: WARM_UP, seconds: 0.2 };
    let m = ours.measure(load, Some(options.seconds))?;
    if options.json {
        let document = serde_json::json!({
            "schema": 1, "bench": "blk idle", "machine": machine(), "idle": m,
        });
        outln!("{document}");
    } else {
        table::idle(&m);
    }
    Ok(ExitCode::SUCCESS)
}
