//! The peer of `ringback bench blk`: QEMU's storage daemon, which exports a disk by
//! vhost-user-blk.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use blktap::storage::Access;

use super::blk::{Caching, Disk};
use super::host::{Held, measure, part, until};
use super::load::{Load, Measured};
use super::peer::{Plan, Waiting};

const PROGRAM: &str = "qemu-storage-daemon";

/// A disk that QEMU serves.
pub struct Qemu {
    daemon: Held,
    socket: PathBuf,
    access: Access,
}

/// Its version, or what to install.
pub fn version() -> io::Result<String> {
    let output = Command::new(PROGRAM).arg("--version").output().map_err(|e| {
        let text = format!("{PROGRAM}: {e}: install the package qemu-system-common or qemu-utils");
        io::Error::new(e.kind(), text)
    })?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

/// What serves an image of a format by vhost-user-blk, with an iothread and one queue. It takes
/// no lock: another server has the same image.
pub fn daemon(format: &str, image: &Path, caching: Caching, socket: &Path) -> Command {
    // A comma in a value is doubled.
    let text = |path: &Path| path.display().to_string().replace(',', ",,");
    let direct = if caching.is_direct() { "on" } else { "off" };
    let mut command = Command::new(PROGRAM);
    command.args(["--object", "iothread,id=io", "--blockdev"]);
    command.arg(format!(
        "file,node-name=file,filename={},aio=io_uring,cache.direct={direct},\
         cache.no-flush=off,discard=unmap,locking=off",
        text(image)
    ));
    command.arg("--blockdev").arg(format!("{format},node-name=disk,file=file"));
    command.arg("--export").arg(format!(
        "vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={},writable=on,\
         num-queues=1,iothread=io",
        text(socket)
    ));
    command
}

impl Qemu {
    /// Serves a disk with an iothread, one queue, and the same use of the page cache as ours.
    pub fn start(folder: &Path, disk: &Disk) -> io::Result<Qemu> {
        let socket = folder.join("qemu.sock");
        let node = match disk {
            // Without payload and without a wait, as our null disk.
            Disk::Null { size } => {
                format!("null-co,node-name=disk,size={size},read-zeroes=off,latency-ns=0")
            }
            Disk::File { path, cache, access } => {
                let read_only = if *access == Access::ReadOnly { "on" } else { "off" };
                let direct = if cache.is_direct() { "on" } else { "off" };
                // A comma in a value is doubled.
                let path = path.display().to_string().replace(',', ",,");
                format!(
                    "file,node-name=disk,filename={path},aio=io_uring,cache.direct={direct},\
                     cache.no-flush=off,discard=unmap,locking=off,read-only={read_only}"
                )
            }
        };
        let address = socket.display().to_string().replace(',', ",,");
        let writable = if disk.access() == Access::ReadWrite { "on" } else { "off" };
        let export = format!(
            "vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={address},\
             writable={writable},num-queues=1,iothread=io"
        );
        let mut command = Command::new(PROGRAM);
        command.args(["--object", "iothread,id=io", "--blockdev", &node, "--export", &export]);
        let daemon = Held::spawn(command.stdin(Stdio::null()).stdout(Stdio::null()))?;
        until("QEMU's socket", || socket.exists())?;
        Ok(Qemu { daemon, socket, access: disk.access() })
    }

    /// One measurement by a new client process.
    pub fn measure(&self, load: Load, waiting: Waiting) -> io::Result<Measured> {
        let pid = self.daemon.child.id();
        let read_only = self.access == Access::ReadOnly;
        let socket = self.socket.clone();
        let plan = Plan { socket, read_only, load, waiting, backend_pid: pid };
        measure(part("client", &plan)?, Stdio::null())
    }
}
