//! An image with the images below it, as one: where a guest's bytes are, whichever layer has them.
use std::ops::Range;
use std::sync::Arc;

use crate::formats::{Extent, Format, ImageError, Miss, Outcome, Place};
use crate::storage::Storage;

/// Where a stretch of guest bytes is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// In a file of the chain, by its number in [`Chain::files`].
    Data { file: u16, offset: u64 },
    /// Nowhere.
    Zero,
    /// In a compressed cluster of a layer.
    Compressed { layer: u16, cluster: u64, skip: u32 },
}

/// A stretch of guest bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stretch {
    pub len: u64,
    pub source: Source,
}

/// A layer of a chain.
pub(super) struct Layer {
    pub format: Arc<dyn Format>,
    /// The number of its first file in the chain's.
    pub first_file: u16,
}

/// The layers of an image, the one that is written first, with all their files in one list.
pub(super) struct Chain {
    layers: Vec<Layer>,
    files: Vec<Arc<dyn Storage>>,
}

/// A layer's miss.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LayerMiss {
    pub layer: u16,
    pub miss: Miss,
}

/// What a caller keeps so that resolving allocates nothing: a list for each layer.
#[derive(Default)]
pub(super) struct Scratch(Vec<Vec<Extent>>);

/// How far a range was resolved.
pub(super) enum Found {
    /// So many bytes from its start.
    Bytes(u64),
    /// None: this is to be loaded first.
    Miss(LayerMiss),
}

impl Chain {
    /// Of at least one format, at most 65,535 files.
    pub(super) fn new(formats: Vec<Arc<dyn Format>>) -> Result<Chain, ImageError> {
        let (mut layers, mut files) = (Vec::new(), Vec::new());
        for format in formats {
            let first_file = u16::try_from(files.len())
                .map_err(|_| ImageError::Unsupported("a chain of so many files".into()))?;
            files.extend(format.files().iter().cloned());
            layers.push(Layer { format, first_file });
        }
        if layers.is_empty() || files.len() > usize::from(u16::MAX) {
            return Err(ImageError::Unsupported("a chain of so many files".into()));
        }
        Ok(Chain { layers, files })
    }

    /// The layer that is written.
    pub(super) fn top(&self) -> &Arc<dyn Format> {
        &self.layers[0].format
    }
    /// All layers, the written one first.
    pub(super) fn layers(&self) -> &[Layer] {
        &self.layers
    }
    /// All files, those of the written layer first.
    pub(super) fn files(&self) -> &[Arc<dyn Storage>] {
        &self.files
    }

    pub(super) fn scratch(&self) -> Scratch {
        Scratch(self.layers.iter().map(|_| Vec::with_capacity(16)).collect())
    }

    /// Where the bytes of `range` are, from its start on; at least one, or a miss.
    pub(super) fn resolve(
        &self,
        range: Range<u64>,
        scratch: &mut Scratch,
        out: &mut Vec<Stretch>,
    ) -> Result<Found, ImageError> {
        self.resolve_from(0, range, &mut scratch.0, out)
    }

    fn resolve_from(
        &self,
        at: usize,
        range: Range<u64>,
        scratch: &mut [Vec<Extent>],
        out: &mut Vec<Stretch>,
    ) -> Result<Found, ImageError> {
        let len = range.end - range.start;
        let Some((layer, (extents, below))) = self.layers.get(at).zip(scratch.split_first_mut())
        else {
            out.push(Stretch { len, source: Source::Zero });
            return Ok(Found::Bytes(len));
        };
        // An overlay may be larger than what it lies over.
        let size = layer.format.size();
        if range.start >= size {
            out.push(Stretch { len, source: Source::Zero });
            return Ok(Found::Bytes(len));
        }
        extents.clear();
        let asked = range.start..range.end.min(size);
        match layer.format.resolve_read(asked, extents)? {
            Outcome::Ready(()) => {}
            Outcome::Miss(miss) => {
                return Ok(Found::Miss(LayerMiss { layer: at as u16, miss }));
            }
            Outcome::Busy => return Err(ImageError::Invalid("a read was told to wait".into())),
        }
        let mut done = 0;
        for extent in extents.iter() {
            let source = match extent.place {
                Place::Data { file, offset } => {
                    Source::Data { file: layer.first_file + file, offset }
                }
                Place::Zero => Source::Zero,
                Place::Compressed { cluster, skip } => {
                    Source::Compressed { layer: at as u16, cluster, skip }
                }
                Place::Absent => {
                    let start = range.start + done;
                    match self.resolve_from(at + 1, start..start + extent.len, below, out)? {
                        Found::Bytes(n) => done += n,
                        Found::Miss(miss) if done == 0 => return Ok(Found::Miss(miss)),
                        Found::Miss(_) => return Ok(Found::Bytes(done)),
                    }
                    if done < start - range.start + extent.len {
                        return Ok(Found::Bytes(done));
                    }
                    continue;
                }
            };
            out.push(Stretch { len: extent.len, source });
            done += extent.len;
        }
        if done == 0 {
            return Err(ImageError::Invalid("a read was resolved to nothing".into()));
        }
        Ok(Found::Bytes(done))
    }
}
