//! `ringback bench nbd`: NBD servers, ours and others', under the same client: fio's nbd engine
//! (libnbd), one connection. One after the other, in turn, they serve the same image: two files
//! written alike differ past the page cache by where on the device they lie. First writes need a
//! new one each.

mod fio;
mod servers;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use clap::ValueEnum;
use serde::Serialize;

use super::{Result, Scratch, machine, median};
use crate::cli::{BenchCache, BenchFormat, BenchNbd, NbdLoad};
use fio::{Job, Measured};
use servers::{Kind, Served};

/// A row is bound by something else than the servers if this is less than so many times ours.
const BOUND: f64 = 1.1;

/// How a load touches the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Touch {
    Read,
    Overwrite,
    First,
}

impl NbdLoad {
    fn touch(self) -> Touch {
        match self {
            NbdLoad::Read4k | NbdLoad::Read256k => Touch::Read,
            NbdLoad::Write4k | NbdLoad::Write256k => Touch::Overwrite,
            NbdLoad::First4k | NbdLoad::First256k => Touch::First,
        }
    }
    fn job(self, depth: u32, options: &BenchNbd) -> Job {
        let random = matches!(self, NbdLoad::Read4k | NbdLoad::Write4k | NbdLoad::First4k);
        let reads = self.touch() == Touch::Read;
        let rw = match (random, reads) {
            (true, true) => "randread",
            (true, false) => "randwrite",
            (false, true) => "read",
            (false, false) => "write",
        };
        // What was written once is no first write: such a job ends with the image.
        let seconds = (self.touch() != Touch::First).then_some(options.seconds);
        let bs = if random { 4096 } else { 256 << 10 };
        Job { rw, bs, depth, size: options.size_mib << 20, seconds, limit: options.seconds }
    }
    fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |v| v.get_name().to_owned())
    }
}

impl BenchFormat {
    /// As we name it, and as qemu-img does.
    fn names(self) -> (&'static str, &'static str) {
        match self {
            BenchFormat::Raw => ("raw", "raw"),
            BenchFormat::Qcow2 => ("qcow2", "qcow2"),
            BenchFormat::Vhd => ("vhd", "vpc"),
        }
    }
}

/// One server's medians.
#[derive(Debug, Serialize)]
struct Side {
    server: &'static str,
    iops: f64,
    /// Microseconds of the server's processor time a request.
    server_cpu_us: f64,
    /// Ours by theirs, the median of the rounds' ratios of IOPS; of ours 1.
    ratio: f64,
}

/// A line of the table.
#[derive(Debug, Serialize)]
struct Row {
    load: String,
    cache: &'static str,
    depth: u32,
    sides: Vec<Side>,
    /// IOPS of fio's io_uring on the bare file (raw only).
    bare: Option<f64>,
    /// IOPS of our server on a disk that does nothing: what fio and the socket can do.
    null: f64,
    /// What a server cannot be faster than, if that is under 1.1 times ours.
    bound: Option<&'static str>,
}

/// Runs all rows.
pub fn run(options: &BenchNbd) -> Result {
    if !(options.seconds > 0.0 && options.seconds <= 3600.0) {
        return Err("--seconds: more than 0 and at most 3600".into());
    }
    let versions = servers::versions(options.format)?;
    let all = |given: &[NbdLoad]| match given {
        [] => NbdLoad::value_variants().to_vec(),
        some => some.to_vec(),
    };
    let caches = match &options.cache[..] {
        [] => vec![BenchCache::Cached, BenchCache::Direct],
        some => some.to_vec(),
    };
    let depths = if options.depth.is_empty() { vec![1, 32] } else { options.depth.clone() };
    let mut rows = Vec::new();
    if !options.json {
        heading(options, &versions);
    }
    for cache in caches {
        for load in all(&options.load) {
            for depth in &depths {
                let row = row(options, cache, load, *depth)?;
                if !options.json {
                    print(&row);
                }
                rows.push(row);
            }
        }
    }
    if options.json {
        let document = serde_json::json!({
            "schema": 1, "bench": "nbd", "machine": machine(), "versions": versions,
            "format": options.format.names().0, "seconds": options.seconds,
            "rounds": options.rounds, "size_mib": options.size_mib, "rows": rows,
        });
        outln!("{document}");
    }
    Ok(ExitCode::SUCCESS)
}

fn heading(options: &BenchNbd, versions: &[String]) {
    outln!(
        "fio's nbd engine, one connection, {} images of {} MiB; medians of {} rounds of {} s",
        options.format.names().0,
        options.size_mib,
        options.rounds.max(1),
        options.seconds
    );
    versions.iter().for_each(|version| outln!("beside {version}"));
    outln!(
        "{:10} {:7} {:>5}  {:21} {:>9} {:>14} {:>6}",
        "load",
        "cache",
        "depth",
        "server",
        "IOPS",
        "server us/req",
        "ratio"
    );
}

fn print(row: &Row) {
    let mut name = format!("{:10} {:7} {:5}", row.load, row.cache, row.depth);
    for side in &row.sides {
        outln!(
            "{name:24}  {:21} {:9.0} {:14.2} {:6.2}",
            side.server,
            side.iops,
            side.server_cpu_us,
            side.ratio
        );
        name.clear();
    }
    let bare = row.bare.map_or_else(|| "-".to_owned(), |iops| format!("{iops:.0}"));
    let bound = row.bound.map_or_else(String::new, |by| format!("  bound by {by}"));
    outln!("{:24}  bare file {bare}, null disk {:.0}{bound}", "", row.null);
}

/// The images of a row, and where servers listen.
struct Place<'a> {
    folder: Scratch,
    options: &'a BenchNbd,
    cache: BenchCache,
}

impl Place<'_> {
    /// The image; a new one, without data in it, if the load is to write it first.
    fn make(&self, touch: Touch) -> Result<PathBuf> {
        let path = self.folder.path().join("image");
        if touch != Touch::First && path.exists() {
            if self.cache == BenchCache::Direct {
                forget(&path)?;
            }
            return Ok(path);
        }
        let size = self.options.size_mib << 20;
        let format = self.options.format.names().1;
        let create = |path: &Path| -> Result<()> {
            let size = size.to_string();
            let mut command = Command::new("qemu-img");
            command.args(["create", "-q", "-f", format]);
            if format == "vpc" {
                command.args(["-o", "force_size=on"]);
            }
            let status = command.arg(path).arg(size).stdout(Stdio::null()).status()?;
            if status.success() { Ok(()) } else { Err(format!("qemu-img create: {status}").into()) }
        };
        if touch == Touch::First || format == "raw" {
            create(&path)?;
        }
        if touch != Touch::First {
            let plain = self.folder.path().join("data");
            let target = if format == "raw" { &path } else { &plain };
            fill(target, size)?;
            if format != "raw" {
                let status = Command::new("qemu-img")
                    .args(["convert", "-f", "raw", "-O", format])
                    .args([&plain, &path])
                    .status()?;
                if !status.success() {
                    return Err(format!("qemu-img convert: {status}").into());
                }
            }
        }
        if self.cache == BenchCache::Direct {
            forget(&path)?;
        }
        std::fs::File::open(&path)?.sync_all()?;
        Ok(path)
    }
}

/// Takes a file out of the page cache: what one server left there another would have to throw out.
pub fn forget(path: &Path) -> Result<()> {
    let file = std::fs::File::open(path)?;
    file.sync_all()?;
    Ok(rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?)
}

/// Data without holes, written block by block: in large pieces the page cache would keep it in
/// large folios, and the file system would take longer for a small write than any server does.
fn fill(path: &Path, size: u64) -> Result<()> {
    let mut file = std::fs::File::create(path)?;
    (0..size >> 12).try_for_each(|n| file.write_all(&[n as u8 | 1; 4096]))?;
    Ok(file.sync_all()?)
}

/// All servers in turn, so often.
fn row(options: &BenchNbd, cache: BenchCache, load: NbdLoad, depth: u32) -> Result<Row> {
    let place = Place { folder: Scratch::new(Some(Path::new("/var/tmp")))?, options, cache };
    let (job, touch) = (load.job(depth, options), load.touch());
    let kinds = Kind::all(options.format);
    let mut measured: Vec<Vec<Measured>> = kinds.iter().map(|_| Vec::new()).collect();
    let (mut bare, mut null) = (Vec::new(), Vec::new());
    for round in 0..options.rounds.max(1) as usize {
        for at in (0..kinds.len()).map(|n| (round + n) % kinds.len()) {
            measured[at].push(one(&place, kinds[at], &job, touch)?);
        }
        null.push(one(&place, Kind::Null, &job, touch)?.iops);
        if options.format == BenchFormat::Raw {
            let path = place.make(touch)?;
            bare.push(fio::on_file(&path, &job, cache == BenchCache::Direct)?.iops);
        }
    }
    let ours = &measured[0];
    let sides: Vec<Side> = kinds
        .iter()
        .zip(&measured)
        .map(|(kind, all)| Side {
            server: kind.name(),
            iops: median(all.iter().map(|m| m.iops).collect()),
            server_cpu_us: median(all.iter().map(|m| m.server_cpu_us).collect()),
            ratio: median(ours.iter().zip(all).map(|(o, t)| o.iops / t.iops).collect()),
        })
        .collect();
    let bare = (!bare.is_empty()).then(|| median(bare));
    let null = median(null);
    let mine = sides[0].iops;
    let limits = [("the file", bare), ("fio and the socket", Some(null))];
    let bound = limits.into_iter().find(|(_, l)| l.is_some_and(|l| l < BOUND * mine));
    Ok(Row {
        load: load.name(),
        cache: if cache == BenchCache::Direct { "direct" } else { "cached" },
        depth,
        sides,
        bare,
        null,
        bound: bound.map(|(name, _)| name),
    })
}

fn one(place: &Place<'_>, kind: Kind, job: &Job, touch: Touch) -> Result<Measured> {
    let image = if kind == Kind::Null { PathBuf::new() } else { place.make(touch)? };
    let served = Served::start(kind, &image, place)?;
    let measured = fio::on_server(&served, job)?;
    served.end();
    Ok(measured)
}
