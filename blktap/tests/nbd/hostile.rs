//! A client by hand, and what it must not be able to do.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blktap::MemDisk;
use blktap::export::nbd::proto::{
    CHUNK_MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC, REQUEST_MAGIC, SIMPLE_MAGIC, cmd, opt, rep,
};
use blktap::export::nbd::{Export, Limits, Server};

use super::rig::{Ours, until};
use super::support::folder;

const SIZE: usize = 1 << 20;

/// A connection that knows only bytes.
pub struct Session {
    stream: UnixStream,
    /// The smallest request that the server has told of.
    pub minimum: Option<u32>,
}

fn be16(b: &[u8]) -> u16 {
    u16::from_be_bytes([b[0], b[1]])
}
fn be32(b: &[u8]) -> u32 {
    u32::from_be_bytes([b[0], b[1], b[2], b[3]])
}

impl Session {
    /// Up to the client's flags.
    pub fn greet(socket: &Path) -> Session {
        let stream = UnixStream::connect(socket).expect("a connection");
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
        let mut session = Session { stream, minimum: None };
        let greeting = session.take(18);
        assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
        session.send(&3u32.to_be_bytes());
        session
    }
    /// In transmission, with simple replies.
    pub fn go(socket: &Path, name: &str, infos: &[u16]) -> Session {
        let mut session = Session::greet(socket);
        session.option(opt::GO, &Self::info_data(name, infos));
        for (kind, data) in session.answers(opt::GO) {
            assert_eq!(kind & rep::ERROR, 0, "{kind:#x}");
            if kind == rep::INFO && be16(&data) == 3 {
                session.minimum = Some(be32(&data[2..]));
            }
        }
        session
    }
    pub fn info_data(name: &str, infos: &[u16]) -> Vec<u8> {
        let mut data = (name.len() as u32).to_be_bytes().to_vec();
        data.extend(name.as_bytes());
        data.extend((infos.len() as u16).to_be_bytes());
        infos.iter().for_each(|i| data.extend(i.to_be_bytes()));
        data
    }
    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("a write");
    }
    pub fn take(&mut self, n: usize) -> Vec<u8> {
        let mut bytes = vec![0; n];
        self.stream.read_exact(&mut bytes).expect("bytes");
        bytes
    }
    pub fn option(&mut self, option: u32, data: &[u8]) {
        let mut all = OPTION_MAGIC.to_be_bytes().to_vec();
        all.extend(option.to_be_bytes());
        all.extend((data.len() as u32).to_be_bytes());
        all.extend(data);
        self.send(&all);
    }
    /// All answers to an option, the last one too.
    pub fn answers(&mut self, option: u32) -> Vec<(u32, Vec<u8>)> {
        let mut all = Vec::new();
        loop {
            let head = self.take(20);
            assert_eq!(head[..8], OPTION_REPLY_MAGIC.to_be_bytes());
            assert_eq!(be32(&head[8..]), option);
            let kind = be32(&head[12..]);
            let data = self.take(be32(&head[16..]) as usize);
            all.push((kind, data));
            if kind == rep::ACK || kind & rep::ERROR != 0 {
                return all;
            }
        }
    }
    pub fn ask(&mut self, option: u32, data: &[u8]) -> u32 {
        self.option(option, data);
        self.answers(option).last().expect("an answer").0
    }
    pub fn request(&mut self, flags: u16, command: u16, offset: u64, len: u32) {
        let mut all = REQUEST_MAGIC.to_be_bytes().to_vec();
        all.extend(flags.to_be_bytes());
        all.extend(command.to_be_bytes());
        all.extend(77u64.to_be_bytes());
        all.extend(offset.to_be_bytes());
        all.extend(len.to_be_bytes());
        self.send(&all);
    }
    /// A simple reply's error.
    pub fn reply(&mut self) -> u32 {
        let head = self.take(16);
        assert_eq!(head[..4], SIMPLE_MAGIC.to_be_bytes());
        assert_eq!(head[8..], 77u64.to_be_bytes());
        be32(&head[4..])
    }
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        self.request(0, cmd::WRITE, offset, data.len() as u32);
        self.send(data);
        assert_eq!(self.reply(), 0);
    }
    pub fn zero(&mut self, offset: u64, len: u32) {
        self.request(0, cmd::WRITE_ZEROES, offset, len);
        assert_eq!(self.reply(), 0);
    }
    pub fn flush(&mut self) {
        self.request(0, cmd::FLUSH, 0, 0);
        assert_eq!(self.reply(), 0);
    }
    pub fn try_read(&mut self, offset: u64, len: u32) -> Result<Vec<u8>, u32> {
        self.request(0, cmd::READ, offset, len);
        match self.reply() {
            0 => Ok(self.take(len as usize)),
            error => Err(error),
        }
    }
    pub fn read(&mut self, offset: u64, len: u32) -> Vec<u8> {
        self.try_read(offset, len).expect("a read")
    }
    /// The server ends the connection, whatever it says before.
    pub fn ends(mut self) {
        let mut rest = Vec::new();
        match self.stream.read_to_end(&mut rest) {
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => {}
            Err(e) => panic!("the connection goes on: {e}"),
        }
    }
}

fn server() -> (tempfile::TempDir, Ours) {
    let folder = folder();
    let ours = Ours::disk(folder.path(), MemDisk::new(SIZE));
    (folder, ours)
}

/// A client that has done nothing wrong is served to the end.
fn with_a_witness(hostile: impl FnOnce(&Ours)) {
    let (_folder, ours) = server();
    let mut witness = Session::go(&ours.socket, "", &[3]);
    witness.write(0, &[5; 512]);
    hostile(&ours);
    assert_eq!(witness.read(0, 512), [5; 512]);
    drop(witness);
    ours.end();
}

#[test]
fn garbage_ends_the_connection_and_no_other() {
    with_a_witness(|ours| {
        let begin = |bytes: &[u8]| {
            let mut session = Session::greet(&ours.socket);
            session.send(bytes);
            session
        };
        // No option's magic; an option of 4 GiB; one of 65 KiB; one that never comes whole.
        begin(b"GET / HTTP/1.1\r\n\r\n").ends();
        let head = |option: u32, len: u32| {
            let mut all = OPTION_MAGIC.to_be_bytes().to_vec();
            all.extend(option.to_be_bytes());
            all.extend(len.to_be_bytes());
            all
        };
        begin(&head(opt::GO, u32::MAX)).ends();
        begin(&head(opt::LIST, 65 << 10)).ends();
        drop(begin(&head(opt::GO, 60000)));
        begin(&[head(opt::EXPORT_NAME, 4), b"none".to_vec()].concat()).ends();
        begin(&[head(opt::EXPORT_NAME, 2), vec![0xff, 0xfe]].concat()).ends();
        // Flags that nobody has offered.
        let mut session =
            Session { stream: UnixStream::connect(&ours.socket).unwrap(), minimum: None };
        session.send(&0xffff_0003u32.to_be_bytes());
        session.ends();
        // Requests: a wrong magic, a write that is too long, half a write.
        let mut session = Session::go(&ours.socket, "", &[3]);
        session.send(&[0; 28]);
        session.ends();
        let mut session = Session::go(&ours.socket, "", &[3]);
        session.request(0, cmd::WRITE, 0, (32 << 20) + 512);
        session.ends();
        let mut session = Session::go(&ours.socket, "", &[3]);
        session.request(0, cmd::WRITE, 4096, 4096);
        session.send(&[9; 100]);
        drop(session);
        let mut session = Session::go(&ours.socket, "", &[3]);
        assert_eq!(session.read(4096, 4096), [0; 4096], "half a write was written");
    });
}

#[test]
fn wrong_options_are_refused_and_the_next_one_is_served() {
    with_a_witness(|ours| {
        let mut session = Session::greet(&ours.socket);
        let info = |name, count: u16| {
            let mut data = Session::info_data(name, &[]);
            let at = data.len() - 2;
            data[at..].copy_from_slice(&count.to_be_bytes());
            data
        };
        for data in
            [vec![], vec![0; 5], u32::MAX.to_be_bytes().to_vec(), info("", 9), info("", 65535)]
        {
            assert_eq!(session.ask(opt::GO, &data), rep::ERR_INVALID, "{data:?}");
            assert_eq!(session.ask(opt::INFO, &data), rep::ERR_INVALID, "{data:?}");
        }
        let long = "x".repeat(5000);
        assert_eq!(session.ask(opt::GO, &info(&long, 0)), rep::ERR_TOO_BIG);
        assert_eq!(session.ask(opt::GO, &info("nobody", 0)), rep::ERR_UNKNOWN);
        assert_eq!(session.ask(opt::STRUCTURED_REPLY, &[1]), rep::ERR_INVALID);
        assert_eq!(session.ask(opt::LIST, &[1]), rep::ERR_INVALID);
        assert_eq!(session.ask(opt::STARTTLS, &[]), rep::ERR_POLICY);
        assert_eq!(session.ask(4, &[]), rep::ERR_UNSUP);
        assert_eq!(session.ask(0xdead_beef, &[1, 2, 3]), rep::ERR_UNSUP);
        // Contexts before structured replies, and of no sense after them.
        let context = |name: &str, queries: &[&[u8]]| {
            let mut data = (name.len() as u32).to_be_bytes().to_vec();
            data.extend(name.as_bytes());
            data.extend((queries.len() as u32).to_be_bytes());
            for query in queries {
                data.extend((query.len() as u32).to_be_bytes());
                data.extend(*query);
            }
            data
        };
        let set = opt::SET_META_CONTEXT;
        assert_eq!(session.ask(set, &context("", &[b"base:allocation"])), rep::ERR_INVALID);
        assert_eq!(session.ask(opt::STRUCTURED_REPLY, &[]), rep::ACK);
        let mut many = context("", &[]);
        many[4..].copy_from_slice(&u32::MAX.to_be_bytes());
        assert_eq!(session.ask(set, &many), rep::ERR_INVALID);
        assert_eq!(session.ask(set, &context("", &[&[0xff; 9]])), rep::ERR_INVALID);
        assert_eq!(session.ask(set, &context("", &[&[b'q'; 4097]])), rep::ERR_TOO_BIG);
        assert_eq!(session.ask(set, &context("nobody", &[])), rep::ERR_UNKNOWN);
        session.option(set, &context("", &[&b"base:allocation"[..]; 3]));
        assert_eq!(session.answers(set).len(), 2, "told once, and the end");
        assert_eq!(session.ask(opt::ABORT, &[]), rep::ACK);
        session.ends();
    });
}

#[test]
fn a_flood_of_options_ends() {
    with_a_witness(|ours| {
        let mut session = Session::greet(&ours.socket);
        for _ in 0..128 {
            assert_eq!(session.ask(opt::LIST, &[]), rep::ACK);
        }
        session.option(opt::LIST, &[]);
        session.ends();
    });
}

#[test]
fn wrong_requests_are_refused_and_the_next_one_is_served() {
    with_a_witness(|ours| {
        let mut session = Session::go(&ours.socket, "", &[3]);
        let size = SIZE as u64;
        for (flags, command, offset, len, error) in [
            (0, cmd::READ, size, 512, 22),
            (0, cmd::READ, u64::MAX - 511, 1024, 22),
            (0, cmd::READ, 0, u32::MAX / 512 * 512, 22),
            (0, cmd::TRIM, size - 512, 1024, 22),
            (0, cmd::WRITE_ZEROES, size - 512, 1024, 28),
            (0, cmd::WRITE_ZEROES, u64::MAX - 511, 512, 28),
            (0, cmd::CACHE, size, 512, 22),
            // Without contexts, and without structured replies.
            (0, cmd::BLOCK_STATUS, 0, 512, 22),
            (1 << 2, cmd::READ, 0, 512, 22),
            (1 << 4, cmd::WRITE_ZEROES, 0, 512, 22),
            (0xff00, cmd::FLUSH, 0, 0, 22),
            (0, 99, 0, 512, 22),
            (0, cmd::READ, 0, 0, 0),
            (0, cmd::TRIM, 1024, 512, 0),
            (1, cmd::TRIM, 1024, 512, 0),
            (1, cmd::WRITE_ZEROES, 1024, 512, 0),
            (3, cmd::WRITE_ZEROES, 0, 0, 0),
            (0, cmd::CACHE, 0, SIZE as u32, 0),
        ] {
            session.request(flags, command, offset, len);
            assert_eq!(session.reply(), error, "{command} {flags:#x} at {offset} of {len}");
        }
        // The payload of a refused write is no request.
        session.request(0, cmd::WRITE, size, 1024);
        session.send(&[0xff; 1024]);
        assert_eq!(session.reply(), 28);
        assert_eq!(session.read(512, 512), [0; 512]);
    });
}

#[test]
fn a_slow_handshake_is_ended_and_others_are_not_kept() {
    let folder = folder();
    let exports = vec![Export::new("", MemDisk::new(SIZE) as Arc<dyn blktap::Disk>)];
    let handshake = Duration::from_secs(1);
    let server = Server::new(exports, None, Limits { connections: 4, handshake });
    let ours = Ours::run(folder.path(), server.expect("a server"));
    let start = Instant::now();
    // More than there are places, a byte now and then.
    let slow: Vec<UnixStream> =
        (0..8).map(|_| UnixStream::connect(&ours.socket).expect("a connection")).collect();
    let drip = std::thread::spawn(move || {
        for _ in 0..40 {
            slow.iter().for_each(|mut stream| _ = stream.write(&[0]));
            std::thread::sleep(Duration::from_millis(50));
        }
    });
    let mut client = Session::go(&ours.socket, "", &[3]);
    assert_eq!(client.read(0, 512), [0; 512]);
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    drip.join().expect("no panic");
    // A client in transmission may be as slow as it likes.
    std::thread::sleep(2 * handshake);
    assert_eq!(client.read(0, 512), [0; 512]);
    drop(client);
    ours.end();
}

#[test]
fn a_client_that_does_not_read_holds_up_nobody() {
    with_a_witness(|ours| {
        let mut deaf = Session::go(&ours.socket, "", &[3]);
        deaf.stream.set_nonblocking(true).expect("non-blocking");
        let mut requests = Vec::new();
        for _ in 0..1000 {
            requests.extend(REQUEST_MAGIC.to_be_bytes());
            requests.extend([0; 4]);
            requests.extend(77u64.to_be_bytes());
            requests.extend(0u64.to_be_bytes());
            requests.extend((1u32 << 20).to_be_bytes());
        }
        // As much as goes; the server stops taking requests when it cannot answer.
        let mut sent = 0;
        until("a full socket", || match deaf.stream.write(&requests[sent % 28..]) {
            Ok(n) => {
                sent += n;
                false
            }
            Err(e) => e.kind() == io::ErrorKind::WouldBlock,
        });
        let mut client = Session::go(&ours.socket, "", &[3]);
        assert_eq!(client.read(0, 512), [5; 512]);
        drop(deaf);
    });
}

#[test]
fn structured_replies_are_framed_as_agreed() {
    with_a_witness(|ours| {
        let mut session = Session::greet(&ours.socket);
        assert_eq!(session.ask(opt::STRUCTURED_REPLY, &[]), rep::ACK);
        let mut data = vec![0; 4];
        data.extend(1u32.to_be_bytes());
        data.extend(15u32.to_be_bytes());
        data.extend(b"base:allocation");
        assert_eq!(session.ask(opt::SET_META_CONTEXT, &data), rep::ACK);
        assert_eq!(session.ask(opt::GO, &Session::info_data("", &[3])), rep::ACK);
        let chunk = |session: &mut Session| {
            let head = session.take(20);
            assert_eq!(head[..4], CHUNK_MAGIC.to_be_bytes());
            assert_eq!(be16(&head[4..]), 1, "the last chunk");
            assert_eq!(head[8..16], 77u64.to_be_bytes());
            let body = session.take(be32(&head[16..]) as usize);
            (be16(&head[6..]), body)
        };
        session.request(1 << 2, cmd::READ, 512, 1024);
        let (kind, body) = chunk(&mut session);
        assert_eq!((kind, &body[..8], body.len()), (1, &512u64.to_be_bytes()[..], 1032));
        session.request(0, cmd::READ, SIZE as u64, 512);
        let (kind, body) = chunk(&mut session);
        assert_eq!((kind, body), ((1 << 15) | 1, vec![0, 0, 0, 22, 0, 0]));
        session.request(1 << 3, cmd::BLOCK_STATUS, 0, 4096);
        let (kind, body) = chunk(&mut session);
        assert_eq!((kind, &body[..]), (5, &[0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 0, 0][..]));
        session.request(0, cmd::BLOCK_STATUS, 0, 0);
        assert_eq!(chunk(&mut session).0, (1 << 15) | 1);
        session.request(0, cmd::DISC, 0, 0);
        session.ends();
    });
}
