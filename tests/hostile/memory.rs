//! A guest without our library: it has the descriptors in its own hands.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use blkback::proto::{RSP_ERROR, RSP_OKAY};
use hypervisor::Access;
use hypervisor::embedded::message::{MAX_FDS, MAX_MESSAGE, Reader, Request};
use hypervisor::xenbus::State;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use rustix::pipe::PipeFlags;

use crate::guest::{PERSISTENT, PLAIN, at, read, readable, whole, write};
use crate::image::patterned;
use crate::rig::{Rig, until};
use crate::scene::{BAD, Scene};

/// Speaks the bundled hypervisor's protocol itself.
pub struct RawGuest(OwnedFd);

/// An arena with its descriptor.
pub struct Arena {
    pub id: u32,
    pub fd: OwnedFd,
}

impl Arena {
    /// Writes into a page.
    pub fn write(&self, page: u64, data: &[u8]) {
        assert_eq!(rustix::io::pwrite(&self.fd, data, page * 4096), Ok(data.len()));
    }
    pub fn read(&self, page: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        assert_eq!(rustix::io::pread(&self.fd, &mut data, page * 4096), Ok(len));
        data
    }
}

impl RawGuest {
    /// One more connection of a domain.
    pub fn of(rig: &Rig, domid: u16) -> RawGuest {
        RawGuest(rig.toolstack.connect_domain(domid).unwrap())
    }
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
        assert!(readable(self.0.as_fd(), 10_000), "no answer from the hypervisor");
        let mut body = vec![0; MAX_MESSAGE];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut iov = [IoSliceMut::new(&mut body)];
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let got = rustix::net::recvmsg(&self.0, &mut iov, &mut control, flags).ok()?;
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
    fn ask(&self, request: &Request) -> (Vec<u8>, Vec<OwnedFd>) {
        self.send(&request.encode(), &[]).unwrap();
        let (status, body, fds) = self.receive().expect("the connection was closed");
        assert_eq!(status, 0, "{request:?}");
        (body, fds)
    }
    pub fn open_arena(&self, peer: u16, access: Access) -> Arena {
        let (body, mut fds) = self.ask(&Request::OpenArena { peer, access });
        Arena { id: Reader(&body).u32().unwrap(), fd: fds.remove(0) }
    }
    /// Grants pages of an arena.
    pub fn grant(&self, arena: &Arena, first: u32, count: u32) -> Vec<u32> {
        let (body, _) = self.ask(&Request::Grant { arena: arena.id, first, count });
        let mut fields = Reader(&body);
        (0..count).map(|_| fields.u32().unwrap()).collect()
    }
    /// Ends access; for each reference 0, or why it cannot end.
    pub fn end_access(&self, refs: &[u32]) -> Vec<u16> {
        let (body, _) = self.ask(&Request::EndAccess { refs: refs.to_vec() });
        let mut fields = Reader(&body);
        refs.iter().map(|_| fields.u16().unwrap()).collect()
    }
    /// A port for domain 0: its number, and the ends to read and to write.
    fn alloc_unbound(&self) -> (u32, OwnedFd, OwnedFd) {
        let (body, mut fds) = self.ask(&Request::AllocUnbound { peer: 0 });
        (Reader(&body).u32().unwrap(), fds.remove(0), fds.remove(0))
    }
}

/// Pages of the payload and of the ring are punched out under the backend.
#[test]
fn a_guest_punches_its_memory_and_cannot_truncate_it() {
    for wish in [PLAIN, PERSISTENT] {
        let mut scene = Scene::start();
        let mut queue = scene.connect(wish);
        let raw = RawGuest::of(&scene.rig, scene.domain.id);
        let arena = raw.open_arena(0, Access::ReadWrite);
        let refs = raw.grant(&arena, 0, 8);
        let segments: Vec<_> = refs.iter().map(|r| whole(*r)).collect();
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        scene.during(|| {
            for round in 0..50 {
                arena.write(0, &[round | 1; 8 * 4096]);
                assert_eq!(queue.ask(write(80, &segments)), RSP_OKAY);
                rustix::fs::fallocate(&arena.fd, hole, 0, 8 * 4096).unwrap();
                assert_eq!(rustix::fs::ftruncate(&arena.fd, 0), Err(Errno::PERM));
                // Zeroes, but no harm.
                assert_eq!(queue.ask(write(80, &segments)), RSP_OKAY);
                assert_eq!(queue.ask(read(0, &segments)), RSP_OKAY);
                assert!(arena.read(0, 8 * 4096) == scene.image.model()[..8 * 4096]);
                // Again, with requests in flight.
                for _ in 0..8 {
                    queue.push(read(8, &segments));
                }
                queue.publish();
                rustix::fs::fallocate(&arena.fd, hole, 0, 8 * 4096).unwrap();
                (0..8).for_each(|_| assert_eq!(queue.answer().status, RSP_OKAY));
            }
        });
        scene.image.wrote(80 * 512, &[0; 8 * 4096]);
        drop(queue);
        scene.finish();
    }
}

/// The ring's page itself vanishes: all its words are 0 of a sudden.
#[test]
fn a_guest_punches_its_ring() {
    let scene = Scene::start();
    let raw = RawGuest::of(&scene.rig, scene.domain.id);
    let arena = raw.open_arena(0, Access::ReadWrite);
    let ring = raw.grant(&arena, 5, 1)[0];
    let (port, _read, events) = raw.alloc_unbound();
    arena.write(5, &[0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]);
    let connect = || {
        scene.wait(State::InitWait);
        scene.domain.set(BAD, "ring-ref", &ring.to_string());
        scene.domain.set(BAD, "event-channel", &port.to_string());
        scene.domain.set_state(BAD, State::Initialised);
        scene.wait(State::Connected);
    };
    connect();
    let notify = || rustix::io::write(&events, &[1]).unwrap();
    scene.during(|| {
        // Seven requests of zeroed slots: reads without segments.
        arena.write(5, &7u32.to_le_bytes());
        notify();
        until("7 answers", || arena.read(5, 12)[8] == 7);
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&arena.fd, hole, 5 * 4096, 4096).unwrap();
        notify();
        scene.fails_with("{}.0: corrupt blkif ring: req_prod is 0, possible is 7 to 39");
    });
    assert_eq!(raw.end_access(&[ring]), [0], "the ring of a failed device is still mapped");
    scene.finish();
}

/// The pipe of an event channel is full in both directions.
#[test]
fn a_guest_that_fills_its_pipes() {
    let scene = Scene::start();
    let mut queue = scene.connect(PLAIN);
    let page = scene.domain.pages(1);
    let segment = [whole(page.refs()[0])];
    scene.during(|| {
        for _ in 0..100_000 {
            queue.channel.notify().unwrap();
        }
        assert_eq!(queue.ask(read(0, &segment)), RSP_OKAY);
        // It asks for an event for each response and takes none: more than a pipe holds.
        for n in 0..6000u32 {
            queue.memory.word(at::RSP_EVENT).store(n + 2, std::sync::atomic::Ordering::SeqCst);
            let id = queue.send(read(0, &[]));
            let answer = loop {
                match queue.ring.take().unwrap() {
                    Some(raw) => break raw,
                    None => std::thread::yield_now(),
                }
            };
            assert_eq!((answer.id.get(), answer.status.get()), (id, RSP_ERROR));
        }
        assert_eq!(queue.ask(read(0, &segment)), RSP_OKAY);
    });
    drop((queue, page));
    scene.finish();
}

/// The guest's end of a channel is closed under a connected device.
#[test]
fn a_guest_that_closes_its_end_of_a_channel() {
    let scene = Scene::start();
    let mut queue = scene.connect(PERSISTENT);
    let page = scene.domain.pages(1);
    assert_eq!(queue.ask(read(0, &[whole(page.refs()[0])])), RSP_OKAY);
    scene.during(|| {
        drop(queue);
        scene.fails_with("{}.0: event channel: broken pipe");
    });
    let mut queue = scene.again(PLAIN);
    assert_eq!(queue.ask(read(0, &[whole(page.refs()[0])])), RSP_OKAY);
    drop((queue, page));
    scene.finish();
}

/// Descriptors are nothing that anybody asked for: pipes, files and sockets by the hundred.
#[test]
fn a_guest_that_sends_descriptors() {
    let scene = Scene::start();
    let mut queue = scene.connect(PLAIN);
    let page = scene.domain.pages(1);
    let raw = RawGuest::of(&scene.rig, scene.domain.id);
    let (ours, theirs) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).unwrap();
    scene.during(|| {
        for n in 0..200 {
            let fds =
                [theirs.try_clone().unwrap(), std::fs::File::open("/dev/null").unwrap().into()];
            let requests = [
                Request::Hello,
                Request::OpenArena { peer: 0, access: Access::ReadWrite },
                Request::EndAccess { refs: vec![n] },
                Request::Map { domid: 0, access: Access::ReadWrite, refs: vec![n] },
            ];
            raw.send(&requests[n as usize % 4].encode(), &fds).unwrap();
            let _ = raw.receive().expect("an answer, whatever it is");
        }
        assert_eq!(queue.ask(read(0, &[whole(page.refs()[0])])), RSP_OKAY);
    });
    drop(theirs);
    assert!(readable(ours.as_fd(), 5000), "somebody keeps a descriptor");
    let data = patterned(7, 4096);
    let mut found = vec![0; 4096];
    page.read(0, &mut found);
    assert!(found == data);
    drop((queue, page));
    scene.finish();
}
