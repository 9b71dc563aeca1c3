//! The real Xen.
