//! The table of a bitmap and the clusters of bits that it names.
use crate::formats::ImageError;
use crate::formats::qcow2::header::be64;
use crate::formats::qcow2::offline::Offline;
use crate::storage::Storage;

use super::bits::DirtyBits;
use super::directory::{Bits, Entry};

fn read_table(storage: &dyn Storage, cluster: u64, entry: &Entry) -> Result<Vec<Bits>, ImageError> {
    let mut bytes = vec![0; entry.table_size as usize * 8];
    storage
        .read_at(entry.table_offset, &mut bytes)
        .map_err(ImageError::io("read a bitmap table"))?;
    let broken = || ImageError::Corrupt(format!("the table of bitmap {:?} is broken", entry.name));
    let decode = |raw: &[u8]| Bits::decode(be64(raw, 0), cluster).ok_or_else(broken);
    bytes.chunks_exact(8).map(decode).collect()
}

/// Entries of a table for a disk of `size` bytes.
fn need(size: u64, entry: &Entry, cluster: u64) -> u64 {
    Entry::clusters_for(size, entry.granularity_bits, cluster).max(1)
}

/// Reads the bits of a disk of `size` bytes.
pub(super) fn load(
    storage: &dyn Storage,
    cluster: u64,
    size: u64,
    entry: &Entry,
) -> Result<DirtyBits, ImageError> {
    if u64::from(entry.table_size) != need(size, entry, cluster) {
        let name = &entry.name;
        return Err(ImageError::Corrupt(format!("bitmap {name:?} is for another disk")));
    }
    let bits = DirtyBits::new(size, entry.granularity_bits);
    let per = cluster * 8;
    for (index, part) in read_table(storage, cluster, entry)?.into_iter().enumerate() {
        let first = index as u64 * per;
        match part {
            Bits::Zeroes => {}
            Bits::Ones => bits.set(first.min(bits.len())..(first + per).min(bits.len())),
            Bits::At(offset) if first < bits.len() => {
                let mut bytes = vec![0; cluster as usize];
                let what = "read a bitmap";
                storage.read_at(offset, &mut bytes).map_err(ImageError::io(what))?;
                bits.put_bytes(first / 8, &bytes);
            }
            Bits::At(_) => {}
        }
    }
    Ok(bits)
}

/// Stores bits where the bitmap, which nobody trusts meanwhile, has its clusters now; those that
/// it does not need are freed once nothing names them. Durable afterwards. A bitmap for a disk
/// of another size gets another table.
pub(super) fn store(
    offline: &mut Offline<'_>,
    entry: &mut Entry,
    bits: &DirtyBits,
) -> Result<(), ImageError> {
    let cluster = offline.layout().cluster_size();
    let old = read_table(offline.storage(), cluster, entry)?;
    let need = need(bits.disk_size(), entry, cluster);
    let (mut table, mut freed) = (Vec::new(), Vec::new());
    for index in 0..need {
        let before = old.get(index as usize).copied().unwrap_or(Bits::Zeroes);
        table.push(store_part(offline, bits, index, before)?);
    }
    for (index, part) in old.iter().enumerate() {
        if let Bits::At(offset) = part
            && table.get(index) != Some(part)
        {
            freed.push((*offset, cluster));
        }
    }
    // The bits are durable before the table names them.
    offline.sync()?;
    if need != u64::from(entry.table_size) {
        freed.push((entry.table_offset, u64::from(entry.table_size) * 8));
        entry.table_offset = offline.allocate(need * 8)?;
        entry.table_size = need as u32;
    }
    let words: Vec<u64> = table.iter().map(|part| part.encode()).collect();
    offline.write_table(entry.table_offset, &words, "write a bitmap table")?;
    offline.sync()?;
    offline.defer_free(freed);
    Ok(())
}

/// Stores one cluster of bits.
fn store_part(
    offline: &mut Offline<'_>,
    bits: &DirtyBits,
    index: u64,
    before: Bits,
) -> Result<Bits, ImageError> {
    let cluster = offline.layout().cluster_size();
    let mut bytes = vec![0; cluster as usize];
    bits.bytes(index * cluster, &mut bytes);
    let first = index * cluster * 8;
    let last = (first + cluster * 8).min(bits.len());
    if bytes.iter().all(|b| *b == 0) {
        return Ok(Bits::Zeroes);
    }
    if bits.all_set(first..last) {
        return Ok(Bits::Ones);
    }
    let offset = match before {
        Bits::At(offset) => offset,
        Bits::Zeroes | Bits::Ones => offline.allocate(cluster)?,
    };
    offline.write(offset, &bytes, "write a bitmap")?;
    Ok(Bits::At(offset))
}

/// All clusters that a bitmap has, to be freed.
pub(super) fn clusters(
    storage: &dyn Storage,
    cluster: u64,
    entry: &Entry,
) -> Result<Vec<(u64, u64)>, ImageError> {
    let mut all = vec![(entry.table_offset, u64::from(entry.table_size) * 8)];
    for part in read_table(storage, cluster, entry)? {
        if let Bits::At(offset) = part {
            all.push((offset, cluster));
        }
    }
    Ok(all)
}
