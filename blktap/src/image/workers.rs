//! What may block, on threads of its own: loading metadata, flushing, unpacking, and payload of
//! storages that are no files.
// Payload is copied to and from named memory by address.
#![allow(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crossbeam::channel::{Receiver, Sender, unbounded};
use crossbeam::queue::SegQueue;

use super::chain::{Chain, LayerMiss};
use super::log::ErrorLog;
use crate::disk::IoBuf;
use crate::engine::EngineOp;
use crate::formats::{ImageError, Mailbox};
use crate::storage::Storage;

/// Most threads of one image.
const MOST: usize = 4;
/// Message that says: look at the answers.
pub(super) const ANSWERS: u32 = u32::MAX;

/// Where blocking work is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blocking {
    /// On up to four threads, started when there is something to do.
    Threads,
    /// By whoever submits or polls: everything happens in one order. For tests.
    Inline,
}

/// Blocking work.
pub(super) enum Job {
    Load(LayerMiss),
    Flush,
    /// A compressed cluster of a layer.
    Unpack {
        layer: u16,
        cluster: u64,
    },
    /// Payload, to or from a storage that is no file.
    Move {
        file: u16,
        op: EngineOp,
        offset: u64,
        len: u64,
        bufs: Vec<IoBuf>,
    },
}

/// A job's end.
pub(super) struct Answer {
    pub token: u64,
    pub errno: i32,
    /// An unpacked cluster.
    pub bytes: Vec<u8>,
}

/// Where a queue's answers arrive.
#[derive(Clone)]
pub(super) struct ReplyTo {
    pub answers: Arc<SegQueue<Answer>>,
    pub mailbox: Arc<Mailbox<u32>>,
}

struct Task {
    job: Job,
    token: u64,
    to: ReplyTo,
    /// With the task, not with the thread: when all answers are there, no thread holds the image.
    chain: Arc<Chain>,
}

/// The threads of one image. They end when it is dropped.
pub(super) struct Workers {
    mode: Blocking,
    tasks: (Sender<Task>, Receiver<Task>),
    threads: AtomicUsize,
    /// Tasks that were sent and not yet ended.
    open: Arc<AtomicUsize>,
    log: Arc<ErrorLog>,
}

impl Workers {
    pub(super) fn new(mode: Blocking) -> Workers {
        let (threads, open, log) = (AtomicUsize::new(0), Arc::default(), Arc::default());
        Workers { mode, tasks: unbounded(), threads, open, log }
    }

    /// Has `job` done; its answer carries `token`.
    pub(super) fn send(&self, chain: &Arc<Chain>, job: Job, token: u64, to: &ReplyTo) {
        let task = Task { job, token, to: to.clone(), chain: Arc::clone(chain) };
        if self.mode == Blocking::Inline {
            return perform(task, &self.log);
        }
        let open = self.open.fetch_add(1, Ordering::Relaxed) + 1;
        let threads = self.threads.load(Ordering::Relaxed);
        if threads < open.min(MOST) && !self.start_thread() && threads == 0 {
            self.open.fetch_sub(1, Ordering::Relaxed);
            return perform(task, &self.log);
        }
        // The receiver is ours: it cannot be gone.
        let _ = self.tasks.0.send(task);
    }

    fn start_thread(&self) -> bool {
        let (tasks, open) = (self.tasks.1.clone(), Arc::clone(&self.open));
        let log = Arc::clone(&self.log);
        let run = move || {
            while let Ok(task) = tasks.recv() {
                perform(task, &log);
                open.fetch_sub(1, Ordering::Relaxed);
            }
        };
        let started = std::thread::Builder::new().name("image".into()).spawn(run).is_ok();
        if started {
            self.threads.fetch_add(1, Ordering::Relaxed);
        }
        started
    }
}

fn perform(task: Task, log: &ErrorLog) {
    let Task { job, token, to, chain } = task;
    let mut bytes = Vec::new();
    let result = match job {
        Job::Load(LayerMiss { layer, miss }) => match chain.layers().get(usize::from(layer)) {
            Some(layer) => layer.format.load(miss),
            None => Ok(()),
        },
        Job::Flush => chain.top().flush(),
        Job::Unpack { layer, cluster } => match chain.layers().get(usize::from(layer)) {
            Some(layer) => layer.format.decompress(cluster, &mut bytes),
            None => Ok(()),
        },
        Job::Move { file, op, offset, len, bufs } => match chain.files().get(usize::from(file)) {
            Some(storage) => transfer(&**storage, op, offset, len, &bufs),
            None => Ok(()),
        },
    };
    let errno = result.err().map_or(0, |e| {
        log.say(&chain, &e);
        e.errno()
    });
    drop(chain);
    to.answers.push(Answer { token, errno, bytes });
    to.mailbox.post(ANSWERS);
}

/// Carries out an engine's operation on a storage that is no file.
fn transfer(
    storage: &dyn Storage,
    op: EngineOp,
    offset: u64,
    len: u64,
    bufs: &[IoBuf],
) -> Result<(), ImageError> {
    let end = offset.checked_add(len).ok_or_else(|| ImageError::Invalid("a range".into()))?;
    match op {
        EngineOp::Read => read(storage, offset, bufs).map_err(ImageError::io("read")),
        EngineOp::Write(_) => write(storage, offset, bufs).map_err(ImageError::io("write")),
        EngineOp::Sync => storage.sync().map_err(ImageError::io("flush")),
        EngineOp::Discard | EngineOp::Zero => {
            storage.punch(offset..end).map_err(ImageError::io("discard"))
        }
        EngineOp::SecureDiscard => Err(ImageError::Unsupported("secure discard".into())),
    }
}

fn read(storage: &dyn Storage, mut offset: u64, bufs: &[IoBuf]) -> std::io::Result<()> {
    let mut copy = Vec::new();
    for buf in bufs {
        copy.resize(buf.len(), 0);
        storage.read_at(offset, &mut copy)?;
        // SAFETY: whoever made the buffer promised that it is valid until the request is done;
        // the copy has its length.
        unsafe { std::ptr::copy(copy.as_ptr(), buf.addr(), buf.len()) };
        offset += buf.len() as u64;
    }
    Ok(())
}

fn write(storage: &dyn Storage, offset: u64, bufs: &[IoBuf]) -> std::io::Result<()> {
    let mut copy = Vec::with_capacity(bufs.iter().map(IoBuf::len).sum());
    for buf in bufs {
        let at = copy.len();
        copy.resize(at + buf.len(), 0);
        // SAFETY: as in `read`; the copy was made longer by the buffer's length.
        unsafe { std::ptr::copy(buf.addr(), copy[at..].as_mut_ptr(), buf.len()) };
    }
    storage.write_at(offset, &copy)
}
