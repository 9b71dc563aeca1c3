//! The bitmaps extension of a header, changed so that no crash makes the header unreadable.
//!
//! Only the first sector, with the autoclear bit, is certain to be written whole. So the bit is
//! off while an extension is half there, and a backing file's name that is in the way moves first.
use crate::formats::ImageError;
use crate::formats::qcow2::extension::{BITMAPS, BitmapsExtension};
use crate::formats::qcow2::header::{AUTOCLEAR_BITMAPS, Version, be32, be64};

use super::Offline;

/// Where fields are in the header.
const BACKING_OFFSET: u64 = 8;
const AUTOCLEAR: u64 = 88;
/// Bytes of the extension: kind and length, then its fields.
const HEAD: usize = 8;
const FIELDS: usize = 24;

/// Where the extensions are in the header's cluster.
struct Places {
    /// Where the bitmaps' one begins, if there is one, and where the next begins.
    bitmaps: Option<(usize, usize)>,
    /// Where the end is marked.
    end: usize,
}

impl Offline<'_> {
    /// Writes, or takes away, the extension. With one, the autoclear bit is set afterwards.
    pub(in crate::formats::qcow2) fn set_bitmaps_extension(
        &mut self,
        new: Option<BitmapsExtension>,
    ) -> Result<(), ImageError> {
        if self.header().version == Version::V2 {
            let text = "bitmaps need an image of compat=1.1";
            return Err(ImageError::Unsupported(text.to_owned()));
        }
        self.sync()?;
        let cluster = self.header_cluster()?;
        let places = Places::find(&cluster);
        match (new, places.bitmaps) {
            (None, None) => Ok(()),
            (None, Some((at, next))) => {
                self.set_bit(Bit::Off)?;
                self.take_away(&cluster, at, next, places.end)
            }
            (Some(new), Some((at, _))) => {
                let fields = (at + HEAD) as u64;
                let bytes = &new.to_extension().data;
                let one_sector = fields / 512 == (fields + FIELDS as u64 - 1) / 512;
                if one_sector {
                    self.switch(fields, bytes)?;
                } else {
                    self.set_bit(Bit::Off)?;
                    self.write(fields, bytes, "write the header")?;
                    self.sync()?;
                }
                self.set_bit(Bit::On)
            }
            (Some(new), None) => {
                self.set_bit(Bit::Off)?;
                self.append(places.end, new)?;
                self.set_bit(Bit::On)
            }
        }
    }

    fn header_cluster(&self) -> Result<Vec<u8>, ImageError> {
        let mut cluster = vec![0; self.layout().cluster_size() as usize];
        self.storage().read_at(0, &mut cluster).map_err(ImageError::io("read the header"))?;
        Ok(cluster)
    }

    fn set_bit(&mut self, bit: Bit) -> Result<(), ImageError> {
        let old = self.header().autoclear;
        let new = match bit {
            Bit::On => old | AUTOCLEAR_BITMAPS,
            Bit::Off => old & !AUTOCLEAR_BITMAPS,
        };
        if new == old {
            return Ok(());
        }
        self.switch(AUTOCLEAR, &new.to_be_bytes())
    }

    /// Puts the extension where the end is marked.
    fn append(&mut self, at: usize, new: BitmapsExtension) -> Result<(), ImageError> {
        let need = at + HEAD + FIELDS + HEAD;
        self.make_room(need)?;
        // The mark of the end stays until what comes behind it is durable.
        let mut rest = new.to_extension().data;
        rest.extend_from_slice(&[0; HEAD]);
        self.write((at + HEAD) as u64, &rest, "write the header")?;
        let mut head = BITMAPS.to_be_bytes().to_vec();
        head.extend_from_slice(&(FIELDS as u32).to_be_bytes());
        self.switch(at as u64, &head)
    }

    /// Moves the backing file's name to the end of the cluster if it begins before `need`.
    fn make_room(&mut self, need: usize) -> Result<(), ImageError> {
        let cluster = self.header_cluster()?;
        let (at, len) = (be64(&cluster, 8) as usize, be32(&cluster, 16) as usize);
        let named = at != 0 && len != 0;
        let to = (cluster.len() - if named { len } else { 0 }) & !7;
        if need > to || (named && at < need && to < at + len) {
            return Err(ImageError::NoSpace("the header has no room for bitmaps".to_owned()));
        }
        if named && at < need {
            self.write(to as u64, &cluster[at..at + len], "write the header")?;
            self.switch(BACKING_OFFSET, &(to as u64).to_be_bytes())?;
        }
        Ok(())
    }

    /// Takes the extension from `at` to `next` away.
    fn take_away(
        &mut self,
        cluster: &[u8],
        at: usize,
        next: usize,
        end: usize,
    ) -> Result<(), ImageError> {
        if next == end {
            return self.switch(at as u64, &[0; HEAD]);
        }
        // Others behind it move up. Until they have, the end is where it was.
        let mut moved = cluster[next..end].to_vec();
        moved.resize(end + HEAD - at, 0);
        self.switch(at as u64, &[0; HEAD])?;
        self.write((at + HEAD) as u64, &moved[HEAD..], "write the header")?;
        self.switch(at as u64, &moved[..HEAD])
    }
}

#[derive(Clone, Copy)]
enum Bit {
    On,
    Off,
}

impl Places {
    /// In a header that could be parsed.
    fn find(cluster: &[u8]) -> Places {
        let mut at = be32(cluster, 100) as usize;
        let mut bitmaps = None;
        while at + HEAD <= cluster.len() && be32(cluster, at) != 0 {
            let next = (at + HEAD + be32(cluster, at + 4) as usize).next_multiple_of(8);
            if be32(cluster, at) == BITMAPS {
                bitmaps = Some((at, next));
            }
            at = next;
        }
        Places { bitmaps, end: at }
    }
}
