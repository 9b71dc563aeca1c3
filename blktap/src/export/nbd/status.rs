//! Block status: asking a disk how it is kept may block, so a thread of the connection's own
//! does it; the data path only hands over questions and sends answers.

use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use zerocopy::IntoBytes;
use zerocopy::byteorder::big_endian::U32;

use super::handshake::Context;
use super::proto::{CHUNK_MAGIC, Chunk, STATE_HOLE, STATE_ZERO, chunk, error_of};
use crate::disk::{Disk, Kept};

/// Most extents of one answer; the client asks again for the rest.
const MAX_EXTENTS: usize = 8192;

/// A question.
#[derive(Clone, Copy, Debug)]
pub struct Job {
    /// Whose answer it is.
    pub slot: u32,
    /// Bytes.
    pub offset: u64,
    /// Bytes, not 0.
    pub len: u32,
    /// Only the first extent.
    pub one: bool,
    /// The request's.
    pub cookie: u64,
}

/// What is asked about.
pub struct Subject {
    /// The disk.
    pub disk: Arc<dyn Disk>,
    /// What is told of it.
    pub contexts: Vec<Context>,
}

/// An answer: a slot and the chunks, ready to be sent.
pub type Answer = (u32, Vec<u8>);

/// The thread. It ends when this is dropped.
pub struct StatusThread {
    jobs: Option<Sender<Job>>,
    answers: Receiver<Answer>,
    thread: Option<JoinHandle<()>>,
}

impl StatusThread {
    /// Starts it; `wake` is an eventfd that is written for each answer.
    pub fn start(subject: Subject, wake: Arc<OwnedFd>) -> io::Result<Self> {
        // There are never more jobs than a connection has slots.
        let (jobs, todo) = channel::<Job>();
        let (send, answers) = channel();
        let run = move || {
            for job in todo {
                let told = subject.answer(&job);
                let woken = send.send((job.slot, told)).is_ok()
                    && rustix::io::write(&wake, &1u64.to_ne_bytes()).is_ok();
                if !woken {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("nbd-status".into()).spawn(run)?;
        Ok(StatusThread { jobs: Some(jobs), answers, thread: Some(thread) })
    }

    /// Hands over a question. `false`: the thread has ended.
    pub fn ask(&self, job: Job) -> bool {
        self.jobs.as_ref().is_some_and(|jobs| jobs.send(job).is_ok())
    }

    /// An answer, if there is one.
    pub fn answer(&self) -> Option<Answer> {
        self.answers.try_recv().ok()
    }
}

impl Drop for StatusThread {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("nbd: the thread for block status panicked");
        }
    }
}

impl Subject {
    /// All chunks of an answer.
    pub fn answer(&self, job: &Job) -> Vec<u8> {
        let mut out = Vec::new();
        for (number, context) in self.contexts.iter().enumerate() {
            let last = number + 1 == self.contexts.len();
            match self.extents(context, job) {
                Ok(extents) => {
                    let flags = if last { chunk::DONE } else { 0 };
                    let len = 4 + extents.len() as u32 * 8;
                    head(&mut out, chunk::BLOCK_STATUS, flags, job.cookie, len);
                    out.extend_from_slice(&(number as u32).to_be_bytes());
                    out.extend_from_slice(extents.as_bytes());
                }
                Err(e) => {
                    tracing::debug!("nbd: block status at {}: {e}", job.offset);
                    let error = error_of(e.raw_os_error().unwrap_or(libc::EIO));
                    head(&mut out, chunk::ERROR, chunk::DONE, job.cookie, 6);
                    out.extend_from_slice(&error.to_be_bytes());
                    out.extend_from_slice(&[0; 2]);
                    return out;
                }
            }
        }
        out
    }

    /// Lengths and states, in turn, from the first byte of the request on.
    fn extents(&self, context: &Context, job: &Job) -> io::Result<Vec<[U32; 2]>> {
        let geometry = self.disk.geometry();
        let block = u64::from(geometry.logical_block);
        let (start, end) = (job.offset, job.offset + u64::from(job.len));
        // A client without block sizes may ask for any byte.
        let whole = start - start % block..end.next_multiple_of(block).min(geometry.size);
        let mut stretches: Vec<(u64, u32)> = Vec::new();
        match context {
            Context::Allocation => {
                let mut regions = Vec::new();
                self.disk.map(whole.clone(), &mut regions)?;
                stretches.extend(regions.iter().map(|r| (r.len, state(r.kept))));
            }
            Context::Bitmap(name) => {
                let mut dirty = Vec::new();
                self.disk.bitmap(name, whole.clone(), &mut dirty)?;
                stretches.extend(dirty.iter().map(|(len, dirty)| (*len, u32::from(*dirty))));
            }
        }
        let most = if job.one { 1 } else { MAX_EXTENTS };
        let found = clip(&stretches, whole.start, start..end, most);
        // A disk that says nothing has data, or bits that nobody knows to be clean.
        let unknown = || match context {
            Context::Allocation => vec![[job.len.into(), 0.into()]],
            Context::Bitmap(_) => vec![[job.len.into(), 1.into()]],
        };
        Ok(if found.is_empty() { unknown() } else { found })
    }
}

fn state(kept: Kept) -> u32 {
    match kept {
        Kept::Data => 0,
        Kept::Zero => STATE_ZERO,
        Kept::Hole => STATE_HOLE | STATE_ZERO,
    }
}

/// The part of `stretches` (which begin at `at`) inside `range`, neighbours of one state joined,
/// at most `most` of them. A range is shorter than 4 GiB, so each fits.
fn clip(stretches: &[(u64, u32)], at: u64, range: Range<u64>, most: usize) -> Vec<[U32; 2]> {
    let mut found: Vec<[U32; 2]> = Vec::new();
    let mut at = at;
    for (len, state) in stretches {
        let end = at.saturating_add(*len);
        let inside = end.min(range.end).saturating_sub(at.max(range.start)) as u32;
        at = end;
        if inside == 0 {
            continue;
        }
        let count = found.len();
        match found.last_mut() {
            Some(last) if last[1].get() == *state => last[0] += inside,
            _ if count == most => break,
            _ => found.push([inside.into(), (*state).into()]),
        }
    }
    found
}

fn head(out: &mut Vec<u8>, kind: u16, flags: u16, cookie: u64, len: u32) {
    let chunk = Chunk {
        magic: CHUNK_MAGIC.into(),
        flags: flags.into(),
        kind: kind.into(),
        cookie: cookie.into(),
        len: len.into(),
    };
    out.extend_from_slice(chunk.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(found: Vec<[U32; 2]>) -> Vec<(u32, u32)> {
        found.iter().map(|e| (e[0].get(), e[1].get())).collect()
    }

    #[test]
    fn stretches_are_cut_to_the_request_and_joined() {
        let stretches = [(512, 0), (512, 3), (1024, 3), (4096, 0)];
        let all = clip(&stretches, 4096, 4196..7000, 10);
        assert_eq!(plain(all), [(412, 0), (1536, 3), (856, 0)]);
        assert_eq!(plain(clip(&stretches, 4096, 4196..7000, 1)), [(412, 0)]);
        assert_eq!(plain(clip(&stretches, 0, 100_000..100_001, 1)), []);
    }
}
