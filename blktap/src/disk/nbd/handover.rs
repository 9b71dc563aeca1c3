//! A connection that is agreed on and then given away: to the kernel's nbd driver.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use super::address::{Encryption, NbdTarget};
use super::connect::{Replies, connect};

/// A socket on which requests may be sent, answered by simple replies.
#[derive(Debug)]
pub struct Handover {
    /// The connection.
    pub socket: OwnedFd,
    /// Bytes of the export.
    pub size: u64,
    /// Its transmission flags.
    pub flags: u16,
    /// Smallest unit of a request.
    pub block: u32,
}

impl Handover {
    /// Connects and agrees, within `patience`. Not under TLS, which a socket alone does not have.
    pub fn connect(target: &NbdTarget, patience: Duration) -> io::Result<Handover> {
        if target.encryption != Encryption::Plain {
            let why = "a connection under TLS cannot be given away";
            return Err(io::Error::new(io::ErrorKind::Unsupported, why));
        }
        let link = connect(target, None, patience, Replies::Simple)?;
        let facts = link.facts;
        let socket = link.transport.into_socket();
        Ok(Handover { socket, size: facts.size, flags: facts.flags, block: facts.minimum })
    }
}
