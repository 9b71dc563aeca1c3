//! New images.
use std::time::SystemTime;

use zerocopy::IntoBytes;

use super::batmap::Batmap;
use super::footer::{FOOTER, Footer, Kind, LARGEST_DISK, too_large};
use super::header::{HEADER, Header};
use super::locator::{Locator, NewParent};
use super::open::growth;
use super::space::{Growth, write_footer};
use super::{UNUSED, Vhd};
use crate::formats::ImageError;
use crate::storage::Storage;

/// Bytes of a block: the only size that tapdisk and Windows know.
const BLOCK: u32 = 2 << 20;

/// What a new image is to be.
#[derive(Clone, Debug)]
pub enum Shape {
    /// The disk's bytes one after the other.
    Fixed,
    /// Blocks that are allocated when they are first written.
    Dynamic,
    /// The same on top of a parent.
    Differencing(NewParent),
}

/// A new image.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Guest bytes: a multiple of 512, up to 2040 GiB.
    pub size: u64,
    /// How they are kept.
    pub shape: Shape,
    /// Its unique id, by which its children will know it.
    pub id: [u8; 16],
    /// Its time of creation.
    pub created: SystemTime,
}

impl CreateOptions {
    /// An image with a new id, created now.
    pub fn new(size: u64, shape: Shape) -> Result<Self, ImageError> {
        Ok(CreateOptions { size, shape, id: new_id()?, created: SystemTime::now() })
    }
}

/// A random UUID.
fn new_id() -> Result<[u8; 16], ImageError> {
    let mut id = [0; 16];
    let filled = rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty());
    if filled.map_err(|e| ImageError::io("make a unique id")(e.into()))? != id.len() {
        let short = std::io::ErrorKind::UnexpectedEof;
        return Err(ImageError::io("make a unique id")(short.into()));
    }
    (id[6], id[8]) = (id[6] & 0x0f | 0x40, id[8] & 0x3f | 0x80);
    Ok(id)
}

impl Vhd {
    /// Makes an empty image of whatever `storage` holds. A file is cut to it; on a device the
    /// footer goes to the end.
    pub fn create(storage: &dyn Storage, options: &CreateOptions) -> Result<(), ImageError> {
        let size = options.size;
        if size == 0 || !size.is_multiple_of(512) {
            let what = format!("a disk of {size} bytes: it must be a multiple of 512 and not 0");
            return Err(ImageError::Invalid(what));
        }
        if size > LARGEST_DISK {
            return Err(too_large(size));
        }
        let kind = match options.shape {
            Shape::Fixed => Kind::Fixed,
            Shape::Dynamic => Kind::Dynamic,
            Shape::Differencing(_) => Kind::Differencing,
        };
        let footer = Footer::new(kind, size, options.id, options.created);
        let sparse = match &options.shape {
            Shape::Fixed => None,
            Shape::Dynamic => Some(Plan::new(size, None)?),
            Shape::Differencing(parent) => Some(Plan::new(size, Some(parent))?),
        };
        let end = sparse.as_ref().map_or(size, |plan| plan.end);
        let footer_at = match growth(storage) {
            Growth::File => {
                storage.set_size(0).map_err(ImageError::io("empty the file"))?;
                end
            }
            Growth::Device => room_on_device(storage, end)?,
        };
        if let Some(plan) = sparse {
            plan.write(storage, &footer)?;
        }
        write_footer(storage, &footer, footer_at)?;
        storage.sync().map_err(ImageError::io("flush the file"))
    }
}

/// Where the footer goes on a device that has room for `end` bytes before it.
fn room_on_device(storage: &dyn Storage, end: u64) -> Result<u64, ImageError> {
    let have = storage.size().map_err(ImageError::io("read the size"))?;
    match (have / 512 * 512).checked_sub(FOOTER) {
        Some(at) if at >= end => Ok(at),
        _ => {
            let need = end + FOOTER;
            Err(ImageError::NoSpace(format!("the device has {have} bytes, the image {need}")))
        }
    }
}

/// The metadata of a new image with a block table, in the order that tapdisk has them: footer,
/// header, block table, batmap, parent locators.
struct Plan {
    header: Header,
    entries: u32,
    batmap: Batmap,
    names: Vec<(u64, Vec<u8>)>,
    end: u64,
}

impl Plan {
    fn new(size: u64, parent: Option<&NewParent>) -> Result<Plan, ImageError> {
        let entries =
            u32::try_from(size.div_ceil(u64::from(BLOCK))).map_err(|_| too_large(size))?;
        let mut header = Header::new(FOOTER + HEADER, entries, BLOCK);
        let batmap = Batmap::new(header.table_end(), entries, size);
        let mut end = header.table_end() + Batmap::room(entries);
        let mut names = Vec::new();
        if let Some(parent) = parent {
            parent.describe(&mut header)?;
            for (locator, (code, name)) in header.locators.iter_mut().zip(parent.encoded()) {
                let room = name.len().next_multiple_of(512) as u32;
                *locator = Locator::new(code, room, name.len() as u32, end);
                names.push((end, name));
                end += u64::from(room);
            }
        }
        header.seal();
        Ok(Plan { header, entries, batmap, names, end })
    }

    fn write(mut self, storage: &dyn Storage, footer: &Footer) -> Result<(), ImageError> {
        let write = |at: u64, bytes: &[u8]| {
            storage.write_at(at, bytes).map_err(ImageError::io("write the image's metadata"))
        };
        write(FOOTER, self.header.as_bytes())?;
        // Whole sectors, as all others write them.
        let table = vec![UNUSED; (self.entries as usize).next_multiple_of(128)];
        write(self.header.table_offset.get(), table.as_bytes())?;
        self.batmap.write(storage)?;
        for (at, name) in &self.names {
            let mut sectors = name.clone();
            sectors.resize(name.len().next_multiple_of(512), 0);
            write(*at, &sectors)?;
        }
        write(0, footer.as_bytes())
    }
}
