//! The images that are served, of each format, and what others find in their files afterwards.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use blktap::formats::Format;
use blktap::formats::qcow2::L2Cache;
use blktap::formats::qcow2::check::{CHECK_MEMORY, check, unwatched};
use blktap::formats::vhd::{CreateOptions, NewParent, Repair, Shape, Vhd};
use blktap::image::{ImageDisk, ImageFormat, ImageOptions, open_image};
use blktap::storage::{self, Access, Cache, OpenOptions};

use super::rig::well;
use super::vhd_model::{Byte, Model};

/// What kind of image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Raw,
    /// QCOW2 in clusters of 4 KiB.
    SmallClusters,
    /// QCOW2 in clusters of 16 KiB on QCOW2 in clusters of 64 KiB.
    Overlay,
    Dynamic,
    /// A differencing VHD on a dynamic one.
    Differencing,
}

impl Kind {
    pub fn format(self) -> ImageFormat {
        match self {
            Kind::Raw => ImageFormat::Raw,
            Kind::SmallClusters | Kind::Overlay => ImageFormat::Qcow2,
            Kind::Dynamic | Kind::Differencing => ImageFormat::Vhd,
        }
    }
    /// As QEMU calls its format.
    pub fn qemu(self) -> &'static str {
        match self.format() {
            ImageFormat::Vhd => "vpc",
            format => format.name(),
        }
    }
    fn has_base(self) -> bool {
        matches!(self, Kind::Overlay | Kind::Differencing)
    }
}

pub fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

fn storage_of(path: &Path, access: Access) -> Arc<dyn storage::Storage> {
    let options = OpenOptions::new(path).access(access).cache(Cache::Writeback);
    Arc::new(storage::open(&options).unwrap_or_else(|e| panic!("{e}")))
}

fn make_vhd(path: &Path, size: u64, shape: Shape) {
    std::fs::write(path, []).expect("a file");
    let options = CreateOptions::new(size, shape).expect("options");
    Vhd::create(&*storage_of(path, Access::ReadWrite), &options).expect("an image");
}

/// An image in a folder of its own, where the names are always the same.
pub struct Image {
    pub kind: Kind,
    pub path: PathBuf,
    pub base: Option<PathBuf>,
}

impl Image {
    /// An empty one of `size` bytes. Where it builds on another, that one holds `below`.
    pub fn new(kind: Kind, folder: &Path, size: u64, below: &[u8]) -> Image {
        let path = folder.join(format!("image.{}", kind.format()));
        let base = kind.has_base().then(|| folder.join(format!("base.{}", kind.format())));
        if let Some(base) = &base {
            let raw = folder.join("below.raw");
            std::fs::write(&raw, below).expect("a file");
            if kind == Kind::Differencing {
                make_vhd(base, size, Shape::Dynamic);
                let args = ["convert", "-n", "-f", "raw", "-O", "vpc", text(&raw), text(base)];
                well("qemu-img", &args);
            } else {
                let args = ["convert", "-f", "raw", "-O", "qcow2", text(&raw), text(base)];
                well("qemu-img", &args);
            }
        }
        let image = Image { kind, path, base };
        image.create(size);
        image
    }

    fn create(&self, size: u64) {
        let bytes = size.to_string();
        let qcow2 = |options: &[&str]| {
            let head = ["create", "-q", "-f", "qcow2"];
            let args = [&head[..], options, &[text(&self.path), &bytes]].concat();
            well("qemu-img", &args);
        };
        match (self.kind, &self.base) {
            (Kind::SmallClusters, _) => qcow2(&["-o", "cluster_size=4k"]),
            (Kind::Overlay, _) => {
                qcow2(&["-o", "cluster_size=16k", "-b", "base.qcow2", "-F", "qcow2"])
            }
            (Kind::Dynamic, _) => make_vhd(&self.path, size, Shape::Dynamic),
            (Kind::Differencing, Some(base)) => {
                let parent = NewParent {
                    id: Vhd::open(storage_of(base, Access::ReadOnly)).expect("base").unique_id(),
                    modified: modified(base),
                    relative: "base.vhd".into(),
                    absolute: text(base).into(),
                };
                make_vhd(&self.path, size, Shape::Differencing(parent));
            }
            _ => {
                let file = std::fs::File::create(&self.path).expect("a file");
                file.set_len(size).expect("its size");
            }
        }
    }

    /// Opened for writing, with so much memory for its tables.
    pub fn open(&self, cache: Option<u64>) -> Arc<ImageDisk> {
        let file = OpenOptions::new(&self.path).cache(Cache::Writeback);
        let mut options = ImageOptions::new(self.kind.format(), file);
        options.l2_cache = cache.map_or_else(L2Cache::default, L2Cache::Bytes);
        open_image(&options).unwrap_or_else(|e| panic!("{e}"))
    }

    /// Our check and QEMU's find nothing wrong, and nothing that nobody uses.
    pub fn assert_clean(&self) {
        let kind = self.kind;
        match kind.format() {
            ImageFormat::Qcow2 => {
                let storage = storage_of(&self.path, Access::ReadOnly);
                let report = check(&*storage, CHECK_MEMORY, &unwatched).expect("a check");
                let faults = report.corruptions + report.leaks + report.check_errors;
                assert_eq!(faults, 0, "{kind:?}: {report:?}");
                well("qemu-img", &["check", "-f", "qcow2", text(&self.path)]);
            }
            ImageFormat::Vhd => {
                let storage = storage_of(&self.path, Access::ReadOnly);
                let report = Vhd::check(&*storage, Repair::Nothing).expect("a check");
                assert_eq!(report.corruptions + report.leaks, 0, "{kind:?}: {report:?}");
            }
            _ => {}
        }
    }

    /// Somebody else than we reads `expected` from the file: QEMU, or, for what QEMU does not
    /// open, a reader that shares nothing with ours.
    pub fn assert_holds(&self, expected: &[u8]) {
        if self.kind == Kind::Differencing {
            let files = [Some(&self.path), self.base.as_ref()].into_iter().flatten();
            let layers: Vec<Model> = files
                .map(|path| Model::open(&std::fs::read(path).expect("a file")).expect("an image"))
                .collect();
            let byte = |at: u64| {
                let found = layers.iter().find_map(|layer| match layer.byte(at) {
                    Byte::Is(byte) => Some(byte),
                    Byte::Below => None,
                });
                found.unwrap_or(0)
            };
            let differs = (0..).zip(expected).find(|(at, expected)| byte(*at) != **expected);
            assert_eq!(differs, None, "{:?}: the first byte that is otherwise", self.kind);
            return;
        }
        let raw = self.path.with_extension("seen");
        let args = ["convert", "-f", self.kind.qemu(), "-O", "raw", text(&self.path), text(&raw)];
        well("qemu-img", &args);
        let seen = std::fs::read(&raw).expect("what QEMU reads");
        assert_eq!(seen.len(), expected.len(), "{:?}", self.kind);
        let differs = seen.iter().zip(expected).position(|(a, b)| a != b);
        assert_eq!(differs, None, "{:?}: the first byte that QEMU reads otherwise", self.kind);
    }
}

fn modified(path: &Path) -> SystemTime {
    std::fs::metadata(path).and_then(|m| m.modified()).expect("a time")
}
