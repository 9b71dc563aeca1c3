//! QCOW2 images.
use std::sync::Arc;
use std::time::SystemTime;

use blktap::formats::qcow2::header::Header;
use blktap::formats::qcow2::resize::{self, Around, Below, Shrink};
use blktap::formats::qcow2::snapshots::{self, Which};
use blktap::formats::qcow2::{Dirty, L2Cache, Qcow2, Qcow2Options, check};
use blktap::formats::{Format, ImageError};
use blktap::storage::Storage;
use blktap::storage::record::SparseBytes;

use super::vhd::base;
use crate::case::{Case, Health, Layers, Mend, Special, Specials};
use crate::history::{BASE, bytes_of};
use crate::qemu;

/// An image as `qemu-img create` makes it.
pub struct Qcow2Case {
    name: String,
    cluster: u64,
    sectors: u64,
    base: u64,
    files: Vec<SparseBytes>,
    /// Has the backing image, for QEMU.
    _folder: tempfile::TempDir,
}

impl Qcow2Case {
    /// With these options of qemu-img, clusters of so many bytes, and a backing image of `base`
    /// sectors.
    pub fn new(options: &str, cluster: u64, sectors: u64, base: u64) -> Self {
        let folder = qemu::folder();
        let [image, data, backing] =
            ["image", "data", "backing"].map(|n| folder.path().join(n).display().to_string());
        let mut with = format!("cluster_size={cluster}");
        if !options.is_empty() {
            with = format!("{with},{options}");
        }
        let has_data = options.contains("data_file");
        if has_data {
            with = format!("{with},data_file={data}");
        }
        if base > 0 {
            std::fs::write(&backing, bytes_of(BASE, 0..base)).expect("a backing image");
            with = format!("{with},backing_file={backing},backing_fmt=raw");
        }
        let size = (sectors * 512).to_string();
        let made = qemu::run("qemu-img", &["create", "-f", "qcow2", "-o", &with, &image, &size]);
        assert!(made.status.success(), "{with}: {}", String::from_utf8_lossy(&made.stderr));
        let read = |name| SparseBytes::of(&std::fs::read(name).expect("what qemu-img made"));
        let mut files = vec![read(&image)];
        if has_data {
            files.push(read(&data));
        }
        let name = match options {
            "" => format!("qcow2 {cluster}"),
            _ => format!("qcow2 {cluster} {options}"),
        };
        let name = if base > 0 { format!("{name} overlay") } else { name };
        Qcow2Case { name, cluster, sectors, base, files, _folder: folder }
    }
}

impl Case for Qcow2Case {
    fn name(&self) -> String {
        self.name.clone()
    }
    fn sectors(&self) -> u64 {
        self.sectors
    }
    fn base(&self) -> u64 {
        self.base
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
            dirty: Dirty::Repair,
        };
        let image = Qcow2::open(Arc::clone(&files[0]), files.get(1).cloned(), &options)?;
        let mut layers: Vec<Arc<dyn Format>> = vec![Arc::new(image)];
        if self.base > 0 {
            layers.push(base(self.base)?);
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
        // Refcounts of a dirty image are rebuilt before it is used.
        let corruptions = if dirty { 0 } else { report.corruptions + report.check_errors };
        let why = report.findings.iter().map(|f| f.text.clone()).collect();
        Ok(Health { corruptions, leaks: report.leaks, why })
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
                let below = BaseDisk(self.base);
                let below: Option<&dyn Below> = if self.base > 0 { Some(&below) } else { None };
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
        Specials {
            snapshots: self.files.len() == 1 && !self.name.contains("refcount_bits=1"),
            // Snapshots of another size cannot be applied in version 2.
            grow: (!self.name.contains("0.10")).then_some(self.sectors * 3 / 2),
            shrinks: true,
        }
    }
    fn qemu(&self) -> Option<&'static str> {
        (self.files.len() == 1).then_some("qcow2")
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
