//! `ringback disk convert`.

use std::path::Path;
use std::process::ExitCode;

use blktap::copy::{self, Before, Copied, CopyOptions, Order, Part, What};
use blktap::image::{BackingPolicy, ImageFormat, StatusPlace};
use blktap::{Disk, Kept};
use serde_json::json;

use super::create::{self, Made, NewBacking, NewImage};
use super::open::{Guess, Opened, Opening, cache, is_nbd, parse_format};
use super::options::Options;
use super::work::Work;
use super::{Result, Usage, about, document, formats, sizes};
use crate::cli::disk::Convert;

/// Where the bytes go.
struct Target {
    /// What this command made of it.
    made: Option<Made>,
    format: ImageFormat,
    size: u64,
}

/// `ringback disk convert`.
pub fn run(options: &Convert) -> Result {
    let sparse = sizes::parse(&options.sparse)?;
    if options.compress && options.no_create {
        return Err(Usage("-c needs a new target: leave -n out".into()).into());
    }
    if sparse % 512 != 0 || sparse > 1 << 20 {
        let text = format!("-S {}: a multiple of 512 up to 1M, or 0", options.sparse);
        return Err(Usage(text).into());
    }
    let given = Options::parse(&options.options)?;
    if given.asks_for_help() {
        let format = parse_format(options.output_format.as_deref().unwrap_or("raw"))?;
        out!("{}", formats::help(format));
        return Ok(ExitCode::SUCCESS);
    }
    let source = source(options)?;
    let mut work = Work::new(options.progress.progress)?;
    let target = target(options, given, &source, &mut work)?;
    let result = fill(options, &source, &target, sparse, &mut work);
    let copied = match (result, target.made) {
        (Ok(copied), _) => copied,
        (Err(e), Some(made)) => return Err(create::failed(made, e)),
        (Err(e), None) => {
            return Err(format!("{}: {e}; it holds a part of the copy", options.target).into());
        }
    };
    work.end();
    if options.output.json {
        document(json!({
            "source": options.source, "target": options.target,
            "format": target.format.name(), "virtual-size": target.size,
            "written": copied.written, "sparse": copied.sparse,
        }));
    }
    Ok(ExitCode::SUCCESS)
}

fn source(options: &Convert) -> Result<Opened> {
    let opening = Opening::to_read(&options.source, options.format.as_deref(), &options.allow)
        .force_share(options.force_share)
        .cache(options.source_cache);
    match &options.snapshot {
        Some(name) => formats::snapshot_disk(&opening, name),
        None => opening.open(),
    }
}

/// Makes the target, or finds it.
fn target(
    options: &Convert,
    mut given: Options,
    source: &Opened,
    work: &mut Work,
) -> Result<Target> {
    let size = source.disk.geometry().size;
    if options.no_create {
        let format = existing(options).format()?;
        formats::can_write(format)?;
        return Ok(Target { made: None, format, size });
    }
    if is_nbd(&options.target) {
        let text = format!("{}: a server's export is there already: say -n", options.target);
        return Err(Usage(text).into());
    }
    if same_file(&options.source, &options.target) {
        return Err(format!("{}: source and target are one file", options.target).into());
    }
    let format = parse_format(options.output_format.as_deref().unwrap_or("raw"))?;
    formats::can_compress(format, options.compress)?;
    let name = given.take("backing_file").or_else(|| options.backing.clone());
    let named = given.take("backing_fmt").or_else(|| options.backing_format.clone());
    let backing = match (name, named) {
        (Some(name), Some(format)) => Some(NewBacking { name, format: parse_format(&format)? }),
        (Some(name), None) => {
            return Err(Usage(format!("{name}: name the backing file's format with -F")).into());
        }
        (None, _) => None,
    };
    let cache = cache(options.target_cache);
    let path = Path::new(&options.target);
    let new = NewImage { path, format, size, options: given, backing, cache };
    let made = create::make(new, work)?;
    Ok(Target { made: Some(made), format, size })
}

fn existing(options: &Convert) -> Opening<'_> {
    let format = options.output_format.as_deref();
    let opening = Opening::to_write(&options.target, format, &options.allow);
    Opening { guess: Guess::Header, ..opening.cache(options.target_cache) }
}

fn same_file(a: &str, b: &str) -> bool {
    let real = |name: &str| Path::new(name).canonicalize().ok();
    real(a).is_some_and(|a| Some(a) == real(b))
}

/// Copies into the target.
fn fill(
    options: &Convert,
    source: &Opened,
    target: &Target,
    sparse: u64,
    work: &mut Work,
) -> Result<Copied> {
    let with_backing = options.backing.is_some() && target.made.is_some();
    let mut how = CopyOptions::new(target.size);
    how.depth = options.parallel;
    how.order = if options.any_order { Order::Any } else { Order::Ascending };
    how.sparse = (sparse > 0).then_some(sparse as usize);
    let fresh = target.made.is_some() || options.target_is_zero;
    if fresh && !with_backing && sparse > 0 && !is_device(&options.target) {
        how.before = Before::Zeroes;
    }
    let mut plan = plan(source, with_backing, how.sparse.is_some());
    if options.compress || target.format == ImageFormat::Qcow {
        let packing = formats::Packing {
            path: Path::new(&options.target),
            format: target.format,
            compress: options.compress,
            cache: cache(options.target_cache),
        };
        return packing.carry_out(source, how, &mut plan, work);
    }
    let disk = open_target(options, target, with_backing)?;
    let there = disk.disk.geometry().size;
    if there < target.size {
        return Err(format!(
            "{}: a disk of {there} bytes is too small for {}",
            options.target, target.size
        )
        .into());
    }
    let total = there;
    let mut tick = |done| work.tick(done, total);
    let copied = copy::copy(&*source.disk, &*disk.disk, &how, &mut plan, None, &mut tick)?;
    if there > target.size && how.before == Before::Unknown {
        clear_rest(&*disk.disk, target.size..there)?;
    }
    if let Some(image) = disk.image {
        image.close().map_err(about(&options.target))?;
    }
    Ok(copied)
}

/// The rest of a target that is larger reads as zeroes, as the source does beyond its end.
fn clear_rest(disk: &dyn Disk, range: std::ops::Range<u64>) -> Result<()> {
    let mut queue = disk.queue(1)?;
    let len = range.end - range.start;
    blktap::blocking::range(&mut *queue, blktap::Op::WriteZeroes, range.start, len)?;
    Ok(blktap::blocking::flush(&mut *queue)?)
}

fn is_device(path: &str) -> bool {
    use std::os::unix::fs::FileTypeExt;
    std::fs::metadata(path).is_ok_and(|m| m.file_type().is_block_device())
}

fn open_target(options: &Convert, target: &Target, with_backing: bool) -> Result<Opened> {
    let mut opening = existing(options);
    if is_nbd(&options.target) {
        return opening.open();
    }
    opening.format = Some(target.format.name());
    // What a new target builds on was named by the caller; it is read where clusters are written
    // in part.
    if with_backing {
        let own = backing_folders(options).chain(options.allow.allow_backing.iter().cloned());
        opening.backing = BackingPolicy::Allow(own.collect());
    }
    opening.open()
}

/// The folder of the backing file that the caller names.
fn backing_folders(options: &Convert) -> impl Iterator<Item = std::path::PathBuf> {
    let found = options.backing.iter();
    found.filter_map(|name| {
        let file = super::open::beside(Path::new(&options.target), name).canonicalize().ok()?;
        file.parent().map(Path::to_owned)
    })
}

/// What is copied: with a backing file only what the source's own image has.
fn plan(
    source: &Opened,
    with_backing: bool,
    sparse: bool,
) -> impl FnMut(std::ops::Range<u64>, &mut Vec<Part>) -> std::io::Result<()> + Send + '_ {
    let mut found = Vec::new();
    let mut whole = copy::plan_of(&*source.disk);
    move |range, out| {
        if !sparse {
            out.push(Part { len: range.end - range.start, what: What::Data });
            return Ok(());
        }
        let Some(image) = source.image.as_ref().filter(|_| with_backing) else {
            return whole(range, out);
        };
        found.clear();
        image.status(range, 1, &mut found)?;
        out.extend(found.iter().map(|s| {
            let what = match s.place {
                StatusPlace::Nowhere => What::Skip,
                StatusPlace::Zero => What::Zero,
                StatusPlace::Data { kept, .. } if kept != Kept::Data => What::Zero,
                StatusPlace::Data { .. } | StatusPlace::Compressed => What::Data,
            };
            Part { len: s.len, what }
        }));
        Ok(())
    }
}
