use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::thread;

use super::*;

const MODES: [RingMode; 3] = [RingMode::Deferred, RingMode::Cooperative, RingMode::Plain];

fn engine_on(file: File, depth: u32, newest: RingMode) -> Engine {
    let file = EngineFile {
        file: Arc::new(file),
        kind: FileKind::Regular,
        memory_align: 1,
        length_align: 1,
        past_end: PastEnd::Error,
        sync_failed: Arc::default(),
    };
    Engine::new(EngineConfig { depth, files: vec![file], newest }).expect("io_uring")
}

fn transfer(op: EngineOp, offset: u64, bufs: &[IoBuf], token: u64) -> Transfer<'_> {
    let len = bufs.iter().map(|b| b.len() as u64).sum();
    Transfer { file: 0, op, offset, len, bufs, token }
}

fn buf(bytes: &mut [u8]) -> IoBuf {
    // SAFETY: tests keep the bytes until the request is done.
    unsafe { IoBuf::new(bytes.as_mut_ptr(), bytes.len()) }
}

fn pipe() -> (File, File) {
    let (r, w) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).expect("a pipe");
    (File::from(r), File::from(w))
}

/// An fd that a read blocks on: reads from it are in flight until the other end writes.
fn slow() -> (File, File) {
    pipe()
}

#[test]
fn every_mode_is_what_was_asked_for_at_most() {
    for newest in MODES {
        let engine = engine_on(tempfile::tempfile().expect("a file"), 4, newest);
        assert!(engine.mode() <= newest, "{:?}", engine.mode());
    }
    assert!(doctor().expect("io_uring").starts_with("works"));
    for depth in [0, MAX_DEPTH + 1] {
        let config = EngineConfig { depth, files: Vec::new(), newest: RingMode::Deferred };
        assert_eq!(Engine::new(config).map(drop), Err(SetupError::Depth(depth)));
    }
}

#[test]
fn a_batch_is_one_enter() {
    for mode in MODES {
        let file = tempfile::tempfile().expect("a file");
        file.write_all_at(&[5; 32 * 512], 0).expect("fill");
        let mut engine = engine_on(file, 32, mode);
        let mut memory = vec![0u8; 32 * 512];
        for (n, part) in memory.chunks_mut(512).enumerate() {
            let bufs = [buf(part)];
            let t = transfer(EngineOp::Read, n as u64 * 512, &bufs, n as u64);
            assert_eq!(engine.start(&t), Ok(()));
        }
        assert_eq!(engine.counters().enters.get(), 0, "taking is no system call");
        engine.submit().expect("submit");
        assert_eq!(engine.counters().enters.get(), 1);
        let mut done = Vec::new();
        // Cached: all done at once, and to see that needs no second call.
        engine.poll(&mut done).expect("poll");
        assert_eq!((done.len(), engine.counters().enters.get()), (32, 1), "{mode:?}");
        assert!(memory.iter().all(|b| *b == 5));
        engine.poll(&mut done).expect("poll");
        assert_eq!(engine.counters().enters.get(), 1, "nothing taken, nothing called");
    }
}

#[test]
fn a_wait_sees_descriptors_as_long_as_they_are_readable() {
    for mode in MODES {
        let mut engine = engine_on(tempfile::tempfile().expect("a file"), 4, mode);
        let ((mut r1, mut w1), (mut r2, mut w2)) = (pipe(), pipe());
        let short = Some(Duration::from_millis(20));
        let mut byte = [0u8; 1];
        assert_eq!(engine.wait(&[r1.as_fd(), r2.as_fd()], short).expect("wait"), 0);
        w2.write_all(b"x").expect("write");
        assert_eq!(engine.wait(&[r1.as_fd(), r2.as_fd()], None).expect("wait"), 2);
        assert_eq!(engine.wait(&[r1.as_fd(), r2.as_fd()], None).expect("wait"), 2, "still");
        // Another set, another position.
        assert_eq!(engine.wait(&[r2.as_fd()], None).expect("wait"), 1);
        assert_eq!(engine.wait(&[r1.as_fd()], short).expect("wait"), 0, "not in this set");
        r2.read_exact(&mut byte).expect("read");
        assert_eq!(engine.wait(&[r1.as_fd(), r2.as_fd()], short).expect("wait"), 0, "stale");
        w1.write_all(b"x").expect("write");
        w2.write_all(b"x").expect("write");
        assert_eq!(engine.wait(&[r1.as_fd(), r2.as_fd()], None).expect("wait"), 3);
        r1.read_exact(&mut byte).expect("read");
        r2.read_exact(&mut byte).expect("read");
        drop(w1);
        assert_eq!(engine.wait(&[r1.as_fd(), r2.as_fd()], None).expect("wait"), 1, "hang-up");
    }
}

#[test]
fn one_enter_sends_and_waits_for_both() {
    let file = tempfile::tempfile().expect("a file");
    file.set_len(4096).expect("size");
    let mut engine = engine_on(file, 4, RingMode::Deferred);
    let (r, _w) = pipe();
    let mut memory = [0u8; 512];
    let bufs = [buf(&mut memory)];
    engine.start(&transfer(EngineOp::Read, 0, &bufs, 1)).expect("room");
    assert_eq!(engine.wait(&[r.as_fd()], None).expect("wait"), 0);
    assert_eq!(engine.counters().enters.get(), 1);
    let mut done = Vec::new();
    engine.poll(&mut done).expect("poll");
    assert_eq!(done, [Done { token: 1, errno: 0 }]);
}

#[test]
fn a_wait_for_nothing_returns_and_a_timeout_keeps_its_time() {
    for mode in MODES {
        let mut engine = engine_on(tempfile::tempfile().expect("a file"), 4, mode);
        assert_eq!(engine.wait(&[], None).expect("wait"), 0);
        let (r, _w) = pipe();
        let start = Instant::now();
        let limit = Duration::from_millis(50);
        assert_eq!(engine.wait(&[r.as_fd()], Some(limit)).expect("wait"), 0);
        assert!(start.elapsed() >= limit && start.elapsed() < limit * 10, "{mode:?}");
        let zero = Instant::now();
        assert_eq!(engine.wait(&[r.as_fd()], Some(Duration::ZERO)).expect("wait"), 0);
        assert!(zero.elapsed() < limit);
    }
}

#[test]
fn without_timeouts_in_enter_poll_keeps_the_time() {
    let (r, mut w) = slow();
    let mut engine = engine_on(r, 2, RingMode::Plain);
    let mut memory = [0u8; 4];
    let bufs = [buf(&mut memory)];
    engine.start(&transfer(EngineOp::Read, 0, &bufs, 1)).expect("room");
    engine.wait(&[], Some(Duration::ZERO)).expect("enabled");
    let limit = Duration::from_millis(30);
    let start = Instant::now();
    assert!(engine.enter_then_poll(limit).expect("poll") == Woken::Timeout);
    assert!(start.elapsed() >= limit);
    w.write_all(b"here").expect("write");
    assert!(engine.enter_then_poll(limit).expect("poll") == Woken::Event);
    let mut done = Vec::new();
    engine.poll(&mut done).expect("poll");
    assert_eq!((done[0].errno, &memory), (0, b"here"));
}

#[test]
fn a_timeout_beyond_all_clocks_is_as_good_as_none() {
    let mut engine = engine_on(tempfile::tempfile().expect("a file"), 2, RingMode::Deferred);
    let (r, mut w) = pipe();
    w.write_all(b"x").expect("write");
    assert_eq!(engine.wait(&[r.as_fd()], Some(Duration::MAX)).expect("wait"), 1);
}

#[test]
fn an_unwatched_descriptor_is_let_go_and_its_number_can_be_used_again() {
    for mode in MODES {
        let mut engine = engine_on(tempfile::tempfile().expect("a file"), 4, mode);
        let (r, w) = pipe();
        let number = r.as_raw_fd();
        let short = Some(Duration::from_millis(5));
        assert_eq!(engine.wait(&[r.as_fd()], short).expect("wait"), 0);
        engine.unwatch().expect("unwatch");
        drop(r);
        // With no reader left, a write fails: the engine does not hold the read end.
        let broken = (&w).write(b"x").expect_err("nobody reads");
        assert_eq!(broken.kind(), io::ErrorKind::BrokenPipe, "{mode:?}");
        let (r, mut w) = pipe();
        let r = rustix::io::fcntl_dupfd_cloexec(&r, number).expect("dup");
        w.write_all(b"x").expect("write");
        assert_eq!(engine.wait(&[r.as_fd()], short).expect("wait"), 1, "{mode:?}");
    }
}

#[test]
fn more_descriptors_than_it_remembers_are_still_all_watched() {
    let mut engine = engine_on(tempfile::tempfile().expect("a file"), 1, RingMode::Deferred);
    let pipes: Vec<_> = (0..100).map(|_| pipe()).collect();
    let short = Some(Duration::from_millis(1));
    for part in pipes.chunks(40) {
        let fds: Vec<_> = part.iter().map(|(r, _)| r.as_fd()).collect();
        assert_eq!(engine.wait(&fds, short).expect("wait"), 0);
    }
    (&pipes[3].1).write_all(b"x").expect("write");
    let fds: Vec<_> = pipes[..64].iter().map(|(r, _)| r.as_fd()).collect();
    assert_eq!(engine.wait(&fds, None).expect("wait"), 8);
    let all: Vec<_> = pipes.iter().map(|(r, _)| r.as_fd()).collect();
    let refused = engine.wait(&all, short).expect_err("too many");
    assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
}

#[test]
fn dropping_drains_what_is_in_flight() {
    for mode in MODES {
        let (r, mut w) = slow();
        let mut engine = engine_on(r, 2, mode);
        let mut memory = [0u8; 4];
        let bufs = [buf(&mut memory)];
        engine.start(&transfer(EngineOp::Read, 0, &bufs, 1)).expect("room");
        engine.submit().expect("submit");
        let writer = thread::spawn(move || {
            thread::sleep(Duration::from_millis(50));
            w.write_all(b"late").expect("write");
        });
        drop(engine);
        assert_eq!(&memory, b"late", "{mode:?}: dropped before the read was done");
        writer.join().expect("writer");
    }
}

#[test]
fn dropping_carries_out_what_was_only_taken() {
    let file = tempfile::tempfile().expect("a file");
    let seen = file.try_clone().expect("dup");
    let mut engine = engine_on(file, 2, RingMode::Deferred);
    let mut memory = *b"sent";
    let bufs = [buf(&mut memory)];
    let op = EngineOp::Write(Durability::Volatile);
    engine.start(&transfer(op, 0, &bufs, 1)).expect("room");
    drop(engine);
    let mut back = [0u8; 4];
    seen.read_exact_at(&mut back, 0).expect("read");
    assert_eq!(&back, b"sent");
}

#[test]
fn dropping_on_another_thread_waits_until_no_buffer_is_in_use() {
    for mode in MODES {
        let (r, mut w) = slow();
        let mut engine = engine_on(r, 2, mode);
        let mut memory = vec![0u8; 4];
        let bufs = [buf(&mut memory)];
        // Owned by another thread, which is gone when the engine is dropped.
        let engine = thread::spawn(move || {
            engine.start(&transfer(EngineOp::Read, 0, &bufs, 1)).expect("room");
            engine.submit().expect("submit");
            engine
        })
        .join()
        .expect("owner");
        let writer = thread::spawn(move || {
            thread::sleep(Duration::from_millis(100));
            let _ = w.write_all(b"late");
        });
        drop(engine);
        let after = memory.clone();
        writer.join().expect("writer");
        thread::sleep(Duration::from_millis(20));
        assert_eq!(memory, after, "{mode:?}: written after the drop");
    }
}

#[test]
fn another_thread_is_told_whose_queue_it_is() {
    let mut engine = engine_on(tempfile::tempfile().expect("a file"), 2, RingMode::Deferred);
    if engine.mode() != RingMode::Deferred {
        return;
    }
    engine.start(&transfer(EngineOp::Sync, 0, &[], 1)).expect("room");
    engine.submit().expect("submit");
    let error = thread::spawn(move || {
        engine.start(&transfer(EngineOp::Sync, 0, &[], 2)).expect("room");
        engine.submit().expect_err("not its thread").to_string()
    });
    assert!(error.join().expect("thread").contains("belongs to the thread"));
}

#[test]
fn dropping_lets_go_of_the_file_at_once() {
    for mode in MODES {
        let (r, w) = slow();
        let mut engine = engine_on(r, 2, mode);
        let (watched, writer) = pipe();
        let short = Some(Duration::from_millis(1));
        assert_eq!(engine.wait(&[watched.as_fd()], short).expect("wait"), 0);
        let start = Instant::now();
        drop((engine, watched));
        let took = start.elapsed();
        for mut end in [w, writer] {
            let broken = end.write(b"x").expect_err("nobody reads");
            assert_eq!(broken.kind(), io::ErrorKind::BrokenPipe, "{mode:?}");
        }
        assert!(took < Duration::from_secs(1), "{took:?}");
    }
}

#[test]
fn short_reads_go_on_where_they_stopped() {
    for mode in MODES {
        let (r, mut w) = slow();
        let mut engine = engine_on(r, 2, mode);
        let mut memory = [0u8; 12];
        let (a, b) = memory.split_at_mut(6);
        // Two segments that are not neighbours, filled in three pieces.
        let bufs = [buf(&mut b[..5]), buf(a)];
        engine.start(&transfer(EngineOp::Read, 0, &bufs, 1)).expect("room");
        let mut done = Vec::new();
        for piece in ["abc", "defgh", "ijk"] {
            assert!(done.is_empty());
            w.write_all(piece.as_bytes()).expect("write");
            engine.wait(&[], Some(Duration::from_millis(20))).expect("wait");
            engine.poll(&mut done).expect("poll");
        }
        assert_eq!(done, [Done { token: 1, errno: 0 }]);
        assert_eq!(&memory, b"fghijkabcde\0");
        assert_eq!(engine.counters().resumed.get(), 2);
    }
}

/// Replaces the one completion that is there by another result.
fn replace_completion(engine: &mut Engine, res: i32) {
    let cqe = engine.ring.completion().next().expect("a completion");
    let mut sq = engine.ring.submission();
    engine.ops.complete(cqe.user_data() as u32, res, &mut sq, &engine.counters);
}

#[test]
fn again_and_interrupted_are_tried_again_up_to_a_limit() {
    for errno in [libc::EAGAIN, libc::EINTR] {
        let file = tempfile::tempfile().expect("a file");
        file.write_all_at(b"here", 0).expect("fill");
        let mut engine = engine_on(file, 2, RingMode::Deferred);
        let mut memory = [0u8; 4];
        let bufs = [buf(&mut memory)];
        engine.start(&transfer(EngineOp::Read, 0, &bufs, 1)).expect("room");
        let mut done = Vec::new();
        engine.enter(1, None).expect("enter");
        replace_completion(&mut engine, -errno);
        while done.is_empty() {
            engine.wait(&[], None).expect("wait");
            engine.poll(&mut done).expect("poll");
        }
        assert_eq!((done[0], &memory), (Done { token: 1, errno: 0 }, b"here"));
        assert_eq!(engine.counters().retried.get(), 1);

        engine.start(&transfer(EngineOp::Read, 0, &bufs, 2)).expect("room");
        let mut tries = 0;
        while engine.ops.busy() > 0 {
            engine.enter(1, None).expect("enter");
            replace_completion(&mut engine, -errno);
            tries += 1;
        }
        assert_eq!(tries, 101);
        engine.poll(&mut done).expect("poll");
        assert_eq!(done[1], Done { token: 2, errno });
    }
}

#[test]
fn zeroing_falls_back_to_writing() {
    let file = tempfile::tempfile().expect("a file");
    file.write_all_at(&[1; 300_000], 0).expect("fill");
    let seen = file.try_clone().expect("dup");
    let mut engine = engine_on(file, 2, RingMode::Deferred);
    engine.ops.files[0].1 = ops::ZeroMethod::Write;
    let t = Transfer { len: 200_000, ..transfer(EngineOp::Zero, 50_000, &[], 1) };
    engine.start(&t).expect("room");
    let mut done = Vec::new();
    while done.is_empty() {
        engine.wait(&[], None).expect("wait");
        engine.poll(&mut done).expect("poll");
    }
    assert_eq!(done, [Done { token: 1, errno: 0 }]);
    let mut back = vec![0u8; 300_000];
    seen.read_exact_at(&mut back, 0).expect("read");
    assert!(back[..50_000].iter().chain(&back[250_000..]).all(|b| *b == 1));
    assert!(back[50_000..250_000].iter().all(|b| *b == 0));
    assert!(engine.counters().writes.get() >= 4 && engine.counters().fallocates.get() == 0);
}

#[test]
fn a_failed_sync_is_remembered() {
    let (r, _w) = slow();
    let failed = Arc::new(AtomicI32::new(0));
    let file = EngineFile {
        file: Arc::new(r),
        kind: FileKind::Regular,
        memory_align: 1,
        length_align: 1,
        past_end: PastEnd::Error,
        sync_failed: Arc::clone(&failed),
    };
    let newest = RingMode::Deferred;
    let config = EngineConfig { depth: 1, files: vec![file], newest };
    let mut engine = Engine::new(config).expect("io_uring");
    engine.start(&transfer(EngineOp::Sync, 0, &[], 1)).expect("room");
    let mut done = Vec::new();
    while done.is_empty() {
        engine.wait(&[], None).expect("wait");
        engine.poll(&mut done).expect("poll");
    }
    // A pipe cannot be synced.
    assert_eq!(done[0].errno, libc::EINVAL);
    assert_eq!(failed.load(std::sync::atomic::Ordering::Relaxed), libc::EINVAL);
}

#[test]
fn refusals_name_the_remedy() {
    let text = |errno, disabled| SetupError::explain(errno, disabled, Some(65536)).to_string();
    assert!(text(libc::EPERM, 2).contains("sysctl kernel.io_uring_disabled=0"));
    assert!(!text(libc::EPERM, 2).contains("io_uring_group"));
    assert!(text(libc::EPERM, 1).contains("kernel.io_uring_group"));
    assert!(text(libc::EPERM, 0).contains("seccomp"));
    assert!(text(libc::ENOSYS, 0).contains("Linux 5.10"));
    let memory = text(libc::ENOMEM, 0);
    assert!(memory.contains("64 KiB") && memory.contains("LimitMEMLOCK="), "{memory}");
    assert!(text(libc::EMFILE, 0).contains("LimitNOFILE="));
    let e = io::Error::from(SetupError::explain(libc::EPERM, 2, None));
    assert_eq!(e.kind(), io::ErrorKind::PermissionDenied);
    assert!(e.to_string().contains("sysctl"));
}

#[test]
fn small_cached_writes_arrive_whoever_makes_them() {
    for mode in MODES {
        let file = tempfile::tempfile_in(".").expect("a file");
        let mut engine = engine_on(file.try_clone().expect("a descriptor"), 8, mode);
        let mut blocks: Vec<Vec<u8>> = (1..=8u8).map(|n| vec![n; 4096]).collect();
        let mut done = Vec::new();
        for (at, block) in blocks.iter_mut().enumerate() {
            let (head, tail) = block.split_at_mut(1024);
            let (offset, token) = (at as u64 * 4096, at as u64);
            let write = EngineOp::Write(Durability::Volatile);
            engine.start(&transfer(write, offset, &[buf(head), buf(tail)], token)).expect("room");
        }
        // Some are left for the drop to drain, once they are taken.
        while done.is_empty() {
            engine.poll(&mut done).expect("poll");
        }
        let counters = engine.counters().clone();
        drop(engine);
        assert!(done.iter().all(|d| d.errno == 0));
        assert!(counters.inline_writes.get() + counters.writes.get() >= 8);
        let mut bytes = vec![0; 8 * 4096];
        file.read_exact_at(&mut bytes, 0).expect("read");
        assert!(bytes == blocks.concat(), "in mode {mode:?}");
    }
}

#[test]
fn a_write_that_fails_at_once_says_why() {
    let file = tempfile::NamedTempFile::new_in(".").expect("a file");
    let read_only = File::open(file.path()).expect("open");
    let mut engine = engine_on(read_only, 1, RingMode::Deferred);
    let mut bytes = [1; 512];
    let write = EngineOp::Write(Durability::Volatile);
    engine.start(&transfer(write, 0, &[buf(&mut bytes)], 7)).expect("room");
    let mut done = Vec::new();
    while done.is_empty() {
        engine.wait(&[], None).expect("wait");
        engine.poll(&mut done).expect("poll");
    }
    assert_eq!(done, [Done { token: 7, errno: libc::EBADF }]);
}

#[test]
fn a_priority_is_in_each_read_and_write() {
    let file = tempfile::tempfile().expect("a file");
    file.write_all_at(&[5; 512], 0).expect("fill");
    let mut engine = engine_on(file, 2, RingMode::Deferred);
    let mut memory = [0; 512];
    let mut answer = |ioprio, op| {
        engine.prioritize(ioprio);
        let bufs = [buf(&mut memory)];
        engine.start(&transfer(op, 0, &bufs, 0)).expect("room");
        let mut done = Vec::new();
        while done.is_empty() {
            engine.wait(&[], None).expect("wait");
            engine.poll(&mut done).expect("poll");
        }
        done[0].errno
    };
    // No class has the number 4: the kernel says so of what it looks at.
    let (idle, unknown) = (3 << 13, 4 << 13);
    for op in [EngineOp::Read, EngineOp::Write(Durability::Through)] {
        assert_eq!((answer(0, op), answer(idle, op)), (0, 0));
        assert_eq!(answer(unknown, op), libc::EINVAL, "{op:?}");
    }
}
