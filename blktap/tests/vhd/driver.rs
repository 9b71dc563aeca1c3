//! A chain of formats as a disk, one request at a time: what an image layer does, without its
//! speed. Several drivers of one chain may run on several threads.
#![allow(dead_code, unreachable_pub)]

use std::sync::Arc;

use blktap::formats::{
    Change, Extent, Format, Guard, ImageError, LeaseHolder, Mailbox, Outcome, Piece, Place, Target,
    Waiter,
};

pub struct Driver {
    /// The image that is written first, its parent behind it, and so on.
    chain: Vec<Arc<dyn Format>>,
    holders: Vec<LeaseHolder>,
    mailbox: Arc<Mailbox<u32>>,
    waiter: Waiter,
}

impl Driver {
    pub fn new(chain: Vec<Arc<dyn Format>>) -> Driver {
        let mailbox = Arc::new(Mailbox::new().expect("a mailbox"));
        let waiter = Waiter::new(Arc::clone(&mailbox), 1);
        let holders = chain.iter().map(|f| f.leases().holder()).collect();
        Driver { chain, holders, mailbox, waiter }
    }

    pub fn top(&self) -> &dyn Format {
        &*self.chain[0]
    }

    pub fn size(&self) -> u64 {
        self.chain[0].size()
    }

    pub fn read(&mut self, offset: u64, len: usize) -> Result<Vec<u8>, ImageError> {
        let mut out = vec![0xee; len];
        self.read_level(0, offset, &mut out)?;
        Ok(out)
    }

    fn read_level(&mut self, level: usize, offset: u64, into: &mut [u8]) -> Result<(), ImageError> {
        let Some(format) = self.chain.get(level).cloned() else {
            into.fill(0);
            return Ok(());
        };
        let inside = format.size().saturating_sub(offset).min(into.len() as u64) as usize;
        let (into, beyond) = into.split_at_mut(inside);
        beyond.fill(0);
        let mut at = 0;
        while at < into.len() {
            let lease = self.holders[level].take();
            let extents = resolve(&*format, offset + at as u64..offset + into.len() as u64)?;
            assert!(!extents.is_empty(), "an empty answer");
            for extent in extents {
                let part = &mut into[at..at + extent.len as usize];
                self.read_extent(level, offset + at as u64, &extent, part)?;
                at += part.len();
            }
            self.holders[level].end(lease);
        }
        Ok(())
    }

    fn read_extent(
        &mut self,
        level: usize,
        offset: u64,
        extent: &Extent,
        into: &mut [u8],
    ) -> Result<(), ImageError> {
        let format = Arc::clone(&self.chain[level]);
        match extent.place {
            Place::Zero => into.fill(0),
            Place::Absent => self.read_level(level + 1, offset, into)?,
            Place::Data { file, offset } => {
                let file = &format.files()[usize::from(file)];
                let end = offset + into.len() as u64;
                // What QEMU writes as QCOW may end in a part of a cluster.
                let is_whole = format.name() == "qcow" || end <= file.size().expect("a size");
                assert!(is_whole, "data past the end of the file");
                file.read_at(offset, into).map_err(ImageError::io("read"))?;
            }
            Place::Compressed { cluster, skip } => {
                let mut unpacked = Vec::new();
                format.decompress(cluster, &mut unpacked)?;
                let skip = skip as usize;
                into.copy_from_slice(&unpacked[skip..skip + into.len()]);
            }
        }
        Ok(())
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), ImageError> {
        self.change(offset, data.len() as u64, Change::Write, data)
    }

    pub fn zero(&mut self, offset: u64, len: u64) -> Result<(), ImageError> {
        self.change(offset, len, Change::Zero, &[])
    }

    pub fn discard(&mut self, offset: u64, len: u64) -> Result<(), ImageError> {
        self.change(offset, len, Change::Discard, &[])
    }

    pub fn flush(&self) -> Result<(), ImageError> {
        self.chain[0].flush()
    }

    pub fn close(self) -> Result<(), ImageError> {
        self.chain[0].close()
    }

    fn change(
        &mut self,
        offset: u64,
        len: u64,
        change: Change,
        data: &[u8],
    ) -> Result<(), ImageError> {
        let mut at = 0;
        while at < len {
            let lease = self.holders[0].take();
            let (pieces, guard) = self.resolve_write(offset + at..offset + len, change)?;
            assert!(!pieces.is_empty(), "an empty answer");
            for piece in &pieces {
                let part = data.get(at as usize..(at + piece.len) as usize);
                let done = self.carry_out(offset + at, piece, part);
                if let Err(e) = done {
                    guard.into_iter().for_each(|g| self.chain[0].abort(g));
                    return Err(e);
                }
                at += piece.len;
            }
            guard.into_iter().for_each(|g| self.chain[0].commit(g));
            self.holders[0].end(lease);
        }
        assert!(at == len, "an answer longer than its question");
        Ok(())
    }

    /// Resolves a change without carrying it out.
    pub fn resolve_write(
        &mut self,
        range: std::ops::Range<u64>,
        change: Change,
    ) -> Result<(Vec<Piece>, Option<Guard>), ImageError> {
        let format = &self.chain[0];
        loop {
            let mut pieces = Vec::new();
            match format.resolve_write(range.clone(), change, &self.waiter, &mut pieces)? {
                Outcome::Ready(guard) => return Ok((pieces, guard)),
                Outcome::Miss(miss) => format.load(miss)?,
                Outcome::Busy => {
                    while self.mailbox.take().is_none() {
                        std::thread::yield_now();
                    }
                }
            }
        }
    }

    fn carry_out(
        &mut self,
        guest: u64,
        piece: &Piece,
        data: Option<&[u8]>,
    ) -> Result<(), ImageError> {
        let (file, offset, head, tail) = match piece.target {
            Target::Nothing => return Ok(()),
            Target::InPlace { file, offset } => (file, offset, 0, 0),
            Target::New { file, offset, head, tail, .. } => (file, offset, head, tail),
        };
        let mut whole = vec![0; head as usize];
        self.read_level(0, guest - u64::from(head), &mut whole)?;
        match data {
            Some(data) => whole.extend_from_slice(data),
            None => whole.resize(whole.len() + piece.len as usize, 0),
        }
        let mut after = vec![0; tail as usize];
        self.read_level(0, guest + piece.len, &mut after)?;
        whole.extend(after);
        let file = Arc::clone(&self.chain[0].files()[usize::from(file)]);
        file.write_at(offset - u64::from(head), &whole).map_err(ImageError::io("write"))
    }
}

/// All extents of a range, or of a part from its start on.
fn resolve(format: &dyn Format, range: std::ops::Range<u64>) -> Result<Vec<Extent>, ImageError> {
    loop {
        let mut extents = Vec::new();
        match format.resolve_read(range.clone(), &mut extents)? {
            Outcome::Ready(()) => return Ok(extents),
            Outcome::Miss(miss) => format.load(miss)?,
            Outcome::Busy => std::thread::yield_now(),
        }
    }
}
