//! L1 and L2 entries as a check sees them: every bit may be wrong.
use crate::formats::qcow2::entry::{
    COPIED, L1_RESERVED, L2_RESERVED, L2Entry, Layout, OFFSET, SubBits, ZERO,
};

/// An entry of an L2 table; `bitmap` is 0 where there are no subclusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) raw: u64,
    pub(super) bitmap: u64,
}

/// What an L2 entry refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Named {
    Nothing,
    /// A whole cluster.
    Cluster {
        offset: u64,
    },
    /// Bytes of the image.
    Compressed {
        offset: u64,
        len: u64,
    },
}

/// What is wrong with an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct EntryFault {
    pub(super) text: &'static str,
    /// The entry that reads the same and is sound.
    pub(super) mended: Option<Entry>,
}

/// The L2 table that an L1 entry names; 0 is none.
pub(super) fn l2_offset(raw: u64) -> u64 {
    raw & OFFSET
}

/// Whether an L1 entry has bits that mean nothing.
pub(super) fn l1_reserved(raw: u64) -> bool {
    raw & L1_RESERVED != 0
}

impl Entry {
    pub(super) fn is_empty(self) -> bool {
        self.raw == 0 && self.bitmap == 0
    }

    fn offset(self) -> u64 {
        self.raw & OFFSET
    }

    fn written(self) -> u32 {
        SubBits(self.bitmap).allocated()
    }

    pub(super) fn named(self, layout: &Layout) -> Named {
        match layout.l2(self.raw, self.bitmap) {
            L2Entry::Compressed { descriptor } => {
                let bytes = layout.compressed(descriptor);
                Named::Compressed { offset: bytes.start, len: bytes.end - bytes.start }
            }
            L2Entry::Data { host: offset, .. }
            | L2Entry::Zero { host: Some(offset), .. }
            | L2Entry::Subclusters { host: Some(offset), .. } => Named::Cluster { offset },
            L2Entry::Unallocated
            | L2Entry::Zero { host: None, .. }
            | L2Entry::Subclusters { host: None, .. } => Named::Nothing,
        }
    }

    /// All that is wrong with it in itself.
    pub(super) fn faults(self, layout: &Layout) -> impl Iterator<Item = EntryFault> {
        let fault = |text| Some(EntryFault { text, mended: None });
        let named = self.named(layout);
        let compressed = matches!(named, Named::Compressed { .. });
        let cluster = matches!(named, Named::Cluster { .. });
        let reserved = !compressed && self.raw & L2_RESERVED != 0;
        let copied = compressed && self.raw & COPIED != 0;
        let uncopied = Entry { raw: self.raw & !COPIED, ..self };
        let askew = cluster && !self.offset().is_multiple_of(layout.cluster_size());
        [
            fault("has reserved bits set").filter(|_| reserved),
            fault("is compressed and has the copied flag")
                .filter(|_| copied)
                .map(|f| EntryFault { mended: Some(uncopied), ..f }),
            fault("is compressed, in an image with a data file")
                .filter(|_| compressed && layout.data_file),
            fault("is compressed and has subclusters")
                .filter(|_| compressed && !layout.data_file && self.bitmap != 0),
            fault("has subclusters that are both written and zero")
                .filter(|_| cluster && self.bitmap >> 32 & self.bitmap != 0),
            fault("has an offset that is no multiple of the cluster size")
                .filter(|_| askew)
                .map(|f| EntryFault { mended: self.as_zero(layout), ..f }),
            fault("has written subclusters without a cluster")
                .filter(|_| named == Named::Nothing && self.written() != 0),
        ]
        .into_iter()
        .flatten()
    }

    /// The same without its cluster, where no data is in that.
    fn as_zero(self, layout: &Layout) -> Option<Entry> {
        match layout.extended {
            true => (self.written() == 0).then_some(Entry { raw: 0, ..self }),
            false => (self.raw & ZERO != 0).then_some(Entry { raw: ZERO, ..self }),
        }
    }

    /// The copied flag, and where it belongs, of the cluster that it speaks about.
    pub(super) fn copied(self, layout: &Layout) -> Option<(bool, u64)> {
        match self.named(layout) {
            Named::Cluster { offset } => Some((self.raw & COPIED != 0, offset)),
            Named::Nothing | Named::Compressed { .. } => None,
        }
    }

    pub(super) fn with_copied(self, copied: bool) -> Entry {
        Entry { raw: if copied { self.raw | COPIED } else { self.raw & !COPIED }, ..self }
    }
}

/// The entries of an L2 table's bytes.
pub(super) fn entries(table: &[u8], layout: &Layout) -> impl Iterator<Item = Entry> {
    table.chunks_exact(if layout.extended { 16 } else { 8 }).map(move |bytes| Entry {
        raw: word(&bytes[..8]),
        bitmap: if layout.extended { word(&bytes[8..]) } else { 0 },
    })
}

/// Puts an entry into a table's bytes.
pub(super) fn put(table: &mut [u8], index: usize, entry: Entry, layout: &Layout) {
    let at = index * if layout.extended { 16 } else { 8 };
    table[at..at + 8].copy_from_slice(&entry.raw.to_be_bytes());
    if layout.extended {
        table[at + 8..at + 16].copy_from_slice(&entry.bitmap.to_be_bytes());
    }
}

/// A big-endian number.
pub(super) fn word(bytes: &[u8]) -> u64 {
    u64::from_be_bytes(bytes.try_into().unwrap_or_default())
}
