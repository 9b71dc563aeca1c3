//! The snapshot table as a check sees it.
use super::report::Fault;
use super::tables::L1;
use super::walk::Walk;
use crate::formats::ImageError;
use crate::formats::qcow2::header::{MAX_L1_BYTES, Version, be32, be64};

/// Bytes of an entry before its extra data.
const FIXED: u64 = 40;
/// Bytes of the extra data that version 3 needs: size of the state, size of the disk.
const EXTRA_V3: u64 = 16;
/// Most extra data that is accepted, as QEMU has it.
const MAX_EXTRA: u64 = 1024;
/// Longest snapshot table, as QEMU has it.
const MAX_TABLE: u64 = 64 << 20;

/// A snapshot.
pub(super) struct Snapshot {
    pub(super) l1: L1,
    /// Its name, or a part of it.
    pub(super) name: String,
}

/// Counts the snapshot table, and gives the snapshots whose L1 tables can be followed.
pub(super) fn follow(walk: &mut Walk<'_>) -> Result<Vec<Snapshot>, ImageError> {
    let (image, header) = (walk.image, walk.image.header);
    let mut snapshots = Vec::new();
    let mut at = header.snapshots_offset;
    if header.snapshot_count > 0 && image.layout.data_file {
        let n = header.snapshot_count;
        walk.sight.report.corruption(1, || format!("{n} snapshots in an image with a data file"));
    }
    for index in 0..header.snapshot_count {
        let used = at - header.snapshots_offset;
        if used > MAX_TABLE || at.saturating_add(FIXED) > image.file {
            walk.sight.blind = true;
            walk.sight.report.corruption(1, || {
                format!("the snapshot table has no room for snapshot {index} and those behind it")
            });
            break;
        }
        let fixed = image.read(at, FIXED as usize, "read the snapshot table")?;
        let (id, name) = (u64::from(be32(&fixed, 12) >> 16), u64::from(be32(&fixed, 12) & 0xffff));
        let extra = u64::from(be32(&fixed, 36));
        let text = at + FIXED + extra + id;
        let shown = image.read(text, name.min(64) as usize, "read the snapshot table")?;
        let name_shown = String::from_utf8_lossy(&shown).into_owned();
        judge_extra(walk, &name_shown, extra);
        at = (text + name).next_multiple_of(8);
        let l1 = L1 { offset: be64(&fixed, 0), entries: u64::from(be32(&fixed, 8)) };
        let snapshot = Snapshot { l1, name: name_shown };
        if is_sound(walk, &snapshot) {
            snapshots.push(snapshot);
        }
    }
    let len = at - header.snapshots_offset;
    walk.refer(header.snapshots_offset, len, 1, || "the snapshot table".to_owned());
    Ok(snapshots)
}

fn judge_extra(walk: &mut Walk<'_>, name: &str, extra: u64) {
    let short = walk.image.header.version == Version::V3 && extra < EXTRA_V3;
    let report = &mut walk.sight.report;
    report.corruption(u64::from(short), || {
        format!("snapshot {name:?} does not say how large its disk is")
    });
    report.corruption(u64::from(extra > MAX_EXTRA), || {
        format!("snapshot {name:?} has {extra} bytes of extra data")
    });
}

fn is_sound(walk: &mut Walk<'_>, snapshot: &Snapshot) -> bool {
    let L1 { offset, entries } = snapshot.l1;
    let fault = match () {
        () if !walk.image.is_aligned(offset) => "has an L1 table that is not aligned",
        () if entries > MAX_L1_BYTES / 8 => "has too large an L1 table",
        () => return true,
    };
    walk.sight.blind = true;
    walk.sight
        .report
        .found(Fault::Corruption, 1, || format!("snapshot {:?} {fault}", snapshot.name));
    false
}
