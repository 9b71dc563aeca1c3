//! The command line.

pub mod disk;
mod export;
mod filters;
mod serve;
pub mod tap;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
pub use export::{CacheMode, Export, ExportNbd, ExportVhostUserBlk};
pub use filters::{ChangedLog, Filters, MirrorErrors};
pub use serve::{Backend, Daemon, Processes, Serve, ServeNet};

/// A user-space Xen split-driver I/O stack.
///
/// Serves the disks of Xen guests from unprivileged processes, and runs the same backends
/// without Xen on a bundled hypervisor. Without a command it runs `ringback run`.
#[derive(Parser)]
#[command(name = "ringback", version, about, max_term_width = 100)]
pub struct Cli {
    /// Say more (twice: everything). RINGBACK_LOG takes a filter instead.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// Where devices keep locks, control sockets and counters
    /// [default: /run/ringback for root, else $XDG_RUNTIME_DIR/ringback].
    #[arg(long, global = true, env = "RINGBACK_RUN", value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
    /// Use the bundled hypervisor at this socket instead of Xen.
    #[arg(long, global = true, value_name = "SOCKET")]
    pub hypervisor: Option<PathBuf>,
    /// End when this process, which must be the parent, ends.
    #[arg(long, global = true, hide = true, value_name = "PID")]
    pub end_with: Option<i32>,
    /// What to do.
    #[command(subcommand)]
    pub command: Option<Command>,
}

#[derive(Subcommand)]
pub enum Command {
    /// Run a guest against a backend on the bundled hypervisor and verify every byte.
    ///
    /// Starts three processes: the hypervisor, a backend with a throw-away image, and a guest
    /// that reads and writes through the split driver. It needs no privileges and leaves nothing.
    Run(Run),
    /// Run the bundled hypervisor until a signal.
    ///
    /// Its sockets lie in the run folder (--run-dir): hypervisor.sock, which --hypervisor names
    /// for backends and toolstack commands, and xenstored.sock, which Debian's xenstore tools
    /// take as XENSTORED_PATH.
    Hypervisor(Hypervisor),
    /// Be a guest of `ringback run`.
    #[command(hide = true)]
    Guest {
        /// What to do.
        plan: String,
    },
    /// Serve the devices of all guests: one backend process for each guest and kind of device.
    Daemon(Daemon),
    /// Serve devices of one kind in this process.
    #[command(subcommand)]
    Backend(Backend),
    /// Serve images to those who have no Xen.
    #[command(subcommand)]
    Export(Export),
    /// Give a guest a device, without a toolstack.
    #[command(subcommand)]
    Attach(Attach),
    /// Take a device from a guest.
    #[command(subcommand)]
    Detach(Detach),
    /// Make, show, check, copy and change images that nobody serves, like qemu-img.
    #[command(subcommand)]
    Disk(disk::Disk),
    /// Tell the guest of a disk's new size (of a file that has grown, or of a resized device).
    Resize(Live),
    /// Change a knob of a running device (see `ringback knobs`).
    Set {
        /// DOMID/VDEV, or a control socket.
        device: String,
        /// The knob.
        knob: String,
        /// Its new value.
        value: String,
    },
    /// Hold what a guest sends, and let it go or drop it: for checkpoints.
    Output {
        /// DOMID/vifN, or a control socket.
        device: String,
        /// What to do.
        #[arg(value_enum)]
        action: Output,
        /// After a release or a drop, hold what comes later.
        #[arg(long)]
        and_hold: bool,
    },
    /// Log which blocks of a disk change, for backups.
    #[command(subcommand)]
    ChangedLog(ChangedLog),
    /// Change the disc of a CD-ROM drive.
    #[command(subcommand)]
    Cd(Cd),
    /// blktap's command line (also by the name tap-ctl): processes that serve images by NBD.
    #[command(subcommand)]
    TapCtl(tap::Tap),
    /// Show the counters of devices, live.
    Stats(Stats),
    /// List the devices that are served on this host.
    List(List),
    /// Check whether this host can run backends, and say what to change.
    Doctor(List),
    /// Show the knobs: names, units, defaults, ranges.
    Knobs(Knobs),
    /// Measure, beside others under the same load.
    #[command(subcommand)]
    Bench(Bench),
    /// Show the version.
    Version,
}

#[derive(Args, Default)]
pub struct Run {
    /// What to run; without it one guest with one disk.
    ///
    /// [guest] name, cpus, backend_cpus; [[disk]] vdev, target, queues, ring_page_order, grants
    /// (persistent or copy), depth, size_mib, work_mib, seconds.
    #[arg(value_name = "GUEST.TOML")]
    pub file: Option<PathBuf>,
    /// Use a throw-away overlay over this image (FORMAT:PATH; without a format, raw).
    ///
    /// A server's export (nbd:unix:PATH, nbd://HOST/NAME) can only be overwritten or read.
    #[arg(long, value_name = "FORMAT:PATH")]
    pub disk: Option<String>,
    /// Read the named images in place.
    #[arg(long, conflicts_with = "overwrite")]
    pub read_only: bool,
    /// Write to the named images themselves: THEIR CONTENT IS LOST.
    #[arg(long)]
    pub overwrite: bool,
    /// Have the guest serve its disks by NBD at this Unix socket instead, until a signal.
    ///
    /// What fio, qemu-img or nbdcopy do there goes through the split driver. The first disk has
    /// the empty name, each also its vdev. Only with --overwrite do the images keep it.
    #[arg(long, value_name = "SOCKET", conflicts_with_all = ["json", "seed", "progress"])]
    pub nbd: Option<PathBuf>,
    /// Print one JSON document.
    #[arg(long)]
    pub json: bool,
    /// Show progress even if standard error is no terminal.
    #[arg(short, long)]
    pub progress: bool,
    /// Stamp blocks with this number instead of a random one.
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
}

#[derive(Args)]
pub struct Hypervisor {
    /// Serve until standard input ends, then remove this folder.
    #[arg(long, hide = true, value_name = "DIR")]
    pub throw_away: Option<PathBuf>,
}

#[derive(Subcommand)]
pub enum Bench {
    /// A request's way through the ring and back, beside Xen's C macros (needs gcc, libxen-dev).
    Ring(BenchRing),
    /// From a guest's process to a disk and back, beside qemu-storage-daemon.
    Blk(BenchBlk),
    /// NBD servers under fio's nbd engine: ours, qemu-storage-daemon, qemu-nbd and nbdkit.
    Nbd(BenchNbd),
    /// vhost-user-blk servers under the blkio crate's client: ours and qemu-storage-daemon.
    Vhost(BenchVhost),
    /// From a guest's process to a network backend and back, by ring pages and with its pages kept mapped.
    Net(BenchNet),
    /// Be the guest of a network bench.
    #[command(hide = true)]
    NetGuest {
        /// What to do.
        plan: String,
    },
    /// Be the guest of a bench.
    #[command(hide = true)]
    Guest {
        /// What to do.
        plan: String,
    },
    /// Be the client of a peer.
    #[command(hide = true)]
    Client {
        /// What to do.
        plan: String,
    },
}

#[derive(Args)]
pub struct BenchRing {
    /// Print one JSON document.
    #[arg(long)]
    pub json: bool,
    /// Measure each pair so often.
    #[arg(long, value_name = "N", default_value = "31")]
    pub rounds: u32,
}

#[derive(Args)]
pub struct BenchNbd {
    /// Print one JSON document.
    #[arg(long)]
    pub json: bool,
    /// Length of one measurement.
    #[arg(long, value_name = "S", default_value = "2")]
    pub seconds: f64,
    /// Measure each row so often; the servers alternate.
    #[arg(long, value_name = "N", default_value = "3")]
    pub rounds: u32,
    /// Size of the images, in MiB.
    #[arg(long, value_name = "N", default_value = "256",
        value_parser = clap::value_parser!(u64).range(16..=65536))]
    pub size_mib: u64,
    /// The images' format; all but raw without nbdkit, which knows none.
    #[arg(long, value_enum, default_value = "raw")]
    pub format: BenchFormat,
    /// Only these caching modes; may be repeated [default: both].
    #[arg(long, value_enum)]
    pub cache: Vec<BenchCache>,
    /// Only these loads; may be repeated [default: all].
    #[arg(long, value_enum)]
    pub load: Vec<NbdLoad>,
    /// Only this depth; may be repeated [default: 1 and 32].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=128))]
    pub depth: Vec<u32>,
}

#[derive(Args)]
pub struct BenchVhost {
    /// Print one JSON document.
    #[arg(long)]
    pub json: bool,
    /// Length of one measurement.
    #[arg(long, value_name = "S", default_value = "1")]
    pub seconds: f64,
    /// Measure each row so often; the servers alternate.
    #[arg(long, value_name = "N", default_value = "3")]
    pub rounds: u32,
    /// Size of the images, in MiB.
    #[arg(long, value_name = "N", default_value = "256",
        value_parser = clap::value_parser!(u64).range(16..=65536))]
    pub size_mib: u64,
    /// The images' format.
    #[arg(long, value_enum, default_value = "raw")]
    pub format: VhostFormat,
    /// Only these caching modes; may be repeated [default: all].
    #[arg(long, value_enum)]
    pub cache: Vec<VhostCache>,
    /// Only this depth; may be repeated [default: 1 and 32].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub depth: Vec<u32>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum VhostCache {
    /// Through the page cache, where images lie as small writes leave them.
    Cached,
    /// Through the page cache, where images lie as reading them brings them: in large folios,
    /// if the file system has those.
    LargeFolios,
    /// O_DIRECT.
    Direct,
}

impl VhostCache {
    /// As the command line has it.
    pub fn name(self) -> &'static str {
        match self {
            VhostCache::Cached => "cached",
            VhostCache::LargeFolios => "large-folios",
            VhostCache::Direct => "direct",
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum VhostFormat {
    /// The bytes themselves.
    Raw,
    /// QCOW2.
    Qcow2,
}

impl VhostFormat {
    /// As everybody names it.
    pub fn name(self) -> &'static str {
        match self {
            VhostFormat::Raw => "raw",
            VhostFormat::Qcow2 => "qcow2",
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BenchFormat {
    /// The bytes themselves.
    Raw,
    /// QCOW2.
    Qcow2,
    /// VHD (QEMU's vpc), dynamic.
    Vhd,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BenchCache {
    /// Through the page cache.
    Cached,
    /// O_DIRECT.
    Direct,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum NbdLoad {
    /// Random 4 KiB reads.
    Read4k,
    /// Random 4 KiB overwrites.
    Write4k,
    /// Random 4 KiB writes to an image without data.
    First4k,
    /// Sequential 256 KiB reads.
    Read256k,
    /// Sequential 256 KiB overwrites.
    Write256k,
    /// Sequential 256 KiB writes to an image without data.
    First256k,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Peer {
    /// qemu-storage-daemon's vhost-user-blk export.
    Qemu,
    /// None.
    None,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Placement {
    /// Wherever the kernel likes.
    Free,
    /// Backends, ours and the peer's, on processor 0; guests and clients on processor 1.
    Pinned,
}

#[derive(Args)]
pub struct BenchNet {
    /// Print one JSON document.
    #[arg(long)]
    pub json: bool,
    /// Show progress even if standard error is no terminal.
    #[arg(short, long)]
    pub progress: bool,
    /// Length of one measurement.
    #[arg(long, value_name = "S", default_value = "0.5")]
    pub seconds: f64,
    /// Measure each row so often; with and without kept pages alternate.
    #[arg(long, value_name = "N", default_value = "3")]
    pub rounds: u32,
    /// Only rings of so many pages; may be repeated [default: 1, 4 and 16].
    #[arg(long, value_enum)]
    pub pages: Vec<BenchPages>,
    /// Only these packets; may be repeated [default: all].
    #[arg(long, value_enum)]
    pub size: Vec<BenchPacket>,
    /// Set a knob of the backend (see `ringback knobs`); may be repeated.
    #[arg(long = "set", value_name = "KNOB=VALUE")]
    pub set: Vec<String>,
    /// Where the processes run.
    #[arg(long, value_enum, default_value = "free")]
    pub place: Placement,
}

/// Pages of a ring; named by their order.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BenchPages {
    /// One, as unmodified frontends have.
    #[value(name = "1")]
    Order0,
    /// Four.
    #[value(name = "4")]
    Order2,
    /// Sixteen.
    #[value(name = "16")]
    Order4,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BenchPacket {
    /// Frames of 64 bytes.
    #[value(name = "64")]
    Small,
    /// Frames of 1500 bytes.
    #[value(name = "1500")]
    Full,
    /// Unsegmented TCP of 45 segments, 65214 bytes (GSO).
    #[value(name = "64k")]
    Gso,
}

#[derive(Args)]
pub struct BenchBlk {
    /// Print one JSON document.
    #[arg(long)]
    pub json: bool,
    /// Length of one measurement.
    #[arg(long, value_name = "S", default_value = "1")]
    pub seconds: f64,
    /// Measure each pair so often; the two alternate.
    #[arg(long, value_name = "N", default_value = "3")]
    pub rounds: u32,
    /// Whom to measure beside.
    #[arg(long, value_enum, default_value = "qemu")]
    pub peer: Peer,
    /// `null` (a disk that touches no payload), or a file, which is only read. May be repeated.
    /// Without it null and a throw-away file, which is written too.
    #[arg(long, value_name = "null|FILE")]
    pub disk: Vec<PathBuf>,
    /// Only this depth; may be repeated [default: 1 and 32].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=32))]
    pub depth: Vec<u32>,
    /// Set a knob of our backend (see `ringback knobs`); may be repeated.
    #[arg(long = "set", value_name = "KNOB=VALUE")]
    pub set: Vec<String>,
    /// How long our frontend polls before it sleeps, in microseconds.
    #[arg(long, value_name = "US")]
    pub front_poll_us: Option<u32>,
    /// Where the processes run.
    #[arg(long, value_enum, default_value = "free")]
    pub place: Placement,
    /// Show instead what a connected device costs that has nothing to do.
    #[arg(long, conflicts_with_all = ["peer", "rounds"])]
    pub idle: bool,
}

/// What becomes of a guest's output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// From now on it is held.
    Hold,
    /// What is held goes, oldest first.
    Release,
    /// What is held is dropped.
    Drop,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum Drive {
    /// A disk.
    Disk,
    /// A CD-ROM drive: read-only and removable.
    Cdrom,
}

#[derive(Subcommand)]
pub enum Attach {
    /// A disk: `ringback attach blk 3 xvda raw:/images/a.img`.
    Blk {
        /// The guest.
        domid: u16,
        /// The device as the guest names it (xvda, sda1) or its number (51712).
        vdev: String,
        /// FORMAT:PATH; without a format, raw.
        target: String,
        /// The guest may only read.
        #[arg(long)]
        read_only: bool,
        /// What the guest sees.
        #[arg(long, value_enum, default_value = "disk")]
        drive: Drive,
        /// Set a knob for this device (see `ringback knobs`); may be repeated.
        #[arg(long = "set", value_name = "KNOB=VALUE")]
        set: Vec<String>,
        /// The domain of the backend [default: this one].
        #[arg(long, value_name = "N")]
        backend: Option<u16>,
    },
}

#[derive(Subcommand)]
pub enum Detach {
    /// A disk.
    Blk {
        /// The guest.
        domid: u16,
        /// The device, by name or number.
        vdev: String,
        /// Take it even if the guest uses it.
        #[arg(long)]
        force: bool,
        /// The domain of the backend [default: this one].
        #[arg(long, value_name = "N")]
        backend: Option<u16>,
    },
}

#[derive(Args)]
pub struct Live {
    /// DOMID/VDEV, or a control socket.
    pub device: String,
}

#[derive(Subcommand)]
pub enum Cd {
    /// Take the disc out: the guest's device goes away.
    Eject {
        /// The guest.
        domid: u16,
        /// The drive, by name or number.
        vdev: String,
    },
    /// Put a disc in: the guest's device comes back with it.
    Insert {
        /// The guest.
        domid: u16,
        /// The drive, by name or number.
        vdev: String,
        /// FORMAT:PATH; without a format, raw.
        target: String,
    },
}

#[derive(Args)]
pub struct Stats {
    /// Print one JSON document (one a line with --interval).
    #[arg(long)]
    pub json: bool,
    /// Show rates, every so many seconds.
    #[arg(long, value_name = "S")]
    pub interval: Option<f64>,
    /// Stop after so many intervals.
    #[arg(long, value_name = "N", requires = "interval")]
    pub count: Option<u64>,
    /// Only this device (DOMID/VDEV).
    #[arg(long, value_name = "D")]
    pub device: Option<String>,
    /// Say what each counter means instead.
    #[arg(long)]
    pub describe: bool,
}

#[derive(Args)]
pub struct List {
    /// Print one JSON document.
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct Knobs {
    /// Print the table of docs/tuning.md.
    #[arg(long)]
    pub markdown: bool,
}
