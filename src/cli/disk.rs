//! The command line of `ringback disk`, like qemu-img's.

pub mod live;

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

#[derive(Subcommand)]
pub enum Disk {
    /// Make an image.
    Create(Create),
    /// Show what an image is: its format, sizes, backing file, snapshots.
    Info(Info),
    /// Look for damage, and repair it.
    ///
    /// Exit 0: clean. 1: the check failed. 2: corrupt. 3: only leaked clusters. 63: the format
    /// has nothing to check. After a repair, what is left counts.
    Check(Check),
    /// Copy an image into another format.
    Convert(Convert),
    /// Change the size of an image's disk.
    Resize(Resize),
    /// Show which stretches of the disk are allocated, and where.
    Map(Map),
    /// Show how large an image would have to be.
    Measure(Measure),
    /// Compare the contents of two images: exit 0 if they are the same, 1 if not, 2 on an error.
    Compare(Compare),
    /// Give an image another backing file.
    Rebase(Rebase),
    /// Snapshots inside an image.
    #[command(subcommand)]
    Snapshot(Snapshot),
    /// Write what an image has over its backing file into that file.
    Commit(Commit),
    /// Dirty bitmaps of an image.
    #[command(subcommand)]
    Bitmap(Bitmap),
    /// Copy a running guest's disk while it is written, and let the guest go over to the copy.
    ///
    /// It ends after one pass over the disk, however much the guest writes: what was copied is
    /// written twice from then on.
    Mirror(live::Mirror),
    /// Bring into a running guest's image what it has from those it builds on.
    Stream(live::Stream),
    /// Write an image in the middle of a running guest's chain into the one below it.
    Coalesce(live::Coalesce),
    /// Hold the requests of a running guest's disk back, and close its files.
    ///
    /// They may be changed then as long as the guest reads the same: it goes on with
    /// `ringback disk resume`.
    Pause(live::OnLive),
    /// End a pause: the disk is opened again and requests go on.
    Resume(live::OnLive),
    /// Show the job on a running guest's disk, or the last one.
    Job(live::OnLive),
    /// End the job on a running guest's disk; the disk stays as it was, whole.
    Cancel(live::OnLive),
    /// Let a job go on that waits for a word: a mirror goes over to its copy.
    Complete(live::OnLive),
    /// Give an image a device of the kernel's nbd driver (/dev/nbdN), and print it.
    Connect(Connect),
    /// End such a device.
    Disconnect(Disconnect),
}

impl Disk {
    /// Whether a process serves the image.
    pub fn is_served(&self) -> bool {
        matches!(self, Disk::Connect(_) | Disk::Disconnect(_))
    }
}

#[derive(Args)]
pub struct Connect {
    /// The image.
    pub image: PathBuf,
    /// Its format.
    #[arg(short, long, value_name = "FORMAT", default_value = "raw")]
    pub format: String,
    /// Only for reading.
    #[arg(short, long)]
    pub read_only: bool,
    /// This device, not the first that is free.
    #[arg(long, value_name = "/dev/nbdN")]
    pub device: Option<PathBuf>,
    /// Through the page cache, not past it (O_DIRECT).
    #[arg(long)]
    pub cached: bool,
    /// Open backing files in this folder too, and below it; may be repeated.
    #[arg(long, value_name = "DIR")]
    pub allow_backing: Vec<PathBuf>,
}

#[derive(Args)]
pub struct Disconnect {
    /// The device, which nobody uses.
    #[arg(value_name = "/dev/nbdN")]
    pub device: PathBuf,
}

#[derive(Args, Clone, Default)]
pub struct Output {
    /// Print one JSON document.
    #[arg(long)]
    pub json: bool,
}

#[derive(Args, Clone, Default)]
pub struct Progress {
    /// Show progress on standard error even if that is no terminal.
    #[arg(short, long)]
    pub progress: bool,
}

#[derive(Args, Clone, Default)]
pub struct Backing {
    /// Open backing files in this folder too, and below it; may be repeated.
    ///
    /// Without it an image may build only on files in its own folder.
    #[arg(long, value_name = "DIR")]
    pub allow_backing: Vec<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CacheMode {
    /// Past the page cache (O_DIRECT).
    None,
    /// Through the page cache; written out at the end.
    Writeback,
    /// Through the page cache, and not written out.
    Unsafe,
    /// As writeback.
    Writethrough,
    /// As none.
    Directsync,
}

#[derive(Args)]
pub struct Create {
    /// Format of the image: raw, qcow, qcow2, vhd.
    #[arg(short, long, value_name = "FORMAT", default_value = "raw")]
    pub format: String,
    /// Options of the format, KEY=VALUE joined by commas (`-o help` lists them).
    #[arg(short, long, value_name = "LIST")]
    pub options: Vec<String>,
    /// The image it builds on.
    #[arg(short, long, value_name = "FILE")]
    pub backing: Option<String>,
    /// The backing image's format.
    #[arg(short = 'F', long, value_name = "FORMAT")]
    pub backing_format: Option<String>,
    /// Do not look at the backing image: it need not exist, and SIZE must be given.
    #[arg(short = 'u', long)]
    pub unsafe_backing: bool,
    #[command(flatten)]
    pub allow: Backing,
    #[command(flatten)]
    pub progress: Progress,
    #[command(flatten)]
    pub output: Output,
    /// The image; what is there is overwritten.
    pub file: String,
    /// Bytes of its disk; k, M, G, T, P, E are powers of 1024. Not needed with a backing image.
    pub size: Option<String>,
}

#[derive(Args)]
pub struct Info {
    /// Its format; without it, what its first bytes look like.
    #[arg(short, long, value_name = "FORMAT")]
    pub format: Option<String>,
    /// Show the images it builds on as well.
    #[arg(long)]
    pub backing_chain: bool,
    /// Look even if somebody writes to it; what is shown may be out of date.
    #[arg(short = 'U', long)]
    pub force_share: bool,
    #[command(flatten)]
    pub allow: Backing,
    #[command(flatten)]
    pub output: Output,
    /// The image.
    pub file: String,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Repair {
    /// Clusters that nobody uses are given back; nothing else is touched.
    Leaks,
    /// Everything that can be.
    All,
}

#[derive(Args)]
pub struct Check {
    /// Its format; without it, what its first bytes look like. A repair takes no guess of raw.
    #[arg(short, long, value_name = "FORMAT")]
    pub format: Option<String>,
    /// Repair leaks, or all.
    #[arg(short, value_enum, value_name = "WHAT")]
    pub r: Option<Repair>,
    /// The same; without a value, all.
    #[arg(long, value_enum, value_name = "WHAT", num_args = 0..=1, require_equals = true,
          default_missing_value = "all", conflicts_with = "r")]
    pub repair: Option<Repair>,
    /// Look even if somebody writes to it; what is seen may be half done.
    #[arg(short = 'U', long, conflicts_with_all = ["r", "repair"])]
    pub force_share: bool,
    #[command(flatten)]
    pub allow: Backing,
    #[command(flatten)]
    pub progress: Progress,
    #[command(flatten)]
    pub output: Output,
    /// The image.
    pub file: String,
}

#[derive(Args)]
pub struct Convert {
    /// Format of the source; without it, what its first bytes look like.
    #[arg(short, long, value_name = "FORMAT")]
    pub format: Option<String>,
    /// Format of the target [default: raw; with -n what its first bytes say].
    #[arg(short = 'O', long, value_name = "FORMAT")]
    pub output_format: Option<String>,
    /// Options of the target's format, KEY=VALUE joined by commas.
    #[arg(short, long, value_name = "LIST", conflicts_with = "no_create")]
    pub options: Vec<String>,
    /// Compress the target's clusters.
    #[arg(short, long)]
    pub compress: bool,
    /// Write into a target that exists.
    #[arg(short, long)]
    pub no_create: bool,
    /// The target exists and reads as zeroes.
    #[arg(long, requires = "no_create")]
    pub target_is_zero: bool,
    /// The target builds on this image, which has what the source has not of its own.
    #[arg(short = 'B', long, value_name = "FILE")]
    pub backing: Option<String>,
    /// The backing image's format.
    #[arg(short = 'F', long, value_name = "FORMAT")]
    pub backing_format: Option<String>,
    /// Copy this snapshot of the source (its id or its name).
    #[arg(short = 'l', long, value_name = "SNAPSHOT")]
    pub snapshot: Option<String>,
    /// So many zero bytes in a row are left out of the target; 0: nothing is.
    #[arg(short = 'S', long, value_name = "SIZE", default_value = "4k")]
    pub sparse: String,
    /// Pieces in flight.
    #[arg(short = 'm', long, value_name = "N", default_value = "8",
          value_parser = clap::value_parser!(u32).range(1..=16))]
    pub parallel: u32,
    /// Write pieces as they come instead of in order.
    #[arg(short = 'W', long)]
    pub any_order: bool,
    /// Cache of the target.
    #[arg(short = 't', long, value_enum, value_name = "CACHE", default_value = "writeback")]
    pub target_cache: CacheMode,
    /// Cache of the source.
    #[arg(short = 'T', long, value_enum, value_name = "CACHE", default_value = "writeback")]
    pub source_cache: CacheMode,
    /// Read the source even if somebody writes to it.
    #[arg(short = 'U', long)]
    pub force_share: bool,
    #[command(flatten)]
    pub allow: Backing,
    #[command(flatten)]
    pub progress: Progress,
    #[command(flatten)]
    pub output: Output,
    /// The source.
    pub source: String,
    /// The target.
    pub target: String,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Preallocation {
    /// Nothing is allocated ahead.
    Off,
    /// The format's tables are.
    Metadata,
    /// All of it is set aside.
    Falloc,
    /// All of it is written.
    Full,
}

#[derive(Args)]
pub struct Resize {
    /// The disk of a running guest, as DOMID/VDEV, instead of an image that nobody serves. It can
    /// only grow, and the guest is told: `ringback disk resize --live 3/xvda +1G`.
    #[arg(long, value_name = "DOMID/VDEV", conflicts_with_all = ["format", "shrink", "size"])]
    pub live: Option<String>,
    /// Its format; without it, what its first bytes say, but never raw.
    #[arg(short, long, value_name = "FORMAT")]
    pub format: Option<String>,
    /// Make it smaller, and lose what lies beyond.
    #[arg(long)]
    pub shrink: bool,
    /// How the new bytes are set aside.
    #[arg(long, value_enum, default_value = "off", value_name = "HOW")]
    pub preallocation: Preallocation,
    #[command(flatten)]
    pub allow: Backing,
    #[command(flatten)]
    pub progress: Progress,
    #[command(flatten)]
    pub output: Output,
    /// The image. With --live, the new size.
    pub file: String,
    /// The new size, or by how much it changes (+1G, -512M).
    #[arg(allow_hyphen_values = true, required_unless_present = "live")]
    pub size: Option<String>,
}

#[derive(Args)]
pub struct Map {
    /// Its format; without it, what its first bytes look like.
    #[arg(short, long, value_name = "FORMAT")]
    pub format: Option<String>,
    /// First byte that is shown.
    #[arg(short, long, value_name = "BYTES", default_value = "0")]
    pub start_offset: String,
    /// Bytes that are shown [default: all].
    #[arg(short = 'l', long, value_name = "BYTES")]
    pub max_length: Option<String>,
    /// Look even if somebody writes to it.
    #[arg(short = 'U', long)]
    pub force_share: bool,
    #[command(flatten)]
    pub allow: Backing,
    #[command(flatten)]
    pub output: Output,
    /// The image.
    pub file: String,
}

#[derive(Args)]
pub struct Measure {
    /// Format of the source; without it, what its first bytes look like.
    #[arg(short, long, value_name = "FORMAT")]
    pub format: Option<String>,
    /// Format that is measured for.
    #[arg(short = 'O', long, value_name = "FORMAT", default_value = "raw")]
    pub output_format: String,
    /// Options of that format, KEY=VALUE joined by commas.
    #[arg(short, long, value_name = "LIST")]
    pub options: Vec<String>,
    /// For a new image of this size.
    #[arg(long, value_name = "SIZE", conflicts_with = "file")]
    pub size: Option<String>,
    /// For this snapshot of the source.
    #[arg(short = 'l', long, value_name = "SNAPSHOT", requires = "file")]
    pub snapshot: Option<String>,
    /// Read the source even if somebody writes to it.
    #[arg(short = 'U', long)]
    pub force_share: bool,
    #[command(flatten)]
    pub allow: Backing,
    #[command(flatten)]
    pub output: Output,
    /// For a copy of this image.
    #[arg(required_unless_present = "size")]
    pub file: Option<String>,
}

#[derive(Args)]
pub struct Compare {
    /// Format of the first; without it, what its first bytes look like.
    #[arg(short, long, value_name = "FORMAT")]
    pub format: Option<String>,
    /// Format of the second.
    #[arg(short = 'F', long, value_name = "FORMAT")]
    pub second_format: Option<String>,
    /// Another size, or another allocation, is a difference as well.
    #[arg(short, long)]
    pub strict: bool,
    /// Cache of both.
    #[arg(short = 'T', long, value_enum, value_name = "CACHE", default_value = "writeback")]
    pub source_cache: CacheMode,
    /// Read them even if somebody writes to them.
    #[arg(short = 'U', long)]
    pub force_share: bool,
    /// Print only errors.
    #[arg(short, long)]
    pub quiet: bool,
    #[command(flatten)]
    pub allow: Backing,
    #[command(flatten)]
    pub progress: Progress,
    #[command(flatten)]
    pub output: Output,
    /// An image.
    pub first: String,
    /// Another.
    pub second: String,
}

#[derive(Args)]
pub struct Rebase {
    /// Its format; without it, what its first bytes say, but never raw.
    #[arg(short, long, value_name = "FORMAT")]
    pub format: Option<String>,
    /// The new backing image; empty for none.
    #[arg(short, long, value_name = "FILE")]
    pub backing: String,
    /// The new backing image's format.
    #[arg(short = 'F', long, value_name = "FORMAT")]
    pub backing_format: Option<String>,
    /// Only write the new name: nothing is opened, and the disk's content changes unless both
    /// backing images read the same.
    #[arg(short = 'u', long = "unsafe")]
    pub unsafely: bool,
    #[command(flatten)]
    pub allow: Backing,
    #[command(flatten)]
    pub progress: Progress,
    #[command(flatten)]
    pub output: Output,
    /// The image.
    pub file: String,
}

#[derive(Args)]
pub struct Named {
    /// The image's format; without it, what its first bytes say, but never raw.
    #[arg(short, long, value_name = "FORMAT")]
    pub format: Option<String>,
    #[command(flatten)]
    pub allow: Backing,
    #[command(flatten)]
    pub output: Output,
    /// The image.
    pub file: String,
    /// The name. A snapshot's may be its id as well.
    pub name: String,
}

#[derive(Args)]
pub struct Listed {
    /// The image's format; without it, what its first bytes look like.
    #[arg(short, long, value_name = "FORMAT")]
    pub format: Option<String>,
    /// Look even if somebody writes to it.
    #[arg(short = 'U', long)]
    pub force_share: bool,
    #[command(flatten)]
    pub output: Output,
    /// The image.
    pub file: String,
}

#[derive(Subcommand)]
pub enum Snapshot {
    /// Keep the disk's present content: under a name inside the image, or, of a running guest's
    /// disk, by an overlay in which the guest goes on.
    Create(live::CreateSnapshot),
    /// Show the snapshots.
    List(Listed),
    /// Go back to a snapshot: THE PRESENT CONTENT IS LOST unless another snapshot has it.
    Apply(Named),
    /// Forget a snapshot.
    Delete(Named),
}

#[derive(Args)]
pub struct Commit {
    /// The disk of a running guest, as DOMID/VDEV, instead of an image that nobody serves. The
    /// guest goes on in the image that was written. The one that it had is emptied, so that it
    /// reads the same; a VHD is renamed to NAME.committed.
    #[arg(long, value_name = "DOMID/VDEV", conflicts_with_all = ["file", "format", "keep"])]
    pub live: Option<String>,
    /// With --live: begin and return.
    #[arg(long, requires = "live")]
    pub no_wait: bool,
    /// Its format; without it, what its first bytes say, but never raw.
    #[arg(short, long, value_name = "FORMAT")]
    pub format: Option<String>,
    /// Write into this image of the chain instead of the nearest.
    #[arg(short, long, value_name = "FILE")]
    pub base: Option<String>,
    /// Leave the image as it is instead of emptying it.
    #[arg(short = 'd', long)]
    pub keep: bool,
    #[command(flatten)]
    pub allow: Backing,
    #[command(flatten)]
    pub progress: Progress,
    #[command(flatten)]
    pub output: Output,
    /// The image.
    #[arg(default_value = "", hide_default_value = true)]
    pub file: String,
}

#[derive(Args)]
pub struct AddBitmap {
    /// Bytes that one bit stands for, a power of two from 512 to 2G [default: 64k].
    #[arg(short, long, value_name = "SIZE")]
    pub granularity: Option<String>,
    /// Do not record writes in it.
    #[arg(long)]
    pub disabled: bool,
    #[command(flatten)]
    pub named: Named,
}

#[derive(Subcommand)]
pub enum Bitmap {
    /// Add one, which records writes from now on.
    Add(AddBitmap),
    /// Remove one.
    Remove(Named),
    /// Let it record writes.
    Enable(Named),
    /// Let it record no more writes.
    Disable(Named),
    /// Forget what it has recorded.
    Clear(Named),
    /// Show them.
    List(Listed),
}
