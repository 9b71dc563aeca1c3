//! One connection of the HTTP server (RFC 9112): downloads of bytes that both ends can make, uploads
//! that are answered with their SHA-256. One request a connection.

use std::fmt::Write;

use sha2::{Digest, Sha256};
use smoltcp::socket::tcp::{self, SocketBuffer, State};
use smoltcp::time::Duration;

use super::bytes;

/// The port that it listens on.
pub(super) const PORT: u16 = 80;
/// Longest head of a request.
const LONGEST_HEAD: usize = 4096;
/// Bytes of a connection's buffers: two unsegmented packets and more.
const RECEIVE: usize = 256 << 10;
const SEND: usize = 256 << 10;
/// Bytes that are summed in one turn where nothing is sent.
const SUMMED: u64 = 1 << 20;
/// How long a guest may leave what was sent to it unanswered.
const PATIENCE: Duration = Duration::from_secs(30);

const HELP: &str = "GET /bytes/N[/SEED]   N bytes\nGET /sha256/N[/SEED]  their SHA-256\n\
                    PUT /anything         answers the SHA-256 of what is sent\n";

/// A part of an endless sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Span {
    seed: u64,
    at: u64,
    end: u64,
}

/// What a request wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Help,
    Bytes(Span),
    Sum(Span),
    Upload { len: u64, hesitant: bool },
}

/// Where a conversation is.
enum Talk {
    /// The head of the request, as far as it has come.
    Head(Vec<u8>),
    /// So much is still to come.
    Upload { left: u64, sum: Sha256, len: u64 },
    /// The answer's head is sent, bytes follow.
    Bytes(Span),
    /// Bytes are summed, and nothing sent meanwhile.
    Sum(Span, Sha256),
    /// All has been said.
    Over,
}

/// Whether a conversation would go on at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// It waits for the other end.
    Waits,
    /// It was ended for its turn's length alone.
    Continues,
}

/// See the module.
pub(super) struct Web {
    talk: Talk,
    /// What is to be sent before anything else.
    text: Vec<u8>,
}

/// A socket that listens.
pub(super) fn socket() -> tcp::Socket<'static> {
    let buffer = |len| SocketBuffer::new(vec![0; len]);
    let mut socket = tcp::Socket::new(buffer(RECEIVE), buffer(SEND));
    socket.set_nagle_enabled(false);
    socket.set_timeout(Some(PATIENCE));
    socket
}

impl Web {
    pub(super) fn new() -> Web {
        Web { talk: Talk::Head(Vec::new()), text: Vec::new() }
    }

    /// Goes on with the conversation as far as the socket lets it.
    pub(super) fn serve(&mut self, socket: &mut tcp::Socket<'_>) -> Turn {
        match socket.state() {
            State::Closed => {
                *self = Web::new();
                if let Err(e) = socket.listen(PORT) {
                    tracing::debug!("listening: {e}");
                }
                return Turn::Waits;
            }
            State::Listen | State::SynReceived | State::SynSent => return Turn::Waits,
            _ => {}
        }
        let turn = self.go_on(socket);
        if !socket.may_recv() && matches!(self.talk, Talk::Head(_) | Talk::Upload { .. }) {
            // It has ended in the middle.
            socket.abort();
        }
        turn
    }

    /// Whether its socket only waits for late packets, and may be used for another connection.
    pub(super) fn lingers(socket: &tcp::Socket<'_>) -> bool {
        socket.state() == State::TimeWait
    }

    fn go_on(&mut self, socket: &mut tcp::Socket<'_>) -> Turn {
        self.receive(socket);
        if let Talk::Sum(span, sum) = &mut self.talk {
            let end = span.end.min(span.at + SUMMED);
            let mut piece = [0; 4096];
            while span.at < end {
                let len = (end - span.at).min(4096) as usize;
                bytes::fill(span.seed, span.at, &mut piece[..len]);
                sum.update(&piece[..len]);
                span.at += len as u64;
            }
            if span.at < span.end {
                return Turn::Continues;
            }
            let (sum, len) = (std::mem::take(sum), span.end);
            self.told_sum(sum, len);
        }
        self.send(socket);
        Turn::Waits
    }

    fn receive(&mut self, socket: &mut tcp::Socket<'_>) {
        while socket.can_recv() && !matches!(self.talk, Talk::Over) {
            let talk = &mut self.talk;
            let got = socket.recv(|bytes| {
                let used = talk.receive(bytes);
                (used, used)
            });
            match (got, &self.talk) {
                (Ok(0) | Err(_), _) => break,
                (Ok(_), Talk::Head(head)) => {
                    if let Some(next) = self.begin(&head.clone()) {
                        self.talk = next;
                    }
                }
                _ => {}
            }
            if let Talk::Upload { left: 0, sum, len } = &mut self.talk {
                let (sum, len) = (std::mem::take(sum), *len);
                self.told_sum(sum, len);
            }
        }
    }

    /// What follows a head, once it is whole.
    fn begin(&mut self, head: &[u8]) -> Option<Talk> {
        let whole = head.ends_with(b"\r\n\r\n");
        if !whole && head.len() < LONGEST_HEAD {
            return None;
        }
        let wanted = if whole { parse(head) } else { Err("431 Request Header Fields Too Large") };
        Some(match wanted {
            Err(status) => self.answered(status, &format!("{status}\n")),
            Ok(Wanted::Help) => self.answered("200 OK", HELP),
            Ok(Wanted::Bytes(span)) => {
                self.head("200 OK", "application/octet-stream", span.end);
                Talk::Bytes(span)
            }
            Ok(Wanted::Sum(span)) => Talk::Sum(span, Sha256::new()),
            Ok(Wanted::Upload { len, hesitant }) => {
                if hesitant {
                    self.text.extend_from_slice(b"HTTP/1.1 100 Continue\r\n\r\n");
                }
                Talk::Upload { left: len, sum: Sha256::new(), len }
            }
        })
    }

    fn told_sum(&mut self, sum: Sha256, len: u64) {
        let mut text = String::new();
        for byte in sum.finalize() {
            // A String takes all.
            let _ = write!(text, "{byte:02x}");
        }
        self.talk = self.answered("200 OK", &format!("{text}  {len}\n"));
    }

    fn answered(&mut self, status: &str, text: &str) -> Talk {
        self.head(status, "text/plain", text.len() as u64);
        self.text.extend_from_slice(text.as_bytes());
        Talk::Over
    }

    fn head(&mut self, status: &str, kind: &str, len: u64) {
        let head = format!(
            "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len}\r\n\
             Connection: close\r\n\r\n"
        );
        self.text.extend_from_slice(head.as_bytes());
    }

    fn send(&mut self, socket: &mut tcp::Socket<'_>) {
        while !self.text.is_empty() && socket.can_send() {
            let Ok(sent) = socket.send_slice(&self.text) else { return };
            self.text.drain(..sent);
        }
        while self.text.is_empty() && socket.can_send() {
            let Talk::Bytes(span) = &mut self.talk else { break };
            let sent = socket.send(|room| {
                let len = (span.end - span.at).min(room.len() as u64) as usize;
                bytes::fill(span.seed, span.at, &mut room[..len]);
                (len, len)
            });
            let Ok(sent) = sent else { return };
            span.at += sent as u64;
            if span.at == span.end {
                self.talk = Talk::Over;
            }
        }
        if matches!(self.talk, Talk::Over) && self.text.is_empty() {
            // What is in the buffer is sent first.
            socket.close();
        }
    }
}

impl Talk {
    /// Takes bytes from the front; how many.
    fn receive(&mut self, bytes: &[u8]) -> usize {
        match self {
            Talk::Head(head) => {
                for (used, byte) in bytes.iter().enumerate() {
                    head.push(*byte);
                    if head.ends_with(b"\r\n\r\n") || head.len() >= LONGEST_HEAD {
                        return used + 1;
                    }
                }
                bytes.len()
            }
            Talk::Upload { left, sum, .. } => {
                let used = bytes.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
                sum.update(&bytes[..used]);
                *left -= used as u64;
                used
            }
            _ => 0,
        }
    }
}

/// What a request's head asks for; else the status of the answer.
fn parse(head: &[u8]) -> Result<Wanted, &'static str> {
    let bad = "400 Bad Request";
    let head = std::str::from_utf8(head).map_err(|_| bad)?;
    let mut lines = head.split("\r\n");
    let mut words = lines.next().ok_or(bad)?.split(' ');
    let (method, path) = words.next().zip(words.next()).ok_or(bad)?;
    if !words.next().is_some_and(|version| version.starts_with("HTTP/1.")) {
        return Err(bad);
    }
    let fields = lines.filter_map(|line| line.split_once(':'));
    let field = |name: &str| {
        let named = fields.clone().find(|(n, _)| n.eq_ignore_ascii_case(name));
        named.map(|(_, value)| value.trim())
    };
    match method {
        "GET" => download(path),
        "PUT" | "POST" => {
            let len = field("content-length").ok_or("411 Length Required")?;
            let hesitant = field("expect").is_some_and(|v| v.eq_ignore_ascii_case("100-continue"));
            Ok(Wanted::Upload { len: len.parse().map_err(|_| bad)?, hesitant })
        }
        _ => Err("405 Method Not Allowed"),
    }
}

fn download(path: &str) -> Result<Wanted, &'static str> {
    let missing = "404 Not Found";
    let mut parts = path.strip_prefix('/').ok_or(missing)?.split('/');
    let kind = parts.next().unwrap_or_default();
    if kind.is_empty() {
        return Ok(Wanted::Help);
    }
    let mut number = |or| parts.next().map_or(Ok(or), |n| n.parse::<u64>().map_err(|_| missing));
    let (end, seed) = (number(0)?, number(0)?);
    let span = Span { seed, at: 0, end };
    match (kind, parts.next()) {
        ("bytes", None) => Ok(Wanted::Bytes(span)),
        ("sha256", None) => Ok(Wanted::Sum(span)),
        _ => Err(missing),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asks(head: &str) -> Result<Wanted, &'static str> {
        parse(format!("{head}\r\n\r\n").as_bytes())
    }

    #[test]
    fn requests_are_understood_and_others_refused_by_their_status() {
        let span = |seed, end| Span { seed, at: 0, end };
        let upload = |len, hesitant| Ok(Wanted::Upload { len, hesitant });
        for (head, wanted) in [
            ("GET / HTTP/1.1", Ok(Wanted::Help)),
            ("GET /bytes/10 HTTP/1.0", Ok(Wanted::Bytes(span(0, 10)))),
            ("GET /bytes/10/7 HTTP/1.1\r\nHost: x", Ok(Wanted::Bytes(span(7, 10)))),
            ("GET /sha256/5/1 HTTP/1.1", Ok(Wanted::Sum(span(1, 5)))),
            ("PUT /x HTTP/1.1\r\ncontent-LENGTH: 12", upload(12, false)),
            ("POST /x HTTP/1.1\r\nContent-Length:0\r\nExpect: 100-continue", upload(0, true)),
            ("PUT /x HTTP/1.1", Err("411 Length Required")),
            ("PUT /x HTTP/1.1\r\nContent-Length: -1", Err("400 Bad Request")),
            ("GET /bytes/99999999999999999999 HTTP/1.1", Err("404 Not Found")),
            ("GET /bytes/1/2/3 HTTP/1.1", Err("404 Not Found")),
            ("GET bytes HTTP/1.1", Err("404 Not Found")),
            ("GET /", Err("400 Bad Request")),
            ("DELETE / HTTP/1.1", Err("405 Method Not Allowed")),
        ] {
            assert_eq!(asks(head), wanted, "{head}");
        }
        assert_eq!(parse(&[0xff, 0xfe]), Err("400 Bad Request"));
    }

    #[test]
    fn a_head_ends_where_it_ends_or_is_too_long() {
        let mut talk = Talk::Head(Vec::new());
        assert_eq!(talk.receive(b"GET / HTTP/1.1\r\n\r"), 17);
        assert_eq!(talk.receive(b"\nbody"), 1);
        let mut web = Web { talk, text: Vec::new() };
        let Talk::Head(head) = &web.talk else { panic!("no head") };
        assert!(web.begin(&head.clone()).is_some());
        let mut talk = Talk::Head(Vec::new());
        assert_eq!(talk.receive(&[b'x'; 10_000]), LONGEST_HEAD);
        assert!(matches!(web.begin(&[b'x'; LONGEST_HEAD]), Some(Talk::Over)));
        assert!(String::from_utf8_lossy(&web.text).contains(" 431 "));
    }
}
