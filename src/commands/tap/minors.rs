//! Minors that are set aside, and the names under which their images are served.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use super::super::Result;
use super::Taps;

/// What a minor's name is a link to while nothing is served there.
const NOTHING: &str = "no-image";

/// The name of a minor that was set aside, in the tapdisks' folder.
fn name_in(folder: &Path, minor: u32) -> PathBuf {
    folder.join(format!("tapdev{minor}"))
}

/// Where it is noted which other name was made for a minor.
fn note_in(folder: &Path, minor: u32) -> PathBuf {
    folder.join(format!("name-tapdev{minor}"))
}

/// Has the name of a minor, where it was set aside, be the one of this socket, or of nothing.
pub(super) fn point(folder: &Path, minor: u32, socket: Option<&Path>) -> io::Result<()> {
    let name = name_in(folder, minor);
    if fs::symlink_metadata(&name).is_err() {
        return Ok(());
    }
    let new = folder.join(format!("tapdev{minor}.new"));
    let _ = fs::remove_file(&new);
    symlink(socket.unwrap_or(Path::new(NOTHING)), &new)?;
    fs::rename(new, name)
}

/// The major number of block devices of the nbd driver.
pub(super) fn major() -> Result<u32> {
    let text = fs::read_to_string("/proc/devices").map_err(|e| format!("/proc/devices: {e}"))?;
    major_in(&text).ok_or_else(|| "this kernel has no nbd driver: modprobe nbd".into())
}

fn major_in(devices: &str) -> Option<u32> {
    let (_, blocks) = devices.split_once("Block devices:")?;
    let mut rows = blocks.lines().filter_map(|line| line.trim().split_once(' '));
    rows.find(|(_, name)| *name == "nbd").and_then(|(number, _)| number.parse().ok())
}

impl Taps {
    /// While this is there nobody else takes a minor.
    pub(super) fn lock(&self) -> Result<File> {
        fs::create_dir_all(&self.folder)?;
        let lock = File::create(self.folder.join("lock"))?;
        flock(&lock, FlockOperation::LockExclusive)?;
        Ok(lock)
    }

    /// The lowest minor that no tapdisk has and that is not set aside.
    pub(super) fn free_minor(&self) -> Result<u32> {
        let taken: Vec<u32> = self.list()?.iter().filter_map(|row| row.minor).collect();
        let aside = |minor: u32| fs::symlink_metadata(name_in(&self.folder, minor)).is_ok();
        let free = (0..).find(|minor| !taken.contains(minor) && !aside(*minor));
        free.ok_or_else(|| "no minor is free".into())
    }

    /// `tap-ctl allocate`: the minor's name.
    pub(super) fn allocate(&self, other: Option<&Path>) -> Result<PathBuf> {
        let _lock = self.lock()?;
        let minor = self.free_minor()?;
        let name = name_in(&self.folder, minor);
        let Some(other) = other else {
            symlink(NOTHING, &name)?;
            return Ok(name);
        };
        let other = std::path::absolute(other)?;
        symlink(std::path::absolute(&name)?, &other)
            .map_err(|e| format!("{}: {e}", other.display()))?;
        let noted = other.to_str().ok_or("the name is not UTF-8").map(|text| text.to_owned())?;
        fs::write(note_in(&self.folder, minor), noted)?;
        symlink(NOTHING, &name)?;
        Ok(other)
    }

    /// `tap-ctl free`.
    pub(super) fn free(&self, minor: u32) -> Result<()> {
        let _lock = self.lock()?;
        if let Some(row) = self.list()?.iter().find(|row| row.minor == Some(minor)) {
            return Err(
                format!("minor {minor}: tapdisk {} has it: detach it first", row.pid).into()
            );
        }
        let name = name_in(&self.folder, minor);
        fs::symlink_metadata(&name).map_err(|_| format!("minor {minor} is not set aside"))?;
        let note = note_in(&self.folder, minor);
        if let Ok(other) = fs::read_to_string(&note) {
            // Only what `allocate` has made.
            if fs::read_link(&other).is_ok_and(|to| to.file_name() == name.file_name()) {
                fs::remove_file(other)?;
            }
            fs::remove_file(note)?;
        }
        Ok(fs::remove_file(name)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn majors_are_those_of_block_devices() {
        let text = "Character devices:\n 43 nbd\n\nBlock devices:\n  7 loop\n 44 nbd\n";
        assert_eq!(major_in(text), Some(44));
        assert_eq!(major_in("Character devices:\n 43 nbd\n\nBlock devices:\n  7 loop\n"), None);
    }
}
