//! What is done with the disk of a running guest.

use std::path::PathBuf;

use clap::Args;

use super::{Output, Progress};

/// Which disk, and how the command tells of its work.
#[derive(Args)]
pub struct OnLive {
    /// The guest's disk, as DOMID/VDEV, or its control socket.
    #[arg(long, value_name = "DOMID/VDEV")]
    pub live: String,
    /// Begin and return; `ringback disk job` tells how far it is.
    #[arg(long)]
    pub no_wait: bool,
    #[command(flatten)]
    pub progress: Progress,
    #[command(flatten)]
    pub output: Output,
}

/// A snapshot: inside an image that nobody serves, or an overlay under running guests.
#[derive(Args)]
pub struct CreateSnapshot {
    /// The disk of a running guest, as DOMID/VDEV, which gets an overlay; may be repeated, each
    /// with its --overlay: all are taken at one moment.
    #[arg(long, value_name = "DOMID/VDEV", requires = "overlay")]
    pub live: Vec<String>,
    /// The overlay of the --live before it, a new file. The guest goes on in it, and the file
    /// that it had stays as it is.
    #[arg(long, value_name = "FILE", requires = "live")]
    pub overlay: Vec<String>,
    /// Format of the overlays: qcow2 or vhd.
    #[arg(short = 'O', long, value_name = "FORMAT", default_value = "qcow2", requires = "live")]
    pub output_format: String,
    /// Of the --live before it: the file that the disk has now gets this name, in its folder, and
    /// the overlay takes over its name.
    ///
    /// Use it where the guest's configuration names the file and is not changed with the
    /// snapshot: a guest that is started again then finds its newest data. Without it, name the
    /// overlay in the configuration before the guest is started the next time; started with the
    /// old file it would lose what it has written since, and spoil the overlay.
    #[arg(long, value_name = "OLD-NAME", requires = "live")]
    pub rename: Vec<String>,
    /// The image's format; without it, what its first bytes say, but never raw.
    #[arg(short, long, value_name = "FORMAT", conflicts_with = "live")]
    pub format: Option<String>,
    #[command(flatten)]
    pub allow: super::Backing,
    #[command(flatten)]
    pub output: Output,
    /// The image.
    #[arg(required_unless_present = "live", conflicts_with = "live")]
    pub file: Option<String>,
    /// The snapshot's name.
    #[arg(required_unless_present = "live", conflicts_with = "live")]
    pub name: Option<String>,
}

/// A copy of a running guest's disk.
#[derive(Args)]
pub struct Mirror {
    #[command(flatten)]
    pub on: OnLive,
    /// Format of the target.
    #[arg(short = 'O', long, value_name = "FORMAT", default_value = "qcow2")]
    pub output_format: String,
    /// Write into a target that exists, and that has at least the disk's size.
    #[arg(short, long)]
    pub no_create: bool,
    /// Let the guest go on with the copy. Name it in the guest's configuration before the guest
    /// is started the next time: the old disk stays as it was at the switch.
    #[arg(long)]
    pub switch: bool,
    /// Keep disk and copy equal until `ringback disk complete`.
    #[arg(long)]
    pub hold: bool,
    /// The copy: a file, which is made, or a server's export (nbd:unix:PATH, nbd://HOST/NAME).
    pub target: String,
}

/// Chains of a running guest's disk.
#[derive(Args)]
pub struct Stream {
    #[command(flatten)]
    pub on: OnLive,
    /// The image of the chain that the disk builds on afterwards [default: none].
    #[arg(short, long, value_name = "FILE")]
    pub base: Option<PathBuf>,
}

/// Chains of a running guest's disk.
#[derive(Args)]
pub struct Coalesce {
    #[command(flatten)]
    pub on: OnLive,
    /// The image in the middle of the chain; NO OTHER image may build on its parent.
    pub layer: PathBuf,
}
