//! QCOW2 images.

use blktap::formats::qcow2::header::{Compression, Header, Version};
use blktap::storage::Storage;
use serde_json::Value;

use super::super::Result;
use super::super::create::NewBacking;
use super::{Details, qemu_name};

pub fn details(storage: &dyn Storage) -> Result<Details> {
    let header = Header::read(storage)?;
    Ok(Details {
        size: header.disk_size(),
        cluster_size: Some(1 << header.cluster_bits),
        dirty: header.is_dirty(),
        backing: header.backing(),
        snapshots: Vec::new(),
        specific: specific(&header),
    })
}

/// In qemu-img's order.
fn specific(header: &Header) -> Vec<(&'static str, Value)> {
    let compression = match header.compression {
        Compression::Zlib => "zlib",
        Compression::Zstd => "zstd",
    };
    let bits = ("refcount-bits", (1u64 << header.refcount_order).into());
    if header.version == Version::V2 {
        return vec![("compat", "0.10".into()), ("compression-type", compression.into()), bits];
    }
    let mut all: Vec<(&'static str, Value)> = vec![("compat", "1.1".into())];
    if header.has_data_file() {
        all.push(("data-file", header.data_file.clone().unwrap_or_default().into()));
        all.push(("data-file-raw", header.has_raw_data().into()));
    }
    all.push(("compression-type", compression.into()));
    all.push(("lazy-refcounts", header.has_lazy_refcounts().into()));
    all.push(bits);
    all.push(("corrupt", header.is_corrupt().into()));
    all.push(("extended-l2", header.extended_l2().into()));
    all
}

/// Names another backing file in the header.
pub fn set_backing(storage: &dyn Storage, backing: Option<&NewBacking>) -> Result<()> {
    let mut header = Header::read(storage)?;
    if backing.is_some() && header.has_raw_data() {
        return Err("its data file is raw, and has no room for what is not allocated".into());
    }
    header.backing_file = backing.map(|b| b.name.clone());
    header.backing_format = backing.map(|b| qemu_name(b.format).to_owned());
    header.write(storage)?;
    storage.sync()?;
    Ok(())
}
