//! A well-behaved device that does verified I/O while others misbehave.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use blkback::proto::{OP_READ, OP_WRITE, RSP_OKAY};
use hypervisor::GrantedPages;
use parking_lot::Mutex;

use crate::guest::{Domain, Queue, indirect, read, whole, write};
use crate::image::patterned;
use crate::rig::PATIENCE;

/// Pages of the witness's disk that it uses.
const DISK_PAGES: u64 = 64;
/// Pages of its larger requests.
const LARGE: usize = 16;

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    pause: AtomicBool,
    verified: AtomicU64,
    /// Longest time between two verified requests, in ms, since it was last asked.
    gap: AtomicU64,
    error: Mutex<Option<String>>,
}

/// A device with a thread that writes, reads back and compares.
pub struct Witness {
    shared: Arc<Shared>,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// Where a witness was when an attack began.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Mark(u64);

impl Witness {
    /// Starts on a connected device. With `pause` it can be held up.
    pub fn start(domain: &Domain, queue: Queue) -> Witness {
        let shared = Arc::new(Shared::default());
        let pages = domain.pages(LARGE + 1);
        let mine = shared.clone();
        let thread = std::thread::spawn(move || {
            let mut hands = Hands { queue, pages, shown: Vec::new() };
            let mut last = Instant::now();
            for round in 0.. {
                while mine.pause.load(Ordering::Relaxed) && !mine.stop.load(Ordering::Relaxed) {
                    std::thread::sleep(Duration::from_millis(1));
                }
                if mine.stop.load(Ordering::Relaxed) {
                    break;
                }
                if let Err(e) = hands.round(round) {
                    *mine.error.lock() = Some(e);
                    break;
                }
                mine.verified.fetch_add(1, Ordering::Relaxed);
                let gap = last.elapsed().as_millis() as u64;
                mine.gap.fetch_max(gap, Ordering::Relaxed);
                last = Instant::now();
                std::thread::sleep(Duration::from_micros(500));
            }
        });
        Witness { shared, thread: Some(thread) }
    }

    pub fn pause(&self, pause: bool) {
        self.shared.pause.store(pause, Ordering::Relaxed);
    }

    /// Where it is now.
    pub fn mark(&self) -> Mark {
        self.shared.gap.store(0, Ordering::Relaxed);
        Mark(self.shared.verified.load(Ordering::Relaxed))
    }

    /// Waits until it has done `least` verified requests since the mark; says what went wrong.
    pub fn goes_on(&self, mark: Mark, least: u64, patience: Duration) -> Result<u64, String> {
        let start = Instant::now();
        loop {
            if let Some(error) = self.shared.error.lock().as_ref() {
                return Err(format!("the witness failed: {error}"));
            }
            let done = self.shared.verified.load(Ordering::Relaxed) - mark.0;
            if done >= least {
                return Ok(done);
            }
            if start.elapsed() > patience {
                return Err(format!("{done} verified requests in {patience:?}"));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Longest time between two verified requests since the last mark.
    pub fn gap(&self) -> Duration {
        Duration::from_millis(self.shared.gap.load(Ordering::Relaxed))
    }

    /// Ends it; its error, if any.
    pub fn stop(mut self) -> Result<(), String> {
        self.end();
        self.shared.error.lock().take().map_or(Ok(()), Err)
    }

    fn end(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        self.end();
    }
}

struct Hands {
    queue: Queue,
    pages: Arc<dyn GrantedPages>,
    /// What each page of the disk was last written with, by number.
    shown: Vec<(u64, Vec<u8>)>,
}

impl Hands {
    /// Writes, reads back and compares: one page, or many by an indirect request.
    fn round(&mut self, round: u64) -> Result<(), String> {
        let count = if round % 4 == 3 { LARGE } else { 1 };
        let page = (round * 7) % (DISK_PAGES - LARGE as u64);
        let data = patterned(round, count * 4096);
        self.pages.write(0, &data);
        self.ask(OP_WRITE, page * 8, count)?;
        self.pages.write(0, &vec![0; count * 4096]);
        self.ask(OP_READ, page * 8, count)?;
        self.compare(&data, round)?;
        self.shown.retain(|(at, _)| !(page..page + count as u64).contains(at));
        self.shown.extend((page..).zip(data.chunks(4096).map(<[u8]>::to_vec)));
        // Something older, too: nobody may have touched it since.
        let (at, data) = self.shown[(round * 31) as usize % self.shown.len()].clone();
        self.ask(OP_READ, at * 8, 1)?;
        self.compare(&data, round)
    }

    fn compare(&self, data: &[u8], round: u64) -> Result<(), String> {
        let mut found = vec![0; data.len()];
        self.pages.read(0, &mut found);
        match found == data {
            true => Ok(()),
            false => Err(format!("round {round}: what was read is not what was written")),
        }
    }

    fn ask(&mut self, op: u8, sector: u64, count: usize) -> Result<(), String> {
        let segments: Vec<_> = self.pages.refs()[..count].iter().map(|r| whole(*r)).collect();
        let body = match (count, op) {
            (1, OP_READ) => read(sector, &segments),
            (1, _) => write(sector, &segments),
            _ => {
                let mut table = vec![0; count * 8];
                for (entry, gref) in table.chunks_mut(8).zip(self.pages.refs()) {
                    entry[..4].copy_from_slice(&gref.to_le_bytes());
                    entry[5] = 7;
                }
                self.pages.write(LARGE * 4096, &table);
                indirect(op, sector, count as u16, &self.pages.refs()[LARGE..])
            }
        };
        let id = self.queue.send(body);
        let answer = self.queue.try_answer(PATIENCE)?;
        let right = answer.id == id && answer.operation == op && answer.status == RSP_OKAY;
        if right { Ok(()) } else { Err(format!("{answer:?} to {body:?}")) }
    }
}
