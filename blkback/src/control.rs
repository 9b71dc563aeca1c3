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
