//! The servers: each in its best documented way for a local disk, with the same use of the page
//! cache.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::Place;
use crate::cli::{BenchCache, BenchFormat};
use crate::commands::bench::host::{Held, until};

/// Whose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Ours,
    Daemon,
    QemuNbd,
    Nbdkit,
    /// Ours, on a disk that does nothing.
    Null,
}

impl Kind {
    /// Those that are compared, ours first.
    pub fn all(format: BenchFormat) -> Vec<Kind> {
        let mut all = vec![Kind::Ours, Kind::Daemon, Kind::QemuNbd];
        if format == BenchFormat::Raw {
            all.push(Kind::Nbdkit);
        }
        all
    }
    pub fn name(self) -> &'static str {
        match self {
            Kind::Ours => "ringback",
            Kind::Daemon => "qemu-storage-daemon",
            Kind::QemuNbd => "qemu-nbd",
            Kind::Nbdkit => "nbdkit",
            Kind::Null => "null",
        }
    }
}

/// What the others are, or what to install.
pub fn versions(format: BenchFormat) -> io::Result<Vec<String>> {
    let all = Kind::all(format).into_iter().skip(1);
    all.map(|kind| {
        let output = Command::new(kind.name()).arg("--version").output().map_err(|e| {
            let remedy = "install qemu-utils, qemu-system-common and nbdkit";
            io::Error::new(e.kind(), format!("{}: {e}: {remedy}", kind.name()))
        })?;
        let text = String::from_utf8_lossy(&output.stdout);
        Ok(text.lines().next().unwrap_or_default().to_owned())
    })
    .collect()
}

/// A server with its image.
pub struct Served {
    process: Held,
    socket: PathBuf,
}

impl Served {
    pub fn start(kind: Kind, image: &Path, place: &Place<'_>) -> io::Result<Served> {
        let socket = place.folder.path().join("nbd.sock");
        let direct = place.cache == BenchCache::Direct;
        let (ours, theirs) = place.options.format.names();
        let text = image.display().to_string();
        let at = socket.display().to_string();
        let mut command = match kind {
            Kind::Ours | Kind::Null => {
                let mut command = Command::new(std::env::current_exe()?);
                command.env("RINGBACK_LOG", "warn");
                command.args(["--end-with", &std::process::id().to_string()]);
                command.args(["export", "nbd", "--socket", &at]);
                if kind == Kind::Null {
                    let size = place.options.size_mib << 20;
                    command.args(["--null-disk", &size.to_string()]);
                } else {
                    let cache = if direct { "none" } else { "writeback" };
                    command.args(["--cache", cache, "--format", ours, &text]);
                }
                command
            }
            Kind::Daemon => {
                let (text, at) = (text.replace(',', ",,"), at.replace(',', ",,"));
                let on = if direct { "on" } else { "off" };
                let mut command = Command::new("qemu-storage-daemon");
                command.arg("--blockdev").arg(format!(
                    "file,node-name=file,filename={text},aio=io_uring,cache.direct={on},\
                     discard=unmap"
                ));
                command.arg("--blockdev").arg(format!("{theirs},node-name=disk,file=file"));
                command.arg("--nbd-server").arg(format!("addr.type=unix,addr.path={at}"));
                command.args(["--export", "nbd,id=export,node-name=disk,name=,writable=on"]);
                command
            }
            Kind::QemuNbd => {
                let cache = if direct { "--cache=none" } else { "--cache=writeback" };
                let mut command = Command::new("qemu-nbd");
                command.args(["--persistent", "--aio=io_uring", cache, "-f", theirs, "-k", &at]);
                command.arg(image);
                command
            }
            Kind::Nbdkit => {
                let mut command = Command::new("nbdkit");
                command.args(["--foreground", "--exit-with-parent", "--unix", &at, "file"]);
                command.arg(image);
                // O_DIRECT is not to be had there: it gives the cache back behind itself.
                command.args(direct.then_some("cache=none"));
                command
            }
        };
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let process = Held::spawn(&mut command)?;
        let served = Served { process, socket };
        until(kind.name(), || served.socket.exists())?;
        Ok(served)
    }

    pub fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }
    pub fn pid(&self) -> String {
        self.process.child.id().to_string()
    }

    /// Ends it, so that the next one can listen.
    pub fn end(self) {
        let socket = self.socket.clone();
        drop(self);
        if let Err(e) = std::fs::remove_file(&socket)
            && e.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!("{}: {e}", socket.display());
        }
    }
}
