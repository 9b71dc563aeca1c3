//! Unix sockets that servers listen at.

use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

/// Listens at `path`, without blocking. The socket of a server that is no more is replaced,
/// that of a live one is left alone (AddrInUse).
pub(crate) fn listen(path: &Path) -> io::Result<UnixListener> {
    let named = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", path.display()));
    let listener = match UnixListener::bind(path) {
        Err(e) if e.kind() == io::ErrorKind::AddrInUse => {
            let is_socket = fs::symlink_metadata(path).map_err(named)?.file_type().is_socket();
            let dead = is_socket
                && UnixStream::connect(path)
                    .is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused);
            if !dead {
                let why = "a server is listening there; stop it, or choose another path";
                let why = if is_socket { why } else { "exists and is no socket" };
                let text = format!("{}: {why}", path.display());
                return Err(io::Error::new(e.kind(), text));
            }
            fs::remove_file(path).and_then(|()| UnixListener::bind(path))
        }
        bound => bound,
    };
    let listener = listener.map_err(named)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}
