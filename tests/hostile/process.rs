//! What /proc says of a process.

use std::path::PathBuf;
use std::time::Duration;

/// A process to look at.
#[derive(Clone, Copy, Debug)]
pub struct Process(pub u32);

/// What a device may take and must give back.
#[derive(Debug, PartialEq, Eq)]
pub struct Holdings {
    /// Names of its threads, sorted.
    pub threads: Vec<String>,
    /// What its descriptors are, sorted, without numbers.
    pub descriptors: Vec<String>,
    /// Mappings of granted memory and of copy buffers.
    pub mappings: Vec<String>,
}

impl Holdings {
    /// What is more (`+`) or less (`-`) in `now`.
    pub fn difference(&self, now: &Holdings) -> String {
        let mut text = String::from("held by the backend, compared with before:");
        for (old, new) in [
            (&self.threads, &now.threads),
            (&self.descriptors, &now.descriptors),
            (&self.mappings, &now.mappings),
        ] {
            let mut old = old.clone();
            for item in new {
                match old.iter().position(|o| o == item) {
                    Some(i) => drop(old.remove(i)),
                    None => text += &format!("\n+ {item}"),
                }
            }
            old.iter().for_each(|item| text += &format!("\n- {item}"));
        }
        text
    }
}

impl Process {
    fn path(self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{name}", self.0))
    }
    fn text(self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap_or_default()
    }

    /// Name and number of each thread.
    pub fn threads(self) -> Vec<(String, u32)> {
        let tasks = std::fs::read_dir(self.path("task")).into_iter().flatten().flatten();
        let thread = |task: std::fs::DirEntry| {
            let name = std::fs::read_to_string(task.path().join("comm")).ok()?;
            Some((name.trim().to_owned(), task.file_name().to_str()?.parse().ok()?))
        };
        tasks.filter_map(thread).collect()
    }

    /// The number in a socket's or pipe's name says nothing.
    fn descriptors(self) -> Vec<String> {
        let fds = std::fs::read_dir(self.path("fd")).into_iter().flatten().flatten();
        let what = |fd: std::fs::DirEntry| {
            let target = std::fs::read_link(fd.path()).ok()?;
            let text = target.to_string_lossy().into_owned();
            Some(text.trim_end_matches(|c: char| c.is_ascii_digit() || c == ']').to_owned())
        };
        fds.filter_map(what).collect()
    }

    /// Mappings of memory granted by `domid`, and of copy buffers with `None`.
    pub fn mappings(self, domid: Option<u16>) -> Vec<String> {
        let name = domid.map_or("ringback-".to_owned(), |d| format!("ringback-{d}-"));
        let maps = self.text("maps");
        maps.lines().filter(|line| line.contains(&name)).map(str::to_owned).collect()
    }

    /// All that devices take.
    pub fn holdings(self) -> Holdings {
        let mut threads: Vec<_> = self.threads().into_iter().map(|(name, _)| name).collect();
        let mut descriptors = self.descriptors();
        threads.sort();
        descriptors.sort();
        Holdings { threads, descriptors, mappings: self.mappings(None) }
    }

    /// Resident memory in KiB.
    pub fn resident(self) -> u64 {
        let status = self.text("status");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or("0");
        line.trim().trim_end_matches(" kB").parse().unwrap_or(0)
    }

    /// Processor time of the threads whose names start so.
    pub fn cpu(self, names: &str) -> Duration {
        let of = |tid: u32| {
            let text = self.text(&format!("task/{tid}/schedstat"));
            text.split(' ').next().and_then(|ns| ns.parse().ok()).unwrap_or(0)
        };
        let all = self.threads();
        let ours = all.iter().filter(|(name, _)| name.starts_with(names));
        Duration::from_nanos(ours.map(|(_, tid)| of(*tid)).sum())
    }

    /// Whether it runs.
    pub fn runs(self) -> bool {
        let stat = self.text("stat");
        let state = stat.rsplit(')').next().unwrap_or_default().trim().chars().next();
        state.is_some_and(|s| s != 'Z' && s != 'X')
    }
}
