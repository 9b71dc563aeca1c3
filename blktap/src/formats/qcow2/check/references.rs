//! What the tables of one L1 table refer to, for changes that concern all of it.
use super::copied::{self, Mend};
use super::image::Image;
use super::tables::{self, L1, L1Tables, Uses};
use super::walk::{Follow, Sight, Walk};
use super::{CHECK_MEMORY, unwatched};
use crate::formats::ImageError;
use crate::formats::qcow2::offline::Offline;

/// An L1 table: where it is, and its entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::formats::qcow2) struct Tree {
    pub(in crate::formats::qcow2) offset: u64,
    pub(in crate::formats::qcow2) entries: u32,
}

impl Tree {
    fn l1(self) -> L1 {
        L1 { offset: self.offset, entries: u64::from(self.entries) }
    }
}

/// What happens to a cluster that is referred to so many times.
type Each<'a> = &'a mut dyn FnMut(&mut Offline<'_>, u64, u64) -> Result<(), ImageError>;

/// Fails unless nothing in the image is corrupt: each refcount is at least the number of
/// references that there are. Leaks are allowed.
pub(in crate::formats::qcow2) fn assert_sound(offline: &mut Offline<'_>) -> Result<(), ImageError> {
    passes(offline, |walk| walk.run(), &mut |offline, cluster, uses| {
        let count = offline.refcount(cluster)?;
        if count < uses {
            let text = format!("cluster {cluster} has refcount {count} and is used {uses} times");
            return unsound(text);
        }
        Ok(())
    })
}

/// Calls `each` with all clusters that the L1 table and its L2 tables refer to. The L1 table's
/// own clusters are not among them.
pub(in crate::formats::qcow2) fn each(
    offline: &mut Offline<'_>,
    tree: Tree,
    each: Each<'_>,
) -> Result<(), ImageError> {
    let l1 = L1Tables::from([(tree.l1(), Uses { active: 1, all: 1 })]);
    passes(offline, |walk| tables::visit(walk.image, &l1, walk), each)
}

/// Counts references in as many passes as memory demands, then does `each` with the counts.
fn passes(
    offline: &mut Offline<'_>,
    mut count: impl FnMut(&mut Walk<'_>) -> Result<(), ImageError>,
    each: Each<'_>,
) -> Result<(), ImageError> {
    let header = offline.header().clone();
    let image = Image::new(offline.storage(), &header, CHECK_MEMORY, &unwatched)?;
    let mut start = 0;
    while start < u64::MAX {
        let mut walk = Walk::new(&image, start, Follow::All);
        count(&mut walk)?;
        if walk.sight.report.corruptions > 0 {
            let first = walk.sight.report.findings.into_iter().next();
            return unsound(first.map_or_else(|| "unknown".to_owned(), |f| f.text));
        }
        for (cluster, uses) in walk.counts.iter() {
            each(offline, cluster, u64::from(uses))?;
        }
        start = walk.counts.window().end;
    }
    Ok(())
}

fn unsound<T>(text: String) -> Result<T, ImageError> {
    Err(ImageError::Corrupt(format!("{text}: check and repair it")))
}

/// Sets the copied flags in the L1 table and its L2 tables where, and only where, a refcount is
/// 1. What `offline` changed must be in the file; what is changed here is not durable yet.
pub(in crate::formats::qcow2) fn set_copied(
    offline: &Offline<'_>,
    tree: Tree,
) -> Result<(), ImageError> {
    let image = Image::new(offline.storage(), offline.header(), CHECK_MEMORY, &unwatched)?;
    copied::flags_of(&image, tree.l1(), Mend::Copied, &mut Sight::default())
}
