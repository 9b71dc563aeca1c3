//! Where everything in a file is: what overlaps, what is unused.
use std::ops::Range;

use super::footer::{FOOTER, Footer};
use super::header::{HEADER, Header};

/// An entry of the block table that names nothing.
pub(super) const UNUSED: u32 = u32::MAX;
/// So many faults are told; images have many more.
const FAULTS: usize = 20;

/// Who has a stretch of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Owner {
    Metadata(&'static str),
    Block(u32),
}

impl std::fmt::Display for Owner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Owner::Metadata(name) => f.write_str(name),
            Owner::Block(n) => write!(f, "block {n}"),
        }
    }
}

/// What a look at all of a file's parts gives.
#[derive(Debug, Default)]
pub(super) struct Survey {
    /// Parts that overlap, and blocks that are not inside the file.
    pub faults: Vec<String>,
    /// Faults altogether.
    pub fault_count: u64,
    /// Of these, parts that overlap.
    pub overlaps: u64,
    /// Where the last part that is no block ends.
    pub metadata_end: u64,
    /// Stretches between the parts.
    pub gaps: Vec<Range<u64>>,
    /// Where the last part ends.
    pub end: u64,
}

impl Survey {
    fn fault(&mut self, text: impl FnOnce() -> String) {
        self.fault_count += 1;
        if self.faults.len() < FAULTS {
            self.faults.push(text());
        }
    }
}

/// The stretches that are no blocks.
pub(super) fn metadata(
    footer: &Footer,
    header: &Header,
    batmap: &[Range<u64>],
) -> Vec<(Range<u64>, &'static str)> {
    let at = footer.data_offset.get();
    let table = header.table_offset.get();
    let mut parts = vec![
        (0..FOOTER, "the footer's copy"),
        (at..at + HEADER, "the dynamic header"),
        (table..table + header.table_bytes(), "the block table"),
    ];
    for locator in header.locators.iter().filter(|l| l.is_used()) {
        let start = locator.offset.get();
        parts.push((start..start.saturating_add(locator.room()), "a parent locator"));
    }
    parts.extend(batmap.iter().map(|r| (r.clone(), "the batmap")));
    parts
}

/// Looks at all parts of a file of `file_size` bytes. A block with its bitmap has `block_bytes`.
pub(super) fn survey(
    metadata: &[(Range<u64>, &'static str)],
    table: &[u32],
    block_bytes: u64,
    file_size: u64,
) -> Survey {
    let mut survey = Survey::default();
    let used = table.iter().enumerate().filter(|(_, at)| **at != UNUSED);
    let mut parts: Vec<(u64, Owner)> =
        used.map(|(n, at)| (u64::from(*at) * 512, Owner::Block(n as u32))).collect();
    survey.metadata_end = metadata.iter().map(|(r, _)| r.end).max().unwrap_or(0);
    parts.extend(metadata.iter().map(|(r, name)| (r.start, Owner::Metadata(name))));
    parts.sort_unstable();
    let mut last = Owner::Metadata("the footer's copy");
    for (start, owner) in parts {
        let end = match owner {
            Owner::Block(_) => start + block_bytes,
            Owner::Metadata(name) => {
                let same = |(r, n): &&(Range<u64>, &str)| r.start == start && *n == name;
                metadata.iter().find(same).map_or(start, |(r, _)| r.end)
            }
        };
        if start >= file_size {
            survey.fault(|| format!("{owner} lies behind the end of the file"));
            continue;
        }
        if end > file_size {
            survey.fault(|| format!("{owner} reaches beyond the end of the file"));
        }
        if start < survey.end {
            survey.overlaps += 1;
            survey.fault(|| format!("{owner} overlaps {last}"));
        } else if start > survey.end {
            survey.gaps.push(survey.end..start);
        }
        if end >= survey.end {
            (survey.end, last) = (end, owner);
        }
    }
    survey
}
