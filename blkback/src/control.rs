//! The requests of a block device's control socket: JSON objects with a `command`.

use std::path::PathBuf;

use hypervisor::xenbus::Fault;
use serde::Deserialize;
use serde_json::{Value, json};

/// What can be asked of a live device.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum Command {
    /// Look how large the disk is, and tell the guest.
    Resize {},
    /// Change a knob of the running device.
    Set {
        /// Its name.
        knob: String,
        /// Its new value.
        value: String,
    },
    /// Hold the guest's requests back, and close the disk.
    Pause {},
    /// Open the disk again and let requests go on.
    Resume {},
    /// Make an overlay and let the guest go on in it.
    Snapshot {
        /// `FORMAT:PATH`, absolute.
        overlay: String,
        /// The disk's file gets this name, and the overlay its name.
        rename: Option<PathBuf>,
        /// Wait when paused and when swapped, for other disks.
        #[serde(default)]
        hold: bool,
    },
    /// Copy the disk, and keep the copy equal.
    Mirror {
        /// `FORMAT:PATH`, absolute, or a server's export; it is there.
        target: String,
        /// Let the guest go on with the copy.
        #[serde(default)]
        switch: bool,
        /// Keep both equal until the word is given.
        #[serde(default)]
        hold: bool,
    },
    /// Write the disk's own data into an image that it builds on, and let the guest go on there.
    Commit {
        /// Its file; the nearest where none is named.
        base: Option<PathBuf>,
    },
    /// Bring what the disk has from images below into its own.
    Stream {
        /// The file of the image that it builds on afterwards; none where none is named.
        base: Option<PathBuf>,
    },
    /// Write an image in the middle of the chain into the one below it.
    Coalesce {
        /// Its file.
        layer: PathBuf,
    },
    /// Give the disk more bytes.
    Grow {
        /// How many it has then.
        size: u64,
    },
    /// What is known of the last job.
    Job {},
    /// End the job.
    Cancel {},
    /// The word to go on, for a job that waits.
    Complete {},
    /// Begin a log of changed blocks; one that is in use ends at that moment.
    ChangedLogStart {
        /// Its file, which is new.
        path: PathBuf,
    },
    /// End the log of changed blocks.
    ChangedLogStop {},
}

/// One line for one line: an object, `{"size": BYTES}` for a resize, or `{"error": TEXT}`.
pub(crate) fn answer(line: &str, act: impl FnOnce(Command) -> Result<Value, Fault>) -> String {
    let done = serde_json::from_str(line).map_err(|e| Fault(e.to_string())).and_then(act);
    match done {
        Ok(value) => value.to_string(),
        Err(Fault(error)) => json!({"error": error}).to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_in_and_out() {
        assert_eq!(
            answer(r#"{"command":"resize"}"#, |_| Ok(json!({"size": 512}))),
            r#"{"size":512}"#
        );
        let refused = answer(r#"{"command":"resize"}"#, |_| Err(Fault("no".into())));
        assert_eq!(refused, r#"{"error":"no"}"#);
        for bad in ["", "{}", "[", r#"{"command":"fly"}"#, r#"{"command":"resize","x":1}"#] {
            let answered = answer(bad, |c| panic!("{c:?}"));
            assert!(answered.starts_with(r#"{"error":"#), "{answered}");
        }
    }
}
