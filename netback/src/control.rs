//! The requests of a vif's control socket: JSON objects with a `command`.

use hypervisor::xenbus::Fault;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::hold::Then;

/// What can be asked of a live vif.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum Command {
    /// Change a knob of the running device.
    Set {
        /// Its name.
        knob: String,
        /// Its new value.
        value: String,
    },
    /// Hold what the guest sends from now on.
    HoldOutput {},
    /// Let go what is held now.
    ReleaseOutput {
        /// What becomes of what comes later.
        #[serde(default)]
        then: Then,
    },
    /// Drop what is held now.
    DropOutput {
        /// As above.
        #[serde(default)]
        then: Then,
    },
}

/// One line for one line: an object, or `{"error": TEXT}`.
pub(crate) fn answer(line: &str, act: impl FnOnce(Command) -> Result<Value, Fault>) -> String {
    let done = serde_json::from_str(line).map_err(|e| Fault(e.to_string())).and_then(act);
    match done {
        Ok(value) => value.to_string(),
        Err(Fault(error)) => json!({"error": error}).to_string(),
    }
}
