//! `ringback bench vhost`: vhost-user-blk servers, ours and QEMU's storage daemon, under the same
//! client: the `blkio` crate's driver, one queue. All serve the same image, for where a file lies
//! on its device, or in memory, can make more of a difference than who serves it: what is written
//! lies over data that is there, so that none of them changes what another one knows of the
//! image. The one that is not measured sleeps.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use serde::Serialize;

use super::blk::Caching;
use super::host::{Held, measure, part, until};
use super::load::{Load, Measured, Op};
use super::peer::{self, Plan, Waiting};
use super::{Result, Scratch, alone, machine, median, nbd, qemu};
use crate::cli::{BenchVhost, VhostCache, VhostFormat};

/// Seconds before each measurement.
const WARM_UP: f64 = 0.2;
/// A row is bound by something else than the server if this is less than so many times ours.
const BOUND: f64 = 1.15;

/// Whose server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Ours,
    Qemu,
    /// Ours, on a disk that does nothing.
    Null,
}

/// One server's medians.
#[derive(Clone, Debug, Serialize)]
struct Side {
    iops: f64,
    /// Microseconds of processor time a request, by process.
    server_cpu_us: f64,
    client_cpu_us: f64,
}

impl Side {
    fn of(all: &[Measured]) -> Side {
        let by = |f: &dyn Fn(&Measured) -> f64| median(all.iter().map(f).collect());
        let each = |m: &Measured, ns: u64| ns as f64 / 1e3 / (m.requests as f64).max(1.0);
        Side {
            iops: by(&iops),
            server_cpu_us: by(&|m| each(m, m.backend.cpu_ns)),
            client_cpu_us: by(&|m| each(m, m.guest.cpu_ns)),
        }
    }
}

fn iops(m: &Measured) -> f64 {
    m.requests as f64 / m.seconds
}

/// A line of the table.
#[derive(Debug, Serialize)]
struct Row {
    cache: &'static str,
    op: Op,
    depth: u32,
    client: Waiting,
    ringback: Side,
    qemu: Side,
    /// Median of the rounds' ratios of IOPS, ours to QEMU's.
    ratio: f64,
    /// IOPS of our server on a disk that does nothing: what the client and the ring can do.
    null: f64,
    /// IOPS of the same reads by the engine alone in one thread (raw only).
    alone: Option<f64>,
    /// What no server can be faster than, if that is near.
    bound: Option<&'static str>,
}

/// Runs all rows.
pub fn run(options: &BenchVhost) -> Result {
    if !(options.seconds > 0.0 && options.seconds <= 3600.0) {
        return Err("--seconds: more than 0 and at most 3600".into());
    }
    if !peer::BUILT {
        return Err("built without the feature bench-peers".into());
    }
    let version = qemu::version()?;
    let caches = match &options.cache[..] {
        [] => vec![VhostCache::Cached, VhostCache::LargeFolios, VhostCache::Direct],
        some => some.to_vec(),
    };
    let depths = if options.depth.is_empty() { vec![1, 32] } else { options.depth.clone() };
    let mut rows = Vec::new();
    if !options.json {
        heading(options, &version);
    }
    for cache in caches {
        let scene = Scene::new(options, cache)?;
        for op in [Op::Read, Op::Write] {
            for depth in &depths {
                for client in [Waiting::Sleeping, Waiting::Polling] {
                    let row = scene.row(op, *depth, client)?;
                    if !options.json {
                        print(&row);
                    }
                    rows.push(row);
                }
            }
        }
    }
    if options.json {
        let document = serde_json::json!({
            "schema": 1, "bench": "vhost", "machine": machine(), "qemu": version,
            "format": options.format.name(), "seconds": options.seconds,
            "rounds": options.rounds, "size_mib": options.size_mib, "rows": rows,
        });
        outln!("{document}");
    }
    Ok(ExitCode::SUCCESS)
}

fn heading(options: &BenchVhost, version: &str) {
    outln!(
        "random 4 KiB requests by the blkio crate's client, one queue, one {} image of {} MiB; \
         medians of {} rounds of {} s",
        options.format.name(),
        options.size_mib,
        options.rounds.max(1),
        options.seconds
    );
    outln!("beside {version}");
    outln!(
        "{:12} {:5} {:>5} {:8} {:>10} {:>10} {:>6} {:>10} {:>10} {:>9} {:>9}",
        "cache",
        "op",
        "depth",
        "client",
        "ringback",
        "qemu",
        "ratio",
        "us/req",
        "qemu",
        "null",
        "alone"
    );
}

fn print(row: &Row) {
    let op = if row.op == Op::Read { "read" } else { "write" };
    let client = if row.client == Waiting::Polling { "polling" } else { "sleeping" };
    let alone = row.alone.map_or_else(|| "-".to_owned(), |iops| format!("{iops:.0}"));
    let bound = row.bound.map_or_else(String::new, |by| format!("  bound by {by}"));
    outln!(
        "{:12} {op:5} {:5} {client:8} {:10.0} {:10.0} {:6.2} {:10.2} {:10.2} {:9.0} {alone:>9}{bound}",
        row.cache,
        row.depth,
        row.ringback.iops,
        row.qemu.iops,
        row.ratio,
        row.ringback.server_cpu_us,
        row.qemu.server_cpu_us,
        row.null
    );
}

/// A server and where it listens.
struct Served {
    process: Held,
    socket: PathBuf,
    _folder: Scratch,
}

impl Served {
    fn start(command: impl FnOnce(&Path) -> io::Result<Command>) -> Result<Served> {
        let folder = Scratch::new(None)?;
        let socket = folder.path().join("sock");
        let mut command = command(&socket)?;
        let process = Held::spawn(command.stdin(Stdio::null()).stdout(Stdio::null()))?;
        until("a server's socket", || socket.exists())?;
        Ok(Served { process, socket, _folder: folder })
    }

    /// One measurement by a new client process.
    fn measure(&self, load: Load, waiting: Waiting) -> io::Result<Measured> {
        let backend_pid = self.process.child.id();
        let plan =
            Plan { socket: self.socket.clone(), read_only: false, load, waiting, backend_pid };
        measure(part("client", &plan)?, Stdio::null())
    }
}

/// The servers of one use of the page cache, started once.
struct Scene<'a> {
    options: &'a BenchVhost,
    cache: VhostCache,
    image: PathBuf,
    ours: Served,
    qemu: Served,
    null: Served,
    _folder: Scratch,
}

impl<'a> Scene<'a> {
    fn new(options: &'a BenchVhost, cache: VhostCache) -> Result<Scene<'a>> {
        let caching = caching(cache);
        let folder = Scratch::new(Some(Path::new("/var/tmp")))?;
        let image = folder.path().join("image");
        make(options, &image)?;
        if cache == VhostCache::LargeFolios {
            nbd::forget(&image)?;
            std::io::copy(&mut std::fs::File::open(&image)?, &mut std::io::sink())?;
        }
        let command =
            |kind, image| move |socket: &Path| command(options, caching, kind, image, socket);
        Ok(Scene {
            ours: Served::start(command(Kind::Ours, &image))?,
            qemu: Served::start(command(Kind::Qemu, &image))?,
            null: Served::start(command(Kind::Null, &image))?,
            options,
            cache,
            image,
            _folder: folder,
        })
    }

    fn row(&self, op: Op, depth: u32, client: Waiting) -> Result<Row> {
        let span = self.options.size_mib << 20;
        let load = Load { op, depth, span, warm_up: WARM_UP, seconds: self.options.seconds };
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        let (mut null, mut bare) = (Vec::new(), Vec::new());
        for _ in 0..self.options.rounds.max(1) {
            ours.push(self.ours.measure(load, client)?);
            theirs.push(self.qemu.measure(load, client)?);
            null.push(iops(&self.null.measure(load, client)?));
            if self.options.format == VhostFormat::Raw && op == Op::Read {
                bare.push(iops(&alone::measure(&self.image, caching(self.cache), load)?));
            }
        }
        let ratios = ours.iter().zip(&theirs).map(|(o, t)| iops(o) / iops(t)).collect();
        let (ringback, null) = (Side::of(&ours), median(null));
        let alone = (!bare.is_empty()).then(|| median(bare));
        let limits = [("the file", alone), ("the client and the ring", Some(null))];
        let near = |limit: &Option<f64>| limit.is_some_and(|l| l < BOUND * ringback.iops);
        let bound = limits.into_iter().find(|(_, limit)| near(limit)).map(|(name, _)| name);
        Ok(Row {
            cache: self.cache.name(),
            op,
            depth,
            client,
            ratio: median(ratios),
            qemu: Side::of(&theirs),
            ringback,
            null,
            alone,
            bound,
        })
    }
}

fn caching(cache: VhostCache) -> Caching {
    match cache {
        VhostCache::Cached | VhostCache::LargeFolios => Caching::Cached,
        VhostCache::Direct => Caching::Direct,
    }
}

/// An image without holes, in the page cache; its data are written a block at a time, for the
/// reason that `bench blk` has.
fn make(options: &BenchVhost, path: &Path) -> Result<()> {
    let plain = match options.format {
        VhostFormat::Raw => path.to_owned(),
        VhostFormat::Qcow2 => path.with_extension("raw"),
    };
    let mut file = std::fs::File::create_new(&plain)?;
    let blocks = (options.size_mib << 20) / 4096;
    (0..blocks).try_for_each(|n| file.write_all(&[n as u8 | 1; 4096]))?;
    file.sync_all()?;
    if options.format == VhostFormat::Qcow2 {
        let status = Command::new("qemu-img")
            .args(["convert", "-f", "raw", "-O", "qcow2"])
            .args([&plain, path])
            .status()?;
        std::fs::remove_file(&plain)?;
        if !status.success() {
            return Err(format!("qemu-img convert: {status}").into());
        }
        // Into the page cache again, and written out.
        std::fs::File::open(path)?.sync_all()?;
        std::io::copy(&mut std::fs::File::open(path)?, &mut std::io::sink())?;
    }
    Ok(())
}

fn command(
    options: &BenchVhost,
    caching: Caching,
    kind: Kind,
    image: &Path,
    socket: &Path,
) -> io::Result<Command> {
    let format = options.format.name();
    if kind == Kind::Qemu {
        return Ok(qemu::daemon(format, image, caching, socket));
    }
    let mut command = Command::new(std::env::current_exe()?);
    command.env("RINGBACK_LOG", "warn");
    command.args(["--end-with", &std::process::id().to_string()]);
    command.args(["export", "vhost-user-blk", "--socket-path"]).arg(socket);
    if kind == Kind::Null {
        command.args(["--null-disk", &(options.size_mib << 20).to_string()]);
    } else {
        let cache = if caching.is_direct() { "none" } else { "writeback" };
        command.args(["--cache", cache, "--format", format]).arg(image);
    }
    Ok(command)
}
