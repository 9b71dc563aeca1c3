//! Ringback: a user-space Xen split-driver I/O stack.
