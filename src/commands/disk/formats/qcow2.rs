//! QCOW2 images.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use blktap::copy::{self, Copied, CopyOptions, Plan as CopyPlan};
use blktap::formats::qcow2::check::{self, CHECK_MEMORY, Repair as Repairs};
use blktap::formats::qcow2::create::{CreateOptions, DataFile, DataFileKind, Preallocation};
use blktap::formats::qcow2::entry::Layout;
use blktap::formats::qcow2::header::{Compression, Header, Version};
use blktap::formats::qcow2::measure::{self, Preallocated};
use blktap::formats::qcow2::rebase;
use blktap::formats::qcow2::resize::{self, Around, Below, Shrink};
use blktap::formats::qcow2::snapshots::{self, Snapshot, SnapshotView, Which};
use blktap::formats::qcow2::{Qcow2, Qcow2Options, create};
use blktap::formats::{BackingName, Format, ImageError};
use blktap::image::{ImageFormat, StatusPlace};
use blktap::storage::{Access, Cache, FileStorage, Storage};
use blktap::{Disk, DiskQueue, ImageDisk, Kept, blocking};
use parking_lot::Mutex;
use serde_json::{Value, json};

use super::super::check::Checked;
use super::super::create::{NewBacking, NewImage, failed, open_new};
use super::super::measure::Measured;
use super::super::open::{Opened, Opening, beside};
use super::super::options::Options;
use super::super::resize::Wanted;
use super::super::snapshot::SnapshotInfo;
use super::super::work::Work;
use super::super::{Result, Usage, about, bitmap, snapshot};
use super::{Details, Packing, qemu_name};
use crate::cli::disk::{Preallocation as Asked, Repair};

pub const HELP: &str = "\
size=SIZE             bytes of the disk
compat=VERSION        0.10 (version 2), 1.1 (version 3, the default)
cluster_size=SIZE     512 to 2M [64k]
refcount_bits=N       1 to 64, a power of two [16]
lazy_refcounts=on|off
extended_l2=on|off    clusters of 32 subclusters
compression_type=HOW  zlib, zstd
preallocation=HOW     off, metadata, falloc, full
data_file=FILE        the guest's data go to this file
data_file_raw=on|off  and it is a raw image of the disk
backing_file=FILE     the same as -b
backing_fmt=FORMAT    the same as -F
";

pub struct Plan {
    pub options: CreateOptions,
    /// Where the data file is.
    data: Option<PathBuf>,
    cache: Cache,
}

pub fn plan(new: &mut NewImage<'_>) -> Result<Plan> {
    let mut options = understand(&mut new.options, new.size)?;
    let named = |b: &NewBacking| {
        let format = Some(qemu_name(b.format).to_owned());
        BackingName { name: b.name.clone(), format }
    };
    options.backing = new.backing.as_ref().map(named);
    let data = options.data_file.as_ref().map(|d| beside(new.path, &d.name));
    Ok(Plan { options, data, cache: new.cache })
}

/// The options without the backing file.
pub fn understand(given: &mut Options, size: u64) -> Result<CreateOptions> {
    let mut options = CreateOptions::new(size);
    let versions =
        [("0.10", Version::V2), ("v2", Version::V2), ("1.1", Version::V3), ("v3", Version::V3)];
    if let Some(version) = given.choice("compat", &versions)? {
        options.version = version;
    }
    options.cluster_size = given.size("cluster_size")?.unwrap_or(options.cluster_size);
    if let Some(bits) = given.number("refcount_bits")? {
        options.refcount_bits = u32::try_from(bits).unwrap_or(u32::MAX);
    }
    options.lazy_refcounts = given.switch("lazy_refcounts")?.unwrap_or(false);
    options.extended_l2 = given.switch("extended_l2")?.unwrap_or(false);
    let ways = [("zlib", Compression::Zlib), ("zstd", Compression::Zstd)];
    options.compression = given.choice("compression_type", &ways)?.unwrap_or(options.compression);
    let ways = [
        ("off", Preallocation::Off),
        ("metadata", Preallocation::Metadata),
        ("falloc", Preallocation::Falloc),
        ("full", Preallocation::Full),
    ];
    options.preallocation = given.choice("preallocation", &ways)?.unwrap_or_default();
    let raw = given.switch("data_file_raw")?.unwrap_or(false);
    let kind = if raw { DataFileKind::Raw } else { DataFileKind::Mapped };
    options.data_file = given.take("data_file").map(|name| DataFile { name, kind });
    if raw && options.data_file.is_none() {
        return Err(Usage("data_file_raw needs data_file".into()).into());
    }
    Ok(options)
}

pub fn create(plan: &Plan, storage: &Arc<FileStorage>) -> Result<()> {
    let name = storage.name();
    let Some(path) = &plan.data else {
        return create::create(&**storage, None, &plan.options).map_err(about(&name));
    };
    let data = open_new(path, plan.cache)?;
    let file = data.storage();
    let file = file.as_ref().map(|f| &**f as &dyn Storage);
    match create::create(&**storage, file, &plan.options) {
        Ok(()) => Ok(()),
        Err(e) => Err(failed(data, e.into())),
    }
}

pub fn details(storage: &dyn Storage) -> Result<Details> {
    let header = Header::read(storage)?;
    Ok(Details {
        size: header.disk_size(),
        cluster_size: Some(1 << header.cluster_bits),
        dirty: header.is_dirty(),
        backing: header.backing(),
        snapshots: snapshots::list(storage)?.iter().map(shown).collect(),
        specific: specific(&header, storage)?,
    })
}

fn shown(snapshot: &Snapshot) -> SnapshotInfo {
    SnapshotInfo {
        id: snapshot.id.clone(),
        name: snapshot.name.clone(),
        vm_state_size: snapshot.vm_state_size,
        date: (snapshot.date_sec.into(), snapshot.date_nsec),
        vm_clock: snapshot.vm_clock,
        icount: snapshot.icount,
    }
}

/// Creates, applies, deletes.
pub fn snapshot(storage: &dyn Storage, act: snapshot::Act, name: &str) -> Result<()> {
    match act {
        snapshot::Act::Create => drop(snapshots::create(storage, name, SystemTime::now())?),
        snapshot::Act::Apply => snapshots::apply(storage, Which::IdOrName(name))?,
        snapshot::Act::Delete => snapshots::delete(storage, Which::IdOrName(name))?,
    }
    Ok(())
}

/// A snapshot as a disk.
pub fn snapshot_disk(opening: &Opening<'_>, name: &str) -> Result<Opened> {
    let mut layers = blktap::image::open_layers(&opening.image_options(ImageFormat::Qcow2))?;
    let view = SnapshotView::new(opening.storage()?, Which::IdOrName(name))?;
    let image = Qcow2::open(Arc::new(view), None, &Qcow2Options::default())?;
    if let Some(first) = layers.first_mut() {
        *first = Arc::new(image);
    }
    let image = ImageDisk::new(layers, 512, blktap::image::Blocking::Threads)?;
    Ok(Opened { disk: image.clone(), image: Some(image), format: ImageFormat::Qcow2 })
}

/// In qemu-img's order.
fn specific(header: &Header, storage: &dyn Storage) -> Result<Vec<(&'static str, Value)>> {
    let compression = match header.compression {
        Compression::Zlib => "zlib",
        Compression::Zstd => "zstd",
    };
    let bits = ("refcount-bits", (1u64 << header.refcount_order).into());
    if header.version == Version::V2 {
        return Ok(vec![("compat", "0.10".into()), ("compression-type", compression.into()), bits]);
    }
    let mut all: Vec<(&'static str, Value)> = vec![("compat", "1.1".into())];
    if header.has_data_file() {
        all.push(("data-file", header.data_file.clone().unwrap_or_default().into()));
        all.push(("data-file-raw", header.has_raw_data().into()));
    }
    all.push(("compression-type", compression.into()));
    all.push(("lazy-refcounts", header.has_lazy_refcounts().into()));
    all.push(bits);
    let bitmaps = bitmaps(storage, header)?;
    if !bitmaps.is_empty() {
        let bitmaps: Vec<Value> = bitmaps.iter().map(bitmap::value).collect();
        all.push(("bitmaps", json!(bitmaps)));
    }
    all.push(("corrupt", header.is_corrupt().into()));
    all.push(("extended-l2", header.extended_l2().into()));
    Ok(all)
}

/// The image's dirty bitmaps.
pub fn bitmaps(storage: &dyn Storage, header: &Header) -> Result<Vec<blktap::formats::BitmapInfo>> {
    let all = blktap::formats::qcow2::bitmaps::list(storage, header)?;
    Ok(all.iter().map(blktap::formats::qcow2::bitmaps::info).collect())
}

pub fn change_bitmap(storage: &dyn Storage, act: bitmap::Act, name: &str) -> Result<()> {
    use blktap::formats::qcow2::bitmaps::{self as edit, Recording};
    use blktap::formats::qcow2::offline::Offline;
    let recording = |on| if on { Recording::On } else { Recording::Off };
    let mut offline = Offline::open(storage)?;
    match act {
        bitmap::Act::Add { granularity, recording: on } => {
            // QEMU's default: the cluster's size, 4 KiB to 64 KiB.
            let usual = offline.layout().cluster_size().clamp(4096, 65_536);
            edit::create(&mut offline, name, granularity.unwrap_or(usual), recording(on))?;
        }
        bitmap::Act::Remove => edit::remove(&mut offline, name)?,
        bitmap::Act::Enable => edit::set_recording(&mut offline, name, Recording::On)?,
        bitmap::Act::Disable => edit::set_recording(&mut offline, name, Recording::Off)?,
        bitmap::Act::Clear => edit::clear(&mut offline, name)?,
    }
    Ok(())
}

pub fn check(storage: &dyn Storage, repair: Option<Repair>, work: &mut Work) -> Result<Checked> {
    let work = Mutex::new(work);
    let size = storage.size()?.max(1);
    let progress =
        |p: check::Progress| -> ControlFlow<()> { work.lock().tick(p.tables.min(size), size) };
    let report = match repair {
        None => check::check(storage, CHECK_MEMORY, &progress)?,
        Some(Repair::Leaks) => check::repair(storage, Repairs::Leaks, CHECK_MEMORY, &progress)?,
        Some(Repair::All) => check::repair(storage, Repairs::All, CHECK_MEMORY, &progress)?,
    };
    let mut findings: Vec<String> = report.findings.iter().map(|f| f.text.clone()).collect();
    if report.unlisted > 0 {
        findings.push(format!("{} more findings", report.unlisted));
    }
    Ok(Checked {
        numbers: vec![
            ("image-end-offset", report.image_end_offset),
            ("total-clusters", report.total_clusters),
            ("allocated-clusters", report.allocated_clusters),
            ("fragmented-clusters", report.fragmented_clusters),
            ("compressed-clusters", report.compressed_clusters),
        ],
        findings,
        corruptions: report.corruptions,
        leaks: report.leaks,
        errors: report.check_errors,
        corruptions_fixed: report.corruptions_fixed,
        leaks_fixed: report.leaks_fixed,
    })
}

/// The backing image, as resizing wants it.
struct BackingBytes {
    image: Arc<ImageDisk>,
    queue: Mutex<Box<dyn DiskQueue>>,
}

impl Below for BackingBytes {
    fn size(&self) -> u64 {
        self.image.geometry().size
    }
    fn read_at(&self, offset: u64, into: &mut [u8]) -> std::result::Result<(), ImageError> {
        let there = self.size().saturating_sub(offset).min(into.len() as u64) as usize;
        let (bytes, beyond) = into.split_at_mut(there);
        beyond.fill(0);
        if bytes.is_empty() {
            return Ok(());
        }
        // Whole sectors.
        let start = offset - offset % 512;
        let end = (offset + there as u64).next_multiple_of(512);
        let mut whole = vec![0; (end - start) as usize];
        blocking::read_at(&mut **self.queue.lock(), start, &mut whole)
            .map_err(ImageError::io("read the backing file"))?;
        let skip = (offset - start) as usize;
        bytes.copy_from_slice(&whole[skip..skip + there]);
        Ok(())
    }
}

pub fn resize(opening: &Opening<'_>, wanted: &Wanted) -> Result<()> {
    if wanted.preallocation != Asked::Off {
        return Err(Usage("--preallocation: of qcow2 only when it is made".into()).into());
    }
    let below = below(opening)?;
    let storage = opening.clone().alone().storage()?;
    let header = Header::read(&*storage)?;
    let data = header.has_data_file().then(|| data_file(opening, &header)).transpose()?;
    let around = Around {
        data_file: data.as_ref().map(|d| &**d as &dyn Storage),
        below: below.as_ref().map(|b| b as &dyn Below),
    };
    let shrink = if wanted.new < wanted.old { Shrink::Allow } else { Shrink::Refuse };
    Ok(resize::resize(&*storage, around, wanted.new, shrink)?)
}

/// The images below this one as one disk. The image itself is not open afterwards.
fn below(opening: &Opening<'_>) -> Result<Option<BackingBytes>> {
    let reading = Opening { access: Access::ReadOnly, ..opening.clone() };
    let format = reading.format()?;
    let mut layers = blktap::image::open_layers(&reading.image_options(format))?;
    let below = layers.split_off(1);
    if below.is_empty() {
        return Ok(None);
    }
    let image = ImageDisk::new(below, 512, blktap::image::Blocking::Threads)?;
    let queue = Mutex::new(image.queue(1)?);
    Ok(Some(BackingBytes { image, queue }))
}

/// The external data file. Whether it may be opened was decided when the image was.
fn data_file(opening: &Opening<'_>, header: &Header) -> Result<Arc<FileStorage>> {
    let name = header.data_file.as_deref().unwrap_or_default();
    let found = beside(Path::new(opening.file), name);
    Opening { file: &found.to_string_lossy(), format: Some("raw"), ..opening.clone() }.storage()
}

/// Names another backing file in the header.
pub fn set_backing(storage: &dyn Storage, backing: Option<&NewBacking>) -> Result<()> {
    if backing.is_some() && Header::read(storage)?.has_raw_data() {
        return Err("its data file is raw, and has no room for what is not allocated".into());
    }
    let named = backing.map(|b| BackingName {
        name: b.name.clone(),
        format: Some(qemu_name(b.format).to_owned()),
    });
    Ok(rebase::set_backing(storage, named.as_ref())?)
}

/// Copies into compressed clusters of a new image.
pub fn pack(
    packing: &Packing<'_>,
    source: &Opened,
    mut how: CopyOptions,
    plan: CopyPlan<'_>,
    work: &mut Work,
) -> Result<Copied> {
    let name = packing.path.display().to_string();
    let image = Qcow2::open(packing.storage()?, None, &Qcow2Options::default());
    let image = image.map_err(about(&name))?;
    how.piece = image.cluster() as usize;
    let size = how.len;
    let pack = |at: u64, bytes: &[u8]| image.write_compressed(at, bytes);
    let mut tick = |done| work.tick(done, size);
    let copied = copy::copy_packed(&*source.disk, &pack, &how, plan, &mut tick)?;
    image.close().map_err(about(&name))?;
    Ok(copied)
}

/// How large an image would be, with the options of a new one.
pub fn measure(size: u64, given: &mut Options, source: Option<&Opened>) -> Result<Measured> {
    let options = understand(given, size)?;
    let over = given.take("backing_file").is_some();
    given.take("backing_fmt");
    let size = size.checked_next_multiple_of(512).ok_or_else(|| Usage("too large".into()))?;
    let layout = options.layout()?;
    let preallocated = match options.preallocation {
        Preallocation::Off | Preallocation::Metadata => Preallocated::Nothing,
        Preallocation::Falloc | Preallocation::Full => Preallocated::Data,
    };
    let data = match source {
        Some(source) => data_bytes(source, size, options.cluster_size, over)?,
        None => 0,
    };
    let measured = measure::measure(&layout, size, data, preallocated)?;
    Ok(Measured {
        required: measured.required,
        fully_allocated: measured.fully_allocated,
        bitmaps: source.map(|s| bitmap_bytes(s, &layout, size)).transpose()?.flatten(),
    })
}

/// Bytes of the clusters that a copy would write.
fn data_bytes(source: &Opened, size: u64, cluster: u64, over: bool) -> Result<u64> {
    let layers = if over { 1 } else { usize::MAX };
    let (mut at, mut data, mut counted) = (0, 0, 0);
    while at < size {
        let (len, has_data) = stretch(source, at..size, layers)?;
        if has_data {
            // Whole clusters; the last of the stretch before may be the first of this one.
            let start = (at - at % cluster).max(counted);
            counted = (at + len).next_multiple_of(cluster);
            data += counted.saturating_sub(start);
        }
        at += len;
    }
    Ok(data)
}

/// How long the first stretch is, and whether it has data.
fn stretch(source: &Opened, range: std::ops::Range<u64>, layers: usize) -> Result<(u64, bool)> {
    let range = range.start..range.end.min(range.start + (1 << 32));
    let Some(image) = &source.image else {
        let mut regions = Vec::new();
        source.disk.map(range, &mut regions)?;
        let first = regions.iter().find(|r| r.len > 0).ok_or("a map that does not go on")?;
        return Ok((first.len, first.kept == Kept::Data));
    };
    let mut found = Vec::new();
    image.status(range, layers, &mut found)?;
    let first = found.first().ok_or("a map that does not go on")?;
    let has_data = match first.place {
        StatusPlace::Data { kept, .. } => kept == Kept::Data,
        StatusPlace::Compressed => true,
        StatusPlace::Zero | StatusPlace::Nowhere => false,
    };
    Ok((first.len, has_data))
}

/// What the source's bitmaps take in a copy; `None` where it cannot have any.
fn bitmap_bytes(source: &Opened, layout: &Layout, size: u64) -> Result<Option<u64>> {
    let Some(image) = source.image.as_ref().filter(|i| i.format().name() == "qcow2") else {
        return Ok(None);
    };
    let Some(file) = image.format().files().first() else { return Ok(None) };
    let header = Header::read(&**file)?;
    if header.version == Version::V2 {
        return Ok(None);
    }
    let all = blktap::formats::qcow2::bitmaps::list(&**file, &header)?;
    let all = all.iter().filter(|b| !blktap::formats::qcow2::bitmaps::info(b).in_use);
    let bytes =
        measure::measure_bitmaps(layout, size, all.map(|b| (b.name.as_str(), b.granularity_bits)));
    Ok(Some(bytes))
}
