//! The table of knobs.

use std::path::Path;

use blktap::filters::changed::LogOptions;
use blktap::image::Commits;
use blktap::storage::Cache;

use hypervisor::xenbus::knobs::{Knob, Reach, number, put};
use hypervisor::xenbus::placement;

use super::{ChangedLog, Config, GrantMode, MAX_QUEUES, Ordering};

/// A knob of the throttle.
const fn throttle(
    name: &'static str,
    unit: &'static str,
    default: &'static str,
    range: &'static str,
    help: &'static str,
    set: fn(&mut Config, &str) -> Option<()>,
) -> Knob<Config> {
    Knob { name, unit, default, range, help, shows_in: "throttled", reach: Reach::Live, set }
}

/// Every knob there is.
pub(super) const KNOBS: &[Knob<Config>] = &[
    Knob {
        name: "cache",
        unit: "",
        default: "none",
        range: "none, writeback, unsafe",
        help: "how the host's page cache is used; none is O_DIRECT",
        shows_in: "latency_read, latency_write",
        reach: Reach::Connect,
        set: |c, v| {
            c.cache = match v {
                "none" => Cache::None,
                "writeback" => Cache::Writeback,
                "unsafe" => Cache::Unsafe,
                _ => return None,
            };
            Some(())
        },
    },
    Knob {
        name: "l2_cache_size",
        unit: "bytes",
        default: "32M",
        range: "4K to 1024G, or all",
        help: "memory for the L2 tables of each QCOW2 image of a chain; 1 MiB is enough for 8 GiB of disk in clusters of 64 KiB",
        shows_in: "latency_read, latency_write",
        reach: Reach::Connect,
        set: |c, v| put(&mut c.l2_cache_size, v.parse().ok()),
    },
    Knob {
        name: "metadata",
        unit: "",
        default: "answer",
        range: "answer, flush",
        help: "when the tables of a growing image (QCOW2, VHD) are in its file: before a write is answered, so that nothing is lost if the backend is killed, or with the guest's next flush, which is faster and loses what came after the last flush",
        shows_in: "latency_write",
        reach: Reach::Connect,
        set: |c, v| {
            c.commits = match v {
                "answer" => Commits::BeforeAnswer,
                "flush" => Commits::AtFlush,
                _ => return None,
            };
            Some(())
        },
    },
    Knob {
        name: "grants",
        unit: "",
        default: "persistent",
        range: "persistent, copy, map",
        help: "payload transport; persistent needs a frontend that offers it, else copy; map (for one request) excludes cache=none",
        shows_in: "grants_copied, grants_mapped, hits",
        reach: Reach::Connect,
        set: |c, v| {
            c.grants = match v {
                "persistent" => GrantMode::Persistent,
                "copy" => GrantMode::Copy,
                "map" => GrantMode::Map,
                _ => return None,
            };
            Some(())
        },
    },
    Knob {
        name: "max_persistent_grants",
        unit: "pages",
        default: "1056",
        range: "1 to 65536",
        help: "pages that each queue keeps mapped",
        shows_in: "evictions",
        reach: Reach::Live,
        set: |c, v| put(&mut c.max_persistent_grants, number(v, 1, 65536)),
    },
    Knob {
        name: "persistent_idle_s",
        unit: "seconds",
        default: "60",
        range: "1 to 86400",
        help: "after which an unused persistent grant is unmapped",
        shows_in: "evictions",
        reach: Reach::Live,
        set: |c, v| put(&mut c.persistent_idle_s, number(v, 1, 86400)),
    },
    Knob {
        name: "max_ring_page_order",
        unit: "order of pages",
        default: "4",
        range: "0 to 4",
        help: "largest ring offered: 4 is 16 pages, 512 requests",
        shows_in: "ring_full",
        reach: Reach::Connect,
        set: |c, v| put(&mut c.max_ring_page_order, number(v, 0, 4)),
    },
    Knob {
        name: "max_queues",
        unit: "queues",
        default: "CPUs",
        range: "1 to 64",
        help: "most queues offered; each has a thread of its own",
        shows_in: "requests of each queue",
        reach: Reach::Connect,
        set: |c, v| put(&mut c.max_queues, number(v, 1, MAX_QUEUES)),
    },
    Knob {
        name: "max_indirect_segments",
        unit: "segments of 4 KiB",
        default: "256",
        range: "0 (not offered), 12 to 4096",
        help: "largest request: 256 is 1 MiB",
        shows_in: "indirect",
        reach: Reach::Connect,
        set: |c, v| {
            let n = number(v, 0, 4096).filter(|n| *n == 0 || *n >= 12);
            put(&mut c.max_indirect_segments, n)
        },
    },
    Knob {
        name: "poll_us",
        unit: "microseconds",
        default: "100",
        range: "0 to 10000",
        help: "how long a queue polls before it sleeps, at most; it polls less where that does not pay",
        shows_in: "polls_paid, notifications_received, cpu_ns",
        reach: Reach::Live,
        set: |c, v| put(&mut c.poll_us, number(v, 0, 10_000)),
    },
    Knob {
        name: "ordering",
        unit: "",
        default: "both",
        range: "flush, barrier, both",
        help: "ordering primitives offered; barrier (alone) excludes indirect descriptors",
        shows_in: "f_req, barriers",
        reach: Reach::Connect,
        set: |c, v| {
            c.ordering = match v {
                "flush" => Ordering::Flush,
                "barrier" => Ordering::Barrier,
                "both" => Ordering::Both,
                _ => return None,
            };
            Some(())
        },
    },
    placement::cpus(|c, v| c.placement.set_cpus(v)),
    placement::node(|c, v| c.placement.set_node(v)),
    throttle(
        "iops_total",
        "requests/s",
        "0",
        "0 (no limit) to 10^15, also with K, M or G",
        "requests a second of all kinds",
        |c, v| c.limits.set("iops_total", v),
    ),
    throttle(
        "iops_total_max",
        "requests/s",
        "0",
        "0 (none) to 10^15, at least iops_total",
        "the same while a burst lasts",
        |c, v| c.limits.set("iops_total_max", v),
    ),
    throttle(
        "iops_total_max_length",
        "seconds",
        "1",
        "1 to 86400",
        "how long a burst lasts at the rate of iops_total_max; one of 1 s may come all at once",
        |c, v| c.limits.set("iops_total_max_length", v),
    ),
    throttle(
        "iops_read",
        "requests/s",
        "0",
        "0 (no limit) to 10^15, also with K, M or G",
        "requests a second that read",
        |c, v| c.limits.set("iops_read", v),
    ),
    throttle(
        "iops_read_max",
        "requests/s",
        "0",
        "0 (none) to 10^15, at least iops_read",
        "the same while a burst lasts",
        |c, v| c.limits.set("iops_read_max", v),
    ),
    throttle(
        "iops_read_max_length",
        "seconds",
        "1",
        "1 to 86400",
        "how long a burst lasts at the rate of iops_read_max; one of 1 s may come all at once",
        |c, v| c.limits.set("iops_read_max_length", v),
    ),
    throttle(
        "iops_write",
        "requests/s",
        "0",
        "0 (no limit) to 10^15, also with K, M or G",
        "requests a second that write, discards included",
        |c, v| c.limits.set("iops_write", v),
    ),
    throttle(
        "iops_write_max",
        "requests/s",
        "0",
        "0 (none) to 10^15, at least iops_write",
        "the same while a burst lasts",
        |c, v| c.limits.set("iops_write_max", v),
    ),
    throttle(
        "iops_write_max_length",
        "seconds",
        "1",
        "1 to 86400",
        "how long a burst lasts at the rate of iops_write_max; one of 1 s may come all at once",
        |c, v| c.limits.set("iops_write_max_length", v),
    ),
    throttle(
        "bps_total",
        "bytes/s",
        "0",
        "0 (no limit) to 10^15, also with K, M or G",
        "bytes a second read and written together",
        |c, v| c.limits.set("bps_total", v),
    ),
    throttle(
        "bps_total_max",
        "bytes/s",
        "0",
        "0 (none) to 10^15, at least bps_total",
        "the same while a burst lasts",
        |c, v| c.limits.set("bps_total_max", v),
    ),
    throttle(
        "bps_total_max_length",
        "seconds",
        "1",
        "1 to 86400",
        "how long a burst lasts at the rate of bps_total_max; one of 1 s may come all at once",
        |c, v| c.limits.set("bps_total_max_length", v),
    ),
    throttle(
        "bps_read",
        "bytes/s",
        "0",
        "0 (no limit) to 10^15, also with K, M or G",
        "bytes a second read",
        |c, v| c.limits.set("bps_read", v),
    ),
    throttle(
        "bps_read_max",
        "bytes/s",
        "0",
        "0 (none) to 10^15, at least bps_read",
        "the same while a burst lasts",
        |c, v| c.limits.set("bps_read_max", v),
    ),
    throttle(
        "bps_read_max_length",
        "seconds",
        "1",
        "1 to 86400",
        "how long a burst lasts at the rate of bps_read_max; one of 1 s may come all at once",
        |c, v| c.limits.set("bps_read_max_length", v),
    ),
    throttle(
        "bps_write",
        "bytes/s",
        "0",
        "0 (no limit) to 10^15, also with K, M or G",
        "bytes a second written",
        |c, v| c.limits.set("bps_write", v),
    ),
    throttle(
        "bps_write_max",
        "bytes/s",
        "0",
        "0 (none) to 10^15, at least bps_write",
        "the same while a burst lasts",
        |c, v| c.limits.set("bps_write_max", v),
    ),
    throttle(
        "bps_write_max_length",
        "seconds",
        "1",
        "1 to 86400",
        "how long a burst lasts at the rate of bps_write_max; one of 1 s may come all at once",
        |c, v| c.limits.set("bps_write_max_length", v),
    ),
    throttle(
        "iops_size",
        "bytes",
        "0",
        "0 (not) to 10^15",
        "a larger request counts as several of so many bytes",
        |c, v| c.limits.set("iops_size", v),
    ),
    Knob {
        name: "on_error",
        unit: "",
        default: "report",
        range: "report, pause",
        help: "what becomes of a request that fails: report answers it with the error; pause keeps it, and the disk waits for `ringback disk resume`, which tries it again",
        shows_in: "stalled, errors",
        reach: Reach::Live,
        set: |c, v| put(&mut c.policies.on_error, v.parse().ok()),
    },
    Knob {
        name: "on_enospc",
        unit: "",
        default: "pause",
        range: "report, pause",
        help: "the same where there is no room (ENOSPC, EDQUOT)",
        shows_in: "stalled, errors",
        reach: Reach::Live,
        set: |c, v| put(&mut c.policies.on_enospc, v.parse().ok()),
    },
    Knob {
        name: "io_priority",
        unit: "",
        default: "none",
        range: "none, idle, rt:LEVEL, be:LEVEL (0 is first, 7 last)",
        help: "what the kernel's scheduler is told of reads and writes to files and devices; rt needs CAP_SYS_NICE",
        shows_in: "latency_read, latency_write",
        reach: Reach::Live,
        set: |c, v| put(&mut c.io_priority, v.parse().ok()),
    },
    Knob {
        name: "throttle_group",
        unit: "",
        default: "none",
        range: "none, or a name",
        help: "disks of one backend process (the disks of a guest) that name the same group share its limits; those that the last disk to connect sets are in force",
        shows_in: "throttled",
        reach: Reach::Connect,
        set: |c, v| match v {
            "" => None,
            "none" => put(&mut c.throttle_group, Some(None)),
            name => put(&mut c.throttle_group, Some(Some(name.to_owned()))),
        },
    },
    Knob {
        name: "fault",
        unit: "",
        default: "none",
        range: "none, or OP:ERROR[:nth=N][:every=N][:p=0..1][:seed=N][:at=FIRST-END], joined by +",
        help: "requests that fail on purpose, for tests of guests; OP is any, read, write, flush, discard",
        shows_in: "errors",
        reach: Reach::Connect,
        set: |c, v| put(&mut c.faults, if v == "none" { "" } else { v }.parse().ok()),
    },
    Knob {
        name: "delay_us",
        unit: "microseconds",
        default: "0",
        range: "0 to 600000000, or LEAST-MOST[:seed=N]",
        help: "how long each request waits on purpose, for tests of guests",
        shows_in: "latency_read, latency_write",
        reach: Reach::Connect,
        set: |c, v| put(&mut c.delay, v.parse().ok()),
    },
    Knob {
        name: "changed_block_log",
        unit: "",
        default: "none",
        range: "none, ready, or an absolute path",
        help: "a file that logs which blocks change, for backups: it is gone on with, or begun; ready: `ringback changed-log start` may begin one later",
        shows_in: "latency_write",
        reach: Reach::Connect,
        set: |c, v| {
            c.changed = match v {
                "none" => ChangedLog::None,
                "ready" => ChangedLog::Ready,
                path if path.starts_with('/') => ChangedLog::In(path.into()),
                _ => return None,
            };
            Some(())
        },
    },
    Knob {
        name: "changed_block_granularity",
        unit: "bytes",
        default: "64K",
        range: "512 to 2G, a power of two",
        help: "what a bit of a log that begins stands for",
        shows_in: "latency_write",
        reach: Reach::Live,
        set: |c, v| {
            LogOptions::of(Path::new("x")).granularity(v)?;
            put(&mut c.changed_granularity, Some(v.to_owned()))
        },
    },
];
