//! `ringback disk create`, and the making of targets.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use blktap::image::{BackingPolicy, ImageFormat};
use blktap::storage::{self, Access, Cache, FileStorage, Lock, OpenOptions, Sharing};
use serde_json::json;

use super::open::{Opening, beside, parse_format};
use super::options::Options;
use super::work::Work;
use super::{Result, Usage, about, document, formats, sizes};
use crate::cli::disk::Create;

/// The image that a new one builds on.
pub struct NewBacking {
    /// As the new image's header is to name it: relative to its folder.
    pub name: String,
    pub format: ImageFormat,
}

/// An image that is to be made.
pub struct NewImage<'a> {
    pub path: &'a Path,
    pub format: ImageFormat,
    /// Bytes of its disk.
    pub size: u64,
    pub options: Options,
    pub backing: Option<NewBacking>,
    pub cache: Cache,
}

/// What was made, and whether it was there before.
pub struct Made {
    path: PathBuf,
    /// Kept open, and so locked.
    storage: Option<Arc<FileStorage>>,
    was_there: bool,
}

impl Made {
    /// Its file.
    pub fn storage(&self) -> Option<Arc<FileStorage>> {
        self.storage.clone()
    }

    /// It is not finished: removed if this process has made it; what to tell is returned.
    pub fn give_up(mut self) -> String {
        self.storage = None;
        let name = self.path.display();
        if self.was_there {
            return format!("{name} is left unfinished");
        }
        match std::fs::remove_file(&self.path) {
            Ok(()) => format!("{name} was removed"),
            Err(e) => format!("{name} is left unfinished (cannot remove it: {e})"),
        }
    }
}

/// `error`, after what was begun is given up.
pub fn failed(made: Made, error: Box<dyn std::error::Error>) -> Box<dyn std::error::Error> {
    let name = made.path.display().to_string();
    let left = made.give_up();
    let error = error.to_string();
    // What names another file keeps that name.
    if error.starts_with(&name) || error.contains(": ") {
        format!("{error}; {left}").into()
    } else {
        format!("{name}: {error}; {left}").into()
    }
}

/// Opens the file of a new image, which is made if it is not there.
pub fn open_new(path: &Path, cache: Cache) -> Result<Made> {
    let was_there = match File::create_new(path) {
        Ok(_) => false,
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => true,
        Err(e) => return Err(format!("{}: cannot create: {e}", path.display()).into()),
    };
    let lock = Lock::Held { sharing: Sharing::Exclusive, wait: Duration::ZERO };
    let options = OpenOptions::new(path).access(Access::ReadWrite).cache(cache).lock(lock);
    let made = Made { path: path.to_owned(), storage: None, was_there };
    match storage::open(&options) {
        Ok(storage) => Ok(Made { storage: Some(Arc::new(storage)), ..made }),
        // Somebody else's file is not ours to remove.
        Err(e) if was_there => Err(e.into()),
        Err(e) => Err(failed(made, e.into())),
    }
}

/// Makes an image. It is complete and durable, or given up.
pub fn make(mut new: NewImage<'_>, work: &mut Work) -> Result<Made> {
    if let Some(size) = new.options.size("size")? {
        new.size = size;
    }
    // Before anything is touched.
    let plan = formats::plan(&mut new)?;
    new.options.finish(new.format.name())?;
    let made = open_new(new.path, new.cache)?;
    let Some(storage) = made.storage() else { return Ok(made) };
    match plan.carry_out(&storage, work) {
        Ok(()) => {
            drop(storage);
            Ok(Made { storage: None, ..made })
        }
        Err(e) => {
            drop(storage);
            Err(failed(made, e))
        }
    }
}

/// `ringback disk create`.
pub fn run(options: &Create) -> Result {
    let format = parse_format(&options.format)?;
    let mut given = Options::parse(&options.options)?;
    if given.asks_for_help() {
        out!("{}", formats::help(format));
        return Ok(ExitCode::SUCCESS);
    }
    let path = Path::new(&options.file);
    let backing_name = given.take("backing_file").or_else(|| options.backing.clone());
    let backing_format = given.take("backing_fmt").or_else(|| options.backing_format.clone());
    let backing = match (backing_name, backing_format) {
        (None, _) => None,
        (Some(name), Some(format)) => Some(NewBacking { name, format: parse_format(&format)? }),
        (Some(name), None) => {
            return Err(Usage(format!("{name}: name the backing file's format with -F")).into());
        }
    };
    let size = match (&options.size, &backing) {
        (Some(size), _) => sizes::parse(size)?,
        (None, Some(backing)) if !options.unsafe_backing => {
            let policy = BackingPolicy::Allow(options.allow.allow_backing.clone());
            backing_size(path, backing, &policy)?
        }
        (None, _) => given.size("size")?.ok_or_else(|| {
            let file = &options.file;
            Usage(format!("{file}: its size is missing: say it after the name, like 10G"))
        })?,
    };
    let mut work = Work::new(options.progress.progress)?;
    let new = NewImage { path, format, size, options: given, backing, cache: Cache::Writeback };
    make(new, &mut work)?;
    work.end();
    let name = &options.file;
    if options.output.json {
        document(json!({"filename": name, "format": format.name(), "virtual-size": size}));
    } else {
        outln!("{name}: {format}, {} ({size} bytes)", sizes::words(size));
    }
    Ok(ExitCode::SUCCESS)
}

/// The size of the disk that a new image builds on.
pub fn backing_size(path: &Path, backing: &NewBacking, policy: &BackingPolicy) -> Result<u64> {
    let found = beside(path, &backing.name);
    let file = found.to_string_lossy();
    let opening = Opening {
        backing: policy.clone(),
        ..Opening::to_read(&file, Some(backing.format.name()), &Default::default())
    };
    let disk = opening.open().map_err(about("the backing file"))?;
    Ok(disk.disk.geometry().size)
}
