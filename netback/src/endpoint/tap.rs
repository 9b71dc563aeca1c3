//! A TAP device of the host: what Xen's own vif scripts put into a bridge or give an address.
//!
//! One descriptor a queue (`IFF_MULTI_QUEUE`). Each frame has a virtio-net header before it
//! (`IFF_VNET_HDR`), so that blank checksums and unsegmented packets pass both ways.

mod device;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::io::Errno;

pub use self::device::Persistence;
use super::vnet::{self, Size};
use super::{Abilities, Accepts, Endpoint, EndpointQueue, Waits};
use crate::config::Carrier;
use crate::frame::{Frame, Pool};

/// Of the header before each frame.
const HEADER: Size = Size::Long;

/// A TAP device; it goes with its last descriptor, unless it was made to [stay](Persistence).
pub struct Tap {
    state: Mutex<State>,
}

struct State {
    /// The device's ends: the first is there from the beginning, the others while a guest is
    /// connected.
    ends: Vec<Arc<OwnedFd>>,
}

impl Tap {
    /// Makes the device `name`, or takes over the one that a predecessor has left. Its link is down
    /// until a guest connects.
    pub fn open(name: &str) -> io::Result<Tap> {
        let end = device::open(name)
            .map_err(|e| io::Error::new(e.kind(), format!("TAP device {name}: {e}")))?;
        Ok(Tap { state: Mutex::new(State { ends: vec![Arc::new(end)] }) })
    }

    /// Whether there is a network device of this name.
    pub fn exists(name: &str) -> bool {
        device::exists(name)
    }

    /// Its present name: a script may have given it another.
    pub fn name(&self) -> io::Result<String> {
        device::name(self.first().as_fd())
    }

    /// Whether it outlives this process.
    pub fn persist(&self, persistence: Persistence) -> io::Result<()> {
        device::persist(self.first().as_fd(), persistence)
    }

    fn first(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.state.lock().ends[0])
    }
}

impl Endpoint for Tap {
    fn abilities(&self) -> Abilities {
        Abilities { checksum: true, tso4: true, tso6: true, mtu: 65_521 }
    }

    fn connect(&self, queues: usize, accepts: Accepts) -> io::Result<()> {
        let name = self.name()?;
        let mut state = self.state.lock();
        state.ends.truncate(1);
        for _ in 1..queues {
            state.ends.push(Arc::new(device::open(&name)?));
        }
        device::offload(state.ends[0].as_fd(), accepts)?;
        device::carrier(state.ends[0].as_fd(), Carrier::Up)
    }

    fn queue(&self, number: usize) -> io::Result<Box<dyn EndpointQueue>> {
        let state = self.state.lock();
        let end = state.ends.get(number).ok_or(io::ErrorKind::NotFound)?;
        Ok(Box::new(TapQueue { end: Arc::clone(end), full: false, dropped: 0 }))
    }

    fn link(&self, carrier: Carrier) -> io::Result<()> {
        device::carrier(self.first().as_fd(), carrier)
    }

    fn disconnect(&self) {
        let mut state = self.state.lock();
        state.ends.truncate(1);
        if let Err(e) = device::carrier(state.ends[0].as_fd(), Carrier::Down) {
            tracing::debug!("TAP device: its link: {e}");
        }
    }
}

/// One queue's descriptor.
struct TapQueue {
    end: Arc<OwnedFd>,
    /// The device took no more.
    full: bool,
    dropped: u64,
}

impl EndpointQueue for TapQueue {
    fn send(&mut self, frames: &mut VecDeque<Frame>, pool: &mut Pool) -> io::Result<()> {
        self.full = false;
        while let Some(mut frame) = frames.pop_front() {
            if !vnet::put(&mut frame, HEADER) {
                self.dropped += 1;
                pool.give(frame);
                continue;
            }
            match rustix::io::write(&*self.end, &frame) {
                Ok(_) => {}
                Err(Errno::AGAIN) => {
                    frame.trim_front(HEADER.bytes());
                    frames.push_front(frame);
                    self.full = true;
                    return Ok(());
                }
                Err(Errno::INTR) => {
                    frame.trim_front(HEADER.bytes());
                    frames.push_front(frame);
                    continue;
                }
                // EIO: the device is down. EINVAL: the kernel will not have it.
                Err(Errno::IO | Errno::INVAL | Errno::NOMEM | Errno::NOBUFS) => self.dropped += 1,
                Err(e) => return Err(e.into()),
            }
            pool.give(frame);
        }
        Ok(())
    }

    fn receive(
        &mut self,
        frames: &mut VecDeque<Frame>,
        room: usize,
        pool: &mut Pool,
    ) -> io::Result<()> {
        for _ in 0..room {
            let Some(mut frame) = pool.take() else { break };
            // The headroom has place for it: the frame itself stays where frames are.
            if !frame.grow_front(HEADER.bytes()) {
                pool.give(frame);
                break;
            }
            frame.set_len(usize::MAX);
            match rustix::io::read(&*self.end, &mut frame[..]) {
                Ok(len) if vnet::take(&mut frame, len, HEADER) => frames.push_back(frame),
                Ok(_) => {
                    self.dropped += 1;
                    pool.give(frame);
                }
                Err(e) => {
                    pool.give(frame);
                    match e {
                        // EBADFD: the device has gone, as `ip link del` does it.
                        Errno::AGAIN | Errno::INTR => break,
                        e => return Err(e.into()),
                    }
                }
            }
        }
        Ok(())
    }

    fn waits(&self) -> Waits<'_> {
        let end: BorrowedFd<'_> = self.end.as_fd();
        Waits { readable: Some(end), writable: self.full.then_some(end), ..Waits::default() }
    }

    fn take_dropped(&mut self) -> u64 {
        std::mem::take(&mut self.dropped)
    }
}

#[cfg(test)]
mod tests;
