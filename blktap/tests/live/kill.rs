//! Jobs that end by SIGKILL at any instant: nothing that was flushed is lost, and the same job,
//! begun anew, completes it.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use blktap::formats::BackingName;
use blktap::formats::qcow2::create::{CreateOptions, create};
use blktap::formats::vhd::{self, NewParent, Repair, Shape, Vhd};
use blktap::image::{self, BackingPolicy, ImageFormat, ImageOptions};
use blktap::live::jobs::{self, AtTheEnd, Host, JobError, Old, Opening, Scene, Stage, Watch};
use blktap::live::{LiveDisk, Name};
use blktap::storage::{self, Access, Cache, Lock, OpenOptions};
use blktap::{Disk, blocking};

use crate::late::next;

/// Set in the process that is killed: the folder, the job, and a seed.
const ROLE: &str = "RINGBACK_TEST_LIVE_KILL";
const SIZE: u64 = 12 << 20;
const BLOCK: usize = 4096;
const BLOCKS: u64 = SIZE / BLOCK as u64;
const JOBS: [&str; 8] =
    ["snapshot", "rename", "mirror", "commit", "commit-base", "stream", "stream-base", "coalesce"];
const VHD_JOBS: [&str; 5] = ["rename", "commit", "stream", "stream-base", "coalesce"];

/// The folder stands for xenstore as well. All images have one format.
struct Here(PathBuf, ImageFormat);

impl Here {
    fn name(&self) -> Name {
        let text = std::fs::read_to_string(self.0.join("params")).expect("params");
        text.parse().expect("a name")
    }
    fn named(&self, name: &str) -> Name {
        Name::File { format: self.1, path: self.0.join(name) }
    }
}

impl Host for Here {
    fn open(&self, name: &Name, how: Opening) -> Result<Arc<dyn Disk>, JobError> {
        let Name::File { format, path } = name else { panic!("{name}") };
        let file = OpenOptions::new(path).cache(Cache::Writeback);
        let (file, backing) = match how {
            Opening::Guest => (file, BackingPolicy::Allow(Vec::new())),
            Opening::Below => (file.lock(Lock::Off), BackingPolicy::Allow(Vec::new())),
            Opening::Read | Opening::Alone => {
                (file.lock(Lock::Off).access(Access::ReadOnly), BackingPolicy::Ignore)
            }
        };
        let disk = image::open_image(&ImageOptions::new(*format, file).backing(backing));
        disk.map(|d| d as Arc<dyn Disk>).map_err(|e| JobError::Other(e.to_string()))
    }
    fn record(&self, name: &Name) -> Result<(), JobError> {
        // Whoever is killed here leaves the disk to a successor, who looks for it by this name.
        if self.0.join("params").exists() {
            let Name::File { path, .. } = self.name() else { panic!("{name}") };
            assert!(path.exists(), "{} is gone before {name} is recorded", path.display());
        }
        let (new, params) = (self.0.join("params.new"), self.0.join("params"));
        std::fs::write(&new, name.to_string()).expect("params");
        std::fs::rename(new, params).expect("params");
        Ok(())
    }
}

struct Patient;

impl Watch for Patient {
    fn tick(&self, _done: u64, _total: u64) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
    fn decide(&self, _stage: Stage, _fails: &dyn Fn() -> Option<String>) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
    fn trouble(&self, error: &JobError) {
        panic!("{error}");
    }
}

fn carry_out(here: &Here, live: &Arc<LiveDisk>, job: &str) -> Result<(), JobError> {
    let name = here.name();
    let patience = Duration::from_secs(10);
    let scene = Scene { live, name: &name, host: here, watch: &Patient, patience };
    let base = here.0.join("base");
    match job {
        "snapshot" => jobs::snapshot(&scene, &here.named("new"), &Old::Keeps).map(drop),
        "rename" => jobs::snapshot(&scene, &here.named("new"), &Old::Moves("old".into())).map(drop),
        "mirror" => jobs::mirror(&scene, &here.named("copy"), AtTheEnd::Switch),
        "commit" => jobs::commit(&scene, None),
        "commit-base" => jobs::commit(&scene, Some(&base)),
        "stream" => jobs::stream(&scene, None),
        "stream-base" => jobs::stream(&scene, Some(&base)),
        _ => jobs::coalesce(&scene, &here.0.join("one")),
    }
}

/// Whether a job that was killed had come to its end.
fn is_done(here: &Here, job: &str) -> bool {
    let disk = here.open(&here.name(), Opening::Guest).expect("the disk");
    let layers = disk.image().expect("an image").layers().count();
    let at = here.name() != here.named("top");
    match job {
        "rename" => here.0.join("old").exists() && layers == 4,
        "snapshot" | "mirror" | "commit" | "commit-base" => at,
        "stream" => layers == 1,
        _ => layers == 2,
    }
}

/// A new image in its file, on another one.
fn make_one(folder: &Path, format: ImageFormat, name: &str, below: Option<&str>) {
    let file = OpenOptions::new(folder.join(name)).cache(Cache::Writeback);
    let file = storage::open(&file).expect("a file");
    if format == ImageFormat::Qcow2 {
        let mut options = CreateOptions::new(SIZE);
        options.cluster_size = 16384;
        let backing = |name: &str| BackingName { name: name.into(), format: Some("qcow2".into()) };
        options.backing = below.map(backing);
        return create(&file, None, &options).expect("an image");
    }
    let shape = match below {
        None => Shape::Dynamic,
        Some(below) => {
            let path = folder.join(below);
            let disk = OpenOptions::new(&path).access(Access::ReadOnly);
            let disk = image::open_image(&ImageOptions::new(format, disk)).expect("the parent");
            Shape::Differencing(NewParent {
                id: disk.format().unique_id(),
                modified: std::fs::metadata(&path).and_then(|m| m.modified()).expect("its time"),
                relative: below.to_owned(),
                absolute: path.to_str().expect("UTF-8").to_owned(),
            })
        }
    };
    let options = vhd::CreateOptions::new(SIZE, shape).expect("options");
    Vhd::create(&file, &options).expect("an image");
}

/// base <- one <- top, with data in each.
fn make(folder: &Path, format: ImageFormat) {
    let mut below: Option<&str> = None;
    for (n, name) in ["base", "one", "top", "copy"].into_iter().enumerate() {
        let path = folder.join(name);
        std::fs::write(&path, []).expect("a file");
        make_one(folder, format, name, below.filter(|_| name != "copy"));
        let file = OpenOptions::new(&path).cache(Cache::Writeback);
        below = Some(name);
        if name != "copy" {
            let disk = image::open_image(&ImageOptions::new(format, file));
            let disk = disk.expect("an image");
            let mut queue = disk.queue(1).expect("queue");
            for block in (n as u64 * 301..BLOCKS).step_by(n + 2).take(1500) {
                let text = [n as u8 + 1; BLOCK];
                blocking::write_at(&mut *queue, block * BLOCK as u64, &text).expect("a write");
            }
            drop(queue);
            disk.close().expect("closed");
        }
    }
}

/// A line in one call: whole or not at all.
fn tell(line: &str) {
    std::io::stderr().write_all(line.as_bytes()).expect("told");
}

/// The guest and the job, in the process that is killed. Says what it is about to write and what
/// is flushed.
fn be_killed(role: &str) {
    let [folder, format, job, seed] = role.split('|').collect::<Vec<_>>()[..] else {
        panic!("{role}")
    };
    let here = Here(folder.into(), format.parse().expect("a format"));
    let mut seed = seed.parse::<u64>().expect("a seed");
    let disk = here.open(&here.name(), Opening::Guest).expect("the disk");
    let live = LiveDisk::new(disk);
    let mut out = std::io::stdout().lock();
    std::thread::scope(|scope| {
        let (here, guest, job) = (&here, live.clone(), job.to_owned());
        scope.spawn(move || {
            let mut queue = live.queue(1).expect("queue");
            let first = next(&mut seed) % 1000 * 1_000_000;
            for number in first + 1.. {
                let block = next(&mut seed) % BLOCKS;
                tell(&format!("W {block} {number}\n"));
                let text = number.to_le_bytes().repeat(BLOCK / 8);
                // It is paused now and then: a request that was refused is tried again.
                while blocking::write_at(&mut *queue, block * BLOCK as u64, &text).is_err() {
                    std::thread::yield_now();
                }
                if number % 16 == 0 {
                    while blocking::flush(&mut *queue).is_err() {
                        std::thread::yield_now();
                    }
                    tell(&format!("F {number}\n"));
                }
            }
        });
        std::thread::sleep(Duration::from_millis(20));
        writeln!(out, "begins").expect("told");
        carry_out(here, &guest, &job).expect("the job");
        writeln!(out, "ended").expect("told");
    });
}

fn read(here: &Here) -> Vec<u8> {
    let disk = here.open(&here.name(), Opening::Guest).expect("the disk");
    let mut bytes = vec![0; SIZE as usize];
    blocking::read_at(&mut *disk.queue(1).expect("queue"), 0, &mut bytes).expect("a read");
    bytes
}

/// Each block holds what was flushed last, or something later; others what they held before.
fn judge(before: &[u8], after: &[u8], told: &str, what: &str) {
    let mut written: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
    let mut flushed = 0;
    for line in told.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["W", block, number] => {
                let all = written.entry(block.parse().expect("a block")).or_default();
                all.push(number.parse().expect("a number"));
            }
            ["F", number] => flushed = number.parse().expect("a number"),
            _ => {}
        }
    }
    for block in 0..BLOCKS {
        let at = block as usize * BLOCK;
        let (old, new) = (&before[at..at + BLOCK], &after[at..at + BLOCK]);
        let numbers = written.get(&block).map_or(&[][..], Vec::as_slice);
        let safe = numbers.iter().rposition(|n| *n <= flushed);
        let later = numbers.iter().skip(safe.unwrap_or(0));
        let found = later.map(|n| n.to_le_bytes().repeat(BLOCK / 8)).any(|text| text == new);
        let kept = safe.is_none() && old == new;
        assert!(
            found || kept,
            "{what}: block {block} is lost: it holds {:?}, not {numbers:?}, flushed {flushed}",
            &new[..8]
        );
    }
}

fn check(folder: &Path, format: ImageFormat, what: &str) {
    for name in ["base", "one", "top", "copy", "new", "old"] {
        let path = folder.join(name);
        if format == ImageFormat::Vhd {
            if path.exists() {
                check_vhd(&path, what);
            }
            continue;
        }
        // An overlay that nobody has opened yet names what will be called so.
        let nameless = name == "new" && !folder.join("old").exists() && what.starts_with("rename");
        if path.exists() && !nameless {
            let output =
                Command::new("qemu-img").args(["check", "-U", "-f", "qcow2"]).arg(&path).output();
            let output = output.expect("qemu-img (package qemu-utils)");
            // Clusters that nobody uses may be left.
            let code = output.status.code();
            let error = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(matches!(code, Some(0 | 3)), "{what}: {name}: {code:?} {error}");
        }
    }
}

/// Space that nobody uses may be left.
fn check_vhd(path: &Path, what: &str) {
    let file = OpenOptions::new(path).access(Access::ReadOnly).lock(Lock::Off);
    let file = storage::open(&file).expect("a file");
    let report = Vhd::check(&file, Repair::Nothing).unwrap_or_else(|e| panic!("{what}: {e}"));
    assert_eq!(report.corruptions, 0, "{what}: {}: {:?}", path.display(), report.findings);
}

/// Kills a process with a job after a while; what it has said.
fn kill(folder: &Path, format: ImageFormat, job: &str, seed: u64, after: Duration) -> String {
    let name = "kill::killed_jobs_are_completed";
    let role = format!("{}|{format}|{job}|{seed}", folder.display());
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.args(["--exact", name, "--nocapture"]).env(ROLE, role);
    let said = std::fs::File::create(folder.join("said")).expect("a file");
    let mut child = command.stdout(Stdio::piped()).stderr(said).spawn().expect("itself");
    let mut out = BufReader::new(child.stdout.take().expect("its output"));
    let mut line = String::new();
    while line.trim() != "begins" {
        line.clear();
        let told = out.read_line(&mut line).expect("a line");
        let said = || std::fs::read_to_string(folder.join("said")).unwrap_or_default();
        assert!(told > 0, "{job}: it ended too early: {}", said());
    }
    std::thread::sleep(after);
    child.kill().expect("SIGKILL");
    child.wait().expect("an end");
    std::fs::read_to_string(folder.join("said")).expect("what it said")
}

#[test]
fn killed_jobs_are_completed() {
    if let Ok(role) = std::env::var(ROLE) {
        return be_killed(&role);
    }
    kill_all(ImageFormat::Qcow2, &JOBS);
}

#[test]
fn killed_jobs_on_vhds_are_completed() {
    kill_all(ImageFormat::Vhd, &VHD_JOBS);
}

#[test]
fn the_disk_is_where_the_record_says_until_another_is_recorded() {
    for (format, jobs) in [(ImageFormat::Qcow2, &JOBS[..]), (ImageFormat::Vhd, &VHD_JOBS[..])] {
        for job in jobs {
            let folder = crate::support::folder();
            make(folder.path(), format);
            let here = Here(folder.path().to_owned(), format);
            here.record(&here.named("top")).expect("params");
            let before = read(&here);
            let live = LiveDisk::new(here.open(&here.name(), Opening::Guest).expect("a disk"));
            carry_out(&here, &live, job).unwrap_or_else(|e| panic!("{format}, {job}: {e}"));
            drop(live);
            assert!(is_done(&here, job) && read(&here) == before, "{format}, {job}");
            let aside = format == ImageFormat::Vhd && *job == "commit";
            assert_eq!(folder.path().join("top.committed").exists(), aside, "{format}, {job}");
            check(folder.path(), format, job);
        }
    }
}

fn kill_all(format: ImageFormat, jobs: &[&str]) {
    let mut seed = 0x2545_f491_4f6c_dd1d;
    let template = crate::support::folder();
    make(template.path(), format);
    let mut interrupted = 0;
    for job in jobs.iter().copied() {
        let (mut done, mut undone) = (0, 0);
        for round in 0..10 {
            let what = format!("{job}, round {round}, {format}");
            let folder = crate::support::folder();
            for name in ["base", "one", "top", "copy"] {
                let copied = std::fs::copy(template.path().join(name), folder.path().join(name));
                copied.expect("a copy");
            }
            let here = Here(folder.path().to_owned(), format);
            here.record(&here.named("top")).expect("params");
            let before = read(&here);
            let after = Duration::from_micros(next(&mut seed) % 60_000);
            let told = kill(folder.path(), format, job, next(&mut seed), after);
            // The locks of a killed process are waited for.
            let found = read(&here);
            check(folder.path(), format, &what);
            judge(&before, &found, &told, &what);
            let ended = is_done(&here, job);
            if ended {
                done += 1
            } else {
                undone += 1;
                let live = LiveDisk::new(here.open(&here.name(), Opening::Guest).expect("a disk"));
                carry_out(&here, &live, job).unwrap_or_else(|e| panic!("{what}, again: {e}"));
                drop(live);
                assert!(read(&here) == found, "{what}: completed, it reads otherwise");
                assert!(is_done(&here, job), "{what}");
            }
            check(folder.path(), format, &what);
        }
        eprintln!("{format}: {job}: {undone} were killed before their end, {done} after");
        interrupted += undone;
    }
    assert!(interrupted > 0, "no job was killed before its end");
}
