//! The copied flags of the active tables: set where, and only where, the refcount is 1.
use super::entries::{self, Entry};
use super::image::{Image, Refcounts};
use super::report::Fault;
use super::tables::{self, L1, L1Tables, Uses, Visitor};
use super::walk::{Follow, Sight, Walk};
use crate::formats::ImageError;
use crate::formats::qcow2::entry::COPIED;

/// What to do with entries that are wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mend {
    /// Count them.
    Nothing,
    /// Set copied flags right.
    Copied,
    /// Replace entries that can be said in a sound way without loss.
    Entries,
}

/// Goes through L1 tables and their L2 tables.
struct Flags<'a> {
    image: &'a Image<'a>,
    refcounts: Refcounts<'a>,
    mend: Mend,
    overlap: Overlap,
    sight: &'a mut Sight,
    /// L1 entries to be written.
    wrong_l1: Vec<(u64, u64)>,
    error: Option<ImageError>,
}

/// Whether something else may lie where the tables do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Overlap {
    /// The image is sound.
    None,
    /// Maybe: a table whose refcount is not the number of its users is left alone, as what looks
    /// like its entries may be somebody's data.
    Possible,
}

/// Judges, or mends, the entries: of the disk's own tables, [`Mend::Entries`] of its snapshots'
/// too. Mending needs refcounts that are right.
pub(super) fn flags(image: &Image<'_>, mend: Mend, sight: &mut Sight) -> Result<(), ImageError> {
    let tables = Walk::new(image, 0, Follow::All).l1_tables()?;
    go(image, image.header.l1_offset, &tables, (mend, Overlap::Possible), sight)
}

/// The same with the tables of another L1 table, in a sound image.
pub(super) fn flags_of(
    image: &Image<'_>,
    l1: L1,
    mend: Mend,
    sight: &mut Sight,
) -> Result<(), ImageError> {
    let tables = L1Tables::from([(l1, Uses { active: 1, all: 1 })]);
    go(image, l1.offset, &tables, (mend, Overlap::None), sight)
}

fn go(
    image: &Image<'_>,
    l1_offset: u64,
    tables: &L1Tables,
    (mend, overlap): (Mend, Overlap),
    sight: &mut Sight,
) -> Result<(), ImageError> {
    image.next_pass();
    let (refcounts, wrong_l1) = (Refcounts::new(image), Vec::new());
    let mut flags = Flags { image, refcounts, mend, overlap, sight, wrong_l1, error: None };
    tables::visit(image, tables, &mut flags)?;
    if let Some(e) = flags.error {
        return Err(e);
    }
    if mend == Mend::Copied {
        for (index, raw) in std::mem::take(&mut flags.wrong_l1) {
            let at = l1_offset + index * 8;
            if flags.is_alone(at, 1)? {
                image.write(at, &raw.to_be_bytes(), "write the L1 table")?;
            }
        }
    }
    Ok(())
}

impl Flags<'_> {
    /// Whether a table with so many users may be written.
    fn is_alone(&mut self, offset: u64, users: u32) -> Result<bool, ImageError> {
        let known = self.overlap == Overlap::None;
        Ok(known || self.refcounts.get(offset >> self.image.bits())? == u64::from(users))
    }

    fn judge_l1(&mut self, index: u64, raw: u64) -> Result<(), ImageError> {
        let offset = entries::l2_offset(raw);
        if offset == 0 {
            return Ok(());
        }
        let one = self.refcounts.get(offset >> self.image.bits())? == 1;
        if one != (raw & COPIED != 0) {
            self.wrong_l1.push((index, raw ^ COPIED));
            self.count(1, || format!("L1 entry {index} ({raw:#x}) has the wrong copied flag"));
        }
        Ok(())
    }

    fn count(&mut self, n: u64, text: impl FnOnce() -> String) {
        if self.mend == Mend::Nothing {
            self.sight.copied += n;
            self.sight.report.found(Fault::Corruption, n, text);
        }
    }

    /// The entry as it should be, if it is not.
    fn judge(&mut self, entry: Entry) -> Result<Option<Entry>, ImageError> {
        let layout = &self.image.layout;
        if self.mend == Mend::Entries {
            return Ok(entry.faults(layout).find_map(|f| f.mended));
        }
        let Some((copied, offset)) = entry.copied(layout) else { return Ok(None) };
        let one = layout.data_file || self.refcounts.get(offset >> layout.cluster_bits)? == 1;
        Ok((one != copied).then(|| entry.with_copied(one)))
    }
}

impl Visitor for Flags<'_> {
    fn l1_entry(&mut self, index: u64, raw: u64, uses: Uses) {
        if self.mend != Mend::Entries
            && uses.active > 0
            && let Err(e) = self.judge_l1(index, raw)
        {
            self.error.get_or_insert(e);
        }
    }

    fn l2_table(&mut self, offset: u64, table: &[u8], uses: Uses) -> Result<(), ImageError> {
        let layout = self.image.layout;
        if uses.active == 0 && self.mend != Mend::Entries {
            return Ok(());
        }
        let mut mended: Option<Vec<u8>> = None;
        for (index, entry) in entries::entries(table, &layout).enumerate() {
            if entry.is_empty() {
                continue;
            }
            let Some(right) = self.judge(entry)? else { continue };
            self.count(u64::from(uses.active), || {
                format!(
                    "the L2 table at {offset:#x}: entry {:#x} has the wrong copied flag",
                    entry.raw
                )
            });
            let bytes = mended.get_or_insert_with(|| table.to_vec());
            entries::put(bytes, index, right, &layout);
        }
        match mended {
            Some(bytes) if self.mend != Mend::Nothing && self.is_alone(offset, uses.all)? => {
                self.image.write(offset, &bytes, "write an L2 table")
            }
            _ => Ok(()),
        }
    }
}
