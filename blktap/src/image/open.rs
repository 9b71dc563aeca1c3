//! Opening an image by a format that the caller names, with the images that it builds on as far
//! as the caller's policy allows.
use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use super::{Blocking, ImageDisk};
use crate::disk::{Disk, RawDisk};
use crate::formats::qcow::Qcow;
use crate::formats::qcow2::header::Header;
use crate::formats::qcow2::{L2Cache, Qcow2, Qcow2Options};
use crate::formats::vhd::Vhd;
use crate::formats::{BackingName, Format, ImageError, RawFormat};
use crate::storage::{
    self, Access, BlockSize, Cache, FileStorage, Lock, OpenOptions, Sharing, Storage,
};

/// Most images that build on each other. Each is an open file and a step of every look-up.
pub const MAX_CHAIN: usize = 1024;

/// An image format. Its name is QEMU's, or the one that xl has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ImageFormat {
    /// The bytes themselves.
    Raw,
    /// QCOW, version 1.
    Qcow,
    /// QCOW2, versions 2 and 3.
    Qcow2,
    /// VHD: fixed, dynamic or differencing. QEMU's name for it is vpc.
    Vhd,
}

impl ImageFormat {
    /// All of them.
    pub const ALL: [ImageFormat; 4] =
        [ImageFormat::Raw, ImageFormat::Qcow, ImageFormat::Qcow2, ImageFormat::Vhd];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            ImageFormat::Raw => "raw",
            ImageFormat::Qcow => "qcow",
            ImageFormat::Qcow2 => "qcow2",
            ImageFormat::Vhd => "vhd",
        }
    }
}

impl fmt::Display for ImageFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for ImageFormat {
    type Err = ImageError;

    fn from_str(name: &str) -> Result<Self, ImageError> {
        match name {
            "raw" | "file" | "host_device" => Ok(ImageFormat::Raw),
            "qcow" => Ok(ImageFormat::Qcow),
            "qcow2" => Ok(ImageFormat::Qcow2),
            "vhd" | "vpc" => Ok(ImageFormat::Vhd),
            _ => Err(ImageError::Unsupported(format!(
                "format {name:?}: there are raw, qcow, qcow2 and vhd (or vpc)"
            ))),
        }
    }
}

/// Which other files an image may make its opener open: an image from a stranger names whatever
/// it likes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BackingPolicy {
    /// None: an image that builds on another is refused.
    Refuse,
    /// Only the image itself is opened: what it does not have reads as zeroes.
    Ignore,
    /// Those in the image's own folder, and in these and the folders below them, with a format
    /// that the image names. QCOW of version 1 cannot name one: the backing file's is guessed by
    /// its first bytes, and one that it builds on itself must be in one of these folders.
    Allow(Vec<PathBuf>),
}

/// When a change of an image's metadata gets into its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Commits {
    /// With a flush, as in a disk with a volatile cache. A process that is killed loses what was
    /// written since the last one into places that the image did not have.
    AtFlush,
    /// Before the request that made it is answered. What was answered survives the process.
    BeforeAnswer,
}

/// How to open an image.
#[derive(Clone, Debug)]
pub struct ImageOptions {
    /// The file, its access, cache, lock and block size.
    pub file: OpenOptions,
    /// Its format.
    pub format: ImageFormat,
    /// What else may be opened.
    pub backing: BackingPolicy,
    /// Memory for the L2 tables of each QCOW2 image of the chain.
    pub l2_cache: L2Cache,
    /// Where blocking work is done.
    pub blocking: Blocking,
    /// When metadata is written.
    pub commits: Commits,
}

impl ImageOptions {
    /// `file` as `format`; backing files from the image's own folder.
    pub fn new(format: ImageFormat, file: OpenOptions) -> Self {
        ImageOptions {
            file,
            format,
            backing: BackingPolicy::Allow(Vec::new()),
            l2_cache: L2Cache::default(),
            blocking: Blocking::Threads,
            commits: Commits::AtFlush,
        }
    }
    /// With another policy.
    pub fn backing(mut self, backing: BackingPolicy) -> Self {
        self.backing = backing;
        self
    }
    /// With metadata written at another time.
    pub fn commits(mut self, commits: Commits) -> Self {
        self.commits = commits;
        self
    }
    /// With so much memory for L2 tables.
    pub fn l2_cache(mut self, l2_cache: L2Cache) -> Self {
        self.l2_cache = l2_cache;
        self
    }
}

/// Why an image could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("{}{}", self.prefix(), self.source)]
pub struct ImageOpenError {
    /// The image, of the chain, that it is about.
    pub path: PathBuf,
    /// What is wrong.
    pub source: ImageError,
}

impl ImageOpenError {
    /// What opening the file says names it already.
    fn prefix(&self) -> String {
        match self.source {
            ImageError::Open(_) => String::new(),
            _ => format!("{}: ", self.path.display()),
        }
    }
}

/// For `map_err`: about this image.
fn about(path: &Path) -> impl FnOnce(ImageError) -> ImageOpenError {
    let path = path.to_owned();
    move |source| ImageOpenError { path, source }
}

/// Opens an image with all that it builds on.
pub fn open(options: &ImageOptions) -> Result<Arc<dyn Disk>, ImageOpenError> {
    if options.format == ImageFormat::Raw {
        let disk = RawDisk::open(&options.file);
        return Ok(disk.map_err(ImageError::Open).map_err(about(&options.file.path))?);
    }
    Ok(open_image(options)?)
}

/// As [`open`], also raw images, as an [`ImageDisk`].
pub fn open_image(options: &ImageOptions) -> Result<Arc<ImageDisk>, ImageOpenError> {
    let layers = open_layers(options)?;
    let logical = match options.file.logical_block {
        BlockSize::Native => 512,
        BlockSize::Bytes(bytes) => bytes,
    };
    ImageDisk::that_commits(layers, logical, options.blocking, options.commits)
        .map_err(about(&options.file.path))
}

/// The image and those it builds on, nearest first.
pub fn open_layers(options: &ImageOptions) -> Result<Vec<Arc<dyn Format>>, ImageOpenError> {
    let mut opener = Opener { options, known: Known::Named, seen: Vec::new() };
    let mut layers: Vec<Arc<dyn Format>> = Vec::new();
    let mut next = Some((options.file.clone(), options.format));
    while let Some((file, format)) = next {
        let path = file.path.clone();
        if layers.len() >= MAX_CHAIN {
            let why = format!("more than {MAX_CHAIN} images build on each other");
            return Err(ImageOpenError { path, source: ImageError::Unsupported(why) });
        }
        let opened = opener.layer(&file, format).map_err(about(&path))?;
        if let Some(above) = layers.last() {
            let modified = std::fs::metadata(&path).and_then(|m| m.modified());
            let modified = modified.map_err(ImageError::io("examine the file"));
            let checked = modified.and_then(|time| above.check_backing(&*opened, time));
            let child = above.files().first().map_or_else(String::new, |f| f.name());
            checked.map_err(about(Path::new(&child)))?;
        }
        next = match opened.backing() {
            Some(name) if options.backing != BackingPolicy::Ignore => {
                let name = opener.existing(&path, name, opened.other_backing_names());
                Some(opener.parent(&path, format, &name).map_err(about(&path))?)
            }
            _ => None,
        };
        layers.push(opened);
    }
    Ok(layers)
}

struct Opener<'a> {
    options: &'a ImageOptions,
    /// How the format of the image that is looked at now is known.
    known: Known,
    /// Device and inode of each file that is open.
    seen: Vec<(u64, u64)>,
}

/// How an image's format is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Known {
    /// The caller, or the image above it, has named it.
    Named,
    /// By its first bytes, which in a raw image a guest may have written. So what it says of
    /// other files is not believed just because they are in its folder.
    Guessed,
}

impl Opener<'_> {
    /// Opens and locks one file of the chain.
    fn storage(&mut self, options: &OpenOptions) -> Result<Arc<FileStorage>, ImageError> {
        let file = storage::open(options)?;
        let meta = file.file.metadata().map_err(ImageError::io("examine the file"))?;
        let id = (meta.dev(), meta.ino());
        if self.seen.contains(&id) {
            let why = format!("{} builds on itself", options.path.display());
            return Err(ImageError::Corrupt(why));
        }
        self.seen.push(id);
        Ok(Arc::new(file))
    }

    fn layer(
        &mut self,
        file: &OpenOptions,
        format: ImageFormat,
    ) -> Result<Arc<dyn Format>, ImageError> {
        let storage: Arc<dyn Storage> = self.storage(file)?;
        match format {
            ImageFormat::Raw => {
                let raw = RawFormat::new(storage).map_err(ImageError::io("find the size"))?;
                Ok(Arc::new(raw))
            }
            ImageFormat::Vhd => Ok(Arc::new(Vhd::open(storage)?)),
            ImageFormat::Qcow => Ok(Arc::new(Qcow::open(storage)?)),
            ImageFormat::Qcow2 => self.qcow2(file, storage),
        }
    }

    fn qcow2(
        &mut self,
        file: &OpenOptions,
        storage: Arc<dyn Storage>,
    ) -> Result<Arc<dyn Format>, ImageError> {
        let header = Header::read(&*storage)?;
        let mut data: Option<Arc<dyn Storage>> = None;
        if header.has_data_file() {
            let name = header.data_file.as_deref().unwrap_or_default();
            let found = self.allowed(&file.path, name, "data file")?;
            data = Some(self.storage(&OpenOptions { path: found, ..file.clone() })?);
        }
        let options = Qcow2Options { l2_cache: self.options.l2_cache, ..Default::default() };
        Ok(Arc::new(Qcow2::open(storage, data, &options)?))
    }

    /// The first of the names by which there is a file that may be opened, else the first.
    fn existing(&self, path: &Path, first: BackingName, others: Vec<String>) -> BackingName {
        let may_open = |name: &String| self.allowed(path, name, "backing file").is_ok();
        if others.is_empty() || may_open(&first.name) {
            return first;
        }
        let name = others.into_iter().find(may_open).unwrap_or(first.name);
        BackingName { name, ..first }
    }

    /// How the image that `path` builds on is to be opened.
    fn parent(
        &mut self,
        path: &Path,
        above: ImageFormat,
        name: &BackingName,
    ) -> Result<(OpenOptions, ImageFormat), ImageError> {
        let format = match &name.format {
            Some(format) => Some(format.parse()?),
            // Its header has no room for a format.
            None if above == ImageFormat::Qcow => None,
            None => {
                return Err(ImageError::Unsupported(format!(
                    "its backing file {:?} has no format in the header: give it one with \
                     `ringback disk rebase -u -b {} -F FORMAT {}`",
                    name.name,
                    name.name,
                    path.display()
                )));
            }
        };
        let found = self.allowed(path, &name.name, "backing file")?;
        let lock = match self.options.file.lock {
            Lock::Off => Lock::Off,
            Lock::Held { wait, .. } => Lock::Held { sharing: Sharing::Exclusive, wait },
        };
        let cache = match self.options.file.cache {
            Cache::Unsafe => Cache::Writeback,
            cache => cache,
        };
        let options = OpenOptions::new(found)
            .access(Access::ReadOnly)
            .cache(cache)
            .lock(lock)
            .logical_block(self.options.file.logical_block);
        self.known = if format.is_some() { Known::Named } else { Known::Guessed };
        let format = match format {
            Some(format) => format,
            None => guess(&options)?,
        };
        Ok((options, format))
    }

    /// The path that an image means by `name`, if the policy allows it to be opened.
    fn allowed(&self, path: &Path, name: &str, what: &str) -> Result<PathBuf, ImageError> {
        let folders = match &self.options.backing {
            BackingPolicy::Allow(folders) => folders.as_slice(),
            BackingPolicy::Refuse | BackingPolicy::Ignore => {
                return Err(ImageError::Unsupported(format!("it has a {what}, {name:?}")));
            }
        };
        let local = name.strip_prefix("file:").unwrap_or(name);
        if name.starts_with("json:") || looks_like_a_uri(local) {
            return Err(ImageError::Unsupported(format!("a {what} that is no file: {name:?}")));
        }
        let own = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let meant = own.join(local);
        // Resolves links without opening anything.
        let resolve = |p: &Path| p.canonicalize();
        let real = resolve(&meant).map_err(|source| {
            let what =
                if what == "backing file" { "find its backing file" } else { "find its data file" };
            let source =
                std::io::Error::new(source.kind(), format!("{}: {source}", meant.display()));
            ImageError::Io { what, source }
        })?;
        let own = resolve(path).ok().and_then(|p| p.parent().map(Path::to_owned));
        let inside = |folder: &PathBuf| resolve(folder).is_ok_and(|f| real.starts_with(f));
        let trusts_its_own = self.known == Known::Named && real.parent() == own.as_deref();
        if trusts_its_own || folders.iter().any(inside) {
            return Ok(meant);
        }
        let why = match self.known {
            Known::Named => "is outside the image's folder",
            Known::Guessed => "is named by an image whose format was guessed",
        };
        Err(ImageError::Unsupported(format!(
            "its {what} {} {why}: if you trust the image, allow it with \
             --allow-backing {}",
            real.display(),
            real.parent().unwrap_or(Path::new("/")).display()
        )))
    }
}

/// The format of a backing file that nobody names, as QEMU guesses it too.
fn guess(options: &OpenOptions) -> Result<ImageFormat, ImageError> {
    let file = storage::open(&options.clone().lock(Lock::Off))?;
    Ok(super::probe(&file)?.unwrap_or(ImageFormat::Raw))
}

/// `nbd://...`, `nbd:...`: a protocol before the first slash.
fn looks_like_a_uri(name: &str) -> bool {
    let first = name.split('/').next().unwrap_or_default();
    first.contains(':')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_policy_allows_is_opened() {
        let dir = tempfile::tempdir().expect("a folder");
        let (own, other) = (dir.path().join("own"), dir.path().join("other"));
        for folder in [&own, &other] {
            std::fs::create_dir(folder).expect("a folder");
            std::fs::write(folder.join("base"), [0; 512]).expect("a file");
        }
        std::os::unix::fs::symlink(other.join("base"), own.join("link")).expect("a link");
        let image = own.join("top");
        std::fs::write(&image, [0; 512]).expect("a file");
        let options = |backing| {
            ImageOptions::new(ImageFormat::Raw, OpenOptions::new(&image)).backing(backing)
        };
        let allowed_to = |known, backing, name: &str| {
            let options = options(backing);
            let opener = Opener { options: &options, known, seen: Vec::new() };
            opener.allowed(&image, name, "backing file").map_err(|e| e.to_string())
        };
        let allowed = |backing, name: &str| allowed_to(Known::Named, backing, name);
        let own_only = || BackingPolicy::Allow(Vec::new());
        assert_eq!(allowed(own_only(), "base").expect("in its folder"), own.join("base"));
        assert!(allowed(BackingPolicy::Refuse, "base").is_err());
        for name in ["link", "../other/base", "/etc/passwd"] {
            let error = allowed(own_only(), name).expect_err(name);
            assert!(error.contains("--allow-backing"), "{error}");
        }
        for name in ["json:{}", "nbd://localhost", "nbd:unix:/a", "file:nbd:x"] {
            assert!(allowed(own_only(), name).expect_err(name).contains("no file"));
        }
        let also = BackingPolicy::Allow(vec![other.clone()]);
        assert!(allowed(also.clone(), "../other/base").is_ok());
        // A guest can make a raw image look like one that names other files.
        let guessed = |backing, name| allowed_to(Known::Guessed, backing, name);
        assert!(guessed(also, "../other/base").is_ok());
        assert!(guessed(own_only(), "base").expect_err("guessed").contains("guessed"));
    }
}
