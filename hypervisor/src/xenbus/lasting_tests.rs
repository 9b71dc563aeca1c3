use std::os::unix::fs::{PermissionsExt, symlink};

use super::*;

const ME: &[u8] = b"vbd/1/51712";

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

fn refused(path: &Path, identity: &[u8], bytes: usize) -> &'static str {
    match Lasting::open(path, identity, bytes) {
        Err(LastingError::Refused { why, .. }) => why,
        Err(e) => panic!("{e}"),
        Ok(_) => panic!("{} was taken", path.display()),
    }
}

#[test]
fn a_successor_finds_what_was_written() {
    let folder = folder();
    let path = folder.path().join("1").join("memory");
    let memory = Lasting::create(&path, ME, 5000).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
    let (first, second) = (memory.part(0..4096), memory.part(4096..8192));
    second.write(8, b"second");
    first.write(0, b"first");
    drop((memory, first, second));
    let memory = Lasting::open(&path, ME, 5000).unwrap();
    let mut found = [0; 6];
    memory.part(4096..8192).read(8, &mut found);
    assert_eq!(&found, b"second");
    memory.part(0..4096).read(0, &mut found);
    assert_eq!(&found, b"first\0");
    Lasting::remove(&path).unwrap();
    Lasting::remove(&path).unwrap();
    assert!(matches!(Lasting::open(&path, ME, 5000), Err(LastingError::Missing(_))));
}

#[test]
fn what_was_there_is_replaced_and_stays_whole_for_who_has_it() {
    let folder = folder();
    let path = folder.path().join("memory");
    let old = Lasting::create(&path, ME, 4096).unwrap();
    old.part(0..4096).write(0, b"old");
    // Left by a process that was killed while it made one.
    fs::write(folder.path().join("memory.new"), b"torn").unwrap();
    let new = Lasting::create(&path, b"another", 8192).unwrap();
    let mut found = [1; 3];
    new.part(0..4096).read(0, &mut found);
    assert_eq!(found, [0; 3]);
    old.part(0..4096).read(0, &mut found);
    assert_eq!(&found, b"old");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn what_is_not_ours_is_refused() {
    let folder = folder();
    let path = folder.path().join("memory");
    drop(Lasting::create(&path, ME, 4096).unwrap());
    assert_eq!(refused(&path, b"vbd/1/51713", 4096), "is of another connection");
    assert_eq!(refused(&path, b"vbd/1/5171", 4096), "is of another connection");
    assert_eq!(refused(&path, ME, 8192), "is of another size");
    let whole = fs::read(&path).unwrap();
    for (at, why) in [(0, "is of another version"), (8, "is of another version")] {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        fs::write(&path, bytes).unwrap();
        assert_eq!(refused(&path, ME, 4096), why);
    }
    fs::write(&path, &whole[..whole.len() - 1]).unwrap();
    assert_eq!(refused(&path, ME, 4096), "is of another size");
    fs::write(&path, &whole).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    assert_eq!(refused(&path, ME, 4096), "is not a file of this user alone");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    drop(Lasting::open(&path, ME, 4096).unwrap());
}

#[test]
fn links_are_not_followed() {
    let folder = folder();
    let (path, link) = (folder.path().join("memory"), folder.path().join("link"));
    drop(Lasting::create(&path, ME, 4096).unwrap());
    symlink(&path, &link).unwrap();
    assert!(matches!(Lasting::open(&link, ME, 4096), Err(LastingError::Io { .. })));
    symlink(&path, folder.path().join("link.new")).unwrap();
    drop(Lasting::create(&link, b"new", 4096).unwrap());
    assert!(fs::symlink_metadata(&link).unwrap().is_file(), "the link is replaced");
    drop(Lasting::open(&path, ME, 4096).unwrap());
}
