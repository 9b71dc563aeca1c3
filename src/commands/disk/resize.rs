//! `ringback disk resize`.

use std::process::ExitCode;

use serde_json::json;

use super::open::Opening;
use super::work::Work;
use super::{Result, Usage, document, formats, sizes};
use crate::cli::disk::{Preallocation, Resize};

/// What is to be done.
pub struct Wanted {
    pub old: u64,
    pub new: u64,
    pub preallocation: Preallocation,
}

/// `ringback disk resize`.
pub fn run(options: &Resize) -> Result {
    let opening = Opening::to_write(&options.file, options.format.as_deref(), &options.allow);
    let format = opening.format()?;
    let old = formats::size(&opening, format)?;
    let new = new_size(options.size.as_deref().unwrap_or_default(), old)?;
    if new < old && !options.shrink {
        return Err(format!(
            "{}: it would become smaller, from {old} to {new} bytes, and lose what lies beyond: \
             say --shrink if that is meant",
            options.file
        )
        .into());
    }
    if new < old && options.preallocation != Preallocation::Off {
        return Err(Usage("--preallocation is for growing".into()).into());
    }
    let mut work = Work::new(options.progress.progress)?;
    let wanted = Wanted { old, new, preallocation: options.preallocation };
    if new != old {
        formats::resize(&opening, format, &wanted, &mut work)?;
    }
    work.end();
    let now = formats::size(&opening, format)?;
    if options.output.json {
        document(json!({
            "filename": options.file, "format": format.name(),
            "virtual-size": now, "old-virtual-size": old,
        }));
    } else {
        outln!("{}: {} ({now} bytes)", options.file, sizes::words(now));
    }
    Ok(ExitCode::SUCCESS)
}

/// The size that is meant, in whole sectors.
pub fn new_size(text: &str, old: u64) -> Result<u64> {
    let wrong = || Usage(format!("{text}: from {old} bytes that is no possible size"));
    let size = match text.as_bytes().first() {
        Some(b'+') => old.checked_add(sizes::parse(&text[1..])?),
        Some(b'-') => old.checked_sub(sizes::parse(&text[1..])?),
        _ => Some(sizes::parse(text)?),
    };
    let size = size.and_then(|s| s.checked_next_multiple_of(512));
    Ok(size.filter(|s| *s > 0 && i64::try_from(*s).is_ok()).ok_or_else(wrong)?)
}
