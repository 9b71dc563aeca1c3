//! `ringback export vhost-user-blk` under front-ends and drivers that break the rules: the
//! connection ends, the log names the cause, and the next front-end is served.

mod client;

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};

use client::*;
use rustix::process::{Pid, Signal, kill_process};

const DISK: u64 = 1 << 20;

struct Backend {
    child: Option<Child>,
    log: Receiver<String>,
    folder: tempfile::TempDir,
    socket: PathBuf,
}

impl Backend {
    fn start() -> Backend {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
        File::create(folder.path().join("disk")).and_then(|f| f.set_len(DISK)).expect("an image");
        Backend::again(folder)
    }

    fn again(folder: tempfile::TempDir) -> Backend {
        let socket = folder.path().join("sock");
        let mut command = Command::new(env!("CARGO_BIN_EXE_ringback"));
        command.args(["export", "vhost-user-blk", "--cache", "writeback", "--socket-path"]);
        command.arg(&socket).arg(folder.path().join("disk")).env("RINGBACK_LOG", "warn");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("ringback");
        let mut line = String::new();
        let out = child.stdout.take().expect("its output");
        BufReader::new(out).read_line(&mut line).expect("a line");
        let errors = BufReader::new(child.stderr.take().expect("its log"));
        let (send, log) = channel();
        std::thread::spawn(move || {
            errors.lines().map_while(Result::ok).try_for_each(|line| send.send(line))
        });
        Backend { child: Some(child), log, folder, socket }
    }

    /// The next line of the log must say this.
    fn said(&self, cause: &str) {
        let line = self.log.recv_timeout(PATIENCE);
        let line = line.unwrap_or_else(|_| panic!("nothing was said; wanted: {cause}"));
        assert!(line.contains(cause), "{line:?} does not say {cause:?}");
    }

    /// An honest front-end is served.
    fn serves(&self) {
        let mut client = Client::start(&self.socket);
        client.request(1, 8, 0);
        client.poke(DATA, &[0x5a; 4096]);
        client.offer(0);
        client.kick();
        assert_eq!(client.wait_used(1), 0, "a write");
        let mut bytes = [0; 4096];
        File::open(self.folder.path().join("disk"))
            .expect("the image")
            .read_exact_at(&mut bytes, 4096)
            .expect("its bytes");
        assert_eq!(bytes, [0x5a; 4096]);
    }

    /// SIGTERM, and a good end: what the log says more.
    fn end(mut self) -> Vec<String> {
        let mut child = self.child.take().expect("running");
        kill_process(Pid::from_child(&child), Signal::TERM).expect("SIGTERM");
        let status = child.wait().expect("its end");
        assert!(status.success(), "{status}");
        self.log.iter().collect()
    }

    /// It serves an honest front-end, and there is nothing to say of that.
    fn ends_well(self) {
        self.serves();
        let said = self.end();
        assert!(said.is_empty(), "{said:?}");
    }

    fn kill(mut self) -> tempfile::TempDir {
        let mut child = self.child.take().expect("running");
        child.kill().expect("SIGKILL");
        child.wait().expect("its end");
        std::mem::replace(&mut self.folder, tempfile::tempdir().expect("a folder"))
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A driver that breaks its ring by what `lie` writes there.
fn broken_ring(lie: impl FnOnce(&mut Client), cause: &str) {
    let backend = Backend::start();
    let mut client = Client::start(&backend.socket);
    lie(&mut client);
    client.kick();
    client.until_closed();
    backend.said(cause);
    backend.ends_well();
}

/// A front-end that says something wrong.
fn wrong_message(say: impl FnOnce(&mut Client), cause: &str) {
    let backend = Backend::start();
    let mut client = Client::greet(&backend.socket);
    say(&mut client);
    client.until_closed();
    backend.said(cause);
    backend.ends_well();
}

#[test]
fn a_chain_that_goes_in_a_circle() {
    let lie = |client: &mut Client| {
        client.request(0, 0, WRITE);
        client.desc(DESC, 1, GUEST + DATA, 4096, NEXT | WRITE, 1);
        client.offer(0);
    };
    broken_ring(lie, "queue 0: a chain has more than 8 descriptors");
}

#[test]
fn an_indirect_table_that_goes_in_a_circle() {
    let lie = |client: &mut Client| {
        client.header(0, 0);
        client.desc(DESC, 0, GUEST + TABLE, 32, INDIRECT, 0);
        client.desc(TABLE, 0, GUEST + HEADER, 16, NEXT, 1);
        client.desc(TABLE, 1, GUEST + DATA, 16, NEXT, 0);
        client.offer(0);
    };
    broken_ring(lie, "queue 0: a chain has more than 2 descriptors");
}

#[test]
fn tables_that_name_tables_or_lie_nowhere() {
    let nested = |client: &mut Client| {
        client.desc(DESC, 0, GUEST + TABLE, 16, INDIRECT, 0);
        client.desc(TABLE, 0, GUEST + TABLE, 16, INDIRECT, 0);
        client.offer(0);
    };
    broken_ring(nested, "queue 0: an indirect table: it names another one");
    let nowhere = |client: &mut Client| {
        client.desc(DESC, 0, GUEST + BYTES - 16, 32, INDIRECT, 0);
        client.offer(0);
    };
    broken_ring(nowhere, "queue 0: 0x20 bytes at guest address 0x1ffff0 lie in no region");
}

#[test]
fn memory_that_is_not_the_guests() {
    for (addr, len) in [(0, 4096), (GUEST + BYTES - 512, 4096), (u64::MAX - 100, 4096)] {
        let lie = |client: &mut Client| {
            client.request(0, 0, WRITE);
            client.desc(DESC, 1, addr, len, NEXT | WRITE, 2);
            client.offer(0);
        };
        broken_ring(lie, "lie in no region of the front-end's");
    }
}

#[test]
fn heads_and_indexes_that_the_ring_has_not() {
    broken_ring(|client| client.offer(9), "queue 0: a chain starts at descriptor 9");
    let ahead = |client: &mut Client| client.poke(AVAIL + 2, &9u16.to_le_bytes());
    broken_ring(ahead, "queue 0: the available index is 9 ahead, and the ring has 8 entries");
    let next = |client: &mut Client| {
        client.request(0, 0, WRITE);
        client.desc(DESC, 1, GUEST + DATA, 4096, NEXT | WRITE, 8);
        client.offer(0);
    };
    broken_ring(next, "queue 0: a chain goes on at descriptor 8, and its table has 8");
}

#[test]
fn requests_without_what_an_answer_needs() {
    let short = |client: &mut Client| {
        client.request(0, 0, WRITE);
        client.desc(DESC, 0, GUEST + HEADER, 8, NEXT, 1);
        client.offer(0);
    };
    broken_ring(short, "queue 0: a request is shorter than its header");
    let no_status = |client: &mut Client| {
        client.request(1, 0, 0);
        client.desc(DESC, 2, GUEST + STATUS, 1, 0, 0);
        client.offer(0);
    };
    broken_ring(no_status, "queue 0: a request has no byte for its status");
    let order = |client: &mut Client| {
        client.request(0, 0, WRITE);
        client.desc(DESC, 2, GUEST + STATUS, 1, 0, 0);
        client.offer(0);
    };
    broken_ring(order, "queue 0: a descriptor to read from follows one to write to");
    let empty = |client: &mut Client| {
        client.request(0, 0, WRITE);
        client.desc(DESC, 1, GUEST + DATA, 0, NEXT | WRITE, 2);
        client.offer(0);
    };
    broken_ring(empty, "queue 0: a descriptor of 0 bytes");
}

#[test]
fn memory_that_shrinks_under_a_ring() {
    let lie = |client: &mut Client| {
        client.memory.set_len(0).expect("a memfd that is not sealed");
    };
    broken_ring(lie, "queue 0: a file of the front-end's memory was cut short");
}

#[test]
fn payload_that_is_cut_off_is_an_error_of_that_request() {
    let backend = Backend::start();
    let mut client = Client::start(&backend.socket);
    client.request(0, 0, WRITE);
    client.memory.set_len(DATA).expect("a memfd that is not sealed");
    client.offer(0);
    client.kick();
    assert_eq!(client.wait_used(1), 1, "VIRTIO_BLK_S_IOERR");
    drop(client);
    backend.ends_well();
}

#[test]
fn requests_that_the_disk_refuses_are_answered() {
    let backend = Backend::start();
    let mut client = Client::start(&backend.socket);
    // Behind the end, at the end of all sectors, of an unknown kind, and none at all.
    for (n, (kind, sector, status)) in
        [(0, DISK / 512, 1), (0, u64::MAX, 1), (99, 0, 2), (1, u64::MAX / 512, 1)]
            .into_iter()
            .enumerate()
    {
        client.request(kind, sector, if kind == 0 { WRITE } else { 0 });
        client.offer(0);
        client.kick();
        assert_eq!(client.wait_used(n as u16 + 1), status, "{kind} at {sector}");
    }
    drop(client);
    backend.ends_well();
}

#[test]
fn messages_that_are_none() {
    let unknown = |client: &mut Client| client.tell(4711, &[], &[]);
    wrong_message(unknown, "a message of unknown kind 4711");
    let large = |client: &mut Client| {
        client.send(&words(&[SET_MEM_TABLE, 1, 1 << 30]), &[]).expect("a message is taken");
    };
    wrong_message(large, "a message (SET_MEM_TABLE) of 1073741824 bytes");
    let odd = |client: &mut Client| client.tell(SET_VRING_NUM, &[0; 5], &[]);
    wrong_message(odd, "SET_VRING_NUM: ");
    let half = |client: &mut Client| {
        client.send(&words(&[SET_VRING_NUM, 1, 8])[..10], &[]).expect("a message is taken");
    };
    wrong_message(half, "a message that is not whole within 5 s");
}

#[test]
fn numbers_that_make_no_sense() {
    let queue = |client: &mut Client| client.tell(SET_VRING_NUM, &words(&[7, 8]), &[]);
    wrong_message(queue, "queue 7: there are 1");
    for size in [0, 1025, 65536 + 8] {
        let size = |client: &mut Client| client.tell(SET_VRING_NUM, &words(&[0, size]), &[]);
        wrong_message(size, "queue 0 has a size that is not from 1 to 1024");
    }
    let base = |client: &mut Client| {
        client.start_ring();
        client.tell(SET_VRING_BASE, &words(&[0, 4]), &[]);
    };
    wrong_message(base, "queue 0 is set back while it runs");
    let features = |client: &mut Client| client.tell(SET_FEATURES, &longs(&[1 << 50]), &[]);
    wrong_message(features, "were taken up, and");
    let address = |client: &mut Client| {
        client.tell(SET_VRING_NUM, &words(&[0, 8]), &[]);
        let end = USER + BYTES - 64;
        client.tell(SET_VRING_ADDR, &Client::address(end, USER + USED, USER + AVAIL), &[]);
        client.tell(SET_VRING_ENABLE, &words(&[0, 1]), &[]);
        let kick = client.kick.try_clone().expect("a descriptor");
        client.tell(SET_VRING_KICK, &longs(&[0]), &[kick.as_fd()]);
    };
    wrong_message(address, "queue 0 lies in no region of the memory");
}

#[test]
fn descriptors_of_the_wrong_kind() {
    let file = |client: &mut Client| {
        let fd = client.memory.try_clone().expect("a descriptor");
        client.tell(SET_VRING_KICK, &longs(&[0]), &[fd.as_fd()]);
    };
    wrong_message(file, "queue 0: its kick descriptor is no eventfd");
    let pipe = |client: &mut Client| {
        let (end, _other) = rustix::pipe::pipe().expect("a pipe");
        client.tell(SET_VRING_CALL, &longs(&[0]), &[end.as_fd()]);
    };
    wrong_message(pipe, "queue 0: its call descriptor is no eventfd");
    let socket = |client: &mut Client| {
        let (end, _other) = UnixStream::pair().expect("sockets");
        let table = Client::table(&[[GUEST, BYTES, USER, 0]]);
        client.tell(SET_MEM_TABLE, &table, &[end.as_fd()]);
    };
    wrong_message(
        socket,
        "memory: the descriptor of the region at guest address 0x100000: it is no file",
    );
    let none = |client: &mut Client| {
        client.tell(SET_MEM_TABLE, &Client::table(&[[GUEST, BYTES, USER, 0]]), &[]);
    };
    wrong_message(none, "SET_MEM_TABLE: ");
}

#[test]
fn regions_that_cannot_be() {
    let one = |region: [u64; 4], cause: &str| {
        let say = |client: &mut Client| {
            let fd = client.memory.try_clone().expect("a descriptor");
            client.tell(SET_MEM_TABLE, &Client::table(&[region]), &[fd.as_fd()]);
        };
        wrong_message(say, cause);
    };
    one([GUEST, BYTES + 4096, USER, 0], "it has 0x100000 bytes, and 0x101000 are needed");
    one([GUEST, BYTES, USER, 4096], "it has 0x100000 bytes, and 0x101000 are needed");
    one([u64::MAX - 4096, BYTES, USER, 0], "SET_MEM_TABLE: ");
    one([GUEST, 0, USER, 0], "SET_MEM_TABLE: ");
    let overlap = |client: &mut Client| {
        let fd = client.memory.try_clone().expect("a descriptor");
        let mut region = vec![0; 8];
        region.extend(longs(&[GUEST + 4096, 4096, USER + 4096, 0]));
        client.tell(ADD_MEM_REG, &region, &[fd.as_fd()]);
    };
    wrong_message(
        overlap,
        "memory: a region of 0x1000 bytes at guest address 0x101000: it overlaps",
    );
    let unknown = |client: &mut Client| {
        let mut region = vec![0; 8];
        region.extend(longs(&[GUEST + 4096, 4096, USER + 4096, 0]));
        client.tell(REM_MEM_REG, &region, &[]);
    };
    wrong_message(unknown, "memory: no region is at guest address 0x101000");
}

#[test]
fn in_flight_regions_that_cannot_be() {
    let small = |client: &mut Client| {
        let file = memfd(4096);
        let mut payload = longs(&[4096, 0]);
        payload.extend(words(&[1 | 1024 << 16, 0]));
        client.tell(SET_INFLIGHT_FD, &payload, &[file.as_fd()]);
    };
    wrong_message(small, "the in-flight region: 1 queues of 1024 entries in 4096 bytes");
    let many = |client: &mut Client| {
        let mut payload = longs(&[0, 0]);
        payload.extend(words(&[9 | 8 << 16, 0]));
        client.tell(GET_INFLIGHT_FD, &payload, &[]);
    };
    wrong_message(many, "the in-flight region: 9 queues of 8 entries");
    let torn = |client: &mut Client| {
        // Its version is unknown.
        let file = memfd(4096);
        file.write_all_at(&7u16.to_ne_bytes(), 8).expect("a byte");
        let mut payload = longs(&[4096, 0]);
        payload.extend(words(&[1 | 8 << 16, 0]));
        client.tell(SET_INFLIGHT_FD, &payload, &[file.as_fd()]);
        client.tell(SET_VRING_NUM, &words(&[0, 8]), &[]);
        client.tell(SET_VRING_ADDR, &Client::address(USER, USER + USED, USER + AVAIL), &[]);
        client.tell(SET_VRING_ENABLE, &words(&[0, 1]), &[]);
        let kick = client.kick.try_clone().expect("a descriptor");
        client.tell(SET_VRING_KICK, &longs(&[0]), &[kick.as_fd()]);
    };
    wrong_message(torn, "queue 0: the in-flight region: its version is unknown");
}

#[test]
fn front_ends_that_just_go_and_the_last_that_is_there_at_the_end() {
    let backend = Backend::start();
    for said in 0..3 {
        match said {
            0 => drop(Client::connect(&backend.socket)),
            1 => drop(Client::greet(&backend.socket)),
            _ => drop(Client::start(&backend.socket)),
        }
    }
    backend.serves();
    let mut last = Client::start(&backend.socket);
    last.request(1, 0, 0);
    last.offer(0);
    last.kick();
    assert_eq!(last.wait_used(1), 0);
    // It stays while the server ends.
    assert_eq!(backend.end(), Vec::<String>::new());
    last.until_closed();
}

#[test]
fn a_front_end_that_does_not_read_does_not_hold_up_the_end() {
    let backend = Backend::start();
    let mut client = Client::greet(&backend.socket);
    client.socket.set_nonblocking(true).expect("a socket");
    let message = words(&[GET_FEATURES, 1, 0]);
    let mut refused = 0;
    while refused < 100 {
        match client.send(&message, &[]) {
            Ok(()) => refused = 0,
            Err(_) => refused += 1,
        }
        if refused > 0 {
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
    }
    let said = backend.end();
    assert!(said.len() == 1 && said[0].contains("GET_FEATURES: "), "{said:?}");
}

/// A kill between two requests: what was taken is known to the successor.
#[test]
fn the_base_is_where_the_ring_stopped() {
    let backend = Backend::start();
    let mut client = Client::start(&backend.socket);
    client.request(1, 0, 0);
    for n in 1..=3 {
        client.offer(0);
        client.kick();
        assert_eq!(client.wait_used(n), 0);
    }
    assert_eq!(client.ask(GET_VRING_BASE, &words(&[0, 0])), words(&[0, 3]));
    drop(client);
    Backend::again(backend.kill()).ends_well();
}
