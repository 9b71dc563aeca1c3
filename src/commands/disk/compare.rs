//! `ringback disk compare`.

use std::process::ExitCode;

use blktap::copy::{self, Compared};
use blktap::{Disk, Kept, Region};
use serde_json::json;

use super::open::Opening;
use super::work::Work;
use super::{Result, about, document};
use crate::cli::disk::Compare;

/// Exit status of a comparison that could not be made.
pub const FAILED: u8 = 2;

enum Verdict {
    Identical,
    /// Of another size; only told with `--strict`.
    Size,
    /// Allocated otherwise from this byte on; only told with `--strict`.
    Allocation(u64),
    Content(u64),
}

/// `ringback disk compare`.
pub fn run(options: &Compare) -> Result {
    let open = |file, format: &Option<String>| {
        let opening = Opening::to_read(file, format.as_deref(), &options.allow);
        opening.force_share(options.force_share).cache(options.source_cache).open()
    };
    let first = open(&options.first, &options.format)?;
    let second = open(&options.second, &options.second_format)?;
    let sizes = (first.disk.geometry().size, second.disk.geometry().size);
    let mut work = Work::new(options.progress.progress)?;
    let verdict = if options.strict && sizes.0 != sizes.1 {
        Verdict::Size
    } else {
        if sizes.0 != sizes.1 && !options.quiet && !options.output.json {
            outln!("Warning: Image size mismatch!");
        }
        verdict(&*first.disk, &*second.disk, options.strict, &mut work)?
    };
    work.end();
    tell(&verdict, options);
    Ok(match verdict {
        Verdict::Identical => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}

fn verdict(a: &dyn Disk, b: &dyn Disk, strict: bool, work: &mut Work) -> Result<Verdict> {
    let total = a.geometry().size.max(b.geometry().size);
    let compared = copy::compare(a, b, &mut |done| work.tick(done, total))?;
    Ok(match compared {
        // The sector, as qemu-img says.
        Compared::Differ(at) => Verdict::Content(at - at % 512),
        Compared::Identical if strict => match allocation(a, b)? {
            Some(at) => Verdict::Allocation(at),
            None => Verdict::Identical,
        },
        Compared::Identical => Verdict::Identical,
    })
}

/// Where the first of two disks of one size has data and the other has not, or the other way.
fn allocation(a: &dyn Disk, b: &dyn Disk) -> Result<Option<u64>> {
    let size = a.geometry().size;
    let mut at = 0;
    while at < size {
        let first = |disk: &dyn Disk| -> Result<Region> {
            let mut regions = Vec::new();
            disk.map(at..size, &mut regions).map_err(about("cannot find out what is allocated"))?;
            let region = regions.into_iter().find(|r| r.len > 0);
            region.ok_or_else(|| "a map that does not go on".into())
        };
        let (x, y) = (first(a)?, first(b)?);
        if (x.kept == Kept::Data) != (y.kept == Kept::Data) {
            return Ok(Some(at));
        }
        at += x.len.min(y.len);
    }
    Ok(None)
}

fn tell(verdict: &Verdict, options: &Compare) {
    let (text, offset) = match verdict {
        Verdict::Identical => ("Images are identical.".to_owned(), None),
        Verdict::Size => ("Strict mode: Image size mismatch!".to_owned(), None),
        Verdict::Allocation(at) => {
            (format!("Strict mode: Offset {at} block status mismatch!"), Some(*at))
        }
        Verdict::Content(at) => (format!("Content mismatch at offset {at}!"), Some(*at)),
    };
    if options.output.json {
        let difference = match verdict {
            Verdict::Identical => None,
            Verdict::Size => Some("size"),
            Verdict::Allocation(_) => Some("allocation"),
            Verdict::Content(_) => Some("content"),
        };
        document(json!({
            "identical": difference.is_none(), "difference": difference, "offset": offset,
        }));
    } else if !options.quiet {
        outln!("{text}");
    }
}
