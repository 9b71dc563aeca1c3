//! Guests whose process is killed in mid-I/O.

use std::os::fd::AsFd;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use blkback::proto::{RSP_OKAY, Segment};
use hypervisor::Guest;
use hypervisor::xenbus::State;

use crate::guest::{Domain, PERSISTENT, Wish, read, whole, write};
use crate::image::Image;
use crate::lifetime::gone;
use crate::process::Process;
use crate::rig::{PATIENCE, Rig, in_role, until};
use crate::scene::{GOOD, Scene};

/// A guest's process: connects its device and does I/O until it is killed. Its domain's
/// connection is its standard input.
pub fn guest() -> ! {
    let connection = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    // Another copy would keep the domain alive.
    rustix::stdio::dup2_stdin(std::fs::File::open("/dev/null").unwrap()).unwrap();
    let domain = Domain::of(0, connection);
    let backend = format!("/local/domain/0/backend/vbd/{}/{GOOD}/state", domain.guest.domid());
    let wait = |state: State| {
        let is = || domain.store.get(&backend).unwrap().map(|s| State::parse(&s)) == Some(state);
        until("the backend's state", is);
    };
    wait(State::InitWait);
    let mut queue = domain.prepare(GOOD, Wish { order: 2, ..PERSISTENT }).remove(0);
    domain.set_state(GOOD, State::Initialised);
    wait(State::Connected);
    domain.set_state(GOOD, State::Connected);
    // Half of the pages to write from, half to read into.
    let pages = domain.pages(16);
    pages.write(0, &[0x55; 8 * 4096]);
    let segments: Vec<Segment> = pages.refs().iter().map(|r| whole(*r)).collect();
    let (from, into) = segments.split_at(8);
    for n in 0u64.. {
        let sector = n % 16 * 64;
        queue.push(if n % 2 == 0 { write(sector, from) } else { read(1024, into) });
        queue.publish();
        if queue.ring.free() < 64 {
            assert_eq!(queue.answer().status, RSP_OKAY);
        }
    }
    std::process::exit(0)
}

/// A domain with a disk, a process that acts as it, and its I/O well under way.
fn busy(rig: &Rig) -> (u16, Child, Image) {
    let domid = rig.bare_domain("doomed");
    let image = rig.image("doomed.img", 1 << 20);
    rig.attach(domid, GOOD, image.path(), "");
    let connection = rig.toolstack.connect_domain(domid).unwrap();
    let child = in_role("guest", &rig.run_dir(), Stdio::from(connection));
    until("its I/O arrives", || image.verify().is_err());
    (domid, child, image)
}

#[test]
fn a_guest_killed_in_mid_io_leaves_nothing() {
    let scene = Scene::start();
    for _ in 0..5 {
        let (domid, mut child, image) = busy(&scene.rig);
        scene.during(|| {
            child.kill().unwrap();
            child.wait().unwrap();
            let start = Instant::now();
            gone(&scene, domid);
            eprintln!("gone after {:?}", start.elapsed());
        });
        // Only what it wrote is written: its 16 places, each with 8 pages of one byte.
        image.verify_but(0..16 * 64 * 512).unwrap();
        let written = image.bytes(0..16 * 64 * 512);
        for (n, sector) in written.chunks(512).enumerate() {
            let was = sector == &image.model()[n * 512..][..512];
            assert!(was || sector == [0x55; 512], "sector {n}");
        }
    }
    scene.finish();
}

/// A backend for one guest ends with it, by itself and in order.
#[test]
fn a_backend_of_one_guest_ends_with_it() {
    let mut rig = Rig::start(&["--domid", "1"]);
    let (domid, mut child, _image) = busy(&rig);
    assert_eq!(domid, 1);
    child.kill().unwrap();
    child.wait().unwrap();
    let start = Instant::now();
    let status = loop {
        if let Some(status) = rig.backend.try_wait().unwrap() {
            break status;
        }
        assert!(start.elapsed() < PATIENCE, "the backend goes on without its guest");
        std::thread::sleep(Duration::from_millis(5));
    };
    assert!(status.success(), "{status}: {}", rig.log());
    assert!(!Process(child.id()).runs());
    assert_eq!(rig.state(domid, GOOD), None);
}
