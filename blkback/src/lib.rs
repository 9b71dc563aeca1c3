//! The block backend and frontend of the Xen split-driver model.
