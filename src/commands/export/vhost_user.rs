//! `ringback export vhost-user-blk`, by the back-end program conventions of QEMU's vhost-user
//! document.

use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::process::ExitCode;
use std::sync::Arc;

use blktap::export::vhost_user::{Export, Server};
use blktap::image::Commits;
use blktap::storage::Access;
use blktap::{Disk, NullDisk};

use super::{How, Result, stop_descriptor};
use crate::cli::ExportVhostUserBlk;
use crate::signals;

/// Serves an image, or says what this program can do.
pub fn vhost_user_blk(options: &ExportVhostUserBlk) -> Result {
    if options.print_capabilities {
        let capabilities =
            serde_json::json!({ "type": "block", "features": ["blk-file", "read-only"] });
        outln!("{capabilities:#}");
        return Ok(ExitCode::SUCCESS);
    }
    let socket = options.fd.map(inherited).transpose()?;
    let stop = stop_descriptor(signals::stop()?, || {})?;
    let mut export = Export::new(disk(options)?);
    export.queues = options.num_queues;
    export.serial = options.serial.clone();
    export.poll_us = options.poll_us;
    let mut server = match (&options.socket_path, socket) {
        (Some(path), _) => {
            let server = Server::listen(export, path)?;
            outln!("listening at {}", path.display());
            server
        }
        (None, Some(socket)) => Server::inherit(export, socket)?,
        (None, None) => return Err("--socket-path or --fd is needed".into()),
    };
    server.serve(stop.as_fd())?;
    Ok(ExitCode::SUCCESS)
}

fn disk(options: &ExportVhostUserBlk) -> Result<Arc<dyn Disk>> {
    if let Some(size) = options.null_disk {
        return Ok(NullDisk::new(size));
    }
    let image = options.image.as_ref().or(options.blk_file.as_ref()).ok_or("no image is named")?;
    let path = image.to_str().ok_or("the image's path is not UTF-8")?;
    let how = How {
        access: if options.read_only { Access::ReadOnly } else { Access::ReadWrite },
        cache: options.cache.into(),
        backing: &options.allow_backing,
        l2_cache: options.l2_cache_size,
        // A guest outlives this process, and goes on with the next one.
        commits: Commits::BeforeAnswer,
    };
    how.open(&options.format, path)
}

/// A descriptor that whoever started this process has left open.
#[allow(unsafe_code)]
fn inherited(number: i32) -> io::Result<OwnedFd> {
    let link = std::fs::read_link(format!("/proc/self/fd/{number}"));
    let is_socket = link.is_ok_and(|link| link.to_string_lossy().starts_with("socket:"));
    if !is_socket {
        let text = format!("--fd {number}: it is no open socket");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    // SAFETY: it is open; the command line says that it is ours, and nothing else here has
    // opened a socket yet.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}
