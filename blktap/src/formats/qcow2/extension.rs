//! Extensions behind the header.
use crate::formats::ImageError;

use super::header::{be32, be64};

/// Format of the backing file.
pub const BACKING_FORMAT: u32 = 0xe279_2aca;
/// Names of feature bits.
pub const FEATURE_NAMES: u32 = 0x6803_f857;
/// Where the bitmaps are.
pub const BITMAPS: u32 = 0x2385_2875;
/// Where the encryption header is.
pub const CRYPTO: u32 = 0x0537_be77;
/// Name of the external data file.
pub const DATA_FILE: u32 = 0x4441_5441;

/// One extension.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extension {
    /// Which.
    pub kind: u32,
    /// Its bytes, without padding.
    pub data: Vec<u8>,
}

impl Extension {
    pub(super) fn append(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.kind.to_be_bytes());
        out.extend_from_slice(&(self.data.len() as u32).to_be_bytes());
        out.extend_from_slice(&self.data);
        out.resize(out.len().next_multiple_of(8), 0);
    }
}

/// Ends the extensions.
pub(super) fn end(out: &mut Vec<u8>) {
    out.extend_from_slice(&[0; 8]);
}

/// The extensions in what lies behind the header.
pub(super) fn parse(area: &[u8]) -> Result<Vec<Extension>, ImageError> {
    let mut list: Vec<Extension> = Vec::new();
    let mut at = 0;
    while at + 8 <= area.len() {
        let (kind, len) = (be32(area, at), be32(area, at + 4) as usize);
        if kind == 0 {
            break;
        }
        let end = (at + 8).checked_add(len).filter(|end| *end <= area.len());
        let Some(end) = end else {
            return Err(ImageError::Corrupt(format!(
                "header extension {kind:#010x} of {len} bytes does not fit the header"
            )));
        };
        if list.iter().any(|e| e.kind == kind) && is_known(kind) {
            return Err(ImageError::Corrupt(format!("two header extensions {kind:#010x}")));
        }
        list.push(Extension { kind, data: area[at + 8..end].to_vec() });
        at = end.next_multiple_of(8);
    }
    Ok(list)
}

fn is_known(kind: u32) -> bool {
    [BACKING_FORMAT, FEATURE_NAMES, BITMAPS, CRYPTO, DATA_FILE].contains(&kind)
}

/// A text of the header.
pub(super) fn text(bytes: &[u8], what: &str) -> Result<String, ImageError> {
    // QEMU reads such a text up to its first zero.
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    let text = std::str::from_utf8(&bytes[..end]);
    text.map(str::to_owned).map_err(|_| ImageError::Corrupt(format!("the {what} is no UTF-8")))
}

/// The name that a feature table gives a bit of a kind (0: incompatible).
pub(super) fn feature_name(table: &[u8], kind: u8, bit: u8) -> Option<String> {
    let entry = table.chunks_exact(48).find(|e| e[0] == kind && e[1] == bit)?;
    let name = &entry[2..];
    let end = name.iter().position(|b| *b == 0).unwrap_or(name.len());
    let name = String::from_utf8_lossy(&name[..end]);
    let clean: String = name.chars().filter(|c| !c.is_control()).collect();
    (!clean.is_empty()).then_some(clean)
}

/// The names of all features, as QEMU writes them.
pub(super) fn feature_names() -> Extension {
    let names: [(u8, u8, &str); 8] = [
        (0, 0, "dirty bit"),
        (0, 1, "corrupt bit"),
        (0, 2, "external data file"),
        (0, 3, "compression type"),
        (0, 4, "extended L2 entries"),
        (1, 0, "lazy refcounts"),
        (2, 0, "bitmaps"),
        (2, 1, "raw external data"),
    ];
    let mut data = vec![0; 48 * names.len()];
    for (entry, (kind, bit, name)) in data.chunks_exact_mut(48).zip(names) {
        entry[0] = kind;
        entry[1] = bit;
        entry[2..2 + name.len()].copy_from_slice(name.as_bytes());
    }
    Extension { kind: FEATURE_NAMES, data }
}

/// The bitmaps extension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapsExtension {
    /// Bitmaps.
    pub count: u32,
    /// Bytes of their directory.
    pub directory_size: u64,
    /// Where it is.
    pub directory_offset: u64,
}

impl BitmapsExtension {
    pub(super) fn parse(data: &[u8]) -> Result<Self, ImageError> {
        if data.len() != 24 {
            let text = format!("a bitmaps extension of {} bytes", data.len());
            return Err(ImageError::Corrupt(text));
        }
        Ok(BitmapsExtension {
            count: be32(data, 0),
            directory_size: be64(data, 8),
            directory_offset: be64(data, 16),
        })
    }

    pub(super) fn to_extension(self) -> Extension {
        let mut data = vec![0; 24];
        data[..4].copy_from_slice(&self.count.to_be_bytes());
        data[8..16].copy_from_slice(&self.directory_size.to_be_bytes());
        data[16..].copy_from_slice(&self.directory_offset.to_be_bytes());
        Extension { kind: BITMAPS, data }
    }
}
