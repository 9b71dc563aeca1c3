//! Persistent dirty bitmaps.
pub mod directory;
