//! `ringback disk bitmap`.

use std::process::ExitCode;

use blktap::formats::BitmapInfo;
use serde_json::{Value, json};

use super::open::Opening;
use super::work::Work;
use super::{Result, document, formats, sizes};
use crate::cli::disk::{Bitmap, Named};

/// What is done with one.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Act {
    Add {
        /// Bytes of a bit.
        granularity: Option<u64>,
        recording: bool,
    },
    Remove,
    Enable,
    Disable,
    Clear,
}

/// `ringback disk bitmap`.
pub fn run(what: &Bitmap) -> Result {
    let (act, named) = match what {
        Bitmap::List(list) => {
            let opening = Opening::to_read(&list.file, list.format.as_deref(), &Default::default());
            let opening = opening.force_share(list.force_share).alone();
            let format = opening.format()?;
            let bitmaps = formats::bitmaps(&opening, format)?;
            if list.output.json {
                let all: Vec<Value> = bitmaps.iter().map(value).collect();
                document(json!({"filename": list.file, "bitmaps": all}));
            } else {
                bitmaps.iter().for_each(|b| outln!("{}", text(b)));
            }
            return Ok(ExitCode::SUCCESS);
        }
        Bitmap::Add(add) => {
            let granularity = add.granularity.as_deref().map(sizes::parse).transpose()?;
            (Act::Add { granularity, recording: !add.disabled }, &add.named)
        }
        Bitmap::Remove(named) => (Act::Remove, named),
        Bitmap::Enable(named) => (Act::Enable, named),
        Bitmap::Disable(named) => (Act::Disable, named),
        Bitmap::Clear(named) => (Act::Clear, named),
    };
    change(act, named)
}

fn change(act: Act, named: &Named) -> Result {
    let opening = Opening::to_write(&named.file, named.format.as_deref(), &named.allow).alone();
    let format = opening.format()?;
    // From here on a signal waits for the end, which is not far.
    let _work = Work::new(false)?;
    formats::change_bitmap(&opening, format, act, &named.name)?;
    if named.output.json {
        document(json!({"filename": named.file, "name": named.name}));
    }
    Ok(ExitCode::SUCCESS)
}

/// With qemu-img's keys.
pub fn value(bitmap: &BitmapInfo) -> Value {
    json!({"name": bitmap.name, "granularity": bitmap.granularity, "flags": flags(bitmap)})
}

fn flags(bitmap: &BitmapInfo) -> Vec<&'static str> {
    let mut flags = Vec::new();
    if bitmap.in_use {
        flags.push("in-use");
    }
    if bitmap.recording {
        flags.push("auto");
    }
    flags
}

fn text(bitmap: &BitmapInfo) -> String {
    let state = match (bitmap.in_use, bitmap.recording) {
        (true, _) => "not valid: the image was not closed properly",
        (false, true) => "records writes",
        (false, false) => "disabled",
    };
    format!("{}: one bit for {}, {state}", bitmap.name, sizes::words(bitmap.granularity))
}
