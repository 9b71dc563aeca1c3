//! `ringback hypervisor`: the bundled hypervisor, until a signal.

use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use super::{Context, Result};
use crate::cli::Hypervisor;
use crate::signals;

/// How often removing the folder is tried while others still write into it.
const REMOVALS: u32 = 50;

/// Serves the run folder.
pub fn run(context: &Context, options: &Hypervisor) -> Result {
    let socket = context.run_dir.join(::hypervisor::embedded::HYPERVISOR_SOCKET);
    if let Some(folder) = &options.throw_away {
        let result = ::hypervisor::embedded::serve(&context.run_dir, io::stdin().as_fd());
        remove(folder)?;
        result?;
        return Ok(ExitCode::SUCCESS);
    }
    let (ended, end) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    let stop = signals::stop()?;
    std::thread::Builder::new().name("stop".into()).spawn(move || {
        // A message or the end of the signals' thread: either way it is over.
        let _ = stop.recv();
        drop(end);
    })?;
    tracing::info!("--hypervisor {}", socket.display());
    ::hypervisor::embedded::serve(&context.run_dir, ended.as_fd())?;
    Ok(ExitCode::SUCCESS)
}

/// Removes a folder in which a process that is about to end may still make files.
pub fn remove(folder: &Path) -> io::Result<()> {
    let mut last = Ok(());
    for _ in 0..REMOVALS {
        match std::fs::remove_dir_all(folder) {
            Ok(()) => return Ok(()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => last = Err(e),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    last.map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", folder.display())))
}

/// A folder that is removed when dropped.
pub struct Folder(pub PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(e) = remove(&self.0) {
            tracing::warn!("cannot remove {e}");
        }
    }
}
