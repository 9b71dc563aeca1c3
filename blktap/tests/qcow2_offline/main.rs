//! What is done to QCOW2 images that nobody has open: check, repair, resize, bitmaps, measure.
//! QEMU's programs (Debian's qemu-utils) make the images and judge the results.
mod bitmaps;
mod check;
mod measure;
mod offline;
mod qemu;
mod rebase;
mod repair;
mod resize;
