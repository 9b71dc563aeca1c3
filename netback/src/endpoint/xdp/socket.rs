//! The socket of one hardware queue, with the memory of its frames and its rings (linux/if_xdp.h, the
//! kernel's networking/af_xdp.rst).
//!
//! A frame of the first kind is always in one of four places: the fill ring, the driver, the receive
//! ring, or this process's hands while it is copied. One of the second kind is free, in the send ring,
//! with the driver, or in the completion ring. Each ring has room for all frames that can come to it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::sockopt::{
    set_xdp_rx_ring_size, set_xdp_tx_ring_size, set_xdp_umem_completion_ring_size,
    set_xdp_umem_fill_ring_size, set_xdp_umem_reg, xdp_mmap_offsets, xdp_options,
};
use rustix::net::xdp::{
    SocketAddrXdp, SocketAddrXdpFlags, XDP_PGOFF_RX_RING, XDP_PGOFF_TX_RING,
    XDP_UMEM_PGOFF_COMPLETION_RING, XDP_UMEM_PGOFF_FILL_RING, XdpOptionsFlags, XdpRingOffset,
    XdpUmemReg, XdpUmemRegFlags,
};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind, recv, send, socket_with,
};

use super::memory::Memory;
use super::ring::{Consumer, Mapped, Packet, Places, Producer};

/// Bytes of a frame: the kernel wants a power of 2 and at most a page.
const FRAME: usize = 4096;
/// What the kernel keeps before a packet that comes (`XDP_PACKET_HEADROOM`).
const KEPT: usize = 256;
/// Longest packet.
pub(super) const LONGEST: usize = FRAME - KEPT;
/// Frames for packets that come; all of them may wait in the receive ring.
const RX_FRAMES: u32 = 1024;
/// Frames for packets that go: as many as the send ring has places, and as many again that are with the
/// driver.
const TX_FRAMES: u32 = 1024;
const TX_RING: u32 = 512;
/// How long a predecessor's socket may still hold the hardware queue: the kernel takes it away a moment
/// after its descriptor is closed.
const PATIENCE: Duration = Duration::from_secs(1);
const LOOK: Duration = Duration::from_millis(2);

/// What a socket is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    /// Both ways.
    Both,
    /// Packets that come alone.
    Receive,
}

/// What the kernel has made of packets that are to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sent {
    /// It has them, or will take them when the driver has room.
    Yes,
    /// The interface is down: they wait.
    Down,
}

/// What goes, beside what comes.
struct Sender {
    ring: Producer<Packet>,
    free: Vec<u64>,
}

impl Sender {
    fn new(mapped: Mapped) -> io::Result<Sender> {
        let free = (RX_FRAMES..RX_FRAMES + TX_FRAMES).rev();
        let free = free.map(|frame| u64::from(frame) * FRAME as u64).collect();
        Ok(Sender { ring: Producer::new("send", mapped)?, free })
    }
}

/// One hardware queue.
pub(super) struct Socket {
    fd: OwnedFd,
    frames: Memory,
    fill: Producer<u64>,
    received: Consumer<Packet>,
    completed: Consumer<u64>,
    sender: Option<Sender>,
}

/// An error with what was being done.
fn doing<T, E: Into<io::Error>>(what: &str, result: Result<T, E>) -> io::Result<T> {
    result.map_err(|e| {
        let e: io::Error = e.into();
        io::Error::new(e.kind(), format!("{what}: {e}"))
    })
}

fn socket() -> io::Result<OwnedFd> {
    let made = socket_with(AddressFamily::XDP, SocketType::RAW, SocketFlags::CLOEXEC, None);
    doing("making an AF_XDP socket", made)
}

fn places(offsets: XdpRingOffset) -> io::Result<Places> {
    let at = |offset: u64| usize::try_from(offset).map_err(io::Error::other);
    let flags = offsets.flags.ok_or(io::ErrorKind::Unsupported)?;
    Ok(Places {
        producer: at(offsets.producer)?,
        consumer: at(offsets.consumer)?,
        flags: at(flags)?,
        entries: at(offsets.desc)?,
    })
}

/// Maps the ring at `offset`, with `size` entries of a `T`.
fn map<T>(fd: &OwnedFd, offset: u64, within: XdpRingOffset, size: u32) -> io::Result<Mapped> {
    let places = places(within)?;
    let len = places.entries.saturating_add(size as usize * size_of::<T>());
    Ok(Mapped { memory: Memory::of(fd.as_fd(), len, offset)?, places, size })
}

impl Socket {
    /// A socket with its rings, on the hardware queue `number` of the interface with that index. Its
    /// frames are the driver's own where the driver can (zero copy); else packets are copied to them.
    pub(super) fn open(interface: u32, number: u32, what_for: Use) -> io::Result<Socket> {
        let tx_frames = if what_for == Use::Both { TX_FRAMES } else { 0 };
        let frames = Memory::zeroed((RX_FRAMES + tx_frames) as usize * FRAME)?;
        let fd = socket()?;
        let memory = XdpUmemReg {
            addr: frames.address(),
            len: frames.len() as u64,
            chunk_size: FRAME as u32,
            headroom: 0,
            flags: XdpUmemRegFlags::empty(),
            tx_metadata_len: 0,
        };
        doing("locking memory for frames (RLIMIT_MEMLOCK)", set_xdp_umem_reg(&fd, memory))?;
        set_xdp_umem_fill_ring_size(&fd, RX_FRAMES)?;
        // The kernel wants this ring of each.
        let completed = tx_frames.max(1);
        set_xdp_umem_completion_ring_size(&fd, completed)?;
        set_xdp_rx_ring_size(&fd, RX_FRAMES)?;
        if what_for == Use::Both {
            set_xdp_tx_ring_size(&fd, TX_RING)?;
        }
        let offsets = xdp_mmap_offsets(&fd)?;
        let fill = map::<u64>(&fd, XDP_UMEM_PGOFF_FILL_RING, offsets.fr, RX_FRAMES)?;
        let completed = map::<u64>(&fd, XDP_UMEM_PGOFF_COMPLETION_RING, offsets.cr, completed)?;
        let received = map::<Packet>(&fd, XDP_PGOFF_RX_RING, offsets.rx, RX_FRAMES)?;
        let sender = match what_for {
            Use::Both => {
                Some(Sender::new(map::<Packet>(&fd, XDP_PGOFF_TX_RING, offsets.tx, TX_RING)?)?)
            }
            Use::Receive => None,
        };
        let (fill, received) = (Producer::new("fill", fill)?, Consumer::new("receive", received)?);
        let completed = Consumer::new("completion", completed)?;
        let mut socket = Socket { fd, frames, fill, received, completed, sender };
        for frame in 0..RX_FRAMES {
            socket.recycle(u64::from(frame) * FRAME as u64)?;
        }
        socket.fill.publish()?;
        socket.bind(interface, number)?;
        Ok(socket)
    }

    fn bind(&self, interface: u32, number: u32) -> io::Result<()> {
        // Without XDP_COPY and XDP_ZEROCOPY the kernel tries the latter first.
        let flags = SocketAddrXdpFlags::XDP_USE_NEED_WAKEUP;
        let address = SocketAddrXdp::new(flags, interface, number);
        let until = Instant::now() + PATIENCE;
        loop {
            match bind(&self.fd, &address) {
                Err(Errno::BUSY) if Instant::now() < until => std::thread::sleep(LOOK),
                done => return doing(&format!("binding to queue {number}"), done),
            }
        }
    }

    /// Whether packets are not copied between the driver and the frames.
    pub(super) fn is_zero_copy(&self) -> io::Result<bool> {
        Ok(xdp_options(&self.fd)?.contains(XdpOptionsFlags::XDP_OPTIONS_ZEROCOPY))
    }

    /// Gives the driver a frame to fill.
    fn recycle(&mut self, frame: u64) -> io::Result<()> {
        if self.fill.push(&frame)? {
            return Ok(());
        }
        Err(io::Error::other("the fill ring has no room for a frame that came out of it"))
    }

    // ---- packets that come

    /// The next packet that has come: where it is in the frames' memory, and how long.
    pub(super) fn receive(&mut self) -> io::Result<Option<(usize, usize)>> {
        let Some(packet) = self.received.pop()? else { return Ok(None) };
        let (at, len) = (packet.at as usize, packet.len as usize);
        let fits = at % FRAME + len <= FRAME && at / FRAME < RX_FRAMES as usize;
        let wrong = || io::Error::other(format!("the kernel's {packet:?} is no packet in a frame"));
        fits.then_some(Some((at, len))).ok_or_else(wrong)
    }

    /// Copies the packet at `at` out and gives its frame back to the driver.
    pub(super) fn take(&mut self, at: usize, into: &mut [u8]) -> io::Result<bool> {
        let whole = self.frames.read(at, into);
        self.recycle((at - at % FRAME) as u64)?;
        Ok(whole)
    }

    /// Tells the kernel what has been taken; to be called behind a batch.
    pub(super) fn taken(&mut self) -> io::Result<()> {
        self.received.release()?;
        if self.fill.publish()? {
            // A driver without frames waits for this call. Its failures are those of an interface that
            // is down or gone, which sending tells.
            let _ = recv(&self.fd, &mut [0u8; 0][..], RecvFlags::DONTWAIT);
        }
        Ok(())
    }

    // ---- packets that go

    /// Packets that the kernel has not taken yet, of how many that it may have.
    pub(super) fn unsent(&self) -> io::Result<(u32, u32)> {
        let ring = self.sender.as_ref().map(|sender| &sender.ring);
        ring.map_or(Ok((0, 0)), |ring| Ok((ring.pending()?, ring.size())))
    }

    /// Frees the frames of packets that are gone.
    pub(super) fn reclaim(&mut self) -> io::Result<()> {
        let Some(sender) = &mut self.sender else { return Ok(()) };
        while let Some(at) = self.completed.pop()? {
            let frame = at / FRAME as u64;
            let is_one = (RX_FRAMES.into()..u64::from(RX_FRAMES + TX_FRAMES)).contains(&frame);
            if !is_one || sender.free.len() >= TX_FRAMES as usize {
                return Err(io::Error::other(format!(
                    "the kernel completes {at:#x}, which was not sent"
                )));
            }
            sender.free.push(frame * FRAME as u64);
        }
        self.completed.release()
    }

    /// Puts a packet into the send ring; whether there was room for it.
    pub(super) fn put(&mut self, bytes: &[u8]) -> io::Result<bool> {
        let Some(sender) = &mut self.sender else { return Ok(false) };
        let Some(at) = sender.free.pop() else { return Ok(false) };
        let packet = Packet { at, len: bytes.len() as u32, options: 0 };
        let put = bytes.len() <= FRAME
            && self.frames.write(at as usize, bytes)
            && sender.ring.push(&packet)?;
        if !put {
            sender.free.push(at);
        }
        Ok(put)
    }

    /// Shows the kernel the packets in the send ring, and calls it where it wants that. ENXIO and
    /// ENODEV: the interface is gone, or its driver is not ready.
    pub(super) fn flush(&mut self) -> io::Result<Sent> {
        let Some(sender) = &mut self.sender else { return Ok(Sent::Yes) };
        let mut wants = sender.ring.publish()?;
        let mut left = sender.ring.pending()?;
        // Without zero copy a call sends a part: 32 packets.
        while wants && left > 0 {
            match send(&self.fd, &[], SendFlags::DONTWAIT) {
                Ok(_) => {}
                // The driver's queue is full, or memory is short: later.
                Err(Errno::AGAIN | Errno::BUSY | Errno::NOBUFS | Errno::NOMEM | Errno::INTR) => {}
                Err(Errno::NETDOWN) => return Ok(Sent::Down),
                Err(e) => return Err(e.into()),
            }
            let before = std::mem::replace(&mut left, sender.ring.pending()?);
            wants = left < before && sender.ring.wants_wakeup()?;
        }
        Ok(Sent::Yes)
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
