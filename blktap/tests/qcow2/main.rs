//! QCOW2 against QEMU's own tools and a model.
mod matrix;
mod packed;
mod qemu;
mod queues;
mod states;
#[path = "../support/tool.rs"]
mod tool;
