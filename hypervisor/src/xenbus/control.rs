//! A device's control socket: one line in, one line out.

use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crossbeam::channel::Sender;
use rustix::fs::{FlockOperation, flock};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::oneshot;

use super::nodes::DeviceId;

/// Longest request in bytes.
const LINE_MAX: u64 = 64 * 1024;

/// A line that came in over a control socket.
pub(crate) struct Request {
    pub line: String,
    reply: oneshot::Sender<String>,
}

impl Request {
    /// Answers it.
    pub(crate) fn answer(self, line: String) {
        // The client may have gone; its request has been carried out all the same.
        drop(self.reply.send(line));
    }
}

/// What a served device holds in the run directory: a lock, so that no second process serves it,
/// and its control socket.
pub(crate) struct Claim {
    _lock: std::fs::File,
    socket: PathBuf,
    task: Option<tokio::task::AbortHandle>,
}

impl Claim {
    /// Takes the device `id`, or says who has it.
    pub(crate) fn take(run_dir: &Path, id: &DeviceId) -> io::Result<Claim> {
        let (lock, socket) = (id.file(run_dir, "lock"), id.file(run_dir, "sock"));
        let dir = lock.parent().unwrap_or(run_dir);
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        let lock = std::fs::File::options()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(lock)?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|_| {
            io::Error::other(format!("{id} is served by another process; stop that one first"))
        })?;
        Ok(Claim { _lock: lock, socket, task: None })
    }

    /// Listens on the control socket and passes requests on.
    pub(crate) fn listen(
        &mut self,
        runtime: &tokio::runtime::Handle,
        requests: Sender<Request>,
    ) -> io::Result<()> {
        // The lock is ours, so what lies there was left by a killed predecessor.
        match std::fs::remove_file(&self.socket) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let _inside = runtime.enter();
        let listener = UnixListener::bind(&self.socket)?;
        std::fs::set_permissions(&self.socket, std::fs::Permissions::from_mode(0o600))?;
        self.task = Some(runtime.spawn(accept(listener, requests)).abort_handle());
        Ok(())
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
        }
        let lock = self.socket.with_extension("lock");
        for path in [&self.socket, &lock] {
            if let Err(e) = std::fs::remove_file(path)
                && e.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!("cannot remove {}: {e}", path.display());
            }
        }
        if let Some(dir) = self.socket.parent() {
            // Fails, as it should, while another device of the guest is there.
            drop(std::fs::remove_dir(dir));
        }
    }
}

async fn accept(listener: UnixListener, requests: Sender<Request>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                tokio::spawn(converse(stream, requests.clone()));
            }
            Err(e) => {
                tracing::warn!("control socket: {e}");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
        }
    }
}

async fn converse(stream: UnixStream, requests: Sender<Request>) {
    let (read, mut write) = stream.into_split();
    let mut read = BufReader::new(read);
    loop {
        let mut line = String::new();
        match (&mut read).take(LINE_MAX).read_line(&mut line).await {
            Ok(n) if n > 0 && line.ends_with('\n') => {}
            _ => return,
        }
        let (reply, answer) = oneshot::channel();
        if requests.try_send(Request { line: line.trim().to_owned(), reply }).is_err() {
            return;
        }
        let Ok(answer) = answer.await else { return };
        if write.write_all(format!("{answer}\n").as_bytes()).await.is_err() {
            return;
        }
    }
}
