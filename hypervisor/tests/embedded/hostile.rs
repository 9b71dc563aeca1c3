//! Clients that do as they like: they hurt themselves alone.

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use hypervisor::core::domains::Kind;
use hypervisor::embedded::message::{Copy, Endpoint, MAX_FDS, MAX_MESSAGE, Move, Reader, Request};
use hypervisor::{Access, Source, store::Tx};
use rustix::fs::{FallocateFlags, OFlags, SealFlags};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use rustix::pipe::PipeFlags;

use crate::agent::{Rig, readable, until};

/// A guest without our library: it speaks the protocol itself.
struct Raw(OwnedFd);

impl Raw {
    fn send(&self, datagram: &[u8], fds: &[OwnedFd]) -> Result<usize, Errno> {
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        rustix::net::sendmsg(&self.0, &[IoSlice::new(datagram)], &mut control, flags)
    }
    /// Status, fields, descriptors; `None` where the connection was closed.
    fn receive(&self) -> Option<(u32, Vec<u8>, Vec<OwnedFd>)> {
        if !readable(self.0.as_fd(), 1000) {
            panic!("no answer within a second");
        }
        let mut body = vec![0; MAX_MESSAGE];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut iov = [IoSliceMut::new(&mut body)];
        let got = rustix::net::recvmsg(
            &self.0,
            &mut iov,
            &mut control,
            RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC,
        )
        .ok()?;
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        body.truncate(got.bytes);
        let status = Reader(&body).u32()?;
        Some((status, body[4..].to_vec(), fds))
    }
    fn ask(&self, request: &Request) -> (u32, Vec<u8>, Vec<OwnedFd>) {
        self.send(&request.encode(), &[]).unwrap();
        self.receive().expect("the connection was closed")
    }
    fn refused(&self, request: &Request, errno: Errno) {
        assert_eq!(self.ask(request).0, errno.raw_os_error() as u32, "{request:?}");
    }
}

struct Scene {
    rig: Rig,
    raw: Raw,
    domid: u16,
    /// A domain that goes on while the other one misbehaves.
    witness: crate::agent::Agent,
}

impl Scene {
    fn start() -> Scene {
        let rig = Rig::start();
        let toolstack = rig.toolstack();
        let domid = toolstack.create_domain(None, Kind::Guest, "hostile").unwrap();
        let raw = Raw(toolstack.connect_domain(domid).unwrap());
        let good = toolstack.create_domain(None, Kind::Guest, "good").unwrap();
        let witness = rig.guest(good);
        Scene { rig, raw, domid, witness }
    }
    fn all_is_well(&mut self) {
        let start = Instant::now();
        self.witness.ask("grant 0 1 rw");
        self.witness.ask("write data/x y");
        assert!(start.elapsed() < Duration::from_secs(1));
    }
    fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.rig.hypervisor.id())).unwrap().count()
    }
    fn domain_ends(&self) {
        let toolstack = self.rig.toolstack();
        until("its domain ended", || !toolstack.domains().unwrap().contains(&self.domid));
    }
}

#[test]
fn nonsense_ends_the_connection() {
    for datagram in [&b"x"[..], &[255; 64], &[0; 4], &[13, 0, 0, 0, 1, 0, 255, 255, 255, 255]] {
        let mut scene = Scene::start();
        scene.raw.send(datagram, &[]).unwrap();
        assert!(scene.raw.receive().is_none(), "{datagram:?} was answered");
        scene.domain_ends();
        scene.all_is_well();
    }
}

#[test]
fn too_long_a_datagram_ends_the_connection() {
    let mut scene = Scene::start();
    scene.raw.send(&vec![0; MAX_MESSAGE + 1], &[]).unwrap();
    assert!(scene.raw.receive().is_none());
    scene.all_is_well();
}

#[test]
fn descriptors_that_nobody_asked_for_are_dropped() {
    let mut scene = Scene::start();
    let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).unwrap();
    scene.all_is_well();
    std::thread::sleep(Duration::from_millis(100));
    let before = scene.descriptors();
    for _ in 0..100 {
        let fds = [write.try_clone().unwrap(), write.try_clone().unwrap()];
        scene.raw.send(&Request::Hello.encode(), &fds).unwrap();
        assert_eq!(scene.raw.receive().unwrap().0, 0);
    }
    assert_eq!(scene.descriptors(), before);
    drop(write);
    assert!(readable(read.as_fd(), 1000), "somebody keeps a descriptor");
    scene.all_is_well();
}

#[test]
fn a_guest_cannot_shrink_or_reseal_its_arena() {
    let mut scene = Scene::start();
    let request = Request::OpenArena { peer: 0, access: Access::ReadWrite };
    let (status, _, fds) = scene.raw.ask(&request);
    assert_eq!((status, fds.len()), (0, 1));
    assert_eq!(rustix::fs::ftruncate(&fds[0], 0), Err(Errno::PERM));
    assert_eq!(rustix::fs::ftruncate(&fds[0], 1 << 40), Err(Errno::PERM));
    assert_eq!(rustix::fs::fcntl_add_seals(&fds[0], SealFlags::WRITE), Err(Errno::PERM));
    scene.all_is_well();
}

#[test]
fn a_hole_in_an_arena_reads_as_zeroes() {
    let mut scene = Scene::start();
    let mut backend = scene.rig.backend();
    let request = Request::OpenArena { peer: 0, access: Access::ReadWrite };
    let (_, body, fds) = scene.raw.ask(&request);
    let arena = Reader(&body).u32().unwrap();
    rustix::io::pwrite(&fds[0], &[7; 8192], 0).unwrap();
    let (status, body, _) = scene.raw.ask(&Request::Grant { arena, first: 0, count: 2 });
    assert_eq!(status, 0);
    let mut fields = Reader(&body);
    let refs = format!("{},{}", fields.u32().unwrap(), fields.u32().unwrap());
    let domid = scene.domid;
    backend.ask(&format!("map {domid} {refs} rw"));
    assert_eq!(backend.ask("look 0 4096"), "7");
    assert_eq!(backend.ask(&format!("copy {domid} {refs} from 0")), "0,0 7,7");
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&fds[0], hole, 0, 8192).unwrap();
    assert_eq!(backend.ask("look 0 4096"), "0");
    backend.ask("poke 0 0 1");
    assert_eq!(backend.ask(&format!("copy {domid} {refs} from 0")), "0,0 1,0");
    scene.all_is_well();
}

#[test]
fn a_read_only_arena_is_granted_from_only_when_sealed() {
    let mut scene = Scene::start();
    let request = Request::OpenArena { peer: 0, access: Access::ReadOnly };
    let (_, body, fds) = scene.raw.ask(&request);
    let arena = Reader(&body).u32().unwrap();
    scene.raw.refused(&Request::Grant { arena, first: 0, count: 1 }, Errno::INVAL);
    // A guest that seals it otherwise gets nothing granted from it.
    rustix::fs::fcntl_add_seals(&fds[0], SealFlags::SEAL).unwrap();
    scene.raw.refused(&Request::SealArena { arena }, Errno::PERM);
    scene.raw.refused(&Request::Grant { arena, first: 0, count: 1 }, Errno::INVAL);
    scene.all_is_well();
}

#[test]
fn a_guest_grants_only_its_own_memory() {
    let mut scene = Scene::start();
    let request = Request::OpenArena { peer: 0, access: Access::ReadWrite };
    let arena = Reader(&scene.raw.ask(&request).1).u32().unwrap();
    for (first, count) in [(32768, 1), (32767, 2), (u32::MAX, 2), (0, 5000)] {
        scene.raw.refused(&Request::Grant { arena, first, count }, Errno::INVAL);
    }
    for other in (0..64).filter(|n| *n != arena) {
        scene.raw.refused(&Request::Grant { arena: other, first: 0, count: 1 }, Errno::NOENT);
    }
    scene.all_is_well();
}

#[test]
fn a_guest_is_no_toolstack() {
    let mut scene = Scene::start();
    let name = "more".to_owned();
    let all = [
        Request::CreateDomain { domid: None, kind: Kind::Guest, name },
        Request::DestroyDomain { domid: scene.domid + 1 },
        Request::ConnectDomain { domid: 0 },
        Request::ListDomains,
    ];
    for request in all {
        scene.raw.refused(&request, Errno::PERM);
    }
    scene.all_is_well();
}

#[test]
fn limits_hold_and_bound_descriptors() {
    let mut scene = Scene::start();
    let open = Request::Open { endpoint: Endpoint::Requests };
    let mut kept = Vec::new();
    let refused = (0..1000).find(|_| {
        let (status, _, fds) = scene.raw.ask(&open);
        kept.extend(fds);
        status == Errno::NOSPC.raw_os_error() as u32
    });
    assert!(refused.is_some_and(|n| n > 16), "connections: {refused:?}");
    let arena = Request::OpenArena { peer: 9, access: Access::ReadWrite };
    let refused = (0..1000).find(|_| scene.raw.ask(&arena).0 != 0);
    assert!(refused.is_some_and(|n| n > 4), "arenas: {refused:?}");
    let port = Request::AllocUnbound { peer: 0 };
    let refused = (0..10_000).find(|_| scene.raw.ask(&port).0 != 0);
    assert!(refused.is_some_and(|n| n > 64), "ports: {refused:?}");
    let buffer = Request::Buffer { len: 64 << 20 };
    let refused = (0..10_000).find(|_| scene.raw.ask(&buffer).0 != 0);
    assert_eq!(refused, Some(4));
    scene.all_is_well();
}

#[test]
fn who_does_not_read_is_not_listened_to() {
    let mut scene = Scene::start();
    let request = Request::Open { endpoint: Endpoint::Store }.encode();
    let start = Instant::now();
    let mut sent = 0;
    while start.elapsed() < Duration::from_millis(300) {
        match scene.raw.send(&request, &[]) {
            Ok(_) => sent += 1,
            Err(Errno::AGAIN) => std::thread::sleep(Duration::from_millis(1)),
            Err(e) => panic!("{e}"),
        }
    }
    assert!(sent < 5000, "{sent} requests were taken from a client that reads nothing");
    scene.all_is_well();
}

/// Requests that are well formed and mean nothing in particular.
struct Random(u64);

impl Random {
    fn next(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) % below
    }
    fn access(&mut self) -> Access {
        if self.next(2) == 0 { Access::ReadOnly } else { Access::ReadWrite }
    }
    fn refs(&mut self) -> Vec<u32> {
        (0..self.next(6)).map(|_| self.next(24) as u32).collect()
    }
    fn copy(&mut self) -> Copy {
        let (gref, offset, len) = (self.next(24) as u32, self.next(5000), self.next(9000));
        let at = if self.next(9) == 0 { u64::MAX } else { self.next(9000) };
        Copy { gref, offset: offset as u16, len: len as u16, at, access: self.access() }
    }
    fn transfer(&mut self, domid: u16) -> Move {
        let copy = self.copy();
        let source = match self.next(3) {
            0 => Source::Buffer(copy.at as usize),
            _ => {
                let (gref, offset) = (self.next(24) as u32, self.next(5000) as u16);
                Source::Page { domid, gref, offset }
            }
        };
        Move { source, gref: copy.gref, offset: copy.offset, len: copy.len }
    }
    fn request(&mut self, own: u16) -> Request {
        let domid = [0, own, own + 1, 99][self.next(4) as usize];
        let small = |r: &mut Random| r.next(5) as u32;
        match self.next(13) {
            12 => {
                let ops = (0..self.next(5)).map(|_| self.transfer(domid)).collect();
                Request::Transfer { domid: own, buffer: self.next(40), ops }
            }
            0 => Request::OpenArena { peer: domid, access: self.access() },
            1 => Request::SealArena { arena: small(self) },
            2 | 3 => {
                let (arena, first) = (small(self), self.next(32769) as u32);
                Request::Grant { arena, first, count: small(self) }
            }
            4 => Request::EndAccess { refs: self.refs() },
            5 => Request::AllocUnbound { peer: domid },
            6 => Request::Bind { domid, port: small(self) },
            7 => Request::Close { port: small(self) },
            8 => Request::Map { domid, access: self.access(), refs: self.refs() },
            9 => Request::Unmap { handle: self.next(40) },
            10 => Request::Buffer { len: 4096 * self.next(3) },
            _ => {
                let ops = (0..self.next(5)).map(|_| self.copy()).collect();
                Request::Copy { domid, buffer: self.next(40), ops }
            }
        }
    }
}

#[test]
fn any_requests_at_all_leave_the_hypervisor_whole() {
    let mut scene = Scene::start();
    scene.all_is_well();
    let mut done = [0; 2];
    for seed in 0..3 {
        let mut random = Random(seed);
        for _ in 0..3000 {
            let request = random.request(scene.domid);
            let (status, _, _) = scene.raw.ask(&request);
            done[usize::from(status == 0)] += 1;
        }
        scene.all_is_well();
    }
    assert!(done.iter().all(|n| *n > 1000), "refused and done: {done:?}");
    // What it maps and copies of its own counts as in use: it all goes with the domain.
    let (domid, toolstack) = (scene.domid, scene.rig.toolstack());
    toolstack.destroy_domain(domid).unwrap();
    assert!(!toolstack.domains().unwrap().contains(&domid));
    scene.all_is_well();
}

#[test]
fn a_guest_that_fills_pipes_or_changes_its_flags_hangs_nobody() {
    let mut scene = Scene::start();
    let mut backend = scene.rig.backend();
    let (_, body, fds) = scene.raw.ask(&Request::AllocUnbound { peer: 0 });
    let port = Reader(&body).u32().unwrap();
    let domid = scene.domid;
    backend.ask(&format!("bind {domid} {port}"));
    let (read, write) = (&fds[0], &fds[1]);
    while rustix::io::write(write, &[1; 1024]).is_ok() {}
    assert_eq!(backend.ask("ack 0"), "true");
    assert_eq!(backend.ask("ack 0"), "false");
    // The guest makes its own ends blocking and its pipes larger, and reads nothing.
    for fd in [read, write] {
        rustix::fs::fcntl_setfl(fd, OFlags::empty()).unwrap();
    }
    rustix::pipe::fcntl_setpipe_size(read, 1 << 16).unwrap();
    backend.ask("notify 0 100000");
    assert_eq!(backend.ask("ack 0"), "false");
    // It reads its own events away, and writes into its own pipe.
    let stolen = std::fs::File::options().read(true).open(proc_path(write)).unwrap();
    drop(stolen);
    backend.ask("unbind 0");
    backend.ask(&format!("bind {domid} {port}"));
    assert_eq!(backend.ask("ack 0"), "true");
    scene.all_is_well();
}

fn proc_path(fd: &OwnedFd) -> String {
    use std::os::fd::AsRawFd;
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

#[test]
fn broken_store_messages_end_the_connection() {
    let mut scene = Scene::start();
    let header = |len: u32| [2u32, 0, 0, len].map(u32::to_le_bytes).concat();
    let open = || UnixStream::connect(scene.rig.store_socket()).unwrap();
    // Cut off in the header and in the payload.
    open().write_all(&header(5)[..7]).unwrap();
    open().write_all(&[&header(5)[..], b"/x"].concat()).unwrap();
    // Longer than any payload.
    let mut long = open();
    long.write_all(&header(4097)).unwrap();
    long.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
    assert_eq!(long.read(&mut [0; 16]).unwrap(), 0, "a payload too long was taken");
    // Byte by byte is fine.
    let mut slow = open();
    for byte in [&header(2)[..], b"/\0"].concat() {
        slow.write_all(&[byte]).unwrap();
    }
    let mut reply = [0; 16];
    slow.read_exact(&mut reply).unwrap();
    assert_eq!(reply[..4], 2u32.to_le_bytes());
    scene.all_is_well();
}

#[test]
fn a_store_client_that_does_not_read_is_not_listened_to() {
    let mut scene = Scene::start();
    let toolstack = scene.rig.toolstack();
    let store = toolstack.store().unwrap();
    store.write(Tx::NONE, "/big", [1u8; 4000]).unwrap();
    let mut deaf = UnixStream::connect(scene.rig.store_socket()).unwrap();
    deaf.set_nonblocking(true).unwrap();
    let read = [[2u32, 0, 0, 5].map(u32::to_le_bytes).concat(), b"/big\0".to_vec()].concat();
    let start = Instant::now();
    let mut sent = 0;
    while start.elapsed() < Duration::from_millis(300) {
        match deaf.write(&read) {
            Ok(n) => sent += n,
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
    }
    assert!(sent < 2 << 20, "{sent} bytes were taken from a client that reads nothing");
    // Events for it pile up to a limit, and the others go on.
    store.write(Tx::NONE, "/big", "small").unwrap();
    scene.all_is_well();
}
