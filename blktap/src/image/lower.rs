//! Where a queue's transfers go: files through its own io_uring, other storages through the
//! image's threads.
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;

use crossbeam::queue::SegQueue;
use perf::Handle;

use super::chain::Chain;
use super::workers::{Answer, Job, ReplyTo, Workers};
use crate::disk::{Done, IoBuf, wait_for};
use crate::engine::{
    Engine, EngineConfig, EngineCounters, EngineFile, EngineOp, MAX_WATCHES, PastEnd, RingMode,
    Transfer,
};
use crate::filters::priority::Priority;
use crate::formats::Mailbox;

/// Where a file of the chain is reached.
enum Way {
    /// As this file of the engine.
    Engine { number: u16, sync_failed: Arc<AtomicI32> },
    /// By its blocking face.
    Blocking,
}

/// A transfer that found no room.
struct Later {
    number: u16,
    op: EngineOp,
    offset: u64,
    len: u64,
    bufs: Vec<IoBuf>,
    token: u64,
}

/// The lower side of a queue. Tokens are the caller's.
pub(super) struct Lower {
    /// First: dropped before anything that its transfers use.
    engine: Option<Engine>,
    ways: Vec<Way>,
    later: VecDeque<Later>,
    known: Vec<Done>,
    chain: Arc<Chain>,
    workers: Arc<Workers>,
    to: ReplyTo,
    jobs: u32,
}

impl Lower {
    pub(super) fn new(chain: Arc<Chain>, workers: Arc<Workers>, depth: u32) -> io::Result<Lower> {
        let (mut files, mut ways) = (Vec::<EngineFile>::new(), Vec::new());
        for storage in chain.files() {
            ways.push(match storage.engine_file() {
                Some(file) => {
                    let sync_failed = Arc::clone(&file.sync_failed);
                    files.push(EngineFile { past_end: PastEnd::Zeroes, ..file });
                    Way::Engine { number: (files.len() - 1) as u16, sync_failed }
                }
                None => Way::Blocking,
            });
        }
        let engine = match files.is_empty() {
            true => None,
            false => {
                let depth = (2 * depth).clamp(16, crate::engine::MAX_DEPTH);
                Some(Engine::new(EngineConfig { depth, files, newest: RingMode::Deferred })?)
            }
        };
        let mailbox = Arc::new(Mailbox::new()?);
        let to = ReplyTo { answers: Arc::new(SegQueue::new()), mailbox };
        let (later, known) = (VecDeque::new(), Vec::new());
        Ok(Lower { engine, ways, later, known, chain, workers, to, jobs: 0 })
    }

    /// Where wake-ups arrive.
    pub(super) fn mailbox(&self) -> &Arc<Mailbox<u32>> {
        &self.to.mailbox
    }

    /// Whether threads work for this queue.
    pub(super) fn has_jobs(&self) -> bool {
        self.jobs > 0
    }

    /// Ends the engine: what it has on its way is waited for or cut off.
    pub(super) fn stop(&mut self) {
        self.engine = None;
    }

    /// Has blocking work done.
    pub(super) fn job(&mut self, job: Job, token: u64) {
        self.jobs += 1;
        self.workers.send(&self.chain, job, token, &self.to);
    }

    /// Starts a transfer of a file of the chain; its end comes with `token`.
    pub(super) fn start(
        &mut self,
        (file, offset): (u16, u64),
        op: EngineOp,
        (bufs, len): (&[IoBuf], u64),
        token: u64,
    ) {
        let Some(Way::Engine { number, sync_failed }) = self.ways.get(usize::from(file)) else {
            return self.job(Job::Move { file, op, offset, len, bufs: bufs.to_vec() }, token);
        };
        let failed = sync_failed.load(Ordering::Relaxed);
        if op == EngineOp::Sync && failed != 0 {
            return self.known.push(Done { token, errno: failed });
        }
        let number = *number;
        let Some(engine) = &mut self.engine else { return };
        let transfer = Transfer { file: number, op, offset, len, bufs, token };
        if !self.later.is_empty() || engine.start(&transfer).is_err() {
            let bufs = bufs.to_vec();
            self.later.push_back(Later { number, op, offset, len, bufs, token });
        }
    }

    /// Sends what was started.
    pub(super) fn submit(&mut self) -> io::Result<()> {
        self.engine.as_mut().map_or(Ok(()), Engine::submit)
    }

    /// Appends transfers that are done.
    pub(super) fn poll(&mut self, done: &mut Vec<Done>) -> io::Result<()> {
        done.append(&mut self.known);
        let Some(engine) = &mut self.engine else { return Ok(()) };
        engine.poll(done)?;
        while let Some(l) = self.later.front() {
            let transfer = Transfer {
                file: l.number,
                op: l.op,
                offset: l.offset,
                len: l.len,
                bufs: &l.bufs,
                token: l.token,
            };
            if engine.start(&transfer).is_err() {
                break;
            }
            self.later.pop_front();
        }
        Ok(())
    }

    /// An end of a job.
    pub(super) fn answer(&mut self) -> Option<Answer> {
        if self.jobs == 0 {
            return None;
        }
        let answer = self.to.answers.pop()?;
        self.jobs -= 1;
        Some(answer)
    }

    /// Sleeps until something is done, a descriptor is readable, or the time is over.
    pub(super) fn wait(
        &mut self,
        fds: &[BorrowedFd<'_>],
        timeout: Option<Duration>,
    ) -> io::Result<u64> {
        let ready = !self.known.is_empty();
        let timeout = if ready { Some(Duration::ZERO) } else { timeout };
        let mailbox = self.to.mailbox.as_fd();
        let bits = match (fds, &mut self.engine) {
            ([], Some(engine)) => engine.wait(&[mailbox], timeout)?,
            ([one], Some(engine)) => engine.wait(&[*one, mailbox], timeout)?,
            ([one, two], Some(engine)) => engine.wait(&[*one, *two, mailbox], timeout)?,
            (_, Some(engine)) => engine.wait(&with(fds, mailbox)?[..fds.len() + 1], timeout)?,
            (_, None) => wait_for(&with(fds, mailbox)?[..fds.len() + 1], timeout)?,
        };
        Ok(bits & !(1 << fds.len()))
    }

    pub(super) fn unwatch(&mut self) -> io::Result<()> {
        self.engine.as_mut().map_or(Ok(()), Engine::unwatch)
    }

    pub(super) fn counters(&self) -> Option<Handle<EngineCounters>> {
        self.engine.as_ref().map(|e| e.counters().clone())
    }

    pub(super) fn prioritize(&mut self, priority: Priority) {
        if let Some(engine) = &mut self.engine {
            engine.prioritize(priority.raw());
        }
    }

    pub(super) fn count_in(&mut self, counters: Handle<EngineCounters>) {
        if let Some(engine) = &mut self.engine {
            engine.count_in(counters);
        }
    }
}

/// A list with one descriptor more. Few are the rule, and a long list takes time to make.
fn with<'a>(
    fds: &[BorrowedFd<'a>],
    one: BorrowedFd<'a>,
) -> io::Result<[BorrowedFd<'a>; MAX_WATCHES]> {
    let mut all = [one; MAX_WATCHES];
    if fds.len() >= MAX_WATCHES {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "more than 63 descriptors"));
    }
    all[..fds.len()].copy_from_slice(fds);
    Ok(all)
}
