//! `ringback export`: images for those who have no Xen.

pub mod filters;
mod vhost_user;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use blktap::export::nbd::{Export, Limits, Server, proto, tls};
use blktap::formats::qcow2::L2Cache;
use blktap::image::{self, BackingPolicy, Commits, ImageOptions};
use blktap::storage::{Access, Cache, OpenOptions};
use blktap::{Disk, NullDisk};
use crossbeam::channel::Receiver;

use super::Result;
use super::control::Control;
use crate::cli::{CacheMode, ExportNbd};
use crate::signals;
use filters::{Later, Stack};
pub use vhost_user::vhost_user_blk;

impl From<CacheMode> for Cache {
    fn from(mode: CacheMode) -> Cache {
        match mode {
            CacheMode::None => Cache::None,
            CacheMode::Writeback => Cache::Writeback,
            CacheMode::Unsafe => Cache::Unsafe,
        }
    }
}

/// The images under their names.
fn exports(options: &ExportNbd, stack: &mut Stack<'_>) -> Result<Vec<Export>> {
    let mut all = Vec::new();
    if let Some(size) = options.null_disk {
        let disk = stack.put_on(NullDisk::new(size) as Arc<dyn Disk>)?;
        all.push(Export::new(&options.name, disk));
    }
    let mut open = |format: &str, path: &str| stack.put_on(open_nbd(format, path, options)?);
    if let Some(image) = &options.image {
        let path = image.to_str().ok_or("the image's path is not UTF-8")?;
        let mut export = Export::new(&options.name, open(&options.format, path)?);
        export.description = options.description.clone();
        all.push(export);
    }
    for text in &options.export {
        let (name, target) = text
            .split_once('=')
            .ok_or_else(|| format!("--export {text}: write NAME=FORMAT:PATH"))?;
        let (format, path) = match target.split_once(':') {
            Some((format, path)) if !format.contains('/') => (format, path),
            _ => ("raw", target),
        };
        all.push(Export::new(name, open(format, path)?));
    }
    Ok(all)
}

fn open_nbd(format: &str, path: &str, options: &ExportNbd) -> Result<Arc<dyn Disk>> {
    let how = How {
        access: if options.read_only { Access::ReadOnly } else { Access::ReadWrite },
        cache: options.cache.into(),
        backing: &options.allow_backing,
        l2_cache: options.l2_cache_size,
        commits: Commits::AtFlush,
    };
    how.open(format, path)
}

/// How images are opened.
struct How<'a> {
    access: Access,
    cache: Cache,
    backing: &'a [PathBuf],
    l2_cache: L2Cache,
    commits: Commits,
}

impl How<'_> {
    fn open(&self, format: &str, path: &str) -> Result<Arc<dyn Disk>> {
        let file = OpenOptions::new(path).access(self.access).cache(self.cache);
        let backing = BackingPolicy::Allow(self.backing.to_vec());
        let image = ImageOptions::new(format.parse()?, file).backing(backing);
        Ok(image::open(&image.l2_cache(self.l2_cache).commits(self.commits))?)
    }
}

/// A descriptor that becomes readable at the first signal, after what is to be done `before`.
pub fn stop_descriptor(
    stop: Receiver<()>,
    before: impl FnOnce() + Send + 'static,
) -> io::Result<OwnedFd> {
    let (ended, end) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    std::thread::Builder::new().name("stop".into()).spawn(move || {
        // A message or the end of the signals' thread: either way it is over.
        let _ = stop.recv();
        before();
        drop(end);
    })?;
    Ok(ended)
}

/// `ringback export nbd`.
pub fn nbd(options: &ExportNbd) -> Result {
    let signal = signals::stop()?;
    let tls = options.tls_creds.as_deref().map(tls::server).transpose()?;
    let limits = Limits { connections: options.shared.into(), ..Limits::default() };
    let count = options.export.len() + usize::from(options.image.is_some());
    let later = if options.control.is_some() { Later::Changes } else { Later::Stays };
    let open = |format: &str, path: &str| open_nbd(format, path, options);
    let about = (options.read_only, later, count);
    let mut stack = Stack::new(&options.filters, &open, about)?;
    let mut server = Server::new(exports(options, &mut stack)?, tls, limits)?;
    let control = |path: &PathBuf| Control::serve(path, stack.answers());
    let _control = options.control.as_ref().map(control).transpose()?;
    if let Some(path) = &options.socket {
        server.listen_unix(path)?;
        outln!("listening at {}", path.display());
    }
    if options.socket.is_none() || options.bind.is_some() || options.port.is_some() {
        let host = options.bind.as_deref().unwrap_or("localhost");
        for address in server.listen_tcp(host, options.port.unwrap_or(proto::PORT))? {
            outln!("listening at {address}");
        }
    }
    let stalls = stack.stalls();
    let stop = stop_descriptor(signal, move || stalls.iter().for_each(|stall| stall.end()))?;
    server.serve(stop.as_fd())?;
    Ok(ExitCode::SUCCESS)
}
