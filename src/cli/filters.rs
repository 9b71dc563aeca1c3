//! Filters before images.

use std::path::PathBuf;

use blktap::filters::delay::Delay;
use blktap::filters::fault::Faults;
use blktap::filters::priority::Priority;
use blktap::filters::stall::Policy;
use clap::{Args, Subcommand, ValueEnum};

#[derive(Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum MirrorErrors {
    /// The client gets it.
    #[default]
    Report,
    /// The mirror is given up, and the log says so.
    Drop,
}

#[derive(Args, Clone, Default)]
#[command(next_help_heading = "Filters")]
pub struct Filters {
    /// Limit requests and bytes a second, for each image: iops_total, bps_read, and so on, as
    /// `ringback knobs` has them; may be repeated.
    #[arg(long, value_name = "LIMIT=N[,LIMIT=N]")]
    pub throttle: Vec<String>,
    /// The limits hold for all images together, which share them fairly.
    #[arg(long)]
    pub throttle_group: bool,
    /// What the kernel's scheduler is told of reads and writes: none, idle, rt:LEVEL or be:LEVEL,
    /// the level from 0 (first) to 7; rt needs CAP_SYS_NICE.
    #[arg(long, value_name = "PRIORITY", default_value = "none")]
    pub io_priority: Priority,
    /// Log in this file which blocks change. The log is gone on with, or begun; clients see it as
    /// qemu:dirty-bitmap:NAME, NAME being the file's without its ending. With --read-only a log
    /// is only shown.
    #[arg(long, value_name = "PATH")]
    pub changed_log: Option<PathBuf>,
    /// Write to this image too; it is as large, or larger, and has the same content.
    #[arg(long, value_name = "FORMAT:PATH")]
    pub mirror: Option<String>,
    /// What becomes of an error of the mirror.
    #[arg(long, value_enum, default_value = "report")]
    pub mirror_errors: MirrorErrors,
    /// What becomes of a request that fails: report answers it with the error; pause keeps it, and
    /// the image waits for `ringback disk resume --live SOCKET`, SOCKET being that of --control.
    #[arg(long, value_name = "POLICY", default_value = "report")]
    pub on_error: Policy,
    /// The same where there is no room (ENOSPC, EDQUOT).
    #[arg(long, value_name = "POLICY", default_value = "report")]
    pub on_enospc: Policy,
    /// Have requests fail, for tests: OP:ERROR[:nth=N][:every=N][:p=0..1][:seed=N][:at=FIRST-END],
    /// OP of any, read, write, flush, discard; several joined by +.
    #[arg(long, value_name = "FAULT", default_value = "", hide_default_value = true)]
    pub fault: Faults,
    /// Have each request wait, for tests: US, or LEAST-MOST[:seed=N], in microseconds.
    #[arg(long, value_name = "US", default_value = "0", hide_default_value = true)]
    pub delay_us: Delay,
    /// What a bit of a log that begins stands for: 512 to 2G, a power of two.
    #[arg(long, value_name = "BYTES", default_value = "64K")]
    pub changed_log_granularity: String,
}

#[derive(Subcommand)]
pub enum ChangedLog {
    /// Begin a log; one that is in use ends at that moment, and its file can be read.
    ///
    /// The device must have been connected with the knob changed_block_log (ready, or a path).
    Start {
        /// DOMID/VDEV, or a control socket.
        device: String,
        /// The log's file, which is new.
        path: PathBuf,
    },
    /// End the log.
    Stop {
        /// DOMID/VDEV, or a control socket.
        device: String,
    },
    /// Have an export show a log no more that has ended.
    Forget {
        /// The export's control socket.
        device: String,
        /// The log's name: its file's without the ending.
        name: String,
    },
    /// Show what a log that nobody uses has: first byte and length of each changed stretch.
    Show {
        /// The log's file.
        path: PathBuf,
        /// Print one JSON document.
        #[arg(long)]
        json: bool,
    },
}
