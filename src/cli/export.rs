//! The command line of `ringback export`.

use std::path::PathBuf;

use blktap::formats::qcow2::L2Cache;
use clap::{Args, Subcommand, ValueEnum};

use super::Filters;

#[derive(Subcommand)]
pub enum Export {
    /// By the Network Block Device protocol, until a signal.
    ///
    /// QEMU, nbd-client, nbdcopy, fio and guests without Xen read and write the images at
    /// nbd+unix:///NAME?socket=PATH or nbd://HOST:PORT/NAME. The server stays up when its last
    /// client leaves. SIGTERM ends it: requests that it has taken are carried out and answered,
    /// and the images are flushed.
    #[command(
        visible_alias = "qemu-nbd",
        after_help = "\
Examples:
  ringback export nbd --socket /run/a.sock a.raw
  ringback export nbd -b :: -p 10809 --tls-creds /etc/pki/nbd -r -x base a.raw
  ringback export nbd -k /run/nbd.sock --export a=raw:/images/a.img --export b=raw:/dev/vg/b"
    )]
    Nbd(Box<ExportNbd>),
    /// As a vhost-user block device, for QEMU and other virtual machine monitors.
    ///
    /// QEMU: -object memory-backend-memfd,id=m,size=1G,share=on -machine memory-backend=m
    /// -chardev socket,id=c,path=PATH,reconnect=1 -device vhost-user-blk-pci,chardev=c,num-queues=N
    ///
    /// The server stays up when its front-end leaves, and takes the next one. What a killed
    /// server had in flight its successor carries out, if the front-end reconnects. A file or a
    /// device that has grown is noticed within a second, and the guest is told. SIGTERM ends it:
    /// requests that it has taken are carried out and answered, and the image is flushed.
    #[command(after_help = "\
Examples:
  ringback export vhost-user-blk --socket-path /run/a.sock a.raw
  ringback export vhost-user-blk --socket-path /run/a.sock --num-queues 4 -f qcow2 a.qcow2

Under the name vhost-user-blk-ringback the program takes these options alone, as QEMU's back-end
program conventions have it.")]
    VhostUserBlk(ExportVhostUserBlk),
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CacheMode {
    /// Past the host's page cache (O_DIRECT).
    None,
    /// Through it; a flush writes it out.
    Writeback,
    /// Through it, and flushes do nothing: a crash of the host loses data.
    Unsafe,
}

#[derive(Args)]
pub struct ExportNbd {
    /// The image; with --export there may be none.
    #[arg(required_unless_present_any = ["export", "null_disk"])]
    pub image: Option<PathBuf>,
    /// The image's format.
    #[arg(short, long, value_name = "FORMAT", default_value = "raw")]
    pub format: String,
    /// The name under which the image is exported; clients that name nothing ask for the
    /// empty one.
    #[arg(short = 'x', long, alias = "export-name", value_name = "NAME", default_value = "")]
    pub name: String,
    /// What the image is, for people who list exports.
    #[arg(short = 'D', long, value_name = "TEXT", default_value = "")]
    pub description: String,
    /// Export another image; may be repeated.
    #[arg(long, value_name = "NAME=FORMAT:PATH")]
    pub export: Vec<String>,
    /// Clients may only read.
    #[arg(short, long)]
    pub read_only: bool,
    /// Serve a disk of so many bytes that loses what is written: for benches.
    #[arg(long, hide = true, value_name = "BYTES", conflicts_with_all = ["image", "export"])]
    pub null_disk: Option<u64>,
    /// Listen at this Unix socket.
    #[arg(short = 'k', long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Listen at this address by TCP [default without --socket: localhost].
    #[arg(short, long, value_name = "HOST")]
    pub bind: Option<String>,
    /// The TCP port; 0: one that is free, which is printed [default: 10809].
    #[arg(short, long, value_name = "PORT")]
    pub port: Option<u16>,
    /// Connections at once; further ones wait. Each holds at most 33 MiB.
    #[arg(short = 'e', long, value_name = "N", default_value = "64",
        value_parser = clap::value_parser!(u16).range(1..))]
    pub shared: u16,
    /// How the host's page cache is used.
    #[arg(long, value_enum, default_value = "none")]
    pub cache: CacheMode,
    /// Memory for the L2 tables of each QCOW2 image of a chain, in bytes (K, M or G), or all.
    ///
    /// 1 MiB is enough for 8 GiB of disk in clusters of 64 KiB.
    #[arg(long, value_name = "SIZE", default_value = "32M")]
    pub l2_cache_size: L2Cache,
    /// Open backing files in this folder too, and below it; may be repeated.
    ///
    /// Without it an image may build only on files in its own folder.
    #[arg(long, value_name = "DIR")]
    pub allow_backing: Vec<PathBuf>,
    /// Demand TLS: a folder with ca-cert.pem, server-cert.pem and server-key.pem, as QEMU's
    /// tls-creds-x509. Clients need a certificate that the authority has signed. (There are no
    /// pre-shared keys: rustls has none.)
    #[arg(long, value_name = "DIR")]
    pub tls_creds: Option<PathBuf>,
    /// What lies before the images.
    #[command(flatten)]
    pub filters: Filters,
    /// Take commands at this Unix socket: `ringback set SOCKET KNOB VALUE` changes limits,
    /// `ringback changed-log start SOCKET PATH` begins a log.
    #[arg(long, value_name = "SOCKET")]
    pub control: Option<PathBuf>,
}

#[derive(Args)]
pub struct ExportVhostUserBlk {
    /// The image.
    #[arg(required_unless_present_any = ["blk_file", "null_disk", "print_capabilities"])]
    pub image: Option<PathBuf>,
    /// The image, as an option.
    #[arg(long, value_name = "PATH", conflicts_with = "image")]
    pub blk_file: Option<PathBuf>,
    /// The image's format.
    #[arg(short, long, value_name = "FORMAT", default_value = "raw")]
    pub format: String,
    /// Listen at this Unix socket.
    #[arg(short = 's', long, value_name = "PATH",
        required_unless_present_any = ["fd", "print_capabilities"])]
    pub socket_path: Option<PathBuf>,
    /// Use this descriptor: a Unix socket that listens, or that is connected to the front-end
    /// (then the program ends with it).
    #[arg(long, value_name = "N", conflicts_with = "socket_path",
        value_parser = clap::value_parser!(i32).range(3..))]
    pub fd: Option<i32>,
    /// Print what this program can do, as JSON, and exit.
    #[arg(long)]
    pub print_capabilities: bool,
    /// Queues that the guest may use; each has a thread of its own.
    #[arg(long, value_name = "N", default_value = "1",
        value_parser = clap::value_parser!(u16).range(1..=64))]
    pub num_queues: u16,
    /// The guest may only read.
    #[arg(short, long)]
    pub read_only: bool,
    /// What the guest sees as the disk's serial number (20 bytes).
    #[arg(long, value_name = "TEXT", default_value = "ringback")]
    pub serial: String,
    /// How long a queue polls before it sleeps, at most, in microseconds; it polls less where
    /// that does not pay.
    #[arg(long, value_name = "US", default_value = "100",
        value_parser = clap::value_parser!(u32).range(0..=10000))]
    pub poll_us: u32,
    /// How the host's page cache is used.
    #[arg(long, value_enum, default_value = "none")]
    pub cache: CacheMode,
    /// Memory for the L2 tables of each QCOW2 image of a chain, in bytes (K, M or G), or all.
    #[arg(long, value_name = "SIZE", default_value = "32M")]
    pub l2_cache_size: L2Cache,
    /// Open backing files in this folder too, and below it; may be repeated.
    #[arg(long, value_name = "DIR")]
    pub allow_backing: Vec<PathBuf>,
    /// Serve a disk of so many bytes that loses what is written: for benches.
    #[arg(long, hide = true, value_name = "BYTES", conflicts_with_all = ["image", "blk_file"])]
    pub null_disk: Option<u64>,
}
