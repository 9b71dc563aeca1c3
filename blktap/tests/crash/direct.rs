//! The smallest user of the resolve contract: one request at a time, no queue, no thread. It can
//! give up a request at any step.
use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::sync::Arc;

use blktap::formats::{
    Change, Extent, Format, Fresh, Guard, ImageError, LeaseHolder, Mailbox, Outcome, Piece, Place,
    Target, Waiter,
};

/// Why a change was not carried out.
#[derive(Debug)]
pub enum Stop {
    Failed(ImageError),
    /// Given up on purpose.
    Cancelled,
}

impl From<ImageError> for Stop {
    fn from(e: ImageError) -> Self {
        Stop::Failed(e)
    }
}

/// Reads and changes an image over those it builds on.
pub struct Direct {
    layers: Vec<Arc<dyn Format>>,
    holder: RefCell<LeaseHolder>,
    waiter: Waiter,
    /// Steps left until the present request is given up.
    patience: Cell<Option<u32>>,
}

fn failed(what: &'static str) -> impl FnOnce(std::io::Error) -> ImageError {
    ImageError::io(what)
}

impl Direct {
    pub fn new(layers: Vec<Arc<dyn Format>>) -> Self {
        let mailbox = Arc::new(Mailbox::new().expect("an eventfd"));
        let holder = RefCell::new(layers[0].leases().holder());
        Direct { layers, holder, waiter: Waiter::new(mailbox, 0), patience: Cell::new(None) }
    }

    pub fn top(&self) -> &Arc<dyn Format> {
        &self.layers[0]
    }

    /// Gives up the next requests after so many steps each; `None`: never.
    pub fn give_up_after(&self, steps: Option<u32>) {
        self.patience.set(steps);
    }

    fn step(&self) -> Result<(), Stop> {
        match self.patience.get() {
            None => Ok(()),
            Some(0) => Err(Stop::Cancelled),
            Some(n) => {
                self.patience.set(Some(n - 1));
                Ok(())
            }
        }
    }

    pub fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), ImageError> {
        let lease = self.holder.borrow_mut().take();
        let result = self.read_layer(0, offset, into);
        self.holder.borrow_mut().end(lease);
        result
    }

    fn read_layer(&self, layer: usize, offset: u64, into: &mut [u8]) -> Result<(), ImageError> {
        let Some(format) = self.layers.get(layer) else {
            into.fill(0);
            return Ok(());
        };
        let there = format.size().saturating_sub(offset).min(into.len() as u64) as usize;
        let (into, beyond) = into.split_at_mut(there);
        beyond.fill(0);
        let (mut done, mut extents, mut loads) = (0, Vec::new(), 0);
        while done < into.len() {
            extents.clear();
            let at = offset + done as u64;
            match format.resolve_read(at..offset + into.len() as u64, &mut extents)? {
                Outcome::Ready(()) => {}
                Outcome::Miss(miss) => {
                    loads += 1;
                    assert!(loads < 10_000, "a miss that loading does not mend: {miss:?}");
                    format.load(miss)?;
                    continue;
                }
                Outcome::Busy => panic!("a read is never busy"),
            }
            assert!(!extents.is_empty(), "an answer of no bytes");
            for extent in &extents {
                let end = done + extent.len as usize;
                assert!(extent.len > 0 && end <= into.len(), "an answer past its range");
                let here = &mut into[done..end];
                self.read_extent(layer, offset + done as u64, extent, here)?;
                done = end;
            }
        }
        Ok(())
    }

    fn read_extent(
        &self,
        layer: usize,
        at: u64,
        extent: &Extent,
        into: &mut [u8],
    ) -> Result<(), ImageError> {
        let format = &self.layers[layer];
        match extent.place {
            Place::Data { file, offset } => {
                format.files()[usize::from(file)].read_at(offset, into).map_err(failed("read"))?;
            }
            Place::Zero => into.fill(0),
            Place::Absent => self.read_layer(layer + 1, at, into)?,
            Place::Compressed { cluster, skip } => {
                let mut out = Vec::new();
                format.decompress(cluster, &mut out)?;
                into.copy_from_slice(&out[skip as usize..skip as usize + into.len()]);
            }
        }
        Ok(())
    }

    /// Writes `data` (for [`Change::Write`]), zeroes or discards the range.
    pub fn change(&self, range: Range<u64>, change: Change, data: &[u8]) -> Result<(), Stop> {
        let lease = self.holder.borrow_mut().take();
        let result = self.change_all(range, change, data);
        self.holder.borrow_mut().end(lease);
        result
    }

    fn change_all(&self, range: Range<u64>, change: Change, data: &[u8]) -> Result<(), Stop> {
        let (mut at, mut pieces, mut loads) = (range.start, Vec::new(), 0);
        while at < range.end {
            pieces.clear();
            self.step()?;
            let left = at..range.end;
            let guard = match self.top().resolve_write(left, change, &self.waiter, &mut pieces)? {
                Outcome::Ready(guard) => guard,
                Outcome::Miss(miss) => {
                    loads += 1;
                    assert!(loads < 10_000, "a miss that loading does not mend: {miss:?}");
                    self.top().load(miss)?;
                    continue;
                }
                Outcome::Busy => panic!("busy, and nobody else is there"),
            };
            let rest = data.get((at - range.start) as usize..).unwrap_or_default();
            match (self.put_all(at, change, &pieces, rest), guard) {
                (Ok(()), Some(guard)) => self.top().commit(guard),
                (Ok(()), None) => {}
                (Err(stop), guard) => {
                    self.abort(guard);
                    return Err(stop);
                }
            }
            let bytes: u64 = pieces.iter().map(|p| p.len).sum();
            assert!(bytes > 0 && bytes <= range.end - at, "an answer of {bytes} bytes");
            at += bytes;
        }
        self.step()
    }

    fn abort(&self, guard: Option<Guard>) {
        if let Some(guard) = guard {
            self.top().abort(guard);
        }
    }

    fn put_all(
        &self,
        mut at: u64,
        change: Change,
        pieces: &[Piece],
        mut data: &[u8],
    ) -> Result<(), Stop> {
        for piece in pieces {
            let (now, rest) = data.split_at(data.len().min(piece.len as usize));
            self.put(at, change, piece, now)?;
            (at, data) = (at + piece.len, rest);
        }
        self.step()
    }

    fn put(&self, at: u64, change: Change, piece: &Piece, data: &[u8]) -> Result<(), Stop> {
        let write = |file: u16, offset: u64, bytes: &[u8]| -> Result<(), Stop> {
            self.step()?;
            let file = &self.top().files()[usize::from(file)];
            Ok(file.write_at(offset, bytes).map_err(failed("write"))?)
        };
        let punch = |file: u16, offset: u64| -> Result<(), Stop> {
            self.step()?;
            let file = &self.top().files()[usize::from(file)];
            Ok(file.punch(offset..offset + piece.len).map_err(failed("zero"))?)
        };
        match (piece.target, change) {
            (Target::Nothing, _) => Ok(()),
            (Target::InPlace { file, offset }, Change::Write) => write(file, offset, data),
            (Target::InPlace { file, offset }, _) => punch(file, offset),
            (Target::New { file, offset, head, tail, fresh }, _) => {
                self.carry(at - u64::from(head), head, file, offset - u64::from(head), fresh)?;
                match change {
                    Change::Write => write(file, offset, data)?,
                    _ if fresh == Fresh::Zeroes => {}
                    _ => write(file, offset, &vec![0; piece.len as usize])?,
                }
                self.carry(at + piece.len, tail, file, offset + piece.len, fresh)
            }
        }
    }

    /// Brings what stays of a cluster to its new place.
    fn carry(
        &self,
        guest: u64,
        len: u32,
        file: u16,
        offset: u64,
        fresh: Fresh,
    ) -> Result<(), Stop> {
        if len == 0 {
            return Ok(());
        }
        self.step()?;
        let mut bytes = vec![0; len as usize];
        self.read_layer(0, guest, &mut bytes)?;
        if fresh == Fresh::Zeroes && bytes.iter().all(|b| *b == 0) {
            return Ok(());
        }
        self.step()?;
        let file = &self.top().files()[usize::from(file)];
        Ok(file.write_at(offset, &bytes).map_err(failed("write"))?)
    }

    pub fn flush(&self) -> Result<(), ImageError> {
        if self.top().has_unflushed() {
            return self.top().flush();
        }
        for file in self.top().files() {
            file.sync().map_err(failed("flush"))?;
        }
        Ok(())
    }
}
