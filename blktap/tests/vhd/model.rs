//! A reader of VHD images that shares nothing with the one it judges, and a maker of small ones:
//! bytes at the offsets that the specification gives. Slow, and plain.

/// What a byte of the disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Byte {
    Is(u8),
    /// The parent's.
    Below,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Fixed = 2,
    Dynamic = 3,
    Differencing = 4,
}

/// What an image is, if it may be opened for reading.
pub struct Model {
    pub file: Vec<u8>,
    pub kind: Kind,
    pub size: u64,
    pub block: u64,
    table: u64,
}

fn number(bytes: &[u8], at: usize, len: usize) -> u64 {
    bytes[at..at + len].iter().fold(0, |n, b| n << 8 | u64::from(*b))
}

/// The complement of the sum of all bytes but the four of the checksum.
pub fn checksum(bytes: &[u8], own: usize) -> u32 {
    let others = bytes.iter().enumerate().filter(|(i, _)| !(own..own + 4).contains(i));
    !others.fold(0u32, |sum, (_, b)| sum.wrapping_add(u32::from(*b)))
}

/// Writes the checksum that belongs there.
pub fn seal(bytes: &mut [u8], own: usize) {
    let sum = checksum(bytes, own);
    bytes[own..own + 4].copy_from_slice(&sum.to_be_bytes());
}

enum Footer {
    Good(Vec<u8>),
    Damaged,
    None,
}

fn footer(file: &[u8], at: usize) -> Footer {
    let mut f = file[at..file.len().min(at + 512)].to_vec();
    f.resize(512, 0);
    if &f[..8] != b"conectix" {
        return Footer::None;
    }
    let told = number(&f, 64, 4);
    let mut shown = f.clone();
    shown[85] = 0;
    let old = &f[28..31] == b"tap" && matches!(number(&f, 32, 4), 1 | 0x1_0001);
    if told == u64::from(checksum(&f, 64)) || old && told == u64::from(checksum(&shown, 64)) {
        return Footer::Good(f);
    }
    Footer::Damaged
}

fn kind(footer: &[u8]) -> Option<Kind> {
    [Kind::Fixed, Kind::Dynamic, Kind::Differencing]
        .into_iter()
        .find(|k| *k as u64 == number(footer, 60, 4))
}

/// The footer that counts.
fn choose(file: &[u8]) -> Option<Vec<u8>> {
    let tail_at =
        if file.len() % 512 == 511 { file.len() - 511 } else { file.len().checked_sub(512)? };
    match (footer(file, 0), footer(file, tail_at)) {
        (Footer::Good(head), Footer::Good(tail)) => {
            let fixed = [kind(&head)? == Kind::Fixed, kind(&tail)? == Kind::Fixed];
            match fixed {
                [true, true] => Some(tail),
                [false, false] => (head[68..84] == tail[68..84]).then_some(head),
                _ => None,
            }
        }
        (Footer::Good(head), tail) => match (kind(&head)?, tail) {
            (Kind::Fixed, _) => None,
            _ => Some(head),
        },
        (_, Footer::Good(tail)) => Some(tail),
        _ => None,
    }
}

fn disk_size(footer: &[u8]) -> Option<u64> {
    let chs = number(footer, 56, 2) * number(footer, 58, 1) * number(footer, 59, 1);
    let creator = &footer[28..32];
    let by_size = creator.starts_with(b"tap")
        || [b"win ", b"qem2", b"d2v ", b"CTXS", b"wa\0\0"].iter().any(|c| creator == *c)
        || chs == 65535 * 16 * 255;
    let size = if by_size { number(footer, 48, 8) / 512 * 512 } else { chs * 512 };
    (size > 0 && size <= 2040 << 30).then_some(size)
}

impl Model {
    /// `None`: the image must be refused.
    pub fn open(file: &[u8]) -> Option<Model> {
        let footer = choose(file)?;
        let (kind, size) = (kind(&footer)?, disk_size(&footer)?);
        let len = file.len() as u64;
        let mut model = Model { file: file.to_vec(), kind, size, block: 0, table: 0 };
        if kind == Kind::Fixed {
            return (size <= (len - 511) / 512 * 512).then_some(model);
        }
        if footer.starts_with(b"conectix")
            && &footer[28..31] == b"tap"
            && number(&footer, 32, 4) < 2
        {
            return None;
        }
        let at = number(&footer, 16, 8);
        if at < 512 || !at.is_multiple_of(512) || at.checked_add(1024)? > len {
            return None;
        }
        let header = &file[at as usize..at as usize + 1024];
        let right = &header[..8] == b"cxsparse" && number(header, 24, 4) >> 16 == 1;
        if !right || number(header, 36, 4) != u64::from(checksum(header, 36)) {
            return None;
        }
        let entries = number(header, 28, 4);
        (model.block, model.table) = (number(header, 32, 4), number(header, 16, 8));
        let table_end = model.table.checked_add((entries * 4).div_ceil(512) * 512)?;
        let blocks_fit = (9..=28).any(|bits| model.block == 1 << bits);
        let table_fits = model.table >= 512 && model.table.is_multiple_of(512) && table_end <= len;
        if !blocks_fit || !table_fits || entries > 4 << 20 || entries * model.block < size {
            return None;
        }
        let all_inside = (0..entries).all(|n| match model.entry(n) {
            0xffff_ffff => true,
            sector => sector * 512 + model.bitmap() + model.block <= len,
        });
        all_inside.then_some(model)
    }

    fn entry(&self, block: u64) -> u64 {
        number(&self.file, (self.table + block * 4) as usize, 4)
    }

    fn bitmap(&self) -> u64 {
        (self.block / 4096).max(1).div_ceil(512) * 512
    }

    pub fn byte(&self, at: u64) -> Byte {
        if self.kind == Kind::Fixed {
            return Byte::Is(self.file[at as usize]);
        }
        let below = if self.kind == Kind::Differencing { Byte::Below } else { Byte::Is(0) };
        let (sector, skip) = (self.entry(at / self.block), at % self.block);
        if sector == 0xffff_ffff {
            return below;
        }
        let bits = self.file[(sector * 512 + skip / 4096) as usize];
        match bits >> (7 - skip / 512 % 8) & 1 {
            1 => Byte::Is(self.file[(sector * 512 + self.bitmap() + skip) as usize]),
            _ => below,
        }
    }
}

/// Offsets in images that `image` makes.
pub const HEADER: usize = 512;
pub const TABLE: usize = 1536;

/// An image of 64 KiB in blocks of 4 KiB, of which some are there, wholly and in part.
pub fn image(kind: Kind) -> Vec<u8> {
    let mut footer = vec![0; 512];
    footer[..8].copy_from_slice(b"conectix");
    footer[11] = 2;
    footer[13] = 1;
    footer[28..32].copy_from_slice(b"win ");
    footer[48 + 5..48 + 8].copy_from_slice(&[1, 0, 0]);
    footer[63] = kind as u8;
    footer[68..84].fill(0x5a);
    let data = |seed: usize, len: usize| (0..len).map(move |i| (i / 7 + seed) as u8 | 1);
    if kind == Kind::Fixed {
        footer[16..24].fill(0xff);
        seal(&mut footer, 64);
        return data(3, 65536).chain(footer).collect();
    }
    footer[16 + 6] = 2;
    seal(&mut footer, 64);
    let mut header = vec![0; 1024];
    header[..8].copy_from_slice(b"cxsparse");
    header[8..16].fill(0xff);
    header[22..24].copy_from_slice(&(TABLE as u16).to_be_bytes());
    header[25] = 1;
    header[31] = 16;
    header[34] = 0x10;
    if kind == Kind::Differencing {
        // A name in the header and one of each locator that is written today.
        header[40..56].fill(0xa5);
        header[64..68].copy_from_slice(&[0, b'p', 0, b'q']);
        for (n, (code, len)) in [(b"W2ru", 8), (b"MACX", 9)].into_iter().enumerate() {
            let at = 576 + n * 24;
            header[at..at + 4].copy_from_slice(code);
            header[at + 7] = 1;
            header[at + 11] = len;
            header[at + 16 + 6] = ((2048 + n * 512) >> 8) as u8;
        }
    }
    seal(&mut header, 36);
    let mut table = vec![0xff; 512];
    let mut blocks = Vec::new();
    for (n, (block, bits)) in [(3u8, 0xffu8), (0, 0x81), (9, 0x3c)].into_iter().enumerate() {
        let sector = 6 + n * 9;
        table[usize::from(block) * 4..][..4].copy_from_slice(&(sector as u32).to_be_bytes());
        let mut here = vec![0; 512];
        here[0] = bits;
        here.extend(data(n, 4096));
        // Sectors that are not set are zeroes.
        for sector in (0..8).filter(|s| bits >> (7 - s) & 1 == 0) {
            here[512 + sector * 512..][..512].fill(0);
        }
        blocks.extend(here);
    }
    let mut names = vec![0; 1024];
    names[..8].copy_from_slice(b".\0\\\0p\0q\0");
    names[512..521].copy_from_slice(b"file:///p");
    [&footer, &header, &table, &names, &blocks, &footer].into_iter().flatten().copied().collect()
}
