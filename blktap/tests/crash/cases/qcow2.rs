//! QCOW2 images.
use std::sync::Arc;
use std::time::SystemTime;

use blktap::formats::qcow2::header::Header;
use blktap::formats::qcow2::resize::{self, Around, Below, Shrink};
use blktap::formats::qcow2::snapshots::{self, Which};
use blktap::formats::qcow2::{L2Cache, Qcow2, Qcow2Options, check};
use blktap::formats::{Format, ImageError};
use blktap::storage::Storage;
use blktap::storage::record::SparseBytes;

use super::vhd::base;
use crate::case::{Case, Health, Layers, Mend, Special, Specials};
use crate::history::{BASE, bytes_of};
use crate::qemu;

/// What an image holds before anything is done with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Zeroes.
    Empty,
    /// [`BASE`] in the first sectors, of a backing image.
    Backing(u64),
    /// The same, as `qemu-img convert` writes it.
    Converted(u64),
    /// The same, compressed.
    Compressed(u64),
}

/// An image as QEMU makes it.
pub struct Qcow2Case {
    name: String,
    cluster: u64,
    sectors: u64,
    content: Content,
    files: Vec<SparseBytes>,
    /// Has the backing image, for QEMU.
    _folder: tempfile::TempDir,
}

impl Qcow2Case {
    /// With these options of qemu-img, and clusters of so many bytes.
    pub fn new(options: &str, cluster: u64, sectors: u64, content: Content) -> Self {
        let folder = qemu::folder();
        let [image, data, other] =
            ["image", "data", "other"].map(|n| folder.path().join(n).display().to_string());
        let mut with = format!("cluster_size={cluster}");
        if !options.is_empty() {
            with = format!("{with},{options}");
        }
        let has_data = options.contains("data_file");
        if has_data {
            with = format!("{with},data_file={data}");
        }
        let (Content::Backing(n) | Content::Converted(n) | Content::Compressed(n)) = content else {
            let size = (sectors * 512).to_string();
            make(&["create", "-f", "qcow2", "-o", &with, &image, &size]);
            return Self::made(options, cluster, sectors, content, folder);
        };
        let mut bytes = bytes_of(BASE, 0..n);
        if let Content::Backing(_) = content {
            std::fs::write(&other, bytes).expect("a backing image");
            with = format!("{with},backing_file={other},backing_fmt=raw");
            let size = (sectors * 512).to_string();
            make(&["create", "-f", "qcow2", "-o", &with, &image, &size]);
        } else {
            bytes.resize(sectors as usize * 512, 0);
            std::fs::write(&other, bytes).expect("a raw image");
            let packed = if matches!(content, Content::Compressed(_)) { &["-c"][..] } else { &[] };
            let plain = ["convert", "-f", "raw", "-O", "qcow2", "-o", &with, &other, &image];
            make(&[&plain[..1], packed, &plain[1..]].concat());
        }
        Self::made(options, cluster, sectors, content, folder)
    }

    fn made(
        options: &str,
        cluster: u64,
        sectors: u64,
        content: Content,
        folder: tempfile::TempDir,
    ) -> Self {
        let read = |name| {
            let bytes = std::fs::read(folder.path().join(name));
            SparseBytes::of(&bytes.expect("what qemu-img made"))
        };
        let mut files = vec![read("image")];
        if options.contains("data_file") {
            files.push(read("data"));
        }
        let what = match content {
            Content::Empty => "",
            Content::Backing(_) => " overlay",
            Content::Converted(_) => " converted",
            Content::Compressed(_) => " compressed",
        };
        let options = if options.is_empty() { String::new() } else { format!(" {options}") };
        let name = format!("qcow2 {cluster}{options}{what}");
        Qcow2Case { name, cluster, sectors, content, files, _folder: folder }
    }

    /// Sectors of the backing image.
    fn below(&self) -> u64 {
        if let Content::Backing(n) = self.content { n } else { 0 }
    }
}

fn make(args: &[&str]) {
    let made = qemu::run("qemu-img", args);
    assert!(made.status.success(), "{args:?}: {}", String::from_utf8_lossy(&made.stderr));
}

impl Case for Qcow2Case {
    fn name(&self) -> String {
        self.name.clone()
    }
    fn sectors(&self) -> u64 {
        self.sectors
    }
    fn base(&self) -> u64 {
        match self.content {
            Content::Empty => 0,
            Content::Backing(n) | Content::Converted(n) | Content::Compressed(n) => n,
        }
    }
    fn files(&self) -> usize {
        self.files.len()
    }
    fn cluster(&self) -> u64 {
        self.cluster / 512
    }
    fn create(&self, files: &[Arc<dyn Storage>]) -> Result<(), ImageError> {
        for (file, bytes) in files.iter().zip(&self.files) {
            let what = "copy what qemu-img made";
            file.write_at(0, &bytes.to_vec()).map_err(ImageError::io(what))?;
        }
        Ok(())
    }
    fn open(&self, files: &[Arc<dyn Storage>]) -> Result<Layers, ImageError> {
        let options = Qcow2Options {
            l2_cache: L2Cache::Bytes(8 << 10),
            refcount_cache: 16 << 10,
            repair: Some(repair),
        };
        let image = Qcow2::open(Arc::clone(&files[0]), files.get(1).cloned(), &options)?;
        let mut layers: Vec<Arc<dyn Format>> = vec![Arc::new(image)];
        if self.below() > 0 {
            layers.push(base(self.below())?);
        }
        Ok(layers)
    }
    fn check(&self, files: &[Arc<dyn Storage>], mend: Mend) -> Result<Health, ImageError> {
        let file = &*files[0];
        let dirty = Header::read(file)?.is_dirty();
        let report = match mend {
            Mend::Nothing => check::check(file, check::CHECK_MEMORY, &check::unwatched)?,
            Mend::All => {
                check::repair(file, check::Repair::All, check::CHECK_MEMORY, &check::unwatched)?
            }
        };
        let mut why: Vec<_> = report.findings.into_iter().map(|f| f.text).collect();
        let corruptions = match mend {
            // Refcounts of a dirty image are rebuilt before it is used.
            Mend::Nothing if dirty => 0,
            // A refcount and the flag that says whether it is 1 are never changed at once: while
            // a snapshot is made the count is the higher one, which the flag may not know yet.
            Mend::Nothing if why.iter().any(|text| text.contains("copied flag")) => {
                why.retain(|text| !text.contains("copied flag") && !is_leak(text));
                why.len() as u64
            }
            _ => report.corruptions + report.check_errors,
        };
        Ok(Health { corruptions, leaks: report.leaks, why })
    }
    fn is_lazy(&self) -> bool {
        self.name.contains("lazy_refcounts=on")
    }
    fn mends(&self) -> bool {
        true
    }
    fn special(&self, files: &[Arc<dyn Storage>], special: &Special) -> Result<(), ImageError> {
        let file = &*files[0];
        match special {
            Special::Snapshot(name) => {
                snapshots::create(file, name, SystemTime::UNIX_EPOCH).map(|_| ())
            }
            Special::Apply(name) => snapshots::apply(file, Which::Name(name)),
            Special::Delete(name) => snapshots::delete(file, Which::Name(name)),
            Special::Resize(size) => {
                let below = BaseDisk(self.below());
                let below: Option<&dyn Below> = if self.below() > 0 { Some(&below) } else { None };
                let around = Around { data_file: files.get(1).map(|f| &**f), below };
                resize::resize(file, around, *size, Shrink::Allow)
            }
        }
    }
    fn snapshots(&self, files: &[Arc<dyn Storage>]) -> Result<Vec<String>, ImageError> {
        let all = snapshots::list(&*files[0])?;
        Ok(all.into_iter().map(|s| s.name).collect())
    }
    fn specials(&self) -> Specials {
        // Counts of 1 and 2 bits have no room for the snapshots of a whole run.
        let word = |bits: &str| self.name.split([' ', ',']).any(|w| w == bits);
        let narrow = word("refcount_bits=1") || word("refcount_bits=2");
        Specials {
            snapshots: self.files.len() == 1 && !narrow,
            // Snapshots of another size cannot be applied in version 2.
            grow: (!self.name.contains("0.10")).then_some(self.sectors * 3 / 2),
            shrinks: true,
        }
    }
    fn qemu(&self) -> Option<&'static str> {
        (self.files.len() == 1).then_some("qcow2")
    }
}

/// "cluster 5 has refcount 2 and is used 1 times".
fn is_leak(text: &str) -> bool {
    let numbers: Vec<u64> = text.split(' ').filter_map(|word| word.parse().ok()).collect();
    text.contains("has refcount") && matches!(numbers[..], [_, counted, used] if counted > used)
}

fn repair(file: &Arc<dyn Storage>) -> Result<(), ImageError> {
    let done = check::repair(&**file, check::Repair::All, check::CHECK_MEMORY, &check::unwatched)?;
    match done.corruptions {
        0 => Ok(()),
        n => Err(ImageError::Corrupt(format!("{n} corruptions are left"))),
    }
}

/// The backing image as resizing sees it.
struct BaseDisk(u64);

impl Below for BaseDisk {
    fn size(&self) -> u64 {
        self.0 * 512
    }
    fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), ImageError> {
        let first = offset / 512;
        let end = (offset + into.len() as u64).div_ceil(512);
        let mut bytes = bytes_of(BASE, first..end.max(first));
        bytes[(self.0.clamp(first, end) - first) as usize * 512..].fill(0);
        let skip = (offset % 512) as usize;
        into.copy_from_slice(&bytes[skip..skip + into.len()]);
        Ok(())
    }
}
