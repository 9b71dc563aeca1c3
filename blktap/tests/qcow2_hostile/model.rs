//! A slow reader of QCOW2, written from the specification alone: it says whether an image must be
//! refused, and what each cluster of its disk reads as.

/// What an image's header says, as far as reading needs it.
pub struct Model<'a> {
    bytes: &'a [u8],
    v3: bool,
    bits: u32,
    pub size: u64,
    l1_entries: u64,
    l1: u64,
    extended: bool,
    zstd: bool,
}

/// Whether an image is to be opened for reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is sound so far.
    Accept,
    /// It must be refused.
    Refuse,
    /// Both would do: the specification leaves it open.
    Either,
}

/// What a cluster reads as.
#[derive(Debug, PartialEq, Eq)]
pub enum Cell {
    /// These bytes.
    Bytes(Vec<u8>),
    /// These bytes, or an error.
    Doubtful(Vec<u8>),
    /// An error.
    Fault,
}

/// A big-endian number; bytes beyond the end are zeroes.
pub fn be(bytes: &[u8], at: u64, len: u64) -> u64 {
    (at..at.saturating_add(len))
        .map(|i| usize::try_from(i).ok().and_then(|i| bytes.get(i)).copied().unwrap_or(0))
        .fold(0, |n, b| n << 8 | u64::from(b))
}

impl<'a> Model<'a> {
    /// The verdict, and the reader of what is not refused.
    pub fn of(bytes: &'a [u8]) -> (Verdict, Option<Model<'a>>) {
        let field = |at, len| be(bytes, at, len);
        let (version, bits) = (field(4, 4), field(20, 4));
        if bytes.len() < 72
            || field(0, 4) != 0x5146_49fb
            || !(2..=3).contains(&version)
            || !(9..=21).contains(&bits)
            || field(32, 4) != 0
        {
            return (Verdict::Refuse, None);
        }
        let v3 = version == 3;
        let features = if v3 { field(72, 8) } else { 0 };
        let model = Model {
            bytes,
            v3,
            bits: bits as u32,
            size: field(24, 8) - field(24, 8) % 512,
            l1_entries: field(36, 4),
            l1: field(40, 8),
            extended: features & 0x10 != 0,
            zstd: features & 8 != 0,
        };
        (model.verdict(features), Some(model))
    }

    fn verdict(&self, features: u64) -> Verdict {
        let cluster = 1u64 << self.bits;
        let per_l2 = cluster / if self.extended { 16 } else { 8 };
        let aligned = |at: u64| at != 0 && at.is_multiple_of(cluster);
        let field = |at, len| be(self.bytes, at, len);
        let table = field(56, 4) * cluster;
        let bad = features & !0x1f != 0
            // A data file that nobody gives.
            || features & 4 != 0
            || (self.extended && self.bits < 14)
            || self.size > i64::MAX as u64
            || self.l1_entries * 8 > 32 << 20
            || self.l1_entries < self.size.div_ceil(cluster).div_ceil(per_l2)
            || (self.l1_entries > 0 && !aligned(self.l1))
            || !aligned(field(48, 8))
            || table == 0
            || table > (8 << 20).max(cluster)
            || field(60, 4) > 65_536
            || (field(60, 4) > 0 && !aligned(field(64, 8)));
        let length = field(100, 4);
        let bad_v3 = self.v3
            && (field(96, 4) > 6
                || !(104..=cluster).contains(&length)
                || (length > 104 && self.byte(104) > 1)
                || self.zstd != (length > 104 && self.byte(104) == 1));
        match (bad || bad_v3, self.extensions_are_plain(length)) {
            (true, _) => Verdict::Refuse,
            (false, true) => Verdict::Accept,
            (false, false) => Verdict::Either,
        }
    }

    fn byte(&self, at: u64) -> u8 {
        be(self.bytes, at, 1) as u8
    }

    /// No encryption, no names that are not text, nothing that does not fit.
    fn extensions_are_plain(&self, length: u64) -> bool {
        let field = |at, len| be(self.bytes, at, len);
        let (cluster, mut at) = (1 << self.bits, if self.v3 { length } else { 72 });
        let mut seen = Vec::new();
        while at + 8 <= cluster && field(at, 4) != 0 {
            let (kind, len) = (field(at, 4), field(at + 4, 4));
            let known = [0x6803_f857, 0x2385_2875].contains(&kind);
            if !known || at + 8 + len > cluster || seen.contains(&kind) {
                return false;
            }
            if kind == 0x2385_2875 && len != 24 {
                return false;
            }
            seen.push(kind);
            at += (8 + len).next_multiple_of(8);
        }
        // No raw data file, no backing file, and none of the tables so far behind that it overflows.
        (!self.v3 || field(88, 8) & 2 == 0)
            && field(8, 8) == 0
            && [self.l1, field(48, 8), field(64, 8)].iter().all(|at| *at < 1 << 55)
            && field(24, 8).is_multiple_of(512)
    }

    /// Clusters of the disk.
    pub fn clusters(&self) -> u64 {
        self.size.div_ceil(1 << self.bits)
    }

    pub fn cluster_size(&self) -> u64 {
        1 << self.bits
    }

    /// `len` bytes of the file; zeroes behind its end.
    fn file(&self, at: u64, len: u64) -> Vec<u8> {
        (at..at + len)
            .map(|i| usize::try_from(i).ok().and_then(|i| self.bytes.get(i)).copied().unwrap_or(0))
            .collect()
    }

    /// Where cluster `number` has its data, and the clusters of the file that are tables: what
    /// lies in them is not only data.
    pub fn is_tangled(&self, number: u64, tables: &std::collections::HashSet<u64>) -> bool {
        let (cluster, entry_bytes) = (1u64 << self.bits, if self.extended { 16 } else { 8 });
        let per_l2 = cluster / entry_bytes;
        let l2 = be(self.bytes, self.l1 + number / per_l2 * 8, 8) & 0x00ff_ffff_ffff_fe00;
        let word = be(self.bytes, l2 + number % per_l2 * entry_bytes, 8);
        let first = match word >> 62 & 1 {
            1 => word & ((1 << (70 - self.bits)) - 1),
            _ => word & 0x00ff_ffff_ffff_fe00,
        };
        let first = first >> self.bits;
        (first..first + 3).any(|at| tables.contains(&at)) || !self.is_alone(l2)
    }

    /// Whether an L2 table lies in no other table.
    fn is_alone(&self, l2: u64) -> bool {
        let at = l2 >> self.bits;
        let l1 = self.l1 >> self.bits..=(self.l1 + self.l1_entries * 8) >> self.bits;
        let refcounts = be(self.bytes, 48, 8) >> self.bits;
        at != 0 && !l1.contains(&at) && at != refcounts
    }

    /// Clusters of the file with tables in them.
    pub fn tables(&self) -> std::collections::HashSet<u64> {
        let (bits, field) = (self.bits, |at, len| be(self.bytes, at, len));
        let mut all = std::collections::HashSet::from([0]);
        let end = (self.bytes.len() as u64 >> bits) + 1;
        let tables = [(self.l1, self.l1_entries * 8), (field(48, 8), field(56, 4) << bits)];
        for (at, len) in tables {
            all.extend((at >> bits..=(at + len) >> bits).take_while(|c| *c <= end));
            let entries = (0..len / 8).take_while(|i| at + i * 8 < self.bytes.len() as u64);
            all.extend(entries.map(|i| (field(at + i * 8, 8) & 0x00ff_ffff_ffff_fe00) >> bits));
        }
        all
    }

    /// What cluster `number` reads as; there is no backing file.
    pub fn read(&self, number: u64) -> Cell {
        let (cluster, entry_bytes) = (1u64 << self.bits, if self.extended { 16 } else { 8 });
        let per_l2 = cluster / entry_bytes;
        let l1 = be(self.bytes, self.l1 + number / per_l2 * 8, 8);
        let l2 = l1 & 0x00ff_ffff_ffff_fe00;
        if l2 == 0 {
            return Cell::Bytes(vec![0; cluster as usize]);
        }
        if !l2.is_multiple_of(cluster) {
            return Cell::Fault;
        }
        let at = l2 + number % per_l2 * entry_bytes;
        let word = be(self.bytes, at, 8);
        let bitmap = if self.extended { be(self.bytes, at + 8, 8) } else { 0 };
        let cell = match word >> 62 & 1 {
            1 => self.compressed(word),
            _ if self.extended => self.subclusters(word, bitmap),
            _ => self.standard(word),
        };
        match cell {
            Cell::Bytes(bytes) if l2 + cluster > self.bytes.len() as u64 => Cell::Doubtful(bytes),
            cell => cell,
        }
    }

    fn standard(&self, word: u64) -> Cell {
        let (cluster, offset) = (1u64 << self.bits, word & 0x00ff_ffff_ffff_fe00);
        let zeroes = || vec![0; cluster as usize];
        match (word & 1, offset) {
            (1, _) if !self.v3 => Cell::Fault,
            (1, _) if !offset.is_multiple_of(cluster) => Cell::Doubtful(zeroes()),
            (1, _) | (0, 0) => Cell::Bytes(zeroes()),
            _ => self.data(offset, 0, cluster),
        }
    }

    /// `len` bytes of the data cluster at `offset`, `skip` bytes into it.
    fn data(&self, offset: u64, skip: u64, len: u64) -> Cell {
        let cluster = 1u64 << self.bits;
        if !offset.is_multiple_of(cluster) {
            return Cell::Fault;
        }
        let bytes = self.file(offset + skip, len);
        match offset >= self.bytes.len() as u64 {
            true => Cell::Doubtful(bytes),
            false => Cell::Bytes(bytes),
        }
    }

    fn subclusters(&self, word: u64, bitmap: u64) -> Cell {
        let (offset, part) = (word & 0x00ff_ffff_ffff_fe00, (1u64 << self.bits) / 32);
        let (mut all, mut doubtful) = (Vec::new(), word & 1 != 0);
        for i in 0..32 {
            match (bitmap >> i & 1, bitmap >> (32 + i) & 1) {
                (0, _) => all.extend(vec![0; part as usize]),
                (1, 0) if offset != 0 => match self.data(offset, i * part, part) {
                    Cell::Bytes(bytes) => all.extend(bytes),
                    Cell::Doubtful(bytes) => {
                        doubtful = true;
                        all.extend(bytes);
                    }
                    Cell::Fault => return Cell::Fault,
                },
                _ => return Cell::Fault,
            }
        }
        // An offset that is not aligned and not needed.
        doubtful |= !offset.is_multiple_of(1 << self.bits);
        if doubtful { Cell::Doubtful(all) } else { Cell::Bytes(all) }
    }

    fn compressed(&self, word: u64) -> Cell {
        let shift = 62 - (self.bits - 8);
        let offset = word & ((1 << shift) - 1);
        let sectors = (word & ((1 << 62) - 1)) >> shift;
        let len = (sectors + 1) * 512 - offset % 512;
        if self.zstd {
            // The fuzzed images have none.
            return Cell::Doubtful(vec![0; 1 << self.bits]);
        }
        let packed = self.file(offset, len);
        let mut out = vec![0; 1 << self.bits];
        let mut unpack = flate2::Decompress::new(false);
        let done = unpack.decompress(&packed, &mut out, flate2::FlushDecompress::Finish);
        match done.is_ok() && unpack.total_out() == 1 << self.bits {
            // A window larger than the format's: who refuses that is right as well.
            true => Cell::Doubtful(out),
            false => Cell::Fault,
        }
    }
}
