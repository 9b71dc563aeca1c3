//! `ringback tap-ctl`, and `tap-ctl` as a name of the program: blktap's command line.

use std::path::PathBuf;

use clap::{Args, Subcommand};

#[derive(Subcommand)]
pub enum Tap {
    /// List tapdisks: `pid minor state type file` on a terminal, else
    /// `pid=N minor=N state=X args=TYPE:FILE`.
    List {
        /// Only this process.
        #[arg(short, value_name = "PID")]
        pid: Option<u32>,
        /// Only this minor.
        #[arg(short, value_name = "MINOR")]
        minor: Option<u32>,
        /// Only this type.
        #[arg(short = 't', value_name = "TYPE")]
        kind: Option<String>,
        /// Only this file.
        #[arg(short, value_name = "FILE")]
        file: Option<String>,
    },
    /// Start a tapdisk, attach it to a minor that is free, and open an image; print its NBD
    /// socket.
    Create {
        #[command(flatten)]
        image: Image,
        /// Connect this device of the kernel's nbd driver (/dev/nbdN) and print it instead.
        #[arg(short, value_name = "DEVICE")]
        device: Option<PathBuf>,
    },
    /// Close an image and detach; the process ends with its last minor.
    Destroy(Target),
    /// Start a process without a minor; print its pid.
    Spawn,
    /// Give a process a minor.
    Attach(Target),
    /// Take a minor from a process; with its last one it ends.
    Detach(Target),
    /// Open an image and serve it by NBD at $RINGBACK_RUN/blktap/nbdPID.MINOR.
    Open {
        #[command(flatten)]
        target: Target,
        #[command(flatten)]
        image: Image,
    },
    /// Close an image: what was taken is carried out, and it is flushed.
    Close {
        #[command(flatten)]
        target: Target,
        /// Accepted; closing never waits for clients.
        #[arg(short)]
        force: bool,
    },
    /// Hold requests back and close the image: its file is let go, with its lock.
    Pause(Target),
    /// Open the image again, or another one with the same content, and let requests go on.
    Unpause {
        #[command(flatten)]
        target: Target,
        /// TYPE:FILE, where it is another one from now on.
        #[arg(short, value_name = "TYPE:FILE")]
        args: Option<String>,
    },
    /// Print requests, sectors and images as a Python dictionary (which is JSON too).
    Stats(Target),
    /// Set a free minor aside; print the name under which its image will be served: a link to the
    /// NBD socket.
    Allocate {
        /// Make a link of this name, too.
        #[arg(short, value_name = "NAME")]
        device: Option<PathBuf>,
    },
    /// Give up a minor that was set aside and that no tapdisk has.
    Free {
        /// The minor.
        #[arg(short, value_name = "MINOR")]
        minor: u32,
    },
    /// Print the major number of the kernel's nbd devices.
    Major {
        /// Of block devices, as without it.
        #[arg(short)]
        block: bool,
        /// Of character devices; nbd has none.
        #[arg(short, conflicts_with = "block")]
        char: bool,
    },
    /// Check whether tapdisks can run here.
    Check,
    /// Be a tapdisk.
    #[command(hide = true)]
    Tapdisk,
}

#[derive(Args)]
pub struct Target {
    /// The process.
    #[arg(short, value_name = "PID")]
    pub pid: u32,
    /// The minor.
    #[arg(short, value_name = "MINOR")]
    pub minor: u32,
    /// How long the process may take, in seconds.
    #[arg(short, value_name = "S", default_value = "60")]
    pub timeout: u64,
}

#[derive(Args)]
pub struct Image {
    /// TYPE:FILE; aio and raw are the file itself, vhd, qcow2 and qcow images.
    #[arg(short, value_name = "TYPE:FILE")]
    pub args: String,
    /// Clients may only read.
    #[arg(short = 'R')]
    pub read_only: bool,
    /// Through the page cache, not past it (O_DIRECT).
    #[arg(short = 'D')]
    pub no_o_direct: bool,
    /// Accepted: the minor whose tapdisk has the parents open. Here each opens its own.
    #[arg(short = 'e', value_name = "MINOR")]
    pub existing: Vec<u32>,
    /// Log in this file which blocks change: one that is there is gone on with.
    #[arg(short = 'C', value_name = "FILE")]
    pub log: Option<PathBuf>,
    /// Write to this image too, which is as large and has the same content; at its first error it
    /// is given up, and `stats` says so. With -s: see there.
    #[arg(short = '2', value_name = "TYPE:FILE")]
    pub secondary: Option<String>,
    /// The image of -2 is an overlay of the first one: when that has no room (ENOSPC) its place
    /// is taken by the overlay.
    #[arg(short, requires = "secondary")]
    pub standby: bool,
    /// Cache what is read: in the host's page cache, as -D does, where blktap writes it into the
    /// image.
    #[arg(short)]
    pub read_cache: bool,
    /// Open backing files in this folder too, and below it; may be repeated.
    #[arg(long, value_name = "DIR")]
    pub allow_backing: Vec<PathBuf>,
}
