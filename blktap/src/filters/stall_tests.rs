//! What stops a disk, and how it goes on.
use super::*;
use crate::filters::FaultyDisk;
use crate::{MemDisk, blocking};

const SIZE: usize = 1 << 20;

struct Scene {
    memory: Arc<MemDisk>,
    stall: Arc<Stall>,
    disk: Arc<StallDisk>,
}

fn scene(faults: &str, policies: Policies) -> Scene {
    let memory = MemDisk::new(SIZE);
    let below = FaultyDisk::new(memory.clone(), faults.parse().expect("faults"));
    let stall = Stall::new("disk".into(), policies);
    Scene { memory, stall: Arc::clone(&stall), disk: StallDisk::new(below, stall) }
}

fn errno(result: io::Result<()>) -> i32 {
    result.err().map_or(0, |e| e.raw_os_error().expect("an errno"))
}

fn until(what: &str, is: impl Fn() -> bool) {
    let end = std::time::Instant::now() + Duration::from_secs(10);
    while !is() {
        assert!(std::time::Instant::now() < end, "{what}");
        std::thread::yield_now();
    }
}

#[test]
fn policies_tell_errors_apart() {
    let all = Policies { on_error: Policy::Pause, on_enospc: Policy::Pause };
    for errno in [libc::EINVAL, libc::EROFS, libc::EOPNOTSUPP] {
        assert_eq!(all.of(errno), Policy::Report);
    }
    let usual = Policies::default();
    let of = [libc::EIO, libc::ENOSPC, libc::EDQUOT].map(|errno| usual.of(errno));
    assert_eq!(of, [Policy::Report, Policy::Pause, Policy::Pause]);
}

#[test]
fn a_full_disk_stands_and_what_failed_is_tried_again() {
    let Scene { memory, stall, disk } = scene("write:ENOSPC:nth=2", Policies::default());
    let mut queue = disk.queue(4).expect("a queue");
    let writer = std::thread::spawn(move || {
        for n in 0..8 {
            blocking::write_at(&mut *queue, n * 512, &[n as u8 + 1; 512]).expect("no error");
        }
    });
    until("it stands", || stall.stands());
    assert_eq!(stall.standing(), Some(Standing { errno: libc::ENOSPC, requests: 1 }));
    // Another queue waits too, though what it wants would not fail.
    let mut other = disk.queue(1).expect("a queue");
    let reader = std::thread::spawn(move || {
        let mut bytes = [0; 512];
        blocking::read_at(&mut *other, 512, &mut bytes).map(|()| bytes[0])
    });
    std::thread::sleep(Duration::from_millis(50));
    assert!(!writer.is_finished() && !reader.is_finished(), "it goes on by itself");
    assert!(memory.with_bytes(|b| b[512..].iter().all(|b| *b == 0)));
    assert!(stall.go_on());
    writer.join().expect("the writer");
    reader.join().expect("the reader").expect("no error");
    assert!(memory.with_bytes(|b| (0..4096).all(|at| b[at] as usize == at / 512 + 1)));
    assert!(!stall.go_on(), "it stood no more");
}

#[test]
fn an_error_that_lasts_stops_it_again_until_it_may_be_reported() {
    let policies = Policies { on_error: Policy::Pause, on_enospc: Policy::Report };
    let Scene { stall, disk, .. } = scene("read:EIO+write:ENOSPC", policies);
    let mut queue = disk.queue(4).expect("a queue");
    let full = blocking::write_at(&mut *queue, 0, &[1; 512]);
    assert_eq!((errno(full), stall.standing()), (libc::ENOSPC, None));
    let reader =
        std::thread::spawn(move || errno(blocking::read_at(&mut *queue, 0, &mut [0; 512])));
    for _ in 0..3 {
        until("it stands", || stall.stands());
        assert!(stall.go_on());
    }
    until("it stands", || stall.stands());
    stall.set(Policies { on_error: Policy::Report, ..policies });
    stall.go_on();
    assert_eq!(reader.join().expect("the reader"), libc::EIO);
}

#[test]
fn a_queue_that_ends_gets_its_errors() {
    let Scene { memory, stall, disk } = scene("write:ENOSPC:at=0-512", Policies::default());
    let mut queue = disk.queue(4).expect("a queue");
    let bytes = [7_u8; 512];
    let mut done = Vec::new();
    for token in 0..2_u64 {
        // SAFETY: they are written from, and outlive the queue.
        #[allow(unsafe_code)]
        let bufs = [unsafe { IoBuf::new(bytes.as_ptr().cast_mut(), 512) }];
        let request = Request { op: Op::Write, offset: token * 512, len: 512, bufs: &bufs, token };
        queue.submit(&request).expect("room");
        queue.poll(&mut done).expect("a poll");
    }
    assert!(stall.stands() && done.is_empty() && queue.in_flight() == 2);
    queue.hurry();
    while queue.in_flight() > 0 {
        queue.wait(&[], None).expect("a wait");
        queue.poll(&mut done).expect("a poll");
    }
    done.sort_by_key(|d| d.token);
    let errors: Vec<i32> = done.iter().map(|d| d.errno).collect();
    assert_eq!(errors, [libc::ENOSPC, 0]);
    assert!(memory.with_bytes(|b| b[512] == 7));
}
