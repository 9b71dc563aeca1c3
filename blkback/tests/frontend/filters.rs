//! Filters before a guest's disk: set at attach, changed while it runs.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blkback::frontend::FrontOptions;
use blktap::filters::changed::{Frozen, Left};
use blktap::{Disk, DiskQueue, Op, Request};

use crate::rig::{DEVID, Rig, always, memory, pattern, read, same, until, write};

/// Asks the device's control socket.
fn ask(rig: &Rig, line: &str) -> String {
    let path = rig.dir().join(format!("run/{}/vbd-{DEVID}.sock", rig.domid));
    let mut stream = UnixStream::connect(path).unwrap();
    writeln!(stream, "{line}").unwrap();
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).unwrap();
    answer.trim().to_owned()
}

/// Flushes and discards aside, requests that go in a time, with some always on their way.
fn rate(queue: &mut dyn DiskQueue, time: Duration) -> u32 {
    let (begin, mut count, mut done) = (Instant::now(), 0, Vec::new());
    while begin.elapsed() < time {
        while queue.in_flight() < 16 {
            let r = Request { op: Op::Discard, offset: 0, len: 4096, bufs: &[], token: 0 };
            queue.submit(&r).unwrap();
        }
        queue.wait(&[], Some(Duration::from_millis(50))).unwrap();
        done.clear();
        queue.poll(&mut done).unwrap();
        count += done.len() as u32;
    }
    count
}

#[test]
fn limits_hold_for_a_guest_and_change_while_it_runs() {
    let rig = Rig::with_disk(memory(8), "iops_write=200", &[]);
    let front = rig.connect(FrontOptions::default());
    let mut queue = front.queue(32).unwrap();
    rate(&mut *queue, Duration::from_millis(300));
    let held = rate(&mut *queue, Duration::from_secs(1));
    assert!((180..230).contains(&held), "{held} of 200");
    rig.until_counted("engine-", "throttled", |n| n > 100);
    let answer = ask(&rig, r#"{"command":"set","knob":"iops_write","value":"2000"}"#);
    assert_eq!(answer, r#"{"knob":"iops_write","value":"2000"}"#);
    let more = rate(&mut *queue, Duration::from_secs(1));
    assert!((1700..2400).contains(&more), "{more} of 2000");
    let refused = ask(&rig, r#"{"command":"set","knob":"iops_write_max","value":"5"}"#);
    assert!(refused.contains("less than iops_write=2000"), "{refused}");
    ask(&rig, r#"{"command":"set","knob":"iops_write","value":"1"}"#);
    rate(&mut *queue, Duration::from_millis(100));
    // A backend that leaves carries out what it has, and does not wait for limits.
    assert!(queue.in_flight() > 8);
    let begin = Instant::now();
    drop(rig);
    assert!(begin.elapsed() < Duration::from_secs(8), "{:?}", begin.elapsed());
}

#[test]
fn changed_blocks_of_a_guest_are_logged() {
    let folder = tempfile::tempdir().unwrap();
    let [first, second] = ["first.log", "second.log"].map(|name| folder.path().join(name));
    let disk = memory(8);
    let rig = Rig::start(always(Arc::clone(&disk) as Arc<dyn Disk>));
    rig.attach(&format!("changed_block_log={}", first.display()), &[]);
    let front = rig.connect(FrontOptions::default());
    let mut queue = front.queue(32).unwrap();
    let bytes = pattern(70_000 / 512 * 512, 1);
    assert_eq!(write(&mut *queue, 1 << 20, &bytes), 0);
    same(&read(&mut *queue, 1 << 20, bytes.len()), &bytes);
    let line = format!(r#"{{"command":"changed-log-start","path":"{}"}}"#, second.display());
    assert_eq!(ask(&rig, &line), r#"{"ended":"first"}"#);
    assert_eq!(write(&mut *queue, 5 << 20, &[7; 512]), 0);
    let changed = |path: &std::path::Path| {
        let log = Frozen::read(path).unwrap();
        let (mut out, mut at, mut all) = (Vec::new(), 0, Vec::new());
        log.stretches(0..8 << 20, &mut out);
        for (len, dirty) in out {
            all.extend(dirty.then_some((at, len)));
            at += len;
        }
        (log.header.left, all)
    };
    assert_eq!(changed(&first), (Left::Exact, vec![(1 << 20, 128 << 10)]));
    drop(queue);
    front.close().unwrap();
    until("the log is closed", || {
        Frozen::read(&second).is_ok_and(|l| l.header.left == Left::Exact)
    });
    assert_eq!(changed(&second).1, [(5 << 20, 64 << 10)]);
}

#[test]
fn faults_and_delays_reach_a_guest() {
    let rig = Rig::with_disk(memory(8), "fault=write:EIO:nth=2,delay_us=30000", &[]);
    let front = rig.connect(FrontOptions::default());
    let mut queue = front.queue(32).unwrap();
    let begin = Instant::now();
    assert_eq!(write(&mut *queue, 0, &[1; 512]), 0);
    assert!(begin.elapsed() >= Duration::from_millis(30));
    assert_ne!(write(&mut *queue, 0, &[1; 512]), 0);
    assert_eq!(write(&mut *queue, 0, &[1; 512]), 0);
}

/// Begins a write in a thread: its answer.
fn write_beside(
    mut queue: Box<dyn DiskQueue>,
    offset: u64,
    bytes: Vec<u8>,
) -> std::thread::JoinHandle<(i32, Box<dyn DiskQueue>)> {
    std::thread::spawn(move || (write(&mut *queue, offset, &bytes), queue))
}

#[test]
fn a_full_disk_pauses_and_goes_on_when_it_is_resumed() {
    let disk = memory(8);
    let rig = Rig::with_disk(disk.clone(), "fault=write:ENOSPC:at=1M-2M:nth=2", &[]);
    let front = rig.connect(FrontOptions { max_queues: 2, ..Default::default() });
    let (mut queue, other) = (front.queue(32).unwrap(), front.queue(32).unwrap());
    assert_eq!(write(&mut *queue, 1 << 20, &pattern(4096, 1)), 0);
    let refused = ask(&rig, r#"{"command":"resume"}"#);
    assert!(refused.contains("it is not paused"), "{refused}");
    let full = write_beside(queue, 1 << 20, pattern(128 << 10, 2));
    rig.until_counted("queue-", "stalled", |n| n == 1);
    // Nothing else is answered, by whatever queue.
    let behind = write_beside(other, 3 << 20, pattern(64 << 10, 3));
    std::thread::sleep(Duration::from_millis(200));
    assert!(!full.is_finished() && !behind.is_finished());
    let told = ask(&rig, r#"{"command":"job"}"#);
    assert!(told.contains(r#""stopped":{"error":"No space left on device"#), "{told}");
    // Its image may be closed and opened meanwhile: what failed goes to the new one.
    let told = ask(&rig, r#"{"command":"pause"}"#);
    assert!(told.contains(r#""kind":"pause""#), "{told}");
    until("it is paused", || ask(&rig, r#"{"command":"job"}"#).contains(r#""state":"paused""#));
    let told = ask(&rig, r#"{"command":"resume"}"#);
    assert!(!told.contains("stopped") && told.contains(r#""kind":"pause""#), "{told}");
    let [(first, mut queue), (second, _)] = [full, behind].map(|t| t.join().unwrap());
    assert_eq!((first, second), (0, 0));
    same(&read(&mut *queue, 1 << 20, 128 << 10), &pattern(128 << 10, 2));
    same(&read(&mut *queue, 3 << 20, 64 << 10), &pattern(64 << 10, 3));
    assert_eq!(rig.counter("queue-", "errors") + rig.counter("queue-", "stalled"), 0);
}

#[test]
fn errors_are_reported_or_stop_the_disk_as_told_while_it_runs() {
    let rig = Rig::with_disk(memory(8), "fault=write:EIO:at=0-4K+write:ENOSPC:at=4K-8K", &[]);
    let front = rig.connect(FrontOptions::default());
    let mut queue = front.queue(32).unwrap();
    assert_ne!(write(&mut *queue, 0, &[1; 512]), 0);
    for line in ["on_error\",\"value\":\"pause", "on_enospc\",\"value\":\"report"] {
        let answer = ask(&rig, &format!(r#"{{"command":"set","knob":"{line}"}}"#));
        assert!(!answer.contains("error\":"), "{answer}");
    }
    assert_ne!(write(&mut *queue, 4096, &[1; 512]), 0);
    let stopped = write_beside(queue, 0, vec![1; 512]);
    rig.until_counted("queue-", "stalled", |n| n == 1);
    // It lasts: stopped again, and then told.
    ask(&rig, r#"{"command":"resume"}"#);
    rig.until_counted("queue-", "stalled", |n| n == 1);
    assert!(!stopped.is_finished());
    ask(&rig, r#"{"command":"set","knob":"on_error","value":"report"}"#);
    ask(&rig, r#"{"command":"resume"}"#);
    let (errno, mut queue) = stopped.join().unwrap();
    assert_ne!(errno, 0);
    assert_eq!(write(&mut *queue, 8192, &[1; 512]), 0);
    assert_eq!(rig.counter("queue-", "errors"), 3);
}

#[test]
fn a_backend_that_leaves_reports_what_has_stopped_its_disk() {
    let mut rig = Rig::with_disk(memory(8), "fault=write:ENOSPC:at=0-4K", &[]);
    let front = rig.connect(FrontOptions::default());
    let stopped = write_beside(front.queue(32).unwrap(), 0, vec![1; 512]);
    rig.until_counted("queue-", "stalled", |n| n == 1);
    let begin = Instant::now();
    rig.stop_backend();
    assert!(begin.elapsed() < Duration::from_secs(8), "{:?}", begin.elapsed());
    until("it is answered", || stopped.is_finished());
    assert_ne!(stopped.join().unwrap().0, 0);
}
