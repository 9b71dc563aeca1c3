//! Growing an image that nobody uses.
//!
//! The footer is one sector and says where the header is; the header says where the block table
//! is. So whatever a larger table needs is written aside, and the footer's copy at the start,
//! which counts, changes from the old image to the new one at once.
use zerocopy::IntoBytes;
use zerocopy::big_endian::{U32, U64};

use super::batmap::Batmap;
use super::footer::{FOOTER, Footers, Kind, LARGEST_DISK, too_large};
use super::growth;
use super::header::{HEADER, Header};
use super::open::{Sparse, check_fixed, writable};
use super::space::{Space, write_footer};
use super::{UNUSED, Vhd};
use crate::formats::ImageError;
use crate::storage::Storage;

/// Bytes that are copied at once.
const PIECE: usize = 1 << 20;

fn sync(storage: &dyn Storage) -> Result<(), ImageError> {
    storage.sync().map_err(ImageError::io("flush the file"))
}

impl Vhd {
    /// Grows an image to a disk of `size` bytes. What is new reads as zeroes; in a fixed image
    /// whose file has bytes between the disk and the footer these come first, as they are:
    /// readers that go by another of the footer's sizes have them already.
    ///
    /// `parent`: bytes of the disk that a differencing image builds on. One whose parent is
    /// longer than the image is refused, as the parent would show in what is new.
    pub fn grow(storage: &dyn Storage, parent: Option<u64>, size: u64) -> Result<(), ImageError> {
        let footers = Footers::read(storage)?;
        let mut footer = footers.choose()?;
        let old_size = footer.disk_size()?;
        if !size.is_multiple_of(512) || size < old_size {
            let what = format!(
                "a VHD of {old_size} bytes cannot become one of {size}: it can only grow, by multiples \
                 of 512 bytes"
            );
            return Err(ImageError::Invalid(what));
        }
        if size > LARGEST_DISK {
            return Err(too_large(size));
        }
        if footer.kind()? == Kind::Fixed {
            check_fixed(&footers, old_size)?;
            return growth::grow(storage, &footers, footer, size);
        }
        if footer.kind()? == Kind::Differencing && size > old_size {
            check_parent(parent, old_size)?;
        }
        let mut sparse = Sparse::read(storage, footers, footer)?;
        sparse.check()?;
        // Also puts the footers right.
        let space = writable(&mut sparse, storage)?;
        let entries = size.div_ceil(u64::from(sparse.header.block_size.get()));
        forget_beyond(storage, &sparse, sparse.blocks(old_size)?)?;
        let mut growing = Growing { storage, sparse, space };
        let old = growing.sparse.metadata();
        let moves = entries > growing.sparse.entries.len() as u64;
        if moves {
            let at = growing.larger_table(entries, size)?;
            footer.data_offset = U64::new(at);
        }
        footer.set_size(size);
        let what = "write the footer's copy";
        storage.write_at(0, footer.as_bytes()).map_err(ImageError::io(what))?;
        sync(storage)?;
        write_footer(storage, &footer, growing.space.footer_at())?;
        sync(storage)?;
        // The footer's copy stays where it is.
        for (part, _) in old.into_iter().filter(|(part, _)| moves && part.start >= FOOTER) {
            storage.punch(part).map_err(ImageError::io("give space back"))?;
        }
        Ok(())
    }
}

/// The format cannot say that a part of a block is zeroes while the parent has something there.
fn check_parent(parent: Option<u64>, size: u64) -> Result<(), ImageError> {
    match parent {
        None => Err(ImageError::Invalid("the size of its parent is needed".into())),
        Some(bytes) if bytes > size => Err(ImageError::Unsupported(format!(
            "growing an image of {size} bytes whose parent has {bytes}: the parent would show in \
             what is new; convert it to an image without a parent, and grow that"
        ))),
        Some(_) => Ok(()),
    }
}

/// The table may have had room for more blocks than the disk; whatever it says of them is void.
fn forget_beyond(storage: &dyn Storage, sparse: &Sparse, blocks: usize) -> Result<(), ImageError> {
    let beyond = &sparse.entries[blocks..];
    if beyond.iter().all(|at| *at == UNUSED) {
        return Ok(());
    }
    let at = sparse.header.table_offset.get() + blocks as u64 * 4;
    let unused = vec![0xff; beyond.len() * 4];
    storage.write_at(at, &unused).map_err(ImageError::io("write the block table"))?;
    sync(storage)
}

struct Growing<'a> {
    storage: &'a dyn Storage,
    sparse: Sparse,
    space: Space,
}

impl Growing<'_> {
    /// Writes metadata for so many blocks behind those that are there, with a copy of the block
    /// table and the parent's names: where the header is. Nothing refers to it yet.
    fn larger_table(&mut self, entries: u64, size: u64) -> Result<u64, ImageError> {
        let entries = u32::try_from(entries).map_err(|_| too_large(size))?;
        let start = self.sparse.survey().metadata_end.next_multiple_of(512);
        let mut header = self.sparse.header;
        header.table_offset = U64::new(start + HEADER);
        header.entries = U32::new(entries);
        let batmap = self.sparse.batmap.as_ref();
        let batmap = batmap.map(|_| Batmap::new(header.table_end(), entries, size));
        let mut end = header.table_end() + batmap.as_ref().map_or(0, |_| Batmap::room(entries));
        let mut names = Vec::new();
        for locator in header.locators.iter_mut().filter(|l| l.is_used()) {
            let room = locator.room().next_multiple_of(512);
            if room > 1 << 20 {
                let what = format!("a parent locator of {room} bytes");
                return Err(ImageError::Unsupported(what));
            }
            names.push((locator.offset.get(), end, room));
            locator.offset = U64::new(end);
            end += room;
        }
        header.seal();
        self.clear_of_blocks(start, end)?;
        for (from, to, len) in names {
            self.copy(from, to, len)?;
        }
        self.write_metadata(start, &header, batmap)?;
        sync(self.storage)?;
        Ok(start)
    }

    fn write_metadata(
        &self,
        start: u64,
        header: &Header,
        batmap: Option<Batmap>,
    ) -> Result<(), ImageError> {
        let write = |at, bytes: &[u8]| {
            self.storage.write_at(at, bytes).map_err(ImageError::io("write new metadata"))
        };
        let room = header.table_bytes() as usize / 4;
        let mut table: Vec<U32> = self.sparse.entries.iter().map(|at| U32::new(*at)).collect();
        table.resize(room, U32::new(UNUSED));
        write(start, header.as_bytes())?;
        write(header.table_offset.get(), table.as_bytes())?;
        batmap.map_or(Ok(()), |mut batmap| batmap.write(self.storage))
    }

    /// Moves the blocks of a stretch, in which there is nothing else, to the end.
    fn clear_of_blocks(&mut self, start: u64, end: u64) -> Result<(), ImageError> {
        let block_bytes = self.sparse.block_bytes();
        let bitmap_bytes = self.sparse.header.bitmap_bytes();
        let shift = self.sparse.header.block_size.get().trailing_zeros();
        if self.space.only_behind(end)? {
            write_footer(self.storage, &self.sparse.footer, self.space.footer_at())?;
        }
        let mut moved = Vec::new();
        for block in 0..self.sparse.entries.len() {
            let at = self.sparse.entries[block];
            let from = u64::from(at) * 512;
            if at == UNUSED || from >= end || from + block_bytes <= start {
                continue;
            }
            let place = self.space.take(self.storage, &self.sparse.footer, bitmap_bytes, shift)?;
            let to = place.start;
            self.copy(from, to, block_bytes)?;
            self.sparse.entries[block] = (to / 512) as u32;
            moved.push((block, from));
        }
        sync(self.storage)?;
        for (block, _) in &moved {
            let block = *block;
            let at = self.sparse.header.table_offset.get() + block as u64 * 4;
            let entry = self.sparse.entries[block].to_be_bytes();
            let what = "write the block table";
            self.storage.write_at(at, &entry).map_err(ImageError::io(what))?;
        }
        sync(self.storage)?;
        for (_, from) in moved {
            let old = from..from + block_bytes;
            self.storage.punch(old).map_err(ImageError::io("give space back"))?;
        }
        Ok(())
    }

    fn copy(&self, mut from: u64, mut to: u64, len: u64) -> Result<(), ImageError> {
        let mut bytes = vec![0; PIECE.min(len as usize)];
        let end = from + len;
        while from < end {
            let piece = &mut bytes[..((end - from) as usize).min(PIECE)];
            self.storage.read_at(from, piece).map_err(ImageError::io("read a block"))?;
            self.storage.write_at(to, piece).map_err(ImageError::io("write a block"))?;
            from += piece.len() as u64;
            to += piece.len() as u64;
        }
        Ok(())
    }
}
