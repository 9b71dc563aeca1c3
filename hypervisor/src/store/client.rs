//! A blocking client of xenstored. One connection serves any number of threads; watch events go
//! to its [`Inbox`].

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, bounded};
use parking_lot::Mutex;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use zerocopy::IntoBytes;

use super::inbox::Inbox;
use super::wire::{self, Header, Kind};

/// How long a reply may take before xenstored counts as stuck.
const REPLY_LIMIT: Duration = Duration::from_secs(30);
/// How often a transaction that met a conflict is tried again.
const TX_TRIES: u32 = 100;

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// xenstored refused; the errno it named.
    #[error("xenstore: {path}: {}", io::Error::from_raw_os_error(*errno))]
    Refused {
        /// Path of the request.
        path: String,
        /// errno number.
        errno: i32,
    },
    /// The connection failed.
    #[error("xenstore: {0}")]
    Io(#[from] io::Error),
}

impl Error {
    /// Whether the node is not there.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Error::Refused { errno: 2, .. })
    }
    /// Whether a transaction met a conflict.
    pub fn is_conflict(&self) -> bool {
        matches!(self, Error::Refused { errno: 11, .. })
    }
}

impl From<Error> for io::Error {
    fn from(e: Error) -> Self {
        match e {
            Error::Io(e) => e,
            Error::Refused { errno, .. } => {
                io::Error::new(io::Error::from_raw_os_error(errno).kind(), e.to_string())
            }
        }
    }
}

/// A transaction's number; [`Tx::NONE`] outside one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tx(pub u32);

impl Tx {
    /// No transaction.
    pub const NONE: Tx = Tx(0);
}

/// What a domain may do with a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rights {
    /// `n`
    None,
    /// `r`
    Read,
    /// `w`
    Write,
    /// `b`
    Both,
}

/// One entry of a node's permissions; the first one names the owner and everybody else's rights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Permission {
    /// Whom.
    pub domid: u16,
    /// What.
    pub rights: Rights,
}

impl Permission {
    fn text(self) -> String {
        let letter = match self.rights {
            Rights::None => 'n',
            Rights::Read => 'r',
            Rights::Write => 'w',
            Rights::Both => 'b',
        };
        format!("{letter}{}", self.domid)
    }
}

type Reply = (u32, Vec<u8>);

struct Requests {
    next_id: u32,
    replies: Receiver<Reply>,
    broken: bool,
}

/// A connection to xenstored; closed when dropped.
pub struct Client {
    stream: Arc<OwnedFd>,
    requests: Mutex<Requests>,
    inbox: Arc<Inbox>,
    stop: Arc<OwnedFd>,
    reader: Option<std::thread::JoinHandle<()>>,
}

impl Client {
    /// Connects to a Unix socket.
    pub fn connect(path: &Path) -> io::Result<Client> {
        let stream = std::os::unix::net::UnixStream::connect(path).map_err(|e| {
            io::Error::new(e.kind(), format!("xenstored at {}: {e}", path.display()))
        })?;
        Client::new(stream.into())
    }

    /// Opens the kernel's device, for a domain without a xenstored of its own.
    pub fn open_device(path: &Path) -> io::Result<Client> {
        let file = std::fs::File::options()
            .read(true)
            .write(true)
            .open(path)
            .map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", path.display())))?;
        Client::new(file.into())
    }

    /// Speaks over a descriptor that is connected already.
    pub fn new(stream: OwnedFd) -> io::Result<Client> {
        let stream = Arc::new(stream);
        let inbox = Arc::new(Inbox::default());
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        let (send, replies) = bounded(1);
        let reader = Reader {
            stream: stream.clone(),
            stop: stop.clone(),
            inbox: inbox.clone(),
            replies: send,
        };
        let reader =
            std::thread::Builder::new().name("xenstore".into()).spawn(move || reader.run())?;
        let requests = Mutex::new(Requests { next_id: 1, replies, broken: false });
        Ok(Client { stream, requests, inbox, stop, reader: Some(reader) })
    }

    /// Where watch events arrive.
    pub fn inbox(&self) -> &Arc<Inbox> {
        &self.inbox
    }

    fn call(&self, kind: Kind, tx: Tx, payload: &[u8]) -> Result<Vec<u8>, Error> {
        if payload.len() > wire::PAYLOAD_MAX {
            return Err(refused(payload, 7));
        }
        let mut requests = self.requests.lock();
        if requests.broken {
            return Err(io::Error::from(io::ErrorKind::BrokenPipe).into());
        }
        let id = requests.next_id;
        requests.next_id = requests.next_id.wrapping_add(1).max(1);
        let reply = self.exchange(&requests, &wire::encode(kind, id, tx.0, payload));
        // Without its reply the stream is out of step: nothing on it can be trusted any more.
        let (answer, body) = reply.inspect_err(|_| requests.broken = true)?;
        match Kind::from_u32(answer) {
            Some(Kind::Error) => {
                let name = String::from_utf8_lossy(&body);
                Err(refused(payload, wire::errno_of(name.trim_end_matches('\0'))))
            }
            Some(k) if k == kind => Ok(body),
            _ => {
                requests.broken = true;
                Err(io::Error::other(format!("reply of type {answer} to {kind:?}")).into())
            }
        }
    }

    fn exchange(&self, requests: &Requests, message: &[u8]) -> io::Result<Reply> {
        // One write: /dev/xen/xenbus takes header and payload together or apart, a socket either.
        let mut out = std::fs::File::from(self.stream.try_clone()?);
        out.write_all(message)?;
        requests.replies.recv_timeout(REPLY_LIMIT).map_err(|e| match e {
            crossbeam::channel::RecvTimeoutError::Timeout => {
                io::Error::new(io::ErrorKind::TimedOut, "xenstored does not answer")
            }
            crossbeam::channel::RecvTimeoutError::Disconnected => {
                io::Error::new(io::ErrorKind::BrokenPipe, "xenstored is gone")
            }
        })
    }

    /// A node's value.
    pub fn read(&self, tx: Tx, path: &str) -> Result<Vec<u8>, Error> {
        self.call(Kind::Read, tx, &strings(&[path]))
    }

    /// A node's value as text, `None` if the node is not there or is not UTF-8.
    pub fn get(&self, path: &str) -> Result<Option<String>, Error> {
        self.get_in(Tx::NONE, path)
    }

    /// As [`get`](Self::get), in a transaction.
    pub fn get_in(&self, tx: Tx, path: &str) -> Result<Option<String>, Error> {
        match self.read(tx, path) {
            Ok(value) => Ok(String::from_utf8(value).ok()),
            Err(e) if e.is_not_found() => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Writes a node, and makes it and its parents where they are missing.
    pub fn write(&self, tx: Tx, path: &str, value: impl AsRef<[u8]>) -> Result<(), Error> {
        let mut payload = strings(&[path]);
        payload.extend_from_slice(value.as_ref());
        self.call(Kind::Write, tx, &payload).map(drop)
    }

    /// Makes an empty node where there is none.
    pub fn mkdir(&self, tx: Tx, path: &str) -> Result<(), Error> {
        self.call(Kind::Mkdir, tx, &strings(&[path])).map(drop)
    }

    /// Removes a node with all below it. Fine if it is not there.
    pub fn remove(&self, tx: Tx, path: &str) -> Result<(), Error> {
        match self.call(Kind::Rm, tx, &strings(&[path])) {
            Err(e) if e.is_not_found() => Ok(()),
            other => other.map(drop),
        }
    }

    /// Names of a node's children; empty if the node is not there.
    pub fn list(&self, tx: Tx, path: &str) -> Result<Vec<String>, Error> {
        match self.call(Kind::Directory, tx, &strings(&[path])) {
            Ok(body) => Ok(split(&body)),
            Err(e) if e.is_not_found() => Ok(Vec::new()),
            // E2BIG: more names than one payload holds.
            Err(Error::Refused { errno: 7, .. }) => self.list_parts(tx, path),
            Err(e) => Err(e),
        }
    }

    fn list_parts(&self, tx: Tx, path: &str) -> Result<Vec<String>, Error> {
        let (mut names, mut generation) = (Vec::new(), None);
        loop {
            let offset = names.len().to_string();
            let body = self.call(Kind::DirectoryPart, tx, &strings(&[path, &offset]))?;
            let cut = body.iter().position(|b| *b == 0).unwrap_or(body.len());
            // The directory changed between two parts: begin again.
            if generation.get_or_insert_with(|| body[..cut].to_vec()) != &body[..cut] {
                (names, generation) = (Vec::new(), None);
                continue;
            }
            let rest = body.get(cut + 1..).unwrap_or_default();
            names.extend_from_slice(rest);
            // The end of the list is an empty name.
            if rest.is_empty() || rest.ends_with(b"\0\0") || rest == b"\0" {
                names.pop();
                return Ok(split(&names));
            }
        }
    }

    /// Sets a node's permissions.
    pub fn set_permissions(&self, tx: Tx, path: &str, all: &[Permission]) -> Result<(), Error> {
        let texts: Vec<String> = all.iter().map(|p| p.text()).collect();
        let mut parts = vec![path];
        parts.extend(texts.iter().map(String::as_str));
        self.call(Kind::SetPerms, tx, &strings(&parts)).map(drop)
    }

    /// Watches a node and all below it; fires once at once.
    pub fn watch(&self, path: &str, token: &str) -> Result<(), Error> {
        self.call(Kind::Watch, Tx::NONE, &strings(&[path, token])).map(drop)
    }

    /// Ends a watch.
    pub fn unwatch(&self, path: &str, token: &str) -> Result<(), Error> {
        self.call(Kind::Unwatch, Tx::NONE, &strings(&[path, token])).map(drop)
    }

    /// A domain's home, `/local/domain/N`.
    pub fn domain_path(&self, domid: u16) -> Result<String, Error> {
        let body = self.call(Kind::GetDomainPath, Tx::NONE, &strings(&[&domid.to_string()]))?;
        Ok(split(&body).pop().unwrap_or_default())
    }

    /// Runs `body` in a transaction, again if it met a conflict.
    pub fn transaction<T>(&self, mut body: impl FnMut(Tx) -> Result<T, Error>) -> Result<T, Error> {
        for _ in 0..TX_TRIES {
            let started = self.call(Kind::TransactionStart, Tx::NONE, &[0])?;
            let id = split(&started).pop().and_then(|t| t.parse().ok());
            let tx = Tx(id.ok_or_else(|| io::Error::other("not a transaction id"))?);
            let result = body(tx);
            let end = if result.is_ok() { "T" } else { "F" };
            match (result, self.call(Kind::TransactionEnd, tx, &strings(&[end]))) {
                (Err(e), _) if !e.is_conflict() => return Err(e),
                (Ok(value), Ok(_)) => return Ok(value),
                (Ok(_), Err(e)) if !e.is_conflict() => return Err(e),
                _ => {}
            }
        }
        Err(Error::Refused { path: "transaction".into(), errno: 11 })
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // The reader sleeps in poll on both descriptors.
        if rustix::io::write(&*self.stop, &1u64.to_ne_bytes()).is_ok()
            && let Some(reader) = self.reader.take()
        {
            // A panic of the reader has been printed; there is nothing left to undo.
            drop(reader.join());
        }
    }
}

fn refused(payload: &[u8], errno: i32) -> Error {
    Error::Refused { path: split(payload).into_iter().next().unwrap_or_default(), errno }
}

fn strings(parts: &[&str]) -> Vec<u8> {
    let mut out = Vec::new();
    for part in parts {
        out.extend_from_slice(part.as_bytes());
        out.push(0);
    }
    out
}

fn split(body: &[u8]) -> Vec<String> {
    let body = body.strip_suffix(&[0]).unwrap_or(body);
    if body.is_empty() {
        return Vec::new();
    }
    body.split(|b| *b == 0).map(|s| String::from_utf8_lossy(s).into_owned()).collect()
}

struct Reader {
    stream: Arc<OwnedFd>,
    stop: Arc<OwnedFd>,
    inbox: Arc<Inbox>,
    replies: Sender<Reply>,
}

impl Reader {
    fn run(self) {
        if let Err(e) = self.pump() {
            tracing::debug!("xenstore connection ended: {e}");
        }
        self.inbox.close();
    }

    fn pump(&self) -> io::Result<()> {
        let mut stream = std::fs::File::from(self.stream.try_clone()?);
        loop {
            let mut header = [0; wire::HEADER_LEN];
            if !self.read_exact(&mut stream, &mut header)? {
                return Ok(());
            }
            let mut head = Header { kind: 0, req_id: 0, tx_id: 0, len: 0 };
            head.as_mut_bytes().copy_from_slice(&header);
            if head.len as usize > wire::PAYLOAD_MAX {
                return Err(io::Error::other("a message longer than the protocol allows"));
            }
            let mut body = vec![0; head.len as usize];
            if !self.read_exact(&mut stream, &mut body)? {
                return Ok(());
            }
            if head.kind == Kind::WatchEvent as u32 {
                let mut parts = split(&body).into_iter();
                if let (Some(path), Some(token)) = (parts.next(), parts.next()) {
                    self.inbox.post(path, token);
                }
            } else if self.replies.send((head.kind, body)).is_err() {
                return Ok(());
            }
        }
    }

    /// Fills `into`; `false` when told to stop.
    fn read_exact(&self, stream: &mut std::fs::File, into: &mut [u8]) -> io::Result<bool> {
        let mut at = 0;
        while at < into.len() {
            let mut fds = [
                PollFd::from_borrowed_fd(self.stream.as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(self.stop.as_fd(), PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Err(rustix::io::Errno::INTR) => continue,
                other => other?,
            };
            if !fds[1].revents().is_empty() {
                return Ok(false);
            }
            match stream.read(&mut into[at..]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => at += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(true)
    }
}

#[cfg(test)]
#[path = "client_tests.rs"]
mod tests;
