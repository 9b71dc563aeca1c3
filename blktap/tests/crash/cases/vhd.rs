//! VHD images.
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use blktap::formats::vhd::{CreateOptions, NewParent, Repair, Shape, Vhd};
use blktap::formats::{Format, ImageError, RawFormat};
use blktap::storage::Storage;
use blktap::storage::record::{Journal, SparseBytes};

use crate::case::{Case, Health, Layers, Mend, Special, Specials};
use crate::history::{BASE, bytes_of};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Fixed,
    Dynamic,
    Differencing,
}

pub struct VhdCase {
    pub kind: Kind,
    /// Bytes of a block: 2 MiB, or fewer for more of them.
    pub block: u32,
    pub sectors: u64,
}

impl VhdCase {
    fn shape(&self) -> Shape {
        let modified = SystemTime::UNIX_EPOCH + Duration::from_secs(1 << 30);
        match self.kind {
            Kind::Fixed => Shape::Fixed,
            Kind::Dynamic => Shape::Dynamic,
            Kind::Differencing => Shape::Differencing(NewParent {
                id: None,
                modified,
                relative: "parent".into(),
                absolute: "/images/parent".into(),
            }),
        }
    }

    /// The header says other blocks, while there are none yet.
    fn set_block(&self, file: &dyn Storage) -> std::io::Result<()> {
        let mut header = [0; 1024];
        file.read_at(512, &mut header)?;
        let entries = (self.sectors * 512).div_ceil(u64::from(self.block)) as u32;
        assert!(entries <= 128, "one sector of the table");
        header[28..32].copy_from_slice(&entries.to_be_bytes());
        header[32..36].copy_from_slice(&self.block.to_be_bytes());
        header[36..40].fill(0);
        let sum = header.iter().fold(0u32, |sum, b| sum.wrapping_add(u32::from(*b)));
        header[36..40].copy_from_slice(&(!sum).to_be_bytes());
        file.write_at(512, &header)
    }
}

impl Case for VhdCase {
    fn name(&self) -> String {
        format!("vhd {:?} {}K", self.kind, self.block >> 10).to_lowercase()
    }
    fn sectors(&self) -> u64 {
        self.sectors
    }
    fn base(&self) -> u64 {
        if self.kind == Kind::Differencing { self.sectors * 3 / 4 } else { 0 }
    }
    fn cluster(&self) -> u64 {
        if self.kind == Kind::Fixed { 1 } else { u64::from(self.block / 512) }
    }
    fn create(&self, files: &[Arc<dyn Storage>]) -> Result<(), ImageError> {
        let size = self.sectors * 512;
        let created = SystemTime::UNIX_EPOCH + Duration::from_secs(1 << 30);
        let options = CreateOptions { size, shape: self.shape(), id: [7; 16], created };
        Vhd::create(&*files[0], &options)?;
        match self.kind {
            Kind::Fixed => Ok(()),
            _ => self.set_block(&*files[0]).map_err(ImageError::io("set the block size")),
        }
    }
    fn open(&self, files: &[Arc<dyn Storage>]) -> Result<Layers, ImageError> {
        let mut layers: Vec<Arc<dyn Format>> = vec![Arc::new(Vhd::open(Arc::clone(&files[0]))?)];
        if self.base() > 0 {
            layers.push(base(self.base())?);
        }
        Ok(layers)
    }
    fn check(&self, files: &[Arc<dyn Storage>], mend: Mend) -> Result<Health, ImageError> {
        let repair = if mend == Mend::All { Repair::All } else { Repair::Nothing };
        let report = Vhd::check(&*files[0], repair)?;
        // A footer at the end is written anew when the image is opened, and a batmap that is not
        // whole is not used.
        let mut why = report.findings;
        why.retain(|f| {
            mend == Mend::All || !["footer", "batmap", "nobody"].iter().any(|w| f.contains(w))
        });
        let corruptions = match mend {
            Mend::Nothing => why.len() as u64,
            Mend::All => report.corruptions - report.corruptions_fixed,
        };
        Ok(Health { corruptions, leaks: report.leaks - report.leaks_fixed, why })
    }
    fn mends(&self) -> bool {
        true
    }
    fn special(&self, files: &[Arc<dyn Storage>], special: &Special) -> Result<(), ImageError> {
        match special {
            Special::Resize(size) => {
                let parent = (self.base() > 0).then(|| self.base() * 512);
                Vhd::grow(&*files[0], parent, *size)
            }
            _ => Err(ImageError::Unsupported(format!("{special:?}"))),
        }
    }
    fn specials(&self) -> Specials {
        Specials { grow: Some(self.sectors * 3 / 2), ..Specials::default() }
    }
    fn qemu(&self) -> Option<&'static str> {
        (self.kind != Kind::Differencing).then_some("vpc")
    }
    fn checked_by_qemu(&self) -> bool {
        false
    }
}

/// A backing image.
pub fn base(sectors: u64) -> Result<Arc<dyn Format>, ImageError> {
    let bytes = SparseBytes::of(&bytes_of(BASE, 0..sectors));
    let file = Journal::new(vec![bytes]).storages().swap_remove(0);
    Ok(Arc::new(RawFormat::new(file).map_err(ImageError::io("open the backing image"))?))
}
