//! What a run says at its end.

use serde_json::json;

use super::plan::VifReport;
use super::plan::{COMPLAINTS, DiskReport, GuestReport};

/// What the host has found in the images.
#[derive(Debug, Default)]
pub struct Checked {
    pub bytes: u64,
    pub errors: u64,
    pub complaints: Vec<String>,
    name: String,
}

impl Checked {
    pub fn of(name: &str) -> Checked {
        Checked { name: name.to_owned(), ..Checked::default() }
    }
    /// Notes something wrong.
    pub fn wrong(&mut self, text: impl FnOnce() -> String) {
        self.errors += 1;
        if self.complaints.len() < COMPLAINTS {
            self.complaints.push(format!("{}: the image has: {}", self.name, text()));
        }
    }
    /// Adds another image's.
    pub fn add(&mut self, other: Checked) {
        self.bytes += other.bytes;
        self.errors += other.errors;
        let room = COMPLAINTS.saturating_sub(self.complaints.len());
        self.complaints.extend(other.complaints.into_iter().take(room));
    }
}

/// All of it.
pub struct Outcome {
    pub seed: u64,
    pub seconds: f64,
    pub report: GuestReport,
    pub checked: Checked,
}

impl Outcome {
    /// How much is wrong.
    pub fn errors(&self) -> u64 {
        let disks = self.report.disks.iter().map(|r| r.errors + u64::from(r.fault.is_some()));
        let vifs = self.report.vifs.iter().map(|r| r.errors + u64::from(r.fault.is_some()));
        disks.chain(vifs).sum::<u64>() + self.checked.errors
    }
    fn verified_mib(&self) -> u64 {
        let disks = self.report.disks.iter().map(|r| r.verified);
        let vifs = self.report.vifs.iter().map(VifReport::verified);
        (disks.chain(vifs).sum::<u64>() + self.checked.bytes) >> 20
    }
    fn requests(&self) -> u64 {
        let disks = self.report.disks.iter().map(|r| r.requests);
        disks.chain(self.report.vifs.iter().map(VifReport::requests)).sum()
    }
    fn complaints(&self) -> Vec<String> {
        let mut all = Vec::new();
        for report in &self.report.disks {
            let faults = report.fault.iter().chain(&report.complaints);
            all.extend(faults.map(|text| format!("{}: {text}", report.vdev)));
        }
        for report in &self.report.vifs {
            let faults = report.fault.iter().chain(&report.complaints);
            all.extend(faults.map(|text| format!("{}: {text}", report.name())));
        }
        all.extend(self.checked.complaints.iter().cloned());
        all
    }

    /// To standard output; what is wrong, as text, to standard error.
    pub fn print(&self, as_json: bool) {
        if as_json {
            return outln!("{}", self.document());
        }
        for text in self.complaints() {
            errln!("ringback: {text}");
        }
        for r in &self.report.disks {
            let grants = if r.persistent { "persistent grants" } else { "grant copy" };
            outln!(
                "{}: {} queue(s) of {} page(s), {grants}, {} requests, {} flushes, {} discards, \
                 {} MiB read back",
                r.vdev,
                r.queues,
                r.ring_pages,
                r.requests,
                r.flushes,
                r.discards,
                r.verified >> 20
            );
        }
        for vif in &self.report.vifs {
            outln!("{}", vif.line());
        }
        outln!(
            "image: {} MiB compared on the host; {:.1} s, seed {}",
            self.checked.bytes >> 20,
            self.seconds,
            self.seed
        );
        outln!(
            "verified {} MiB, {} requests, {} errors",
            self.verified_mib(),
            self.requests(),
            self.errors()
        );
    }

    fn document(&self) -> serde_json::Value {
        let disk = |r: &DiskReport| {
            json!({
                "vdev": r.vdev, "queues": r.queues, "ring_pages": r.ring_pages,
                "persistent": r.persistent, "requests": r.requests, "flushes": r.flushes,
                "discards": r.discards, "verified_bytes": r.verified, "errors": r.errors,
            })
        };
        json!({
            "schema": 1,
            "verified_mib": self.verified_mib(),
            "requests": self.requests(),
            "errors": self.errors(),
            "complaints": self.complaints(),
            "compared_bytes": self.checked.bytes,
            "seconds": self.seconds,
            "seed": self.seed,
            "disks": self.report.disks.iter().map(disk).collect::<Vec<_>>(),
            "vifs": self.report.vifs.iter().map(VifReport::document).collect::<Vec<_>>(),
        })
    }
}
