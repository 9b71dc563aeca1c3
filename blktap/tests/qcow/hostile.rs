//! Fuzz target: a small image with changes anywhere, read wholly, judged by the model.
//!
//! `cargo test` does a run that is the same each time and a short random one. Longer:
//! `BOLERO_RANDOM_TEST_TIME_MS=600000 BOLERO_RANDOM_ITERATIONS=1000000000 cargo test --release -p ringback-blktap --test qcow`, or
//! guided by coverage: `cargo bolero test -p ringback-blktap hostile::images --sanitizer NONE`.
use std::sync::Arc;

use blktap::formats::qcow::{CreateOptions, Packing, Qcow, QcowWriter};
use blktap::formats::{Extent, Format, Outcome, Place};
use blktap::storage::MemStorage;

use super::model::{Byte, Model};

/// A sound image of 64 KiB with plain and packed clusters.
pub fn image() -> Vec<u8> {
    let storage = Arc::new(MemStorage::default());
    let options = CreateOptions { size: 64 << 10, backing: None };
    let mut writer = QcowWriter::create(Arc::clone(&storage) as _, &options).expect("create");
    for (cluster, packing) in [(1, Packing::Plain), (3, Packing::Compressed), (4, Packing::Plain)] {
        let data: Vec<u8> = (0..4096u32).map(|i| (i / 9 + cluster) as u8).collect();
        writer.write(u64::from(cluster), &data, packing).expect("write");
    }
    writer.finish().expect("finish");
    storage.bytes()
}

/// Reads all of an image, cluster by cluster: bytes, or what else they are.
fn read(image: &Qcow, file: &[u8], size: u64) -> Vec<Byte> {
    let mut all = Vec::new();
    while (all.len() as u64) < size {
        let at = all.len() as u64;
        let mut extents: Vec<Extent> = Vec::new();
        match image.resolve_read(at..size, &mut extents) {
            Ok(Outcome::Ready(())) => {}
            Ok(Outcome::Miss(miss)) => match image.load(miss) {
                Ok(()) => continue,
                Err(_) => {
                    all.extend([Byte::Broken; 512]);
                    continue;
                }
            },
            Ok(Outcome::Busy) => panic!("nobody writes"),
            Err(_) => {
                // What cannot be read is whole clusters.
                all.extend([Byte::Broken; 512]);
                continue;
            }
        }
        assert!(!extents.is_empty());
        for Extent { len, place } in extents {
            match place {
                Place::Zero => all.resize(all.len() + len as usize, Byte::Is(0)),
                Place::Absent => all.resize(all.len() + len as usize, Byte::Below),
                Place::Data { offset, .. } => all.extend(
                    (offset..offset + len)
                        .map(|i| Byte::Is(file.get(i as usize).copied().unwrap_or(0))),
                ),
                Place::Compressed { cluster, skip } => {
                    let mut out = Vec::new();
                    let bytes = image.decompress(cluster, &mut out).is_ok();
                    all.extend((0..len as usize).map(|i| match bytes {
                        true => Byte::Is(out[skip as usize + i]),
                        false => Byte::Broken,
                    }));
                }
            }
        }
        assert!(all.len() as u64 <= size, "more than was asked for");
    }
    all
}

/// Each 5 bytes change one of the image's: mostly of the header and the tables.
fn judge(input: &[u8]) -> Option<usize> {
    let mut file = image();
    for change in input.chunks_exact(5).take(64) {
        let at = usize::from(u16::from_le_bytes([change[1], change[2]]));
        let at = match change[0] % 4 {
            0 => at % 48,
            1 => 48 + at % 8,
            2 => 4096 + at % 128,
            _ => at % file.len(),
        };
        match change[3] % 8 {
            0 => file.truncate(at.max(1)),
            _ => file.get_mut(at).into_iter().for_each(|b| *b = change[4]),
        }
    }
    let model = Model::open(&file);
    let opened = Qcow::open(Arc::new(MemStorage::new(file.clone())));
    let (Ok(image), Some(model)) = (&opened, &model) else {
        let error = opened.as_ref().err().map(ToString::to_string);
        assert!(opened.is_ok() == model.is_some(), "accepted by one of both: {error:?}");
        return None;
    };
    assert_eq!(image.size(), model.size);
    let name = image.backing().map(|b| b.name.into_bytes());
    assert_eq!(name, model.backing);
    let size = model.size.min(256 << 10);
    let ours = read(image, &file, size);
    // Each cluster's ends, and some inside; all bytes of all would take minutes.
    for at in (0..size).filter(|at| at % 512 == 0 || at % 512 == 511 || at % 389 == 0) {
        assert_eq!(ours[at as usize], model.byte(at), "byte {at}");
    }
    Some(ours.iter().filter(|b| **b == Byte::Broken).count())
}

#[test]
fn images() {
    bolero::check!().with_max_len(320).with_iterations(150).for_each(|input: &[u8]| {
        judge(input);
    });
}

#[test]
fn a_run_that_is_the_same_each_time() {
    assert_eq!(judge(&[]), Some(0));
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 56) as u8
    };
    let (mut refused, mut broken, mut whole) = (0, 0, 0);
    for round in 0..400 {
        let input: Vec<u8> = (0..5 * (1 + round % 4)).map(|_| next()).collect();
        match judge(&input) {
            None => refused += 1,
            Some(0) => whole += 1,
            Some(_) => broken += 1,
        }
    }
    assert!(refused > 50 && broken > 10 && whole > 20, "{refused} {broken} {whole}");
}
