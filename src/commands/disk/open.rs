//! Opening what a command line names.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use blktap::image::{self, BackingPolicy, ImageFormat, ImageOptions};
use blktap::storage::{self, Access, Cache, FileStorage, Lock, OpenOptions, Sharing};
use blktap::{Disk, ImageDisk, NbdDisk, NbdOptions, NbdTarget};

use super::{Result, Usage, about};
use crate::cli::disk::{Backing, CacheMode};

/// Which formats may be guessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guess {
    /// What has no known header is raw.
    Any,
    /// Only those with a header: for what writes.
    Header,
}

/// An image that is named, and how it is to be opened.
#[derive(Clone)]
pub struct Opening<'a> {
    pub file: &'a str,
    pub format: Option<&'a str>,
    pub guess: Guess,
    pub access: Access,
    pub cache: Cache,
    /// Whether others may write meanwhile.
    pub sharing: Sharing,
    pub backing: BackingPolicy,
}

/// An open disk.
pub struct Opened {
    pub disk: Arc<dyn Disk>,
    /// The same, where it is an image.
    pub image: Option<Arc<ImageDisk>>,
    /// Its format.
    pub format: ImageFormat,
}

impl<'a> Opening<'a> {
    /// To read `file`, as whatever it looks like where `format` is not given.
    pub fn to_read(file: &'a str, format: Option<&'a str>, allow: &Backing) -> Self {
        Opening {
            file,
            format,
            guess: Guess::Any,
            access: Access::ReadOnly,
            cache: Cache::Writeback,
            sharing: Sharing::Exclusive,
            backing: BackingPolicy::Allow(allow.allow_backing.clone()),
        }
    }

    /// To write it: raw only where `format` says so.
    pub fn to_write(file: &'a str, format: Option<&'a str>, allow: &Backing) -> Self {
        Opening {
            guess: Guess::Header,
            access: Access::ReadWrite,
            ..Opening::to_read(file, format, allow)
        }
    }

    /// Also while others write, where `shared`.
    pub fn force_share(mut self, shared: bool) -> Self {
        if shared {
            self.sharing = Sharing::Shared;
        }
        self
    }

    pub fn cache(mut self, mode: CacheMode) -> Self {
        self.cache = cache(mode);
        self
    }

    /// The image alone: what it builds on is not opened.
    pub fn alone(mut self) -> Self {
        self.backing = BackingPolicy::Ignore;
        self
    }

    pub fn path(&self) -> &'a Path {
        Path::new(self.file)
    }

    /// The image's file, locked at once or not at all.
    pub fn file_options(&self) -> OpenOptions {
        OpenOptions::new(self.file)
            .access(self.access)
            .cache(self.cache)
            .lock(Lock::Held { sharing: self.sharing, wait: Duration::ZERO })
    }

    /// The file below the image.
    pub fn storage(&self) -> Result<Arc<FileStorage>> {
        if is_nbd(self.file) {
            return Err(needs_file(self.file));
        }
        Ok(Arc::new(storage::open(&self.file_options())?))
    }

    /// The format that is named, or that the first bytes tell.
    pub fn format(&self) -> Result<ImageFormat> {
        if let Some(name) = self.format {
            return parse_format(name);
        }
        if is_nbd(self.file) {
            return Ok(ImageFormat::Raw);
        }
        let look = self.file_options().access(Access::ReadOnly).cache(Cache::Writeback);
        let file = storage::open(&look.lock(Lock::Off))?;
        match image::probe(&file).map_err(about(self.file))? {
            Some(format) => Ok(format),
            None if self.guess == Guess::Any => Ok(ImageFormat::Raw),
            None => Err(Usage(format!(
                "{}: nothing in it tells its format: name it (raw, or vhd of fixed size) with -f",
                self.file
            ))
            .into()),
        }
    }

    pub fn image_options(&self, format: ImageFormat) -> ImageOptions {
        ImageOptions::new(format, self.file_options()).backing(self.backing.clone())
    }

    /// The image as a disk.
    pub fn image(&self) -> Result<(Arc<ImageDisk>, ImageFormat)> {
        if is_nbd(self.file) {
            return Err(needs_file(self.file));
        }
        let format = self.format()?;
        Ok((image::open_image(&self.image_options(format))?, format))
    }

    fn open_export(&self) -> Result<Opened> {
        if self.format()? != ImageFormat::Raw {
            let text = format!("{}: what a server exports is taken as raw", self.file);
            return Err(Usage(text).into());
        }
        let options = NbdOptions::new(NbdTarget::parse(self.file)?);
        let disk = NbdDisk::open(NbdOptions { access: self.access, ..options });
        let disk = disk.map_err(about(self.file))?;
        Ok(Opened { disk, image: None, format: ImageFormat::Raw })
    }

    /// The disk, which may be a server's export.
    pub fn open(&self) -> Result<Opened> {
        if is_nbd(self.file) {
            return self.open_export();
        }
        let (image, format) = self.image()?;
        Ok(Opened { disk: Arc::clone(&image) as Arc<dyn Disk>, image: Some(image), format })
    }
}

fn needs_file(file: &str) -> Box<dyn std::error::Error> {
    Usage(format!("{file}: this needs an image file, not a server's export")).into()
}

/// A format by its name.
pub fn parse_format(name: &str) -> Result<ImageFormat> {
    name.parse::<ImageFormat>().map_err(|e| Usage(e.to_string()).into())
}

pub fn cache(mode: CacheMode) -> Cache {
    match mode {
        CacheMode::None | CacheMode::Directsync => Cache::None,
        CacheMode::Writeback | CacheMode::Writethrough => Cache::Writeback,
        CacheMode::Unsafe => Cache::Unsafe,
    }
}

/// Whether the name is a server's export.
pub fn is_nbd(file: &str) -> bool {
    NbdTarget::is_meant(file)
}

/// Where an image's backing file is, by the name in its header.
pub fn beside(image: &Path, name: &str) -> PathBuf {
    let name = name.strip_prefix("file:").unwrap_or(name);
    let folder = image.parent().filter(|p| !p.as_os_str().is_empty());
    folder.map_or_else(|| PathBuf::from(name), |folder| folder.join(name))
}
