//! QCOW2, versions 2 and 3, after QEMU's docs/interop/qcow2.rst.
pub mod bitmaps;
pub mod check;
pub mod entry;
pub mod extension;
pub mod header;
pub mod offline;
