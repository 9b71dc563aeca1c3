//! Backends that are killed by SIGKILL under a guest's verified load, again and again: whoever
//! comes next answers what they had taken, and the guest notices nothing.

mod load;
mod lost;
mod net;
// The guest's plan and the content of its blocks, as its process has them.
#[allow(dead_code)]
#[path = "../../src/commands/run/plan.rs"]
mod plan;
mod rig;
#[allow(dead_code)]
#[path = "../../src/commands/run/stamp.rs"]
mod stamp;
