//! Sixteen of fio's jobs at once, each over a connection and so a queue of its own, on images
//! whose tables do not fit the cache. What they wrote is verified by them, read by others from
//! the file, and verified once more from the image opened anew.

use std::fmt::Write;
use std::path::Path;
use std::sync::Arc;

use blktap::{Disk, ImageDisk, blocking};

use super::counted::Counted;
use super::images::{Image, Kind, text};
use super::rig::{Ours, run, well};
use super::support::{folder, pattern};

const JOBS: u64 = 16;
const JOB: u64 = 2 << 20;
/// Between the jobs there is a block that nobody touches: neighbours share clusters of 64 KiB,
/// and blocks of VHD.
const GAP: u64 = 4096;
const SIZE: u64 = 40 << 20;
/// Bytes of tables that are kept: a fifth of what the QCOW2 images have, or less.
const SMALL: u64 = 4096;
const AMPLE: u64 = 4 << 20;

/// Where a job begins.
fn start(job: u64) -> u64 {
    job * (JOB + GAP) + 8192
}

/// What the jobs do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    /// Write once, flush and verify: the even jobs at random, the odd ones in sequence.
    Fill,
    /// Of four neighbours one trims at random, one trims each block and then writes it, and the
    /// others write; what was written is verified.
    Churn,
    /// Read what [`Work::Fill`] wrote.
    Verify,
}

impl Work {
    /// What a job does, as fio calls it.
    fn of(self, job: u64) -> &'static str {
        match (self, job % 4) {
            (Work::Churn, 0) => "randtrim",
            (Work::Churn, 1) => "trimwrite",
            (_, 0 | 2) => "randwrite",
            _ => "write",
        }
    }
    fn options(self) -> &'static str {
        match self {
            Work::Fill => "",
            // A block is trimmed and then written: not both at once.
            Work::Churn => "loops=2\nserialize_overlap=1\n",
            Work::Verify => "verify_only=1\n",
        }
    }
}

fn jobs(work: Work, uri: &str) -> String {
    let mut file = format!(
        "[global]\nioengine=nbd\nuri={uri}\nsize={JOB}\niodepth=8\nfsync=16\n\
         bssplit=4k/40:16k/30:64k/20:256k/10\n\
         verify=crc32c\nverify_fatal=1\nverify_state_save=0\nrandseed=11\n"
    );
    file += work.options();
    for job in 0..JOBS {
        let _ = write!(file, "[job{job}]\nrw={}\noffset={}\n", work.of(job), start(job));
    }
    file
}

fn fio(work: Work, folder: &Path, server: &Ours) {
    let (path, report) = (folder.join("jobs.fio"), folder.join("report.json"));
    std::fs::write(&path, jobs(work, &server.uri())).expect("a file");
    well("fio", &["--output-format=json", "--output", text(&report), text(&path)]);
    let report = std::fs::read(&report).expect("the report");
    let report: serde_json::Value = serde_json::from_slice(&report).expect("JSON");
    let jobs = report["jobs"].as_array().expect("jobs");
    assert_eq!(jobs.len() as u64, JOBS);
    for (number, job) in (0..).zip(jobs) {
        let moves = |what: &str| job[what]["io_bytes"].as_u64().expect("a number") >= JOB / 2;
        assert_eq!(job["error"], 0, "{job}");
        let does = work.of(number);
        // What is verified is read.
        assert_eq!(moves("read"), does != "randtrim", "{work:?}: {job}");
        // (It counts the writes that it does not do to know what to verify.)
        assert_eq!(moves("write"), does != "randtrim", "{work:?}: {job}");
        assert_eq!(moves("trim"), does.contains("trim"), "{work:?}: {job}");
    }
}

/// A server of the image, and what sees its queues.
fn serve(folder: &Path, disk: &Arc<ImageDisk>) -> (Ours, Arc<Counted<ImageDisk>>) {
    let counted = Counted::new(Arc::clone(disk));
    (Ours::disk(folder, counted.clone()), counted)
}

/// The bytes that no job may have touched are `below`'s.
fn assert_gaps(bytes: &[u8], below: &[u8]) {
    let mut at = 0;
    for job in 0..=JOBS {
        let end = if job == JOBS { SIZE } else { start(job) };
        let gap = at as usize..end as usize;
        assert!(!gap.is_empty() && bytes[gap.clone()] == below[gap], "before job {job}");
        at = end + JOB;
    }
}

fn churned(kind: Kind) {
    let folder = folder();
    let folder = folder.path();
    let below = if kind == Kind::SmallClusters {
        vec![0; SIZE as usize]
    } else {
        pattern(5, SIZE as usize)
    };
    let image = Image::new(kind, folder, SIZE, &below);
    let base = image.base.as_ref().map(|path| std::fs::read(path).expect("the base"));
    // Cold: all tables come from the file, most of them more than once.
    let disk = image.open(Some(SMALL));
    let (ours, counted) = serve(folder, &disk);
    for work in [Work::Fill, Work::Churn, Work::Fill, Work::Verify] {
        fio(work, folder, &ours);
    }
    let copy = folder.join("copy.raw");
    well("nbdcopy", &[&ours.uri(), text(&copy)]);
    let most = counted.most_at_once();
    assert!(most >= 4, "{kind:?}: at most {most} queues at once");
    drop(counted);
    ours.end();
    disk.close().expect("close");
    drop(disk);
    image.assert_clean();
    let copy = std::fs::read(&copy).expect("the copy");
    assert_gaps(&copy, &below);
    image.assert_holds(&copy);
    // Warm: the first pass brings all tables in, the second finds them there.
    let disk = image.open(Some(AMPLE));
    let (ours, _) = serve(folder, &disk);
    for work in [Work::Verify, Work::Verify, Work::Churn, Work::Fill] {
        fio(work, folder, &ours);
    }
    // A sector that is not what was written there is found.
    let mut queue = disk.queue(1).expect("a queue");
    blocking::write_at(&mut *queue, start(5) + 512, &[0xa5; 512]).expect("write");
    drop(queue);
    let path = folder.join("jobs.fio");
    std::fs::write(&path, jobs(Work::Verify, &ours.uri())).expect("a file");
    assert!(!run("fio", &[text(&path)]).status.success(), "fio verifies nothing");
    ours.end();
    disk.close().expect("close");
    drop(disk);
    image.assert_clean();
    assert_eq!(image.base.map(|path| std::fs::read(path).expect("the base")), base);
}

#[test]
fn sixteen_jobs_on_an_overlay() {
    churned(Kind::Overlay);
}

#[test]
fn sixteen_jobs_on_small_clusters() {
    churned(Kind::SmallClusters);
}

#[test]
fn sixteen_jobs_on_a_differencing_image() {
    churned(Kind::Differencing);
}
