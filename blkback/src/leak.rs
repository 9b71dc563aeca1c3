//! Leaks on purpose, to test the leak checks with: `RINGBACK_TEST_LEAK=grant|port|node` makes each
//! closed disk leave one of the kind behind.

use std::any::Any;
use std::sync::Arc;

use hypervisor::store::{Client, Tx};
use hypervisor::xenbus::Nodes;
use parking_lot::Mutex;

static KEPT: Mutex<Vec<Box<dyn Any + Send>>> = Mutex::new(Vec::new());

fn asked(kind: &str) -> bool {
    std::env::var("RINGBACK_TEST_LEAK").is_ok_and(|asked| asked == kind)
}

/// Keeps what should have been dropped, if that kind is to leak.
pub(crate) fn keep(kind: &str, thing: impl Any + Send) {
    if asked(kind) {
        KEPT.lock().push(Box::new(thing));
    }
}

/// Writes a key below the device's node after the node has gone.
pub(crate) struct Node(Option<(Arc<Client>, String)>);

impl Node {
    pub(crate) fn none() -> Node {
        Node(None)
    }
    pub(crate) fn of(nodes: &Nodes) -> Node {
        Node(asked("node").then(|| (nodes.store().clone(), nodes.backend_path().to_owned())))
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some((store, path)) = self.0.take()
            && let Err(e) = store.write(Tx::NONE, &format!("{path}/leaked"), "1")
        {
            tracing::error!("cannot leak {path}: {e}");
        }
    }
}
