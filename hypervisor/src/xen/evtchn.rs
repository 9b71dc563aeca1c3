//! /dev/xen/evtchn: one descriptor for each channel, so that no two queues meet in one.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use super::ioctl;
use crate::{DomId, EventChannel, Port};

/// An event channel's local end; unbound when dropped, with its descriptor.
pub(super) struct Evtchn {
    device: File,
    port: Port,
}

impl Evtchn {
    pub(super) fn bind_interdomain(device: File, domid: DomId, port: Port) -> io::Result<Evtchn> {
        let bind = ioctl::BindInterdomain { remote_domain: domid.into(), remote_port: port };
        let port = ioctl::evtchn_bind_interdomain(&device, bind)?;
        Evtchn::new(device, domid, port)
    }

    pub(super) fn alloc_unbound(device: File, peer: DomId) -> io::Result<Evtchn> {
        let port = ioctl::evtchn_bind_unbound(&device, ioctl::One { value: peer.into() })?;
        Evtchn::new(device, peer, port)
    }

    fn new(device: File, peer: DomId, port: i32) -> io::Result<Evtchn> {
        fcntl_setfl(&device, fcntl_getfl(&device)? | OFlags::NONBLOCK)?;
        // The descriptor needs nothing more; whoever took this process over would get no further
        // than this peer. Kernels before 4.8 do not have it.
        if let Err(e) = ioctl::evtchn_restrict(&device, ioctl::Restrict { domid: peer }) {
            tracing::debug!("evtchn: cannot restrict to domain {peer}: {e}");
        }
        Ok(Evtchn { device, port: port as Port })
    }
}

impl EventChannel for Evtchn {
    fn notify(&self) -> io::Result<()> {
        ioctl::evtchn_notify(&self.device, ioctl::One { value: self.port }).map(drop)
    }

    fn as_fd(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }

    fn acknowledge(&self) -> io::Result<bool> {
        let mut ports = [0; 4 * size_of::<Port>()];
        let pending = match rustix::io::read(&self.device, &mut ports) {
            Ok(n) => n >= size_of::<Port>(),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => false,
            // EFBIG: the kernel's ring of ports overflowed, which one port cannot do alone.
            Err(rustix::io::Errno::FBIG) => {
                ioctl::evtchn_reset(&self.device, ())?;
                true
            }
            Err(e) => return Err(e.into()),
        };
        if pending {
            // Reading a port masks it; writing it back lets the next event through.
            rustix::io::write(&self.device, &self.port.to_ne_bytes())?;
        }
        Ok(pending)
    }

    fn port(&self) -> Port {
        self.port
    }
}

#[cfg(test)]
#[path = "evtchn_tests.rs"]
mod tests;
