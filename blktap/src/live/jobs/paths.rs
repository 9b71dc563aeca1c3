//! Names of files.
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::{JobError, about};

/// Whether both are names of one file.
pub(super) fn same_file(a: &Path, b: &Path) -> bool {
    let id = |p: &Path| std::fs::metadata(p).ok().map(|m| (m.dev(), m.ino()));
    id(a).is_some() && id(a) == id(b)
}

fn folder(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// The name of `below` as an image at `path` writes it: relative where both are in one folder.
pub(super) fn name_from(path: &Path, below: &Path) -> Result<String, JobError> {
    let (own, other) = (real_path(path)?, real_path(below)?);
    let name = match (own.parent() == other.parent(), other.file_name()) {
        (true, Some(name)) => PathBuf::from(name),
        _ => other,
    };
    let text = name.into_os_string().into_string();
    text.map_err(|name| JobError::Other(format!("{}: the name is not UTF-8", name.display())))
}

/// Absolute, its folder without links; the file need not be there.
pub(super) fn real_path(path: &Path) -> Result<PathBuf, JobError> {
    let folder = folder(path);
    let folder = folder.canonicalize().map_err(about(folder.display()))?;
    Ok(path.file_name().map(|name| folder.join(name)).unwrap_or(folder))
}

/// Makes the names in a file's folder durable.
pub(super) fn sync_folder(path: &Path) -> Result<(), JobError> {
    let folder = folder(path);
    File::open(folder).and_then(|f| f.sync_all()).map_err(about(folder.display()))
}
