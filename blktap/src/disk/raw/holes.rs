//! Where a file has holes, by lseek's SEEK_DATA and SEEK_HOLE.

use std::fs::File;
use std::io;
use std::ops::Range;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use crate::disk::{Kept, Region};

/// Most stretches of one answer.
const MAX_REGIONS: usize = 16384;

/// Appends how `range` is kept, in whole blocks of `logical`; a block that is partly a hole is
/// data. The file's position, which nobody uses, moves.
pub(super) fn map(
    file: &File,
    range: Range<u64>,
    logical: u64,
    out: &mut Vec<Region>,
) -> io::Result<()> {
    let mut at = range.start;
    let first = out.len();
    while at < range.end && out.len() - first < MAX_REGIONS {
        let data = match seek(file, SeekFrom::Data(at)) {
            Ok(data) => data - data % logical,
            // No data up to the end.
            Err(Errno::NXIO) => range.end,
            // A file system that does not tell.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => {
                out.push(Region { len: range.end - at, kept: Kept::Data });
                return Ok(());
            }
            Err(e) => return Err(e.into()),
        };
        let data = data.min(range.end);
        if data > at {
            out.push(Region { len: data - at, kept: Kept::Hole });
            at = data;
            continue;
        }
        let hole = match seek(file, SeekFrom::Hole(at)) {
            Ok(hole) => hole.next_multiple_of(logical).min(range.end),
            Err(Errno::NXIO) => range.end,
            Err(e) => return Err(e.into()),
        };
        // A hole inside one block: the block is data.
        let end = if hole > at { hole } else { (at + logical).min(range.end) };
        let len = end - at;
        match out[first..].last_mut() {
            Some(last) if last.kept == Kept::Data => last.len += len,
            _ => out.push(Region { len, kept: Kept::Data }),
        }
        at = end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn holes_and_data_are_told_apart() {
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).expect("a folder");
        let path = folder.path().join("holes");
        let file = File::create_new(&path).expect("a file");
        file.set_len(1 << 20).expect("its size");
        file.write_all_at(&[1; 8192], 65536).expect("data");
        let file = File::open(&path).expect("to read");
        let told = |range, logical| {
            let mut out = Vec::new();
            map(&file, range, logical, &mut out).expect("a map");
            out.iter().map(|r| (r.len, r.kept)).collect::<Vec<_>>()
        };
        let (hole, data) = (Kept::Hole, Kept::Data);
        assert_eq!(told(0..1 << 20, 512), [(65536, hole), (8192, data), (974_848, hole)]);
        assert_eq!(told(66048..67072, 512), [(1024, data)]);
        assert_eq!(told(0..65536, 512), [(65536, hole)]);
        assert_eq!(told(73728..81920, 4096), [(8192, hole)]);
    }
}
