//! QEMU's programs as a second opinion.
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;
use std::process::{Command, Output};

use blktap::storage::record::{Journal, SparseBytes};
use serde_json::Value;

use crate::case::{Case, Mend};
use crate::history::Allowed;

/// Runs one of QEMU's programs.
pub fn run(program: &str, args: &[&str]) -> Output {
    let run = Command::new(program).args(args).output();
    run.unwrap_or_else(|e| panic!("{program} (Debian: qemu-utils): {e}"))
}

/// Writes a file's bytes where a program can see them.
pub fn write_out(bytes: &SparseBytes, path: &Path) {
    let mut file = File::create(path).expect("a file");
    for (offset, page) in bytes.pages() {
        file.seek(SeekFrom::Start(offset)).expect("seek");
        file.write_all(page).expect("write");
    }
    file.set_len(bytes.len()).expect("size");
}

/// A folder in memory.
pub fn folder() -> tempfile::TempDir {
    let shm = Path::new("/dev/shm");
    let made = if shm.is_dir() { tempfile::tempdir_in(shm) } else { tempfile::tempdir() };
    made.expect("a folder")
}

/// qemu-img finds leaks at worst, and after our mending nothing; what it reads is allowed.
pub fn second_opinion(
    case: &dyn Case,
    state: &[SparseBytes],
    allowed: Allowed<'_>,
) -> Result<(), String> {
    let Some(format) = case.qemu() else { return Ok(()) };
    let folder = folder();
    let path = folder.path().join("image");
    write_out(&state[0], &path);
    if case.checked_by_qemu() && !case.is_lazy() {
        let (corruptions, _) = check(format, &path)?;
        if corruptions > 0 {
            return Err(format!("qemu-img check: {corruptions} corruptions"));
        }
    }
    let journal = Journal::new(state.to_vec());
    let files = journal.storages();
    case.check(&files, Mend::All).map_err(|e| format!("mend: {e}"))?;
    // Some mending is done by opening.
    case.open(&files).map_err(|e| format!("open: {e}"))?;
    write_out(&journal.now()[0], &path);
    if case.checked_by_qemu() && case.mends() && check(format, &path)? != (0, 0) {
        return Err("qemu-img check finds faults in the mended image".into());
    }
    let bytes = read(format, &path)?;
    allowed.bytes(0, &bytes).map_err(|e| format!("as qemu-img reads it: {e}"))
}

/// The disk's bytes as qemu-img reads them.
pub fn read(format: &str, path: &Path) -> Result<Vec<u8>, String> {
    let raw = path.with_extension("raw");
    let [from, to] = [path, &raw].map(|p| p.to_str().expect("a name"));
    let out = run("qemu-img", &["convert", "-f", format, "-O", "raw", from, to]);
    if !out.status.success() {
        return Err(format!("qemu-img convert: {}", String::from_utf8_lossy(&out.stderr)));
    }
    Ok(std::fs::read(raw).expect("what qemu-img wrote"))
}

/// (corruptions, leaks) as qemu-img counts them.
pub fn check(format: &str, path: &Path) -> Result<(u64, u64), String> {
    let path = path.to_str().expect("a name");
    let out = run("qemu-img", &["check", "-f", format, "--output=json", path]);
    let code = out.status.code();
    let report: Value = serde_json::from_slice(&out.stdout).map_err(|_| {
        format!("qemu-img check: {code:?} {}", String::from_utf8_lossy(&out.stderr))
    })?;
    let count = |key: &str| report[key].as_u64().unwrap_or(0);
    // A flag that is behind its refcount, while a snapshot is made or deleted, harms nothing.
    let text = String::from_utf8_lossy(&out.stderr);
    let flags = text.lines().filter(|l| l.contains("OFLAG_COPIED")).count() as u64;
    match count("check-errors") {
        0 => Ok((count("corruptions").saturating_sub(flags), count("leaks"))),
        n => Err(format!("qemu-img check: {n} errors")),
    }
}
