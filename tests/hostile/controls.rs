//! The verifiers of these tests, each turned red by what it is there to find.

use std::os::unix::fs::FileExt;
use std::time::Duration;

use hypervisor::xenbus::State;

use crate::guest::{PERSISTENT, PLAIN, read, whole};
use crate::process::Process;
use crate::scene::{BAD, GOOD, Scene, leaves_nothing_within};

const SHORT: Duration = Duration::from_millis(300);

#[test]
fn a_paused_witness_is_noticed() {
    let scene = Scene::start();
    let witness = &scene.witnesses[0];
    witness.pause(true);
    // What it has under way may come to its end.
    let mut last = None;
    let stands = (0..50).any(|_| {
        std::thread::sleep(Duration::from_millis(200));
        last.replace(witness.mark()) == Some(witness.mark())
    });
    assert!(stands, "it is not paused");
    let verdict = witness.goes_on(witness.mark(), 1, SHORT);
    assert_eq!(verdict, Err("0 verified requests in 300ms".to_owned()));
    witness.pause(false);
    witness.goes_on(witness.mark(), 5, Duration::from_secs(10)).unwrap();
    assert!(witness.gap() >= Duration::from_millis(300), "the gap was not seen");
    scene.finish();
}

#[test]
fn a_corrupted_witness_is_noticed() {
    let scene = Scene::start();
    let witness = &scene.witnesses[0];
    witness.goes_on(witness.mark(), 60, Duration::from_secs(20)).unwrap();
    // Behind its back, all of its disk is something else: what it reads is not what it wrote.
    let disk = scene.rig.run_dir().parent().unwrap().join("other.img");
    let file = std::fs::File::options().write(true).open(disk).unwrap();
    file.write_all_at(&[0xee; 64 * 4096], 0).unwrap();
    let verdict = witness.goes_on(witness.mark(), 100_000, Duration::from_secs(20));
    let error = verdict.unwrap_err();
    assert!(error.ends_with("what was read is not what was written"), "{error}");
}

#[test]
fn a_flipped_byte_of_an_image_is_noticed() {
    let scene = Scene::start();
    let (path, at) = (scene.image.path().to_owned(), 1_234_567);
    let file = std::fs::File::options().write(true).open(path).unwrap();
    let right = scene.image.model()[at];
    file.write_all_at(&[right ^ 1], at as u64).unwrap();
    let error = scene.image.verify().unwrap_err();
    assert_eq!(error, format!("byte {at} is {} instead of {right}", right ^ 1));
    assert!(scene.image.verify_but(at + 1..at + 2).is_err());
    assert_eq!(scene.image.verify_but(at..at + 1), Ok(()));
    file.write_all_at(&[right], at as u64).unwrap();
    scene.finish();
}

/// The device is still there: its thread, its descriptors and its mapping count as left over.
#[test]
fn a_device_that_is_left_is_noticed() {
    let scene = Scene::start();
    let mut queue = scene.connect(PERSISTENT);
    let page = scene.domain.pages(1);
    assert_eq!(queue.ask(read(0, &[whole(page.refs()[0])])), 0);
    let verdict = leaves_nothing_within(&scene.rig, scene.before(), SHORT).unwrap_err();
    for what in ["+ vbd-", "+ anon_inode:[io_uring", "+ pipe:[", "memfd:ringback-"] {
        assert!(verdict.contains(what), "{what} is not in {verdict}");
    }
    assert!(!scene.threads().is_empty());
    drop((queue, page));
    scene.finish();
}

#[test]
fn a_wrong_error_text_is_noticed() {
    let scene = Scene::start();
    scene.rig.wait(scene.domain.id, BAD, State::InitWait);
    scene.domain.set_state(BAD, State::Initialised);
    scene.wait(State::Closing);
    let wrong = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        scene.fails_with("frontend key ring-ref is missing.");
    }));
    assert!(wrong.is_err());
    scene.fails_with("frontend key ring-ref is missing");
    scene.finish();
}

#[test]
fn processor_time_and_memory_are_measured() {
    let me = Process(std::process::id());
    let (cpu, resident) = (me.cpu(""), me.resident());
    let mut sink = vec![1u8; 64 << 20];
    let start = std::time::Instant::now();
    while start.elapsed() < Duration::from_millis(200) {
        sink.iter_mut().for_each(|b| *b = b.wrapping_mul(3));
    }
    assert!(me.resident() > resident + 32 * 1024, "{resident} KiB, then {}", me.resident());
    assert!(me.cpu("") > cpu + Duration::from_millis(20), "{cpu:?}, then {:?}", me.cpu(""));
    assert!(me.runs() && !Process(u32::MAX / 2).runs());
    std::hint::black_box(sink);
}

/// Devices that nobody attacked.
#[test]
fn without_an_attack_all_is_well() {
    let mut scene = Scene::start();
    let mut queue = scene.connect(PLAIN);
    let page = scene.domain.pages(1);
    scene.during(|| queue.works(&*page, 800));
    scene.image.wrote(800 * 512, &crate::image::patterned(800, 4096));
    assert_eq!(scene.rig.error(scene.domain.id, GOOD), None);
    drop((queue, page));
    scene.finish();
}
