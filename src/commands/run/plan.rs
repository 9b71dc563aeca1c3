//! What the two sides of `ringback run` tell each other.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Bytes of the unit that is stamped.
pub const CELL: usize = 4096;
/// The generation of a cell that was not written.
pub const UNTOUCHED: u32 = 0;
/// The generation of a cell that reads as zeroes after a discard.
pub const ZEROED: u32 = u32::MAX;
/// Most complaints that are told word by word.
pub const COMPLAINTS: usize = 20;

/// Payload transport that the frontend offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Grants {
    /// The backend may keep pages mapped.
    Persistent,
    /// The hypervisor copies.
    Copy,
}

/// What is done to a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Task {
    /// Writes all of it and reads it back.
    Write,
    /// Reads all of it.
    Read,
}

/// One disk of a guest.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DiskPlan {
    pub vdev: String,
    pub devid: u32,
    pub task: Task,
    pub queues: u32,
    pub ring_page_order: u32,
    pub grants: Grants,
    /// Requests in flight a queue.
    pub depth: u32,
    /// Bytes of the disk that are used, from its beginning.
    pub span: u64,
    /// Bytes of random I/O.
    pub work: u64,
    /// Ends the random I/O earlier.
    pub seconds: Option<f64>,
    pub seed: u64,
    /// Processors of the threads, in turn.
    pub cpus: Vec<u32>,
}

impl DiskPlan {
    /// Bytes that will be moved, for showing progress.
    pub fn total(&self) -> u64 {
        match self.task {
            Task::Write => 3 * self.span + self.work,
            Task::Read => self.span,
        }
    }
}

/// One vif of a guest.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VifPlan {
    pub devid: u32,
    pub mac: [u8; 6],
    pub queues: u32,
    pub ring_page_order: u32,
    pub ping_sizes: Vec<u32>,
    pub pings: u32,
    /// Bytes.
    pub download: u64,
    pub upload: u64,
    pub seed: u64,
}

impl VifPlan {
    /// Bytes that will be moved, for showing progress.
    pub fn total(&self) -> u64 {
        self.download + self.upload
    }
}

/// What a guest has to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GuestPlan {
    pub disks: Vec<DiskPlan>,
    pub vifs: Vec<VifPlan>,
    /// Serve them at this socket instead of working on them.
    pub nbd: Option<PathBuf>,
}

impl GuestPlan {
    /// Bytes that will be moved, for showing progress.
    pub fn total(&self) -> u64 {
        let disks = self.disks.iter().map(DiskPlan::total).sum::<u64>();
        disks + self.vifs.iter().map(VifPlan::total).sum::<u64>()
    }
}

/// What one queue has done.
#[derive(Clone, Debug, Default)]
pub struct Work {
    pub requests: u64,
    /// Bytes read back and compared.
    pub verified: u64,
    pub errors: u64,
    pub complaints: Vec<String>,
    pub flushes: u64,
    pub discards: u64,
    /// The generations of the part's cells.
    pub cells: Vec<u32>,
    /// Of a disk that is read: a sum of each cell.
    pub sums: Vec<u64>,
}

impl Work {
    /// Notes something wrong.
    pub fn complain(&mut self, text: impl FnOnce() -> String) {
        self.errors += 1;
        if self.complaints.len() < COMPLAINTS {
            self.complaints.push(text());
        }
    }
}

/// What has become of a disk.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct DiskReport {
    pub vdev: String,
    pub queues: usize,
    pub ring_pages: usize,
    pub persistent: bool,
    pub fault: Option<String>,
    pub requests: u64,
    pub verified: u64,
    pub errors: u64,
    pub flushes: u64,
    pub discards: u64,
    pub complaints: Vec<String>,
    pub cells: Vec<u32>,
    pub sums: Vec<u64>,
}

impl DiskReport {
    /// Adds what the next queue has done; the queues' parts follow each other.
    pub fn add(&mut self, work: Work) {
        self.requests += work.requests;
        self.verified += work.verified;
        self.errors += work.errors;
        self.flushes += work.flushes;
        self.discards += work.discards;
        let room = COMPLAINTS.saturating_sub(self.complaints.len());
        self.complaints.extend(work.complaints.into_iter().take(room));
        self.cells.extend(work.cells);
        self.sums.extend(work.sums);
    }
}

/// One way of a vif's bytes.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Transfer {
    pub bytes: u64,
    pub seconds: f64,
    /// The SHA-256 of both ends are the same, and the right one.
    pub checksum_ok: bool,
}

impl Transfer {
    fn mib_per_second(&self) -> f64 {
        self.bytes as f64 / f64::from(1 << 20) / self.seconds.max(1e-6)
    }
}

/// What has become of a vif.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct VifReport {
    pub devid: u32,
    pub queues: usize,
    pub ring_pages: usize,
    /// The address that the guest was given.
    pub address: String,
    pub pings: u64,
    pub ping_loss: u64,
    /// Largest payload that came back.
    pub largest_ping: u32,
    pub download: Option<Transfer>,
    pub upload: Option<Transfer>,
    /// Unsegmented packets that left the guest.
    pub gso_frames: u64,
    pub fault: Option<String>,
    pub errors: u64,
    pub complaints: Vec<String>,
}

impl VifReport {
    /// Notes something wrong.
    pub fn complain(&mut self, text: String) {
        self.errors += 1;
        if self.complaints.len() < COMPLAINTS {
            self.complaints.push(text);
        }
    }
    pub fn name(&self) -> String {
        format!("vif{}", self.devid)
    }
    /// Bytes whose checksums were compared and found the same.
    pub fn verified(&self) -> u64 {
        let both = [self.download, self.upload];
        both.iter().flatten().filter(|way| way.checksum_ok).map(|way| way.bytes).sum()
    }
    /// Pings and transfers.
    pub fn requests(&self) -> u64 {
        self.pings + self.download.iter().chain(&self.upload).count() as u64
    }
    /// As a line for people.
    pub fn line(&self) -> String {
        let way = |name: &str, way: &Option<Transfer>| {
            way.map_or_else(String::new, |way| {
                let sums = if way.checksum_ok { "equal" } else { "DIFFERENT" };
                let mib = way.bytes >> 20;
                format!(", {name} {mib} MiB at {:.0} MiB/s, checksums {sums}", way.mib_per_second())
            })
        };
        format!(
            "{}: {} queue(s) of {} page(s), {}, {} pings up to {} bytes, {} lost{}{}",
            self.name(),
            self.queues,
            self.ring_pages,
            self.address,
            self.pings,
            self.largest_ping,
            self.ping_loss,
            way("down", &self.download),
            way("up", &self.upload),
        )
    }
    /// For `--json`.
    pub fn document(&self) -> serde_json::Value {
        let way = |way: &Transfer| {
            serde_json::json!({
                "bytes": way.bytes, "seconds": way.seconds, "checksum_ok": way.checksum_ok,
            })
        };
        serde_json::json!({
            "vif": self.name(), "queues": self.queues, "ring_pages": self.ring_pages,
            "address": self.address, "pings": self.pings, "ping_loss": self.ping_loss,
            "largest_ping": self.largest_ping, "gso_frames": self.gso_frames,
            "download": self.download.as_ref().map(way), "upload": self.upload.as_ref().map(way),
            "errors": self.errors,
        })
    }
}

/// What has become of all devices.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct GuestReport {
    pub disks: Vec<DiskReport>,
    pub vifs: Vec<VifReport>,
}

/// A line of a guest.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Line {
    /// Bytes moved so far.
    Progress(u64),
    /// The disks are served by NBD.
    Serving,
    /// The end.
    Report(GuestReport),
}
