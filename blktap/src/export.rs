//! Ways to give a disk to those who have no Xen.

pub mod nbd;
mod unix;
pub mod vhost_user;
