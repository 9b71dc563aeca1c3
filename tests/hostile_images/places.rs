//! Broken tables of images that have everything: snapshots, bitmaps, parents, footers that agree.
use std::fs;
use std::path::Path;

use super::{Broken, be32, be64, broken, qemu_img, ringback_disk};

/// A number of the image.
fn number(bytes: &[u8], at: u64, len: usize) -> u64 {
    let at = at as usize;
    bytes[at..at + len].iter().fold(0, |n, b| n << 8 | u64::from(*b))
}

/// A QCOW2 image with two snapshots and a bitmap.
pub fn rich_qcow2(folder: &Path, good: &Path) -> Vec<u8> {
    let path = folder.join("rich.qcow2");
    fs::copy(good, &path).expect("a copy");
    let name = path.to_str().expect("a path");
    qemu_img(&["snapshot", "-c", "one", name]);
    qemu_img(&["snapshot", "-c", "two", name]);
    qemu_img(&["bitmap", "--add", "-g", "64k", name, "b"]);
    fs::read(path).expect("the image")
}

/// Where the bitmap directory is, by the header's extension.
fn directory(bytes: &[u8]) -> u64 {
    let mut at = number(bytes, 100, 4);
    while number(bytes, at, 4) != 0x2385_2875 {
        assert!(number(bytes, at, 4) != 0, "the bitmap's extension is missing");
        at += (8 + number(bytes, at + 4, 4)).next_multiple_of(8);
    }
    number(bytes, at + 24, 8)
}

/// Refcounts, snapshots and bitmaps, by what QEMU's docs/interop/qcow2.rst calls them.
pub fn qcow2(bytes: &[u8]) -> Vec<Broken> {
    let (l1, table) = (number(bytes, 40, 8), number(bytes, 48, 8));
    let (block, snapshots) = (number(bytes, table, 8), number(bytes, 64, 8));
    let directory = directory(bytes);
    let bits = number(bytes, directory, 8);
    let one = |name, at: u64, bytes: Vec<u8>| broken(name, "qcow2", vec![(at, bytes)]);
    let mut list = vec![
        one("no refcount block", table, be64(0)),
        one("refcount block far away", table, be64(1 << 60)),
        one("refcount block not aligned", table, be64(block + 512)),
        one("refcount table in itself", table, be64(table)),
        one("refcount block in the L1 table", table, be64(l1)),
        one("refcounts of nothing", block, vec![0; 4096]),
        one("refcounts of everything", block, vec![0xff; 4096]),
        one("two L1 entries share a table", l1 + 8, be64(number(bytes, l1, 8))),
        one("snapshot's L1 far away", snapshots, be64(1 << 60)),
        one("snapshot's L1 not aligned", snapshots, be64(0x1_0001)),
        one("snapshot's L1 in the header", snapshots, be64(0)),
        one("snapshot's L1 is the refcount table", snapshots, be64(table)),
        one("snapshot's absurd L1", snapshots + 8, be32(u32::MAX)),
        one("snapshot's absurd name", snapshots + 12, vec![0xff; 4]),
        one("snapshot's absurd extra data", snapshots + 36, be32(u32::MAX)),
        one("snapshot's absurd size", snapshots + 48, be64(u64::MAX)),
        one("snapshot's absurd machine", snapshots + 32, be32(u32::MAX)),
        one("snapshots in the L1 table", 64, be64(l1)),
        one("more snapshots than there are", 60, be32(2000)),
        one("bitmap directory far away", directory_field(bytes), be64(1 << 62)),
        one("bitmap directory not aligned", directory_field(bytes), be64(directory + 8)),
        one("absurd bitmap directory", directory_field(bytes) - 8, be64(u64::MAX)),
        one("absurd bitmaps", directory_field(bytes) - 16, be32(u32::MAX)),
        one("bitmap's table far away", directory, be64(1 << 62)),
        one("bitmap's table in the header", directory, be64(0)),
        one("bitmap's table is the L1 table", directory, be64(l1)),
        one("bitmap's absurd table", directory + 8, be32(u32::MAX)),
        one("bitmap's flags", directory + 12, be32(u32::MAX)),
        one("bitmap's type", directory + 16, vec![9]),
        one("bitmap's granularity", directory + 17, vec![255]),
        one("bitmap's name", directory + 18, vec![0xff; 2]),
        one("bitmap's extra data", directory + 20, be32(u32::MAX)),
        one("bits far away", bits, be64(1 << 55)),
        one("bits of reserved values", bits, be64(u64::MAX)),
        one("bits in the header", bits, be64(0x200)),
    ];
    // An L1 table of 32 MiB that is all the same table.
    let shared = number(bytes, l1, 8) & !(1 << 63);
    let entries: Vec<u8> = (0..8).flat_map(|_| be64(shared)).collect();
    list.push(one("all L1 entries share a table", l1, entries));
    list
}

/// Where the extension has the directory's place.
fn directory_field(bytes: &[u8]) -> u64 {
    let place = directory(bytes).to_be_bytes();
    let at = bytes[..65536].windows(8).position(|w| w == place);
    at.expect("the directory's place") as u64
}

/// A differencing image, as the program makes it.
pub fn rich_vhd(folder: &Path) -> Vec<u8> {
    ringback_disk(folder, &["create", "-f", "vhd", "base.vhd", "4M"]);
    let on_base = ["create", "-f", "vhd", "-b", "base.vhd", "-F", "vhd", "rich.vhd"];
    ringback_disk(folder, &on_base);
    fs::read(folder.join("rich.vhd")).expect("the image")
}

const HEADER: usize = 512;
/// Where the header has its locators.
const LOCATORS: u64 = 512 + 576;

/// Checksums that fit, of both footers and the header: what is behind them is looked at.
pub fn seal(bytes: &mut [u8]) {
    let mut sum = |range: std::ops::Range<usize>, own: usize| {
        let part = &mut bytes[range];
        part[own..own + 4].fill(0);
        let sum = part.iter().fold(0u32, |sum, b| sum.wrapping_add(u32::from(*b)));
        part[own..own + 4].copy_from_slice(&(!sum).to_be_bytes());
    };
    sum(0..512, 64);
    sum(HEADER..HEADER + 1024, 36);
    let footer = bytes[..512].to_vec();
    let end = bytes.len() - 512;
    bytes[end..].copy_from_slice(&footer);
}

/// Header, footers and locators of the specification, all with checksums that fit.
pub fn vhd() -> Vec<Broken> {
    let one = |name, at: u64, bytes: Vec<u8>| broken(name, "vhd", vec![(at, bytes)]);
    let name = |n: u64| LOCATORS + 24 * n;
    vec![
        one("absurd size", 48, be64(u64::MAX)),
        one("a size of nothing", 48, be64(0)),
        one("2040 GiB without a table", 48, be64(2040 << 30)),
        one("unknown type", 60, be32(9)),
        one("fixed with a header", 60, be32(2)),
        one("dynamic with a parent", 60, be32(3)),
        one("header far away", 16, be64(1 << 62)),
        one("header in the footer", 16, be64(0)),
        one("header beyond the end", 16, be64(u64::MAX)),
        one("table far away", 528, be64(1 << 62)),
        one("table in the header", 528, be64(512)),
        one("table on the footer", 528, be64(0)),
        one("absurd table", 540, be32(u32::MAX)),
        one("table of nothing", 540, be32(0)),
        one("absurd blocks", 544, be32(1 << 31)),
        one("blocks of nothing", 544, be32(0)),
        one("blocks of no power of two", 544, be32(3 << 20)),
        one("block in the table", 1536, be32(3)),
        one("two blocks in one place", 1536, [be32(64), be32(64)].concat()),
        one("block beyond the end", 1536, be32(0x7fff_ffff)),
        one("no parent's id", 552, vec![0; 16]),
        one("no parent's name", 576, vec![0; 512]),
        one("a parent's name of no text", 576, vec![0xdc; 512]),
        one("unknown locator", name(0), b"Evil".to_vec()),
        one("locator far away", name(0) + 16, be64(1 << 62)),
        one("locator beyond the end", name(0) + 16, be64(u64::MAX)),
        one("locator in the footer", name(0) + 16, be64(0)),
        one("absurd locator", name(0) + 4, [be32(u32::MAX), be32(u32::MAX)].concat()),
        one("locator of odd bytes", name(0) + 8, be32(3)),
    ]
}
