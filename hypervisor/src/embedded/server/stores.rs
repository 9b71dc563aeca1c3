//! Connections to the store.

use std::collections::{HashSet, VecDeque};
use std::os::fd::OwnedFd;

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use zerocopy::FromBytes;

use super::{Conn, Fate, Server, TURN};
use crate::DomId;
use crate::core::xenstore::ConnId;
use crate::store::wire::{self, HEADER_LEN, Header, Kind, PAYLOAD_MAX};

/// Bytes that may wait to be read by a client before its requests wait as well.
const OUT_LIMIT: usize = 64 * 1024;
/// Different watch events that may wait for a client; one that lets more pile up is cut off.
const EVENT_LIMIT: usize = 16 * 1024;
/// Bytes of them.
const EVENT_BYTES: usize = 1 << 20;

/// A path and a token.
type Pending = (String, Vec<u8>);

/// One connection.
pub(super) struct StoreConn {
    pub(super) domid: DomId,
    pub(super) id: ConnId,
    pub(super) socket: OwnedFd,
    input: Vec<u8>,
    out: Vec<u8>,
    sent: usize,
    events: VecDeque<Pending>,
    known: HashSet<Pending>,
    event_bytes: usize,
}

impl StoreConn {
    pub(super) fn new(domid: DomId, id: ConnId, socket: OwnedFd) -> Self {
        StoreConn {
            domid,
            id,
            socket,
            input: Vec::new(),
            out: Vec::new(),
            sent: 0,
            events: VecDeque::new(),
            known: HashSet::new(),
            event_bytes: 0,
        }
    }

    fn unsent(&self) -> usize {
        self.out.len() - self.sent
    }

    pub(super) fn interest(&self) -> EventFlags {
        let mut flags = EventFlags::empty();
        flags.set(EventFlags::IN, self.unsent() < OUT_LIMIT);
        flags.set(EventFlags::OUT, self.unsent() > 0);
        flags
    }

    /// Keeps an event for sending; one that waits already is not kept twice.
    fn push_event(&mut self, path: String, token: Vec<u8>) -> Fate {
        let event = (path, token);
        let bytes = event.0.len() + event.1.len();
        // libxenstore could not take a longer message than any other.
        if self.known.contains(&event) || bytes + 2 > PAYLOAD_MAX {
            return Fate::Keep;
        }
        self.event_bytes += bytes;
        if self.events.len() >= EVENT_LIMIT || self.event_bytes > EVENT_BYTES {
            return Fate::Close;
        }
        self.known.insert(event.clone());
        self.events.push_back(event);
        Fate::Keep
    }

    fn encode_events(&mut self) {
        while self.unsent() < OUT_LIMIT {
            let Some(event) = self.events.pop_front() else { return };
            self.known.remove(&event);
            let (path, token) = event;
            self.event_bytes -= path.len() + token.len();
            let payload = [path.as_bytes(), b"\0", &token, b"\0"].concat();
            self.out.extend(wire::encode(Kind::WatchEvent, 0, 0, &payload));
        }
    }

    /// Sends what there is, as far as the client takes it.
    fn flush(&mut self) -> Fate {
        loop {
            self.encode_events();
            if self.unsent() == 0 {
                return Fate::Keep;
            }
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match rustix::net::send(&self.socket, &self.out[self.sent..], flags) {
                Ok(n) => self.sent += n,
                Err(Errno::AGAIN) => return Fate::Keep,
                Err(Errno::INTR) => continue,
                Err(_) => return Fate::Close,
            }
            if self.sent == self.out.len() {
                self.out.clear();
                self.sent = 0;
            }
        }
    }

    /// Reads what there is, at most one round's share.
    fn fill(&mut self) -> Fate {
        let mut bytes = [0; 16 * 1024];
        match rustix::net::recv(&self.socket, &mut bytes, RecvFlags::DONTWAIT) {
            Ok((_, 0)) => Fate::Close,
            Ok((_, n)) => {
                self.input.extend_from_slice(&bytes[..n]);
                Fate::Keep
            }
            Err(Errno::AGAIN | Errno::INTR) => Fate::Keep,
            Err(_) => Fate::Close,
        }
    }

    /// The first whole message that was read; `Close` where it is too long.
    fn next(&mut self) -> Result<Option<(Header, Vec<u8>)>, Fate> {
        let Ok((header, rest)) = Header::read_from_prefix(&self.input) else { return Ok(None) };
        let len = header.len as usize;
        if len > PAYLOAD_MAX {
            return Err(Fate::Close);
        }
        let Some(payload) = rest.get(..len) else { return Ok(None) };
        let payload = payload.to_vec();
        self.input.drain(..HEADER_LEN + len);
        Ok(Some((header, payload)))
    }
}

impl Server {
    pub(super) fn serve_store(&mut self, token: u64, flags: EventFlags) -> Fate {
        let gone = flags.intersects(EventFlags::HUP | EventFlags::ERR);
        let Some(Conn::Store(conn)) = self.conns.get_mut(&token) else { return Fate::Close };
        if conn.flush() == Fate::Close || (gone && conn.unsent() > 0) {
            return Fate::Close;
        }
        if conn.input.len() < HEADER_LEN + PAYLOAD_MAX && conn.fill() == Fate::Close {
            return Fate::Close;
        }
        // What one read brought is handled in one go: its length bounds the work.
        loop {
            match self.step_store(token) {
                Ok(true) => {}
                Ok(false) => return Fate::Keep,
                Err(fate) => return fate,
            }
        }
    }

    /// Handles one message. `Ok(false)`: there is none, or its client must read first.
    fn step_store(&mut self, token: u64) -> Result<bool, Fate> {
        let Some(Conn::Store(conn)) = self.conns.get_mut(&token) else { return Err(Fate::Close) };
        if conn.unsent() >= OUT_LIMIT {
            return Ok(false);
        }
        let Some((header, payload)) = conn.next()? else { return Ok(false) };
        let answer = self.store.handle(conn.id, header.kind, header.tx_id, &payload);
        let message = match (Kind::from_u32(header.kind), answer) {
            (Some(kind), Ok(body)) => wire::encode(kind, header.req_id, header.tx_id, &body),
            (_, answer) => {
                let name = answer.err().map_or("ENOSYS", |e| e.name());
                let body = [name.as_bytes(), b"\0"].concat();
                wire::encode(Kind::Error, header.req_id, header.tx_id, &body)
            }
        };
        conn.out.extend(message);
        let fate = conn.flush();
        self.deliver_events();
        if fate == Fate::Close { Err(fate) } else { Ok(true) }
    }

    /// Hands watch events to the connections that wait for them.
    pub(super) fn deliver_events(&mut self) {
        let mut touched = Vec::new();
        // Closing a connection may cause events in turn.
        for _ in 0..TURN {
            for event in self.store.take_events() {
                let Some(token) = self.by_store_id.get(&event.conn).copied() else { continue };
                let Some(Conn::Store(conn)) = self.conns.get_mut(&token) else { continue };
                let fate = conn.push_event(event.path, event.token);
                touched.push((token, fate));
            }
            if touched.is_empty() {
                return;
            }
            touched.sort_by_key(|(token, fate)| (*token, *fate == Fate::Keep));
            touched.dedup_by_key(|(token, _)| *token);
            for (token, mut fate) in touched.drain(..) {
                if let (Fate::Keep, Some(Conn::Store(conn))) = (fate, self.conns.get_mut(&token)) {
                    fate = conn.flush();
                }
                self.settle(token, fate);
            }
        }
    }
}
