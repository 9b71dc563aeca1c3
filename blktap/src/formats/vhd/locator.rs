//! What a differencing image says about its parent: names, id, time.
use std::time::SystemTime;

use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::footer::{from_vhd_time, to_vhd_time};
use super::header::Header;
use crate::formats::ImageError;
use crate::storage::Storage;

/// Longest name that is read, in bytes as stored.
const LONGEST_NAME: u32 = 32 << 10;

/// A parent locator entry of the dynamic header.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
pub(super) struct Locator {
    pub code: [u8; 4],
    /// Room for the name: sectors by the specification, bytes as Microsoft and tapdisk write it.
    pub space: U32,
    pub len: U32,
    reserved: U32,
    pub offset: U64,
}

impl Locator {
    pub fn new(code: [u8; 4], space: u32, len: u32, offset: u64) -> Locator {
        let [space, len] = [space, len].map(U32::new);
        Locator { code, space, len, reserved: U32::new(0), offset: U64::new(offset) }
    }

    pub fn is_used(&self) -> bool {
        self.code != [0; 4]
    }

    /// Bytes of room, whichever unit it is in.
    pub fn room(&self) -> u64 {
        match self.space.get() {
            sectors if sectors < 512 => u64::from(sectors) * 512,
            bytes => u64::from(bytes),
        }
        .max(u64::from(self.len.get()))
    }
}

/// How an image names its parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Naming {
    /// `W2ru`: relative to the image's folder.
    Relative,
    /// `W2ku`: an absolute path.
    Absolute,
    /// `MACX`: a file URL.
    Url,
    /// The header's own field: a file name, in the image's folder.
    FileName,
}

impl Naming {
    fn of(code: [u8; 4]) -> Option<Naming> {
        match &code {
            b"W2ru" => Some(Naming::Relative),
            b"W2ku" => Some(Naming::Absolute),
            b"MACX" => Some(Naming::Url),
            _ => None,
        }
    }
}

/// A parent as a differencing image describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parent {
    /// The unique id of its footer; `None` for a raw parent (tapdisk's).
    pub id: Option<[u8; 16]>,
    /// When it was last modified.
    pub modified: SystemTime,
    /// Its names as paths, the one to try first at the front: relative ones (an image and its
    /// parent are moved together), absolute ones, URLs, the file name.
    pub names: Vec<(Naming, String)>,
}

/// Whether a parent is as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParentState {
    /// It is.
    AsRecorded,
    /// Its file has been modified, or copied without its time. tapdisk does that itself, when it
    /// marks a parent as hidden; so it is a warning and no more.
    Touched,
}

impl Parent {
    /// Checks a candidate: a VHD's unique id (`None`: it is raw) and its file's modification time.
    pub fn check(
        &self,
        id: Option<[u8; 16]>,
        modified: SystemTime,
    ) -> Result<ParentState, ImageError> {
        if self.id != id {
            return Err(ImageError::Corrupt(format!(
                "its parent should have the unique id {} and has {}",
                id_text(self.id),
                id_text(id)
            )));
        }
        match to_vhd_time(self.modified) == to_vhd_time(modified) {
            true => Ok(ParentState::AsRecorded),
            false => Ok(ParentState::Touched),
        }
    }

    pub(super) fn read(header: &Header, storage: &dyn Storage) -> Result<Parent, ImageError> {
        let mut names = Vec::new();
        for locator in header.locators.iter().filter(|l| l.is_used()) {
            if let Some(naming) = Naming::of(locator.code) {
                // A name that cannot be read or makes no sense is passed over: there are others.
                names.extend(read_name(locator, naming, storage)?.map(|name| (naming, name)));
            }
        }
        names.extend(utf16(&header.parent_name, u16::from_be_bytes).map(|n| (Naming::FileName, n)));
        names.sort_by_key(|(naming, _)| *naming as u8);
        let id = (header.parent_id != [0; 16]).then_some(header.parent_id);
        Ok(Parent { id, modified: from_vhd_time(header.parent_time.get()), names })
    }
}

/// An id as UUIDs are written.
pub(super) fn id_text(id: Option<[u8; 16]>) -> String {
    let Some(id) = id else { return "none (it is raw)".into() };
    let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
    [&id[..4], &id[4..6], &id[6..8], &id[8..10], &id[10..]].map(hex).join("-")
}

fn read_name(
    locator: &Locator,
    naming: Naming,
    storage: &dyn Storage,
) -> Result<Option<String>, ImageError> {
    let len = locator.len.get();
    let end = locator.offset.get().checked_add(u64::from(len));
    let file_size = storage.size().map_err(ImageError::io("read the size"))?;
    if len == 0 || len > LONGEST_NAME || end.is_none_or(|end| end > file_size) {
        return Ok(None);
    }
    let mut bytes = vec![0; len as usize];
    let what = "read a parent locator";
    storage.read_at(locator.offset.get(), &mut bytes).map_err(ImageError::io(what))?;
    Ok(match naming {
        Naming::Url => url_path(&bytes),
        _ => utf16(&bytes, u16::from_le_bytes).map(|name| unix_path(&name)),
    })
}

/// Text in UTF-16 up to the first zero.
fn utf16(bytes: &[u8], unit: fn([u8; 2]) -> u16) -> Option<String> {
    let units = bytes.as_chunks().0.iter().map(|b| unit(*b)).take_while(|u| *u != 0);
    let name: String = char::decode_utf16(units).collect::<Result<_, _>>().ok()?;
    (!name.is_empty()).then_some(name)
}

/// Windows' separators become ours, and a drive's letter goes.
fn unix_path(name: &str) -> String {
    let name = match name.as_bytes() {
        [letter, b':', b'\\' | b'/', ..] if letter.is_ascii_alphabetic() => &name[2..],
        _ => name,
    };
    name.replace('\\', "/")
}

/// The path of `file:PATH`, `file://PATH` (tapdisk's, relative ones too) or `file://localhost/PATH`.
fn url_path(bytes: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(bytes).ok()?.trim_end_matches('\0');
    let rest = text.strip_prefix("file:")?;
    let path = rest.strip_prefix("//").unwrap_or(rest);
    let path = path.strip_prefix("localhost").filter(|p| p.starts_with('/')).unwrap_or(path);
    let mut out = Vec::with_capacity(path.len());
    let mut rest = path.as_bytes();
    while let [first, after @ ..] = rest {
        // tapdisk writes URLs without escapes: what is none stands for itself.
        let escaped = match rest {
            [b'%', a, b, ..] => hex_digit(*a).zip(hex_digit(*b)),
            _ => None,
        };
        out.push(escaped.map_or(*first, |(a, b)| a * 16 + b));
        rest = if escaped.is_some() { &rest[3..] } else { after };
    }
    let path = String::from_utf8(out).ok()?;
    (!path.is_empty() && !path.contains('\0')).then_some(path)
}

fn hex_digit(byte: u8) -> Option<u8> {
    char::from(byte).to_digit(16).map(|d| d as u8)
}

/// A name as `naming` stores it.
fn encode(naming: Naming, path: &str) -> Vec<u8> {
    let windows = |path: &str| -> Vec<u8> {
        path.replace('/', "\\").encode_utf16().flat_map(u16::to_le_bytes).collect()
    };
    match naming {
        // Windows wants relative names to begin with a dot.
        Naming::Relative if !path.starts_with("./") && !path.starts_with("../") => {
            windows(&format!("./{path}"))
        }
        Naming::Url => {
            let plain = |b: &u8| b.is_ascii_alphanumeric() || b"/-._~!$&'()*+,;=:@".contains(b);
            let escaped = path.bytes().map(|b| match plain(&b) {
                true => char::from(b).to_string(),
                false => format!("%{b:02X}"),
            });
            format!("file://{}", escaped.collect::<String>()).into_bytes()
        }
        _ => windows(path),
    }
}

/// A parent as a new image is to describe it.
#[derive(Clone, Debug)]
pub struct NewParent {
    /// Its footer's unique id; `None` for a raw parent.
    pub id: Option<[u8; 16]>,
    /// When its file was last modified.
    pub modified: SystemTime,
    /// Its path from the new image's folder.
    pub relative: String,
    /// Its absolute path.
    pub absolute: String,
}

impl NewParent {
    /// The names with their codes, as tapdisk and Windows look for them.
    pub(super) fn encoded(&self) -> [([u8; 4], Vec<u8>); 3] {
        [
            (*b"MACX", encode(Naming::Url, &self.absolute)),
            (*b"W2ku", encode(Naming::Absolute, &self.absolute)),
            (*b"W2ru", encode(Naming::Relative, &self.relative)),
        ]
    }

    /// Into the header's own fields.
    pub(super) fn describe(&self, header: &mut Header) -> Result<(), ImageError> {
        let name = self.relative.rsplit('/').next().unwrap_or_default();
        let units: Vec<u8> = name.encode_utf16().flat_map(u16::to_be_bytes).collect();
        let room = header.parent_name.get_mut(..units.len());
        let (Some(room), false) = (room, units.is_empty()) else {
            let what = format!("the parent's file name {name:?} has not 1 to 256 characters");
            return Err(ImageError::Invalid(what));
        };
        room.copy_from_slice(&units);
        header.parent_id = self.id.unwrap_or_default();
        header.parent_time = U32::new(to_vhd_time(self.modified));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_back_as_they_were() {
        for path in ["/images/a b/ä%20.vhd", "/x"] {
            assert_eq!(url_path(&encode(Naming::Url, path)).as_deref(), Some(path));
            let wide = encode(Naming::Absolute, path);
            let back = utf16(&wide, u16::from_le_bytes).map(|n| unix_path(&n));
            assert_eq!(back.as_deref(), Some(path));
        }
        let wide = encode(Naming::Relative, "up/p.vhd");
        assert_eq!(utf16(&wide, u16::from_le_bytes).as_deref(), Some(".\\up\\p.vhd"));
        let wide = encode(Naming::Relative, "../p.vhd");
        assert_eq!(utf16(&wide, u16::from_le_bytes).as_deref(), Some("..\\p.vhd"));
    }

    #[test]
    fn names_of_others() {
        assert_eq!(unix_path("C:\\vm\\p.vhd"), "/vm/p.vhd");
        assert_eq!(url_path(b"file://./p 1%.vhd\0").as_deref(), Some("./p 1%.vhd"));
        assert_eq!(url_path(b"file://localhost/a%20b").as_deref(), Some("/a b"));
        assert_eq!(url_path(b"http://x/"), None);
        assert_eq!(url_path(b"file://%00"), None);
        assert_eq!(utf16(&[0xd8, 0, 0, 1], u16::from_be_bytes), None);
    }
}
