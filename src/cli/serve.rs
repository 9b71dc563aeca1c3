//! Arguments of the commands that serve guests' devices: `ringback daemon` and `ringback backend`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

#[derive(Args, Clone)]
pub struct Serve {
    /// Take every node of the kind, not only those whose script is ours.
    #[arg(long)]
    pub any: bool,
    /// Set a knob (see `ringback knobs`); may be repeated.
    #[arg(long = "set", value_name = "KNOB=VALUE")]
    pub set: Vec<String>,
    /// Open backing files in this folder too, and below it; may be repeated.
    ///
    /// Without it an image may build only on files in its own folder.
    #[arg(long, value_name = "DIR")]
    pub allow_backing: Vec<PathBuf>,
}

#[derive(Args)]
pub struct Daemon {
    #[command(flatten)]
    pub serve: Serve,
    /// Take every vif, not only those whose script is vif-ringback.
    #[arg(long)]
    pub any_vif: bool,
    /// Set a knob of network devices; may be repeated.
    #[arg(long, value_name = "KNOB=VALUE")]
    pub set_net: Vec<String>,
    /// How many processes serve network devices.
    ///
    /// Guests meet at a switch (bridge=switch:NAME) only in one process; a fault in it is all guests'.
    #[arg(long, value_enum, value_name = "HOW", default_value_t = Processes::PerGuest)]
    pub net_processes: Processes,
}

/// Which guests share a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Processes {
    /// Each guest has one of its own.
    PerGuest,
    /// One for all.
    One,
}

#[derive(Args)]
pub struct ServeNet {
    /// Take every vif, not only those whose script is vif-ringback.
    #[arg(long)]
    pub any: bool,
    /// Set a knob; may be repeated.
    #[arg(long = "set", value_name = "KNOB=VALUE")]
    pub set: Vec<String>,
}

#[derive(Subcommand)]
pub enum Backend {
    /// Network devices (vif), each a TAP device of the host.
    Net {
        /// Serve this guest only. It may start later; serving ends with it.
        #[arg(long, value_name = "N")]
        domid: Option<u16>,
        #[command(flatten)]
        serve: ServeNet,
    },
    /// Block devices (vbd).
    Blk {
        /// Serve this guest only. It may start later; serving ends with it.
        #[arg(long, value_name = "N")]
        domid: Option<u16>,
        /// Take null:BYTES as a disk, which loses what is written: for benches.
        #[arg(long, hide = true)]
        null_disks: bool,
        #[command(flatten)]
        serve: Serve,
    },
}
