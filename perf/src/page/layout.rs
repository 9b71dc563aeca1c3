//! Offsets of the file, and careful access to bytes that are not trusted.

/// First bytes of every page.
pub(super) const MAGIC: u64 = u64::from_le_bytes(*b"RBSTATS\0");
/// The layout that this crate writes and reads.
pub(super) const VERSION: u32 = 1;
/// Bytes of the header.
pub(super) const HEADER: usize = 256;
/// Bytes of a directory entry.
pub(super) const ENTRY: usize = 128;
/// Largest file that a reader looks at.
pub(super) const MAX_FILE: u64 = 64 << 20;
/// Most blocks of one page.
pub(super) const MAX_BLOCKS: u32 = 4096;

/// Header offsets.
pub(super) mod at {
    pub(crate) const MAGIC: usize = 0;
    pub(crate) const VERSION: usize = 8;
    pub(crate) const HEADER_LEN: usize = 12;
    pub(crate) const FILE_LEN: usize = 16;
    pub(crate) const PID: usize = 24;
    pub(crate) const DOMID: usize = 28;
    pub(crate) const DEVID: usize = 32;
    pub(crate) const START_TIME: usize = 40;
    pub(crate) const BLOCKS: usize = 48;
    pub(crate) const ROOM: usize = 52;
    pub(crate) const UNSHOWN: usize = 56;
    pub(crate) const KIND: usize = 64;
    pub(crate) const NAME: usize = 96;
}
/// Lengths of the header's texts.
pub(super) const KIND_LEN: usize = 32;
pub(super) const NAME_LEN: usize = 64;

/// Offsets within a directory entry.
pub(super) mod entry {
    pub(crate) const NAME: usize = 0;
    pub(crate) const TYPE: usize = 48;
    pub(crate) const SCHEMA: usize = 80;
    pub(crate) const SCHEMA_LEN: usize = 88;
    pub(crate) const VALUES: usize = 96;
    pub(crate) const VALUES_LEN: usize = 104;
}
/// Lengths of an entry's texts.
pub(super) const BLOCK_NAME_LEN: usize = 48;
pub(super) const TYPE_LEN: usize = 32;

/// The longest prefix of `text` that fits in `room - 1` bytes and ends on a character.
pub(super) fn fit(text: &str, room: usize) -> &str {
    &text[..text.floor_char_boundary(room - 1)]
}

/// `len` bytes at `offset`, if the slice has them.
pub(super) fn bytes(from: &[u8], offset: u64, len: u64) -> Option<&[u8]> {
    let start = usize::try_from(offset).ok()?;
    let end = usize::try_from(offset.checked_add(len)?).ok()?;
    from.get(start..end)
}

/// The little-endian word at `offset`.
pub(super) fn u64_at(from: &[u8], offset: usize) -> Option<u64> {
    let word = from.get(offset..offset.checked_add(8)?)?;
    Some(u64::from_le_bytes(word.try_into().ok()?))
}

/// The little-endian half word at `offset`.
pub(super) fn u32_at(from: &[u8], offset: usize) -> Option<u32> {
    let word = from.get(offset..offset.checked_add(4)?)?;
    Some(u32::from_le_bytes(word.try_into().ok()?))
}

/// The zero-padded text at `offset`; what is not UTF-8 or could control a terminal is replaced.
pub(super) fn text_at(from: &[u8], offset: usize, len: usize) -> Option<String> {
    let field = from.get(offset..offset.checked_add(len)?)?;
    let end = field.iter().position(|b| *b == 0).unwrap_or(len);
    Some(printable(&String::from_utf8_lossy(&field[..end])))
}

/// The text without control characters.
pub(super) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// A block's schema as text.
pub(super) fn schema_text(fields: &[crate::Field]) -> String {
    let mut text = String::new();
    for f in fields {
        let help = f.help.replace(['\t', '\n'], " ");
        text += &format!("{}\t{}\t{}\t{}\t{help}\n", f.name, f.kind.name(), f.unit, f.offset);
    }
    text
}
