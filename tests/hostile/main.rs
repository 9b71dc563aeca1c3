//! Hostile frontends against the block backend, as real processes on the bundled hypervisor.
//!
//! Each test has a hypervisor process, a backend process and two witnesses: a well-behaved device
//! of the hostile guest itself and one of another guest, which do verified I/O all the while. A
//! test asserts what became of the bad request or device, that both witnesses went on during
//! the attack, and that nothing of it is left in the backend. Tests named `xsa_N` are reproducers
//! of what that Xen security advisory found in other backends.

mod controls;
mod grants;
mod guest;
mod image;
mod kills;
mod lifetime;
mod limits;
mod memory;
mod process;
mod races;
mod requests;
mod rig;
mod ring;
mod scene;
mod states;
mod storms;
mod witness;
mod xenstore;

/// Not a test by itself: what this program does when a test starts it as another process.
#[test]
fn role() {
    rig::role();
}
