//! New QCOW2 images, and internal snapshots of images that nobody serves: against QEMU's
//! programs (Debian's qemu-utils), and with the power cut.
mod create;
mod cuts;
mod peers;
mod qemu;
mod refusals;
#[path = "../support/tool.rs"]
mod tool;
