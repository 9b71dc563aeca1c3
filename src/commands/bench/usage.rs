//! What a process has used: processor time and context switches, of all its threads.

use std::io;

use serde::{Deserialize, Serialize};

/// Totals since a process began; those of threads that have ended are missing.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Usage {
    /// Processor time in ns.
    pub cpu_ns: u64,
    /// Times a thread went to sleep.
    pub sleeps: u64,
    /// Times a thread was put off for another.
    pub preempted: u64,
}

impl Usage {
    /// What came after `before`.
    pub fn since(&self, before: &Usage) -> Usage {
        Usage {
            cpu_ns: self.cpu_ns.saturating_sub(before.cpu_ns),
            sleeps: self.sleeps.saturating_sub(before.sleeps),
            preempted: self.preempted.saturating_sub(before.preempted),
        }
    }
}

/// Of this process.
pub fn own() -> io::Result<Usage> {
    let mut usage = of("self")?;
    // To the ns, where the scheduler's own figure of a running thread is a tick old.
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    usage.cpu_ns = time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64;
    Ok(usage)
}

/// Of the process `pid` ("self", or a number).
pub fn of(pid: &str) -> io::Result<Usage> {
    let mut sum = Usage::default();
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let task = task?.path();
        // A thread may end meanwhile.
        let Ok(stat) = std::fs::read_to_string(task.join("schedstat")) else { continue };
        let Ok(status) = std::fs::read_to_string(task.join("status")) else { continue };
        sum.cpu_ns += stat.split(' ').next().and_then(|n| n.parse().ok()).unwrap_or(0);
        sum.sleeps += line(&status, "voluntary_ctxt_switches:");
        sum.preempted += line(&status, "nonvoluntary_ctxt_switches:");
    }
    Ok(sum)
}

/// Processor time in ns of the process `pid` since it began, with that of threads that have
/// ended, to a tick (10 ms).
pub fn whole(pid: &str) -> io::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // proc(5): the name, in brackets, may hold anything; utime and stime are 12 and 13 after it.
    let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let ticks = fields.split_whitespace().skip(11).take(2);
    let sum: u64 = ticks.filter_map(|n| n.parse::<u64>().ok()).sum();
    Ok(sum * (1_000_000_000 / rustix::param::clock_ticks_per_second()))
}

fn line(status: &str, name: &str) -> u64 {
    let found = status.lines().find_map(|l| l.strip_prefix(name));
    found.and_then(|n| n.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_and_sleep_are_seen() {
        let before = own().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(2));
        let sum = (0..2_000_000u64).fold(0u64, |sum, n| std::hint::black_box(sum ^ n));
        std::hint::black_box(sum);
        let used = own().unwrap().since(&before);
        assert!(used.cpu_ns > 0 && used.sleeps > 0, "{used:?}");
    }
}
