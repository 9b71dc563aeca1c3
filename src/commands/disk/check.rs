//! `ringback disk check`.

use std::process::ExitCode;

use serde_json::{Map, Value};

use super::open::{Guess, Opening};
use super::work::Work;
use super::{Result, document, formats};
use crate::cli::disk::Check;

/// Exit status where the format has nothing to check, as qemu-img's.
const UNSUPPORTED: u8 = 63;
/// Lines of findings that are shown.
const SHOWN: usize = 100;

/// What a check has found, in qemu-img's terms.
#[derive(Default)]
pub struct Checked {
    /// qemu-img's numbers by their names; those of a format that has no clusters are fewer.
    pub numbers: Vec<(&'static str, u64)>,
    /// What was found, in words.
    pub findings: Vec<String>,
    pub corruptions: u64,
    pub leaks: u64,
    /// What could not be checked.
    pub errors: u64,
    pub corruptions_fixed: u64,
    pub leaks_fixed: u64,
}

impl Checked {
    fn status(&self) -> u8 {
        match self {
            c if c.errors > 0 => 1,
            c if c.corruptions > 0 => 2,
            c if c.leaks > 0 => 3,
            _ => 0,
        }
    }
}

/// `ringback disk check`.
pub fn run(options: &Check) -> Result {
    let repair = options.repair.or(options.r);
    let format = options.format.as_deref();
    let mut opening = match repair {
        None => Opening::to_read(&options.file, format, &options.allow),
        Some(_) => Opening::to_write(&options.file, format, &options.allow),
    };
    // What looks like raw has nothing to repair either, and is told so.
    opening.guess = Guess::Any;
    let opening = opening.force_share(options.force_share).alone();
    let mut work = Work::new(options.progress.progress)?;
    let format = opening.format()?;
    let Some(checked) = formats::check(&opening, format, repair, &mut work)? else {
        errln!("ringback: {}: format {format} has nothing to check", options.file);
        return Ok(ExitCode::from(UNSUPPORTED));
    };
    work.end();
    if options.output.json {
        document(value(&checked, &options.file, formats::qemu_name(format)));
    } else {
        print(&checked);
    }
    Ok(ExitCode::from(checked.status()))
}

fn value(checked: &Checked, file: &str, format: &str) -> Value {
    let mut value = Map::new();
    value.insert("filename".into(), file.into());
    value.insert("format".into(), format.into());
    value.insert("check-errors".into(), checked.errors.into());
    for (name, number) in &checked.numbers {
        value.insert((*name).into(), (*number).into());
    }
    // As qemu-img: what is zero is left out.
    for (name, number) in [
        ("corruptions", checked.corruptions),
        ("leaks", checked.leaks),
        ("corruptions-fixed", checked.corruptions_fixed),
        ("leaks-fixed", checked.leaks_fixed),
    ] {
        if number > 0 {
            value.insert(name.into(), number.into());
        }
    }
    if !checked.findings.is_empty() {
        value.insert("findings".into(), checked.findings.clone().into());
    }
    value.into()
}

fn print(checked: &Checked) {
    let findings = &checked.findings;
    findings.iter().take(SHOWN).for_each(|f| outln!("{f}"));
    if findings.len() > SHOWN {
        outln!("and {} more", findings.len() - SHOWN);
    }
    if checked.corruptions_fixed + checked.leaks_fixed > 0 {
        let (corruptions, leaks) = (checked.corruptions_fixed, checked.leaks_fixed);
        outln!("Repaired: {corruptions} corruptions, {leaks} leaked clusters.");
    }
    match checked.status() {
        0 => outln!("No errors were found on the image."),
        _ => {
            let Checked { corruptions, leaks, errors, .. } = checked;
            outln!("{corruptions} errors, {leaks} leaked clusters, {errors} unchecked.");
            if *corruptions + *leaks > 0 {
                outln!("`ringback disk check --repair` repairs what can be.");
            }
        }
    }
    let number = |name: &str| {
        checked.numbers.iter().find(|(n, _)| *n == name).map_or(0, |(_, number)| *number)
    };
    let total = number("total-clusters");
    if total > 0 {
        let allocated = number("allocated-clusters");
        let percent = |part: u64, of: u64| part as f64 * 100.0 / of.max(1) as f64;
        outln!(
            "{allocated}/{total} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters",
            percent(allocated, total),
            percent(number("fragmented-clusters"), allocated),
            percent(number("compressed-clusters"), allocated),
        );
    }
    if number("image-end-offset") > 0 {
        outln!("Image end offset: {}", number("image-end-offset"));
    }
}
