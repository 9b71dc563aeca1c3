//! Where the threads of a device's queues run.

use std::io;

use rustix::thread::{CpuSet, sched_setaffinity};

use super::knobs::{Knob, Reach, number, put};

/// Which processors the queues' threads are bound to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Placement {
    /// Processors for the queues' threads, in turn; empty: wherever the kernel likes.
    pub cpus: Vec<u32>,
    /// Memory node on whose processors they run, unless `cpus` names some.
    pub node: Option<u32>,
}

impl Placement {
    /// Binds the calling thread, that of queue `number` of the device `name`. Where that cannot be
    /// done it runs anywhere.
    pub fn bind(&self, name: &str, number: u32) {
        if let Err(e) = self.of(number).and_then(|cpus| bind_to(&cpus)) {
            tracing::warn!("{name}: cannot bind to processors: {e}");
        }
    }

    /// The processors for the thread of queue `number`; none: wherever the kernel likes.
    fn of(&self, number: u32) -> io::Result<Vec<u32>> {
        match (self.cpus.as_slice(), self.node) {
            ([], None) => Ok(Vec::new()),
            ([], Some(node)) => {
                let path = format!("/sys/devices/system/node/node{node}/cpulist");
                let list = std::fs::read_to_string(&path)
                    .map_err(|e| io::Error::new(e.kind(), format!("{path}: {e}")))?;
                ranges(list.trim()).ok_or_else(|| io::Error::other(format!("{path}: {list:?}")))
            }
            (cpus, _) => Ok(vec![cpus[number as usize % cpus.len()]]),
        }
    }

    /// For the knob [`cpus`].
    pub fn set_cpus(&mut self, value: &str) -> Option<()> {
        let list = match value {
            "none" => Some(Vec::new()),
            _ => value.split('+').map(|cpu| number(cpu, 0, 4095)).collect(),
        };
        put(&mut self.cpus, list)
    }

    /// For the knob [`node`].
    pub fn set_node(&mut self, value: &str) -> Option<()> {
        match value {
            "none" => put(&mut self.node, Some(None)),
            _ => put(&mut self.node, number(value, 0, 1023).map(Some)),
        }
    }
}

/// The knob of the processors.
pub const fn cpus<C>(set: fn(&mut C, &str) -> Option<()>) -> Knob<C> {
    Knob {
        name: "cpus",
        unit: "",
        default: "none",
        range: "none, or numbers joined by +",
        help: "processors that the queues' threads are bound to, in turn",
        shows_in: "cpu_ns",
        reach: Reach::Connect,
        set,
    }
}

/// The knob of the memory node.
pub const fn node<C>(set: fn(&mut C, &str) -> Option<()>) -> Knob<C> {
    Knob {
        name: "node",
        unit: "",
        default: "none",
        range: "none, or a memory node's number",
        help: "the queues' threads run on this node's processors, unless cpus names some",
        shows_in: "cpu_ns",
        reach: Reach::Connect,
        set,
    }
}

/// The numbers of a list like `0-3,8` (cpulist of the kernel's sysfs).
fn ranges(list: &str) -> Option<Vec<u32>> {
    let parts = list.split(',').map(|part| {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        Some(from.parse::<u32>().ok()?..=to.parse::<u32>().ok()?)
    });
    Some(parts.collect::<Option<Vec<_>>>()?.into_iter().flatten().collect())
}

/// Binds the calling thread; to none: it stays where the kernel likes.
fn bind_to(cpus: &[u32]) -> io::Result<()> {
    if cpus.is_empty() {
        return Ok(());
    }
    let mut set = CpuSet::new();
    cpus.iter().filter(|cpu| **cpu < CpuSet::MAX_CPU as u32).for_each(|cpu| set.set(*cpu as usize));
    Ok(sched_setaffinity(None, &set)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_are_placed_by_processor_or_node() {
        let mut placement = Placement::default();
        assert!(placement.of(0).unwrap().is_empty());
        placement.set_node("0").unwrap();
        assert!(placement.of(5).unwrap().contains(&0));
        placement.set_node("1023").unwrap();
        assert!(placement.of(0).unwrap_err().to_string().contains("node1023/cpulist"));
        placement.set_cpus("0+1").unwrap();
        assert_eq!(placement.of(3).unwrap(), [1]);
        assert_eq!((placement.set_cpus("0+x"), placement.set_node("one")), (None, None));
        placement.set_cpus("none").and_then(|()| placement.set_node("none")).unwrap();
        assert_eq!(placement, Placement::default());
        assert_eq!(ranges("0-2,5").unwrap(), [0, 1, 2, 5]);
        assert_eq!(ranges("0-x"), None);
    }

    #[test]
    fn a_thread_runs_where_it_is_bound() {
        let bound = std::thread::spawn(|| {
            bind_to(&[]).unwrap();
            bind_to(&[0, 99_999]).unwrap();
            rustix::thread::sched_getaffinity(None).unwrap()
        });
        let bound = bound.join().unwrap();
        assert!(bound.is_set(0) && bound.count() == 1);
        assert!(bind_to(&[4000]).is_err(), "a processor that there is not");
    }
}
