//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

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
    /// What to do.
    #[command(subcommand)]
    pub command: Option<Command>,
}

#[derive(Subcommand)]
pub enum Command {
    /// Serve the devices of all guests: one backend process for each guest.
    Daemon(Serve),
    /// Serve devices of one kind in this process.
    #[command(subcommand)]
    Backend(Backend),
    /// Give a guest a device, without a toolstack.
    #[command(subcommand)]
    Attach(Attach),
    /// Take a device from a guest.
    #[command(subcommand)]
    Detach(Detach),
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
    /// Change the disc of a CD-ROM drive.
    #[command(subcommand)]
    Cd(Cd),
    /// Show the counters of devices, live.
    Stats(Stats),
    /// List the devices that are served on this host.
    List(List),
    /// Check whether this host can run backends, and say what to change.
    Doctor(List),
    /// Show the knobs: names, units, defaults, ranges.
    Knobs(Knobs),
    /// Show the version.
    Version,
}

#[derive(Args, Clone)]
pub struct Serve {
    /// Take every node of the kind, not only those whose script is ours.
    #[arg(long)]
    pub any: bool,
    /// Set a knob (see `ringback knobs`); may be repeated.
    #[arg(long = "set", value_name = "KNOB=VALUE")]
    pub set: Vec<String>,
}

#[derive(Subcommand)]
pub enum Backend {
    /// Block devices (vbd).
    Blk {
        /// Serve this guest only. It may start later; serving ends with it.
        #[arg(long, value_name = "N")]
        domid: Option<u16>,
        #[command(flatten)]
        serve: Serve,
    },
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
