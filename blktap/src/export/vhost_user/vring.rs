//! One ring of a device: what messages have said of it, and its thread while it runs.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::io::write;

use super::blk::ID_BYTES;
use super::connection::Cause;
use super::memory::{Memory, Window};
use super::ring::{Area, Events, Layout, MAX_SIZE, Packed, Ring, Split};
use super::worker::{Control, Ended, Parts, Worker};
use crate::disk::{Discarded, Disk};

/// How often a thread that should have ended is looked at.
const LOOK: Duration = Duration::from_millis(1);

/// Where its three parts are, by the front-end's own addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    pub desc: u64,
    pub driver: u64,
    pub device: u64,
}

/// Which of the two rings was agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Split,
    Packed,
}

/// What all rings of a device have in common when they start.
pub struct Common {
    pub kind: Kind,
    pub events: Events,
    pub memory: Arc<Memory>,
    pub disk: Arc<dyn Disk>,
    pub id: [u8; ID_BYTES],
    pub poll_us: u32,
    /// Whether writes may stay in a cache until a flush.
    pub writeback: Arc<AtomicBool>,
    /// Written when a thread ends.
    pub ended: Arc<OwnedFd>,
}

struct Running {
    control: Arc<Control>,
    thread: JoinHandle<Result<Ended, Cause>>,
}

/// See the module.
#[derive(Default)]
pub struct Vring {
    pub size: u16,
    pub addresses: Option<Addresses>,
    pub base: u32,
    pub kick: Option<Arc<OwnedFd>>,
    pub call: Option<Arc<OwnedFd>>,
    pub err: Option<OwnedFd>,
    pub enabled: bool,
    running: Option<Running>,
    /// Requests of threads that have ended.
    pub requests: u64,
}

impl Vring {
    /// Whether all is known that it needs to run.
    pub fn is_ready(&self) -> bool {
        self.running.is_none()
            && self.enabled
            && self.kick.is_some()
            && self.addresses.is_some()
            && self.size > 0
    }

    /// Whether it has a thread.
    pub fn is_running(&self) -> bool {
        self.running.is_some()
    }

    /// Takes another descriptor to notify.
    pub fn set_call(&mut self, call: Option<OwnedFd>) {
        self.call = call.map(Arc::new);
        if let Some(running) = &self.running {
            running.control.set_call(self.call.clone());
        }
    }

    /// Where the ring lies in this process.
    fn layout(
        &self,
        index: u16,
        common: &Common,
        inflight: Option<Window>,
    ) -> Result<Layout, Cause> {
        let size = self.size;
        let Some(at) = self.addresses else { return Err(Cause::Vring(index, "has no address")) };
        let (desc, driver, device) = match common.kind {
            Kind::Split => Split::bytes(size),
            Kind::Packed => Packed::bytes(size),
        };
        if size > MAX_SIZE || (common.kind == Kind::Split && !size.is_power_of_two()) {
            return Err(Cause::Vring(index, "has a size that no ring can have"));
        }
        let find = |user, len, align| {
            let window = common.memory.window(user, len);
            let window = window.ok_or(Cause::Vring(index, "lies in no region of the memory"))?;
            match window.is_aligned(align) {
                true => Ok(window),
                false => Err(Cause::Vring(index, "is not aligned")),
            }
        };
        Ok(Layout {
            size,
            desc: find(at.desc, desc, 16)?,
            driver: find(at.driver, driver, if common.kind == Kind::Split { 2 } else { 4 })?,
            device: find(at.device, device, 4)?,
            events: common.events,
            inflight: inflight.map(Area),
        })
    }

    /// Starts its thread.
    pub fn start(
        &mut self,
        index: u16,
        common: &Common,
        inflight: Option<Window>,
    ) -> Result<(), Cause> {
        let layout = self.layout(index, common, inflight.clone())?;
        let Some(kick) = self.kick.clone() else { return Err(Cause::Vring(index, "has no kick")) };
        let control = Control::new(self.call.clone(), Arc::clone(&common.writeback));
        let control = Arc::new(control.map_err(Cause::Resources)?);
        let parts = Parts {
            index,
            size: self.size,
            disk: common.disk.queue(u32::from(self.size)).map_err(Cause::Queue)?,
            memory: Arc::clone(&common.memory),
            inflight,
            kick,
            control: Arc::clone(&control),
            id: common.id,
            punches: common.disk.discarded() == Discarded::Zeroes
                && common.disk.geometry().discard.is_some(),
            poll_us: common.poll_us,
        };
        let broken = |e| Cause::Ring(index, e);
        let ending = Ending(Arc::clone(&control), Arc::clone(&common.ended));
        let thread = match common.kind {
            Kind::Split => {
                let ring = Split::new(layout, self.base).map_err(broken)?;
                spawn(Worker::new(ring, parts), index, ending)
            }
            Kind::Packed => {
                let ring = Packed::new(layout, self.base).map_err(broken)?;
                spawn(Worker::new(ring, parts), index, ending)
            }
        };
        self.running = Some(Running { control, thread: thread.map_err(Cause::Resources)? });
        Ok(())
    }

    /// Ends its thread, when all that it has taken is answered.
    pub fn stop(&mut self) -> Result<(), Cause> {
        let Some(Running { control, thread }) = self.running.take() else { return Ok(()) };
        control.stop();
        // Only whoever fills up the descriptor that is notified can hold it longer.
        while !thread.is_finished() {
            std::thread::sleep(LOOK);
            control.unblock();
        }
        match thread.join() {
            Ok(Ok(ended)) => {
                self.base = ended.base;
                self.requests += ended.requests;
                Ok(())
            }
            Ok(Err(cause)) => {
                if let Some(err) = &self.err {
                    // It can only be full, and then it is readable.
                    let _ = write(err, &1u64.to_ne_bytes());
                }
                Err(cause)
            }
            Err(_) => Err(Cause::Resources(io::Error::other("a queue's thread panicked"))),
        }
    }

    /// Whether its thread has ended by itself, which it does only for a reason.
    pub fn has_failed(&self) -> bool {
        self.running.as_ref().is_some_and(|r| r.control.has_ended())
    }
}

/// Tells the connection that a thread has ended, however it did.
struct Ending(Arc<Control>, Arc<OwnedFd>);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.set_ended();
        // It can only be full, and then it is readable.
        let _ = write(&*self.1, &1u64.to_ne_bytes());
    }
}

fn spawn<R: Ring + Send + 'static>(
    worker: Worker<R>,
    index: u16,
    ending: Ending,
) -> io::Result<JoinHandle<Result<Ended, Cause>>> {
    std::thread::Builder::new().name(format!("vhost-q{index}")).spawn(move || {
        let _ending = ending;
        worker.run()
    })
}
