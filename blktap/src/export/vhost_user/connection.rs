//! One front-end: its messages, taken one by one, until it goes or breaks the rules.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, IoSliceMut, ioctl_fionread};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use vhost::vhost_user::BackendReqHandler;
use vhost::vhost_user::message::{FrontendReq, MAX_MSG_SIZE};

use super::device::Device;
use super::memory::NoRegion;
use super::ring::Broken;
use super::server::Export;

/// How long the rest of a message may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often the disk's size is looked at.
const LOOK: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };
/// Bytes of a message's head: request, flags, size.
const HEADER: usize = 12;

/// Why a connection was ended by this side.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    /// A message that cannot be one.
    #[error("a message {0}")]
    Message(String),
    /// A message that is refused.
    #[error("{0}: {1}")]
    Refused(String, vhost::vhost_user::Error),
    /// A ring that is none.
    #[error("queue {0} {1}")]
    Vring(u16, &'static str),
    /// A queue that there is not.
    #[error("queue {0}: there are {1}")]
    NoQueue(u32, u16),
    /// A driver that breaks its ring.
    #[error("queue {0}: {1}")]
    Ring(u16, Broken),
    /// Its memory.
    #[error("memory: {0}")]
    Memory(#[from] NoRegion),
    /// The in-flight region.
    #[error("the in-flight region: {0}")]
    Inflight(String),
    /// A descriptor of the wrong kind.
    #[error("queue {0}: its {1} descriptor is no eventfd")]
    Descriptor(u16, &'static str),
    /// Features that were not offered.
    #[error("features {0:#x} were taken up, and {1:#x} offered")]
    Features(u64, u64),
    /// It writes what it may not.
    #[error("{len} bytes of configuration are written at {offset}")]
    Config { offset: u32, len: usize },
    /// No queue for the disk.
    #[error("opening a queue of the disk: {0}")]
    Queue(io::Error),
    /// The disk's queue is broken.
    #[error("the disk's queue: {0}")]
    Disk(io::Error),
    /// No memory, no thread, no descriptor.
    #[error("out of resources: {0}")]
    Resources(io::Error),
    /// The socket.
    #[error("{0}")]
    Socket(io::Error),
}

/// How a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The front-end closed it.
    Gone,
    /// The server ends.
    Stopped,
}

/// What is at the socket.
enum Next {
    Message(FrontendReq),
    Nothing,
    Gone,
}

/// See the module.
pub struct Connection<'a> {
    socket: UnixStream,
    handler: BackendReqHandler<Mutex<Device>>,
    device: Arc<Mutex<Device>>,
    stop: BorrowedFd<'a>,
    /// Since when a message is not whole.
    waiting: Option<Instant>,
}

impl<'a> Connection<'a> {
    pub fn new(socket: UnixStream, export: &Export, stop: BorrowedFd<'a>) -> Result<Self, Cause> {
        let device = Arc::new(Mutex::new(Device::new(export).map_err(Cause::Resources)?));
        let theirs = socket.try_clone().map_err(Cause::Resources)?;
        let handler = BackendReqHandler::from_stream(theirs, Arc::clone(&device));
        Ok(Connection { socket, handler, device, stop, waiting: None })
    }

    fn device(&self) -> MutexGuard<'_, Device> {
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves until either side is done, and all that was taken is answered: how, and how many
    /// requests there were.
    pub fn run(&mut self) -> Result<(End, u64), Cause> {
        let served = self.serve();
        let stopped = self.device().stop_all();
        let end = served?;
        stopped?;
        Ok((end, self.device().requests()))
    }

    fn serve(&mut self) -> Result<End, Cause> {
        let ended = self.device().ended();
        loop {
            match self.next()? {
                Next::Message(request) => self.handle(request)?,
                Next::Gone => return Ok(End::Gone),
                Next::Nothing => {
                    if self.sleep(&ended)? {
                        return Ok(End::Stopped);
                    }
                }
            }
        }
    }

    /// Waits for a message, the end, or the moment to look at the disk's size; whether it is the
    /// end.
    fn sleep(&mut self, ended: &OwnedFd) -> Result<bool, Cause> {
        if self.waiting.is_some() {
            // The socket stays readable meanwhile.
            std::thread::sleep(Duration::from_millis(1));
        }
        let mut fds = [
            PollFd::from_borrowed_fd(self.stop, PollFlags::IN),
            PollFd::new(ended, PollFlags::IN),
            PollFd::new(&self.socket, PollFlags::IN),
        ];
        match poll(&mut fds, Some(&LOOK)) {
            Ok(0) => self.device().look_at_size(),
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(Cause::Socket(e.into())),
        }
        let ready = |n: usize| !fds[n].revents().is_empty();
        if ready(1) {
            // A queue's thread has ended: if by itself, it says why.
            let mut count = [0; 8];
            rustix::io::read(ended, &mut count).map_err(|e| Cause::Resources(e.into()))?;
            self.device().collect()?;
        }
        Ok(ready(0))
    }

    /// Looks whether a whole message is there: what takes it does not wait for its rest.
    fn next(&mut self) -> Result<Next, Cause> {
        let failed = |e: Errno| Cause::Socket(e.into());
        let there = ioctl_fionread(&self.socket).map_err(failed)?;
        if there < HEADER as u64 {
            if there == 0 && self.is_gone()? {
                return Ok(Next::Gone);
            }
            return self.not_whole(there > 0);
        }
        let mut header = [0; HEADER];
        let (_, channel) = self.peek(&mut header)?;
        let [c0, c1, c2, c3, _, _, _, _, s0, s1, s2, s3] = header;
        let code = u32::from_ne_bytes([c0, c1, c2, c3]);
        let size = u32::from_ne_bytes([s0, s1, s2, s3]);
        let request = FrontendReq::try_from(code);
        let request = request.map_err(|_| Cause::Message(format!("of unknown kind {code}")))?;
        if size as usize > MAX_MSG_SIZE {
            let text = format!("({request:?}) of {size} bytes, which is more than {MAX_MSG_SIZE}");
            return Err(Cause::Message(text));
        }
        if there < HEADER as u64 + u64::from(size) {
            return self.not_whole(true);
        }
        self.waiting = None;
        if request == FrontendReq::SET_BACKEND_REQ_FD {
            // The crate's own end of this channel cannot say that the configuration changed.
            self.device().set_channel(channel);
        }
        Ok(Next::Message(request))
    }

    fn not_whole(&mut self, begun: bool) -> Result<Next, Cause> {
        match (begun, self.waiting) {
            (false, _) => self.waiting = None,
            (true, None) => self.waiting = Some(Instant::now()),
            (true, Some(since)) if since.elapsed() > PATIENCE => {
                let text = format!("that is not whole within {} s", PATIENCE.as_secs());
                return Err(Cause::Message(text));
            }
            (true, Some(_)) if self.is_gone()? => return Ok(Next::Gone),
            _ => {}
        }
        Ok(Next::Nothing)
    }

    /// Whether the other side has closed its end.
    fn is_gone(&self) -> Result<bool, Cause> {
        let mut fds = [PollFd::new(&self.socket, PollFlags::RDHUP)];
        match poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
            Ok(_) | Err(Errno::INTR) => Ok(!fds[0].revents().is_empty()),
            Err(e) => Err(Cause::Socket(e.into())),
        }
    }

    /// Looks at the head of a message, and gets a copy of its descriptor if it has one.
    fn peek(&self, header: &mut [u8; HEADER]) -> Result<(usize, Option<OwnedFd>), Cause> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(32))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::PEEK | RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let mut into = [IoSliceMut::new(header)];
        let got = recvmsg(&self.socket, &mut into, &mut control, flags);
        let bytes = got.map_err(|e| Cause::Socket(e.into()))?.bytes;
        let fds = control.drain().filter_map(|m| match m {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        });
        Ok((bytes, fds.flatten().next()))
    }

    /// Has the message taken and carried out.
    fn handle(&mut self, request: FrontendReq) -> Result<(), Cause> {
        let handled = self.handler.handle_request();
        // The device's own word is better than the crate's.
        self.device().take_cause()?;
        handled.map_err(|e| Cause::Refused(format!("{request:?}"), e))
    }
}
