//! `ringback disk`: images that nobody serves, and the disks of running guests.

mod bitmap;
mod check;
mod commit;
mod compare;
mod convert;
mod create;
mod formats;
mod info;
mod live;
mod map;
mod measure;
mod open;
mod options;
mod rebase;
mod resize;
mod sizes;
mod snapshot;
pub(super) mod work;

use std::path::PathBuf;
use std::process::ExitCode;

use serde_json::json;

use super::{Context, Result};
use crate::cli::disk::{Disk, Snapshot};
use crate::platform::run_dir;

/// Exit status of a wrong use.
const USAGE: u8 = 2;

/// A wrong use of the command line.
#[derive(Debug)]
pub struct Usage(pub String);

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// For `map_err`: about `what`.
pub fn about<E: std::fmt::Display>(what: &str) -> impl FnOnce(E) -> Box<dyn std::error::Error> {
    move |e| format!("{what}: {e}").into()
}

/// `ringback disk`. Only what speaks to a device needs to know where these are.
pub fn run(given: Option<PathBuf>, disk: &Disk) -> Result {
    let devices = || run_dir(given.clone()).map(|run_dir| Context { run_dir, socket: None });
    let result = match disk {
        Disk::Create(options) => create::run(options),
        Disk::Info(options) => info::run(options),
        Disk::Check(options) => check::run(options),
        Disk::Convert(options) => convert::run(options),
        Disk::Resize(options) if options.live.is_some() => live::resize(&devices()?, options),
        Disk::Resize(options) => resize::run(options),
        Disk::Map(options) => map::run(options),
        Disk::Measure(options) => measure::run(options),
        Disk::Compare(options) => compare::run(options),
        Disk::Rebase(options) => rebase::run(options),
        Disk::Snapshot(Snapshot::Create(new)) if !new.live.is_empty() => {
            live::snapshot(&devices()?, new)
        }
        Disk::Snapshot(what) => snapshot::run(what),
        Disk::Commit(options) if options.live.is_some() => live::commit(&devices()?, options),
        Disk::Commit(options) if options.file.is_empty() => {
            Err(Usage("name the image, or a running guest's disk with --live".into()).into())
        }
        Disk::Commit(options) => commit::run(options),
        Disk::Bitmap(what) => bitmap::run(what),
        Disk::Mirror(mirror) => live::mirror(&devices()?, mirror),
        Disk::Stream(stream) => live::stream(&devices()?, stream),
        Disk::Coalesce(coalesce) => live::coalesce(&devices()?, coalesce),
        Disk::Pause(on) => live::run(&devices()?, on, &json!({"command": "pause"}), "paused"),
        Disk::Resume(on) => live::resume(&devices()?, on),
        Disk::Job(on) => live::word(&devices()?, on, "job"),
        Disk::Cancel(on) => live::word(&devices()?, on, "cancel"),
        Disk::Complete(on) => live::word(&devices()?, on, "complete"),
        // These need a run folder.
        Disk::Connect(_) | Disk::Disconnect(_) => Ok(ExitCode::SUCCESS),
    };
    match result {
        Err(e) if e.is::<Usage>() => {
            errln!("ringback: {e}");
            Ok(ExitCode::from(USAGE))
        }
        // 1 means that they differ.
        Err(e) if matches!(disk, Disk::Compare(_)) => {
            errln!("ringback: {e}");
            Ok(ExitCode::from(compare::FAILED))
        }
        result => result,
    }
}

/// Prints the one JSON document of a command, with the number of its schema.
fn document(mut value: serde_json::Value) {
    if let Some(object) = value.as_object_mut() {
        object.insert("schema".into(), 1.into());
    }
    outln!("{value}");
}
