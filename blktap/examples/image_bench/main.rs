//! QCOW2 in process: beside raw on the same engine, beside qcow2-rs and imago.
//!
//!     cargo run --release -p ringback-blktap --example image_bench -- [--json] [--ours] [--only NAME] [--row WORK,CACHE,DEPTH]... [SECONDS]
//!
//! `--ours` leaves the peers out, `--only raw` (qcow2, qcow2-rs, imago) all but one: for profiles.
//! `--row read,cached,1` measures that row (and others so named).
//!
//! 4 KiB random requests of one thread to images of 256 MiB in the present folder, made by
//! qemu-img (Debian: qemu-utils). Reads and overwrites of a full image, and first writes to an
//! empty one; through the page cache and past it; 1 and 32 in flight. Rounds alternate; figures
//! are medians of the rounds, a ratio is the median of the rounds' ratios.
//!
//! Raw reads and overwrites go to the very blocks that hold the QCOW2 image's data: two files of
//! one size, written alike, were seen to differ by four times past the cache, by where on the
//! device they lie.
#![allow(unsafe_code, clippy::print_stdout)]

mod peers;
mod ringback;

use std::error::Error;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// Bytes of a disk.
pub(crate) const SIZE: u64 = 256 << 20;
/// Bytes of a request.
pub(crate) const BLOCK: usize = 4096;
const ROUNDS: usize = 5;

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    Read,
    Overwrite,
    /// To clusters that are not allocated yet, each once.
    FirstWrite,
}

/// How.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    pub(crate) work: Work,
    pub(crate) direct: bool,
    pub(crate) depth: usize,
    pub(crate) time: Duration,
}

/// Where the next request goes: at random, or each cluster of 64 KiB once, in a scattered order.
pub(crate) struct Places {
    work: Work,
    random: u64,
    count: u64,
}

impl Places {
    pub(crate) fn new(work: Work) -> Places {
        Places { work, random: 0x2545_f491_4f6c_dd1d, count: 0 }
    }
    /// `None` when there is nothing left to write first.
    pub(crate) fn take(&mut self) -> Option<u64> {
        if self.work == Work::FirstWrite {
            let (n, clusters) = (self.count, SIZE >> 16);
            self.count += 1;
            // 2654435761 is odd and the number of clusters a power of two: each comes once.
            return (n < clusters).then(|| (n.wrapping_mul(2_654_435_761) % clusters) << 16);
        }
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        Some(self.random % (SIZE / BLOCK as u64) * BLOCK as u64)
    }
}

/// Counts until the time is over; the clock is read once in 64 requests.
pub(crate) struct Watch {
    start: Instant,
    time: Duration,
    count: u64,
    over: bool,
}

impl Watch {
    pub(crate) fn start(time: Duration) -> Watch {
        Watch { start: Instant::now(), time, count: 0, over: false }
    }
    /// One more is done; whether to go on.
    pub(crate) fn one(&mut self) -> bool {
        self.count += 1;
        if self.count.is_multiple_of(64) {
            self.over = self.start.elapsed() >= self.time;
        }
        !self.over
    }
    pub(crate) fn goes_on(&self) -> bool {
        !self.over
    }
    /// Requests a second.
    pub(crate) fn rate(&self) -> f64 {
        self.count as f64 / self.start.elapsed().as_secs_f64()
    }
}

pub(crate) type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Who is measured: a name, by what, and on which format.
type Runner = (&'static str, fn(&Image, &Load) -> Result<f64>, &'static str);

const RUNNERS: [Runner; 4] = [
    ("ringback raw", ringback::raw, "raw"),
    ("ringback qcow2", ringback::qcow2, "qcow2"),
    ("qcow2-rs", peers::qcow2_rs, "qcow2"),
    ("imago", peers::imago, "qcow2"),
];
/// The one that the others are compared with.
const OURS: &str = RUNNERS[1].0;

/// A file to work on, and where in it the disk begins.
#[derive(Clone, Debug)]
pub(crate) struct Image {
    pub(crate) path: PathBuf,
    pub(crate) start: u64,
}

/// A fresh image: full for reads and overwrites, empty for first writes.
fn image(folder: &Path, format: &str, work: Work) -> Result<PathBuf> {
    let (full, path) = (folder.join("full.raw"), folder.join(format!("a.{format}")));
    let mut command = Command::new("qemu-img");
    if work == Work::FirstWrite {
        command.args(["create", "-q", "-f", format]).arg(&path).arg(SIZE.to_string());
    } else {
        if !full.exists() {
            let byte = |n: u64| (n >> 12) as u8 | 1;
            std::fs::write(&full, (0..SIZE).map(byte).collect::<Vec<u8>>())?;
        }
        command.args(["convert", "-q", "-f", "raw", "-O", format]).arg(&full).arg(&path);
    }
    let status = command.status().map_err(|e| format!("qemu-img (Debian: qemu-utils): {e}"))?;
    if !status.success() {
        return Err(format!("qemu-img: {status}").into());
    }
    let file = std::fs::File::open(&path)?;
    file.sync_all()?;
    if work != Work::FirstWrite {
        cache_by_blocks(&file)?;
    }
    Ok(path)
}

/// The part of a full QCOW2 image that is its data, in order and in one piece.
fn data_of(image: &Path) -> Result<Image> {
    let mut map = Command::new("qemu-img");
    let map = map.args(["map", "--output=json", "-f", "qcow2"]).arg(image).output()?;
    let map: serde_json::Value = serde_json::from_slice(&map.stdout)?;
    match map.as_array().map(Vec::as_slice) {
        Some([one]) if one["length"] == SIZE && one["start"] == 0 => {
            let start = one["offset"].as_u64().ok_or("no offset in the map")?;
            Ok(Image { path: image.to_owned(), start })
        }
        _ => Err(format!("{}: not in one piece: {map}", image.display()).into()),
    }
}

/// Has the page cache keep a file in pages of 4 KiB, not in folios of the sizes that qemu-img's
/// writes give: a small write makes a large folio dirty as a whole. Reading ahead on demand makes
/// single pages.
fn cache_by_blocks(file: &std::fs::File) -> Result<()> {
    use rustix::fs::{Advice, fadvise};
    const WINDOW: usize = 128 << 10;
    fadvise(file, 0, None, Advice::DontNeed)?;
    let mut bytes = vec![0; WINDOW];
    let mut at = 0;
    while at < file.metadata()?.len() {
        fadvise(file, at, NonZeroU64::new(WINDOW as u64), Advice::WillNeed)?;
        at += std::os::unix::fs::FileExt::read_at(file, &mut bytes, at)? as u64;
    }
    Ok(())
}

fn median(mut of: Vec<f64>) -> f64 {
    of.sort_by(f64::total_cmp);
    of.get(of.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Rates of all runners in each round.
fn rounds(folder: &Path, load: &Load, runners: &[Runner]) -> Result<Vec<Vec<f64>>> {
    let qcow2 = image(folder, "qcow2", load.work)?;
    let raw = match load.work {
        Work::FirstWrite => Image { path: image(folder, "raw", load.work)?, start: 0 },
        Work::Read | Work::Overwrite => data_of(&qcow2)?,
    };
    let images = [("raw", raw), ("qcow2", Image { path: qcow2, start: 0 })];
    let mut rates = vec![Vec::new(); runners.len()];
    for round in 0..ROUNDS {
        // Each is the first in turn: who is first finds more of the file clean, or in the cache.
        for at in (0..runners.len()).map(|n| (round + n) % runners.len()) {
            let (name, run, format) = runners[at];
            if load.work == Work::FirstWrite {
                image(folder, format, load.work)?;
            }
            let image = images.iter().find(|(f, _)| *f == format).map(|(_, image)| image);
            let image = image.ok_or("no image")?;
            rates[at].push(run(image, load).map_err(|e| format!("{name}: {e}"))?);
        }
    }
    Ok(rates)
}

fn print(load: &Load, runners: &[Runner], rates: &[Vec<f64>], json: bool) {
    let ours = runners.iter().position(|(name, ..)| *name == OURS).map(|at| &rates[at]);
    let ratio = |of: &Vec<f64>| {
        let pairs = ours.into_iter().flatten().zip(of);
        median(pairs.map(|(a, b)| a / b).collect())
    };
    let way = if load.direct { "direct" } else { "cached" };
    if json {
        let all = runners.iter().zip(rates).map(|((name, ..), rates)| {
            serde_json::json!({ "name": name, "iops": median(rates.clone()).round(),
                "qcow2_ratio": ratio(rates) })
        });
        let all: Vec<_> = all.collect();
        println!(
            "{}",
            serde_json::json!({ "schema": 1, "work": format!("{:?}", load.work), "cache": way,
                "depth": load.depth, "results": all })
        );
        return;
    }
    print!("{:10} {way:6} {:>2}", format!("{:?}", load.work), load.depth);
    for of in rates {
        print!("  {:>9.0} ({:>5.2})", median(of.clone()), ratio(of));
    }
    println!();
}

/// A row's name, as `--row` has it.
fn name(load: &Load) -> String {
    let cache = if load.direct { "direct" } else { "cached" };
    format!("{:?},{cache},{}", load.work, load.depth).to_lowercase()
}

fn main() -> Result<()> {
    let (mut json, mut seconds, mut runners) = (false, 0.5, RUNNERS.to_vec());
    let mut rows = Vec::new();
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--json" => json = true,
            "--ours" => runners.truncate(2),
            "--only" => {
                let name = arguments.next().ok_or("--only: whom?")?;
                runners.retain(|(n, ..)| n.trim_start_matches("ringback ") == name);
            }
            "--row" => rows.push(arguments.next().ok_or("--row: which?")?),
            other => seconds = other.parse()?,
        }
    }
    let folder = tempfile::tempdir_in(".")?;
    if !json {
        let names: Vec<_> = runners.iter().map(|(name, ..)| format!("{name:>17}")).collect();
        println!("IOPS (our qcow2 as a multiple)  {}", names.join("  "));
    }
    let time = Duration::from_secs_f64(seconds);
    for work in [Work::Read, Work::Overwrite, Work::FirstWrite] {
        for direct in [false, true] {
            for depth in [1, 32] {
                let load = Load { work, direct, depth, time };
                if rows.is_empty() || rows.contains(&name(&load)) {
                    print(&load, &runners, &rounds(folder.path(), &load, &runners)?, json);
                }
            }
        }
    }
    Ok(())
}
