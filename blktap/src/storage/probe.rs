//! What a file or device asks of I/O, and what it can do.
// Block device ioctls take their argument by address.
#![allow(unsafe_code)]

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use rustix::fs::{AtFlags, StatxFlags, statx};

use super::Access;
use crate::engine::FileKind;

/// linux/fs.h: `_IO(0x12, 94)`, int.
const BLKROGET: libc::c_ulong = 0x125e;
/// `_IO(0x12, 104)`, int.
const BLKSSZGET: libc::c_ulong = 0x1268;
/// `_IOR(0x12, 114, size_t)`, u64.
const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;
/// `_IO(0x12, 123)`, unsigned int.
const BLKPBSZGET: libc::c_ulong = 0x127b;
/// `_IO(0x12, 125)`, u64[2].
const BLKSECDISCARD: libc::c_ulong = 0x127d;

/// What the medium is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Medium {
    /// Stays where it is.
    Fixed,
    /// Can be taken out (sysfs `removable`).
    Removable,
}

/// What was found out about an open file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// What it is.
    pub kind: FileKind,
    /// Smallest unit of I/O: 512 for files.
    pub logical: u32,
    /// Unit without read-modify-write.
    pub physical: u32,
    /// Alignment of memory addresses, 1 if buffered.
    pub memory_align: u32,
    /// Alignment of offsets and lengths, 1 if buffered.
    pub length_align: u32,
    /// Granularity of discard, `None` if it does nothing.
    pub discard: Option<u32>,
    /// Whether secure discard works.
    pub secure_discard: bool,
    /// Fixed or removable.
    pub medium: Medium,
}

/// Whether O_DIRECT is in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Path {
    Direct,
    Buffered,
}

/// Size in bytes, as it is now.
pub(crate) fn size(file: &File, kind: FileKind) -> io::Result<u64> {
    match kind {
        FileKind::Regular => Ok(file.metadata()?.len()),
        FileKind::Block => {
            let mut bytes = 0u64;
            // SAFETY: BLKGETSIZE64 writes a u64.
            unsafe { ioctl(file, BLKGETSIZE64, (&raw mut bytes).cast()) }?;
            Ok(bytes)
        }
    }
}

/// Whether a block device refuses writes.
pub(super) fn device_is_read_only(file: &File) -> io::Result<bool> {
    let mut flag = 0i32;
    // SAFETY: BLKROGET writes an int.
    unsafe { ioctl(file, BLKROGET, (&raw mut flag).cast()) }?;
    Ok(flag != 0)
}

/// Finds out what `file` needs. `Unsupported` if direct I/O is not possible on it.
pub(super) fn probe(file: &File, kind: FileKind, path: Path, access: Access) -> io::Result<Probe> {
    let mut found = match kind {
        FileKind::Regular => regular(file, access)?,
        FileKind::Block => block(file, access)?,
    };
    if path == Path::Direct {
        (found.memory_align, found.length_align) = alignment(file, found.logical)?;
    }
    Ok(found)
}

fn regular(file: &File, access: Access) -> io::Result<Probe> {
    let meta = file.metadata()?;
    let unit = u32::try_from(meta.blksize()).unwrap_or(4096);
    // Larger units (some file systems say 128 KiB and more) only make guests waste space.
    let unit = if unit.is_power_of_two() { unit.clamp(512, 4096) } else { 4096 };
    let discard = (access == Access::ReadWrite && punches(file, meta.len())).then_some(unit);
    Ok(Probe {
        kind: FileKind::Regular,
        logical: 512,
        physical: unit,
        memory_align: 1,
        length_align: 1,
        discard,
        secure_discard: false,
        medium: Medium::Fixed,
    })
}

/// Whether the file system can punch holes; tried beyond the end, where there is nothing.
fn punches(file: &File, len: u64) -> bool {
    let at = len.next_multiple_of(1 << 20) as libc::off_t;
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: names no memory.
    unsafe { libc::fallocate(file.as_raw_fd(), mode, at, 4096) == 0 }
}

fn block(file: &File, access: Access) -> io::Result<Probe> {
    let (mut logical, mut physical) = (0i32, 0u32);
    // SAFETY: BLKSSZGET writes an int, BLKPBSZGET an unsigned int.
    unsafe {
        ioctl(file, BLKSSZGET, (&raw mut logical).cast())?;
        ioctl(file, BLKPBSZGET, (&raw mut physical).cast())?;
    }
    let logical = logical.unsigned_abs().max(512);
    let queue = sysfs(file)?;
    let number = |name: &str| -> u64 {
        let text = queue.as_ref().and_then(|q| fs::read_to_string(q.join(name)).ok());
        text.and_then(|t| t.trim().parse().ok()).unwrap_or(0)
    };
    let writes = access == Access::ReadWrite;
    let granularity = u32::try_from(number("queue/discard_granularity")).unwrap_or(0);
    let discards = writes && number("queue/discard_max_bytes") > 0;
    Ok(Probe {
        kind: FileKind::Block,
        logical,
        physical: physical.max(logical),
        memory_align: 1,
        length_align: 1,
        discard: discards.then_some(granularity.max(logical)),
        secure_discard: writes && erases(file),
        medium: if number("removable") == 1 { Medium::Removable } else { Medium::Fixed },
    })
}

/// The device's folder in sysfs; for a partition that of its whole disk.
fn sysfs(file: &File) -> io::Result<Option<PathBuf>> {
    let dev = file.metadata()?.rdev();
    let (major, minor) = (rustix::fs::major(dev), rustix::fs::minor(dev));
    let own = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
    let Ok(own) = own.canonicalize() else { return Ok(None) };
    if own.join("queue").exists() {
        return Ok(Some(own));
    }
    Ok(own.parent().map(Into::into))
}

/// Whether BLKSECDISCARD works: since 5.19 the kernel says so before it looks at the range, and
/// refuses this one (it is not aligned) either way.
fn erases(file: &File) -> bool {
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy();
    let mut parts = release.split(['.', '-']).map(|p| p.parse::<u32>().unwrap_or(0));
    let version = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
    let mut range = [1u64, 512];
    // SAFETY: BLKSECDISCARD reads two u64.
    let answer = unsafe { ioctl(file, BLKSECDISCARD, range.as_mut_ptr().cast()) };
    version >= (5, 19) && answer.is_err_and(|e| e.raw_os_error() == Some(libc::EINVAL))
}

/// Alignment of memory and of offsets that direct I/O on `file` needs.
fn alignment(file: &File, logical: u32) -> io::Result<(u32, u32)> {
    if let Ok(stat) = statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)
        && stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0
    {
        if stat.stx_dio_offset_align == 0 {
            return Err(io::ErrorKind::Unsupported.into());
        }
        return Ok((stat.stx_dio_mem_align.max(1), stat.stx_dio_offset_align.max(logical)));
    }
    alignment_by_reading(file, logical)
}

/// The same on kernels before 6.1, and on file systems that do not say.
fn alignment_by_reading(file: &File, logical: u32) -> io::Result<(u32, u32)> {
    let unit = if reads(file, 0, logical as usize)? { logical } else { 4096 };
    let memory = if reads(file, 512, unit as usize)? { 512 } else { 4096 };
    Ok((memory, unit))
}

/// Whether a direct read of `len` bytes to an address that is `shift` past a page works.
fn reads(file: &File, shift: usize, len: usize) -> io::Result<bool> {
    #[repr(C, align(4096))]
    struct Pages([u8; 3 * 4096]);
    let mut pages = Box::new(Pages([0; 3 * 4096]));
    match rustix::io::pread(file, &mut pages.0[shift..shift + len], 0) {
        Ok(_) => Ok(true),
        Err(rustix::io::Errno::INVAL) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// # Safety
/// `arg` points at what `request` reads or writes.
unsafe fn ioctl(file: &File, request: libc::c_ulong, arg: *mut libc::c_void) -> io::Result<()> {
    // SAFETY: by the caller's promise.
    if unsafe { libc::ioctl(file.as_raw_fd(), request, arg) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, OpenOptionsExt};

    use super::*;

    #[test]
    fn what_reading_finds_out_works() {
        let dir = tempfile::tempdir_in(".").expect("a folder");
        let path = dir.path().join("a.raw");
        fs::write(&path, [7; 65536]).expect("a file");
        let mut options = fs::OpenOptions::new();
        let file = options.read(true).custom_flags(libc::O_DIRECT).open(path).expect("O_DIRECT");
        for logical in [512, 4096] {
            let (memory, unit) = alignment_by_reading(&file, logical).expect("by reading");
            assert!(unit >= logical && unit.is_power_of_two() && memory.is_power_of_two());
            let mut bytes = vec![0u8; 8192 + 8192];
            let at = bytes.as_ptr().align_offset(4096) + memory as usize;
            let part = &mut bytes[at..at + unit as usize];
            file.read_exact_at(part, u64::from(unit)).expect("a read so aligned");
            assert!(part.iter().all(|b| *b == 7));
        }
    }
}
