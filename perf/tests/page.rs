//! The stats page, written and read in one process and across two.
use std::fs;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use perf::page::{Builder, Device, ReadError, Reader, find};
use perf::snapshot::{Number, RateNumber, Writer};
use proptest::prelude::*;

perf::counters! {
    /// A toy queue.
    pub struct Toy {
        /// Requests taken,
        /// in all.
        requests: Counter [requests],
        /// How deep the queue is.
        depth: Gauge [requests],
        /// Time to the answer.
        latency: Histogram [ns],
    }
}
perf::counters! {
    /// Another type.
    pub struct Other {
        /// Bytes moved.
        moved: Counter [bytes],
    }
}

fn device() -> Device {
    Device { kind: "vbd".into(), name: "xvda".into(), domid: 7, devid: 51712 }
}

#[test]
fn what_is_written_is_read_live() {
    let dir = tempfile::tempdir().expect("folder");
    let path = dir.path().join("7/vbd-51712.stats");
    let page = Builder::new(device()).create(&path).expect("page");
    let toy = page.block::<Toy>("queue-0");
    let second = page.block::<Toy>("queue-1");
    let other = page.block::<Other>("queue-0");
    let mut reader = Reader::open(&path).expect("reader");
    toy.requests.add(5);
    toy.depth.set(3);
    toy.latency.record(1000);
    second.requests.add(1);
    other.moved.add(4096);

    let s = reader.snapshot().expect("snapshot");
    assert_eq!((s.device.clone(), s.writer, s.unshown), (device(), Writer::Alive, 0));
    assert_eq!(s.blocks.len(), 3);
    assert_eq!(s.value("queue-0", "requests"), Some(5));
    assert_eq!(s.value("queue-0", "depth"), Some(3));
    assert_eq!(s.value("queue-0", "latency"), Some(1));
    assert_eq!(s.value("queue-0", "moved"), Some(4096));
    assert_eq!(s.value("queue-1", "requests"), Some(1));
    assert_eq!(s.value("queue-2", "requests"), None);
    let help: Vec<_> = s.describe().into_iter().map(|d| (d.name, d.unit, d.help)).collect();
    assert_eq!(help[0], ("requests".into(), "requests".into(), "Requests taken, in all.".into()));
    assert_eq!(help.len(), 4);
    let text = perf::text::values(&s) + &perf::text::describe(&s.describe());
    assert!(text.contains("domain 7 vbd-51712 xvda") && text.contains("Bytes moved."));
}

#[test]
fn rates_are_per_second_and_histograms_per_interval() {
    let dir = tempfile::tempdir().expect("folder");
    let path = dir.path().join("p.stats");
    let page = Builder::new(device()).create(&path).expect("page");
    let toy = page.block::<Toy>("queue-0");
    toy.requests.add(100);
    toy.latency.record(7);
    let mut reader = Reader::open(&path).expect("reader");
    let mut old = reader.snapshot().expect("old");
    toy.requests.add(50);
    toy.depth.set(9);
    toy.latency.record(1 << 20);
    let new = reader.snapshot().expect("new");
    old.at = new.at - Duration::from_secs(2);
    let rates = new.rates(&old);
    let values = &rates.blocks[0].values;
    assert_eq!(values[0].number, RateNumber::PerSecond { per_s: 25.0 });
    assert_eq!(values[1].number, RateNumber::Level { value: 9 });
    match &values[2].number {
        RateNumber::Distribution(d) => assert!(d.count == 1 && d.p50 >= 1 << 20),
        other => panic!("{other:?}"),
    }
    let json = serde_json::to_value(&rates).expect("json");
    assert_eq!(json["schema"], 1);
    assert_eq!(json["blocks"][0]["values"][0]["per_s"], 25.0);
    assert!(perf::text::rates(&rates).contains("requests/s"));
}

#[test]
fn a_block_asked_for_again_goes_on_counting() {
    let dir = tempfile::tempdir().expect("folder");
    let page = Builder::new(device()).create(dir.path().join("p.stats")).expect("page");
    page.block::<Toy>("queue-0").requests.add(5);
    let again = page.block::<Toy>("queue-0");
    again.requests.add(1);
    assert_eq!(again.requests.get(), 6);
}

#[test]
fn blocks_beyond_the_room_still_work_and_are_reported() {
    let dir = tempfile::tempdir().expect("folder");
    let path = dir.path().join("p.stats");
    let page = Builder::new(device()).blocks(1).create(&path).expect("page");
    let _shown = page.block::<Toy>("a");
    let hidden = page.block::<Toy>("b");
    hidden.requests.add(1);
    assert_eq!(hidden.requests.get(), 1);
    let s = Reader::open(&path).expect("reader").snapshot().expect("snapshot");
    assert_eq!((s.blocks.len(), s.unshown), (1, 1));
    let small = Builder::new(device()).bytes(0).create(dir.path().join("q.stats")).expect("page");
    for i in 0..40 {
        small.block::<Toy>(&format!("queue-{i}")).requests.add(1);
    }
    let s = Reader::open(small.path()).expect("reader").snapshot().expect("snapshot");
    assert_eq!(s.blocks.len() as u64 + s.unshown, 40);
}

#[test]
fn the_file_goes_with_the_page_but_handles_and_successors_stay() {
    let dir = tempfile::tempdir().expect("folder");
    let path = dir.path().join("9/vif-0.stats");
    let first = Builder::new(device()).create(&path).expect("first");
    let kept = first.block::<Toy>("queue-0");
    let second = Builder::new(device()).create(&path).expect("second");
    drop(first);
    kept.requests.add(2);
    assert_eq!(kept.requests.get(), 2);
    assert_eq!(find(dir.path()).expect("find"), vec![path.clone()]);
    drop(second);
    assert!(!path.exists());
    assert!(find(dir.path()).expect("find").is_empty());
    assert!(find(&dir.path().join("none")).expect("find").is_empty());
}

const CHILD: &str = "PERF_TEST_CHILD_PAGE";

/// Not a test of its own: the other process of `a_writer_that_died_is_noticed`.
#[test]
fn child_writer() {
    let Ok(path) = std::env::var(CHILD) else { return };
    let page = Builder::new(device()).create(path).expect("page");
    page.block::<Toy>("queue-0").requests.add(42);
    std::thread::sleep(Duration::from_secs(60));
}

#[test]
fn a_writer_that_died_is_noticed_and_its_last_values_are_kept() {
    let dir = tempfile::tempdir().expect("folder");
    let path = dir.path().join("p.stats");
    let mut child = std::process::Command::new(std::env::current_exe().expect("exe"))
        .args(["--exact", "child_writer"])
        .env(CHILD, &path)
        .stdout(std::process::Stdio::null())
        .spawn()
        .expect("child");
    let mut reader = loop {
        match Reader::open(&path) {
            Ok(reader) => break reader,
            Err(ReadError::Io(_)) => std::thread::sleep(Duration::from_millis(5)),
            Err(e) => panic!("a half-made page was seen: {e}"),
        }
    };
    let mut s = reader.snapshot().expect("live");
    while s.value("queue-0", "requests") != Some(42) {
        s = reader.snapshot().expect("live");
    }
    assert_eq!((s.pid, s.writer), (child.id(), Writer::Alive));
    child.kill().expect("kill");
    // Still a zombie here: it must count as dead before it is reaped, too.
    while reader.snapshot().expect("dying").writer == Writer::Alive {}
    child.wait().expect("wait");
    let s = reader.snapshot().expect("dead");
    assert_eq!((s.writer, s.value("queue-0", "requests")), (Writer::Dead, Some(42)));
    assert!(perf::text::values(&s).contains("its backend is gone"));
}

fn sample() -> Vec<u8> {
    let dir = tempfile::tempdir().expect("folder");
    let page =
        Builder::new(device()).blocks(4).bytes(4096).create(dir.path().join("p")).expect("page");
    page.block::<Toy>("queue-0").latency.record(5);
    page.block::<Other>("queue-0").moved.add(5);
    fs::read(page.path()).expect("bytes")
}

fn read(bytes: &[u8]) -> Result<perf::snapshot::Snapshot, ReadError> {
    let dir = tempfile::tempdir().expect("folder");
    let path = dir.path().join("p");
    fs::write(&path, bytes).expect("write");
    Reader::open(&path)?.snapshot()
}

#[test]
fn every_truncation_and_foreign_file_is_an_error() {
    let whole = sample();
    assert!(read(&whole).is_ok());
    for length in [0, 1, 8, 255, 256, 300, 1000, whole.len() - 1] {
        assert!(read(&whole[..length]).is_err(), "{length}");
    }
    assert!(matches!(read(&[7; 8192]), Err(ReadError::NotStats)));
    let mut newer = whole.clone();
    newer[8] = 9;
    assert!(matches!(read(&newer), Err(ReadError::Version(9))));
    assert!(matches!(Reader::open("/proc"), Err(ReadError::NotStats)));
}

#[test]
fn a_file_that_shrinks_under_the_reader_is_an_error() {
    let dir = tempfile::tempdir().expect("folder");
    let path = dir.path().join("p");
    fs::write(&path, sample()).expect("write");
    let mut reader = Reader::open(&path).expect("reader");
    let file = fs::OpenOptions::new().write(true).open(&path).expect("open");
    file.set_len(512).expect("shrink");
    assert!(matches!(reader.snapshot(), Err(ReadError::Corrupt("file length"))));
    file.set_len(0).expect("shrink");
    assert!(reader.snapshot().is_err());
}

#[test]
fn a_small_file_cannot_ask_for_unbounded_memory() {
    let mut page = sample();
    // 4096 blocks are claimed where the file has room for a few.
    page[48..52].copy_from_slice(&4096u32.to_le_bytes());
    page[52..56].copy_from_slice(&4096u32.to_le_bytes());
    assert!(read(&page).is_err());
}

#[test]
fn control_characters_do_not_reach_the_terminal() {
    let mut page = sample();
    page[96..100].copy_from_slice(b"\x1b[2J");
    let s = read(&page).expect("readable");
    assert!(!s.device.name.contains('\x1b'));
    assert!(matches!(s.blocks[0].values[0].number, Number::Value { .. }));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn no_page_makes_the_reader_panic(changes in prop::collection::vec((0usize..4800, any::<u64>(), 1usize..9), 1..6)) {
        let dir = tempfile::tempdir().expect("folder");
        let path = dir.path().join("p");
        let mut page = sample();
        for (at, value, n) in changes {
            let at = at.min(page.len() - n);
            page[at..at + n].copy_from_slice(&value.to_le_bytes()[..n]);
        }
        fs::write(&path, &page).expect("write");
        if let Ok(mut reader) = Reader::open(&path) {
            let s = reader.snapshot().expect("it opened");
            let _ = perf::text::values(&s);
            let _ = serde_json::to_string(&s.rates(&s)).expect("json");
        }
        // The file itself is never written to by a reader.
        let mut after = vec![0; page.len()];
        fs::File::open(&path).expect("open").read_exact_at(&mut after, 0).expect("read");
        prop_assert_eq!(after, page);
    }
}
