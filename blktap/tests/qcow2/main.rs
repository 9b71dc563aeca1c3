//! QCOW2 against QEMU's own tools and a model.
mod matrix;
#[allow(dead_code)]
mod qemu;
