//! QCOW2 images from a stranger: each is refused with a clear error or reads as an independent
//! reader says; a repair changes no data; and what is clean after it stays clean when written.
//!
//! `cargo test` goes through the named mutations, replays the corpus in `__fuzz__`, and does a
//! run that is the same each time and a short random one. Longer:
//! `BOLERO_RANDOM_TEST_TIME_MS=600000 BOLERO_RANDOM_ITERATIONS=1000000000 cargo test --release -p ringback-blktap --test
//! qcow2_hostile`, or guided by coverage: `cargo bolero test -p ringback-blktap images
//! --sanitizer NONE`. QEMU's programs (Debian's qemu-utils) make the good images.
mod bytes;
mod disk;
mod fuzz;
mod judge;
mod model;
mod mutations;
