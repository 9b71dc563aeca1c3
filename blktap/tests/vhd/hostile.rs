//! Fuzz target: small images with changes anywhere, most of them with right checksums, read
//! wholly and written to, judged by the model.
//!
//! `cargo test` does a run that is the same each time and a short random one. Longer:
//! `BOLERO_RANDOM_TEST_TIME_MS=600000 BOLERO_RANDOM_ITERATIONS=1000000000 cargo test --release -p ringback-blktap --test vhd hostile`,
//! or guided by coverage: `cargo bolero test -p ringback-blktap hostile::images --sanitizer NONE`.
use std::sync::Arc;

use blktap::formats::vhd::{Repair, Vhd};
use blktap::formats::{Format, ImageError};
use blktap::storage::{Access, MemStorage, Storage};

use super::driver::Driver;
use super::model::{self, Byte, HEADER, Kind, Model, TABLE};

/// Memory that is only read.
struct ReadOnly(MemStorage);

impl Storage for ReadOnly {
    fn size(&self) -> std::io::Result<u64> {
        self.0.size()
    }
    fn read_at(&self, offset: u64, into: &mut [u8]) -> std::io::Result<()> {
        self.0.read_at(offset, into)
    }
    fn write_at(&self, offset: u64, from: &[u8]) -> std::io::Result<()> {
        panic!("written to: {} bytes at {offset}", from.len());
    }
    fn sync(&self) -> std::io::Result<()> {
        Ok(())
    }
    fn set_size(&self, size: u64) -> std::io::Result<()> {
        panic!("cut to {size}");
    }
    fn punch(&self, range: std::ops::Range<u64>) -> std::io::Result<()> {
        panic!("punched at {range:?}");
    }
    fn allocate(&self, range: std::ops::Range<u64>) -> std::io::Result<()> {
        panic!("allocated at {range:?}");
    }
    fn access(&self) -> Access {
        Access::ReadOnly
    }
    fn name(&self) -> String {
        "memory".into()
    }
}

fn take<'a>(input: &mut &'a [u8], n: usize) -> &'a [u8] {
    let (now, later) = input.split_at(n.min(input.len()));
    *input = later;
    now
}

/// Changes an image: each 5 bytes of input a byte of it, or its length. Bits of the first byte
/// say which checksums are made right.
fn change(file: &mut Vec<u8>, right: u8, changes: &[u8]) {
    for change in changes.chunks_exact(5) {
        let at = usize::from(u16::from_le_bytes([change[1], change[2]]));
        let (len, tail) = (file.len(), file.len().saturating_sub(512));
        let at = match change[0] % 8 {
            0 => at % 90,
            1 => tail + at % 90,
            2 => HEADER + at % 64,
            3 => HEADER + 576 + at % 64,
            4 | 5 => TABLE + at % 68,
            _ => at % len.max(1),
        };
        match change[3] % 16 {
            0 => file.truncate(at),
            1 => file.resize(len + at % 3000, change[4]),
            // Small numbers are the interesting ones in tables.
            2..=9 => file.get_mut(at).into_iter().for_each(|b| *b = change[4] % 40),
            _ => file.get_mut(at).into_iter().for_each(|b| *b = change[4]),
        }
    }
    let last = file.len().saturating_sub(512);
    let parts = [(1, 0, 512, 64), (2, last, 512, 64), (4, HEADER, 1024, 36)];
    for (bit, start, len, own) in parts {
        if let (Some(part), true) = (file.get_mut(start..start + len), right & bit != 0) {
            model::seal(part, own);
        }
    }
}

/// The start of a disk; all of a large one would take too long.
fn expected(model: &Model) -> Vec<Byte> {
    (0..model.size.min(256 << 10)).map(|at| model.byte(at)).collect()
}

fn as_read(byte: &Byte) -> u8 {
    match byte {
        Byte::Is(b) => *b,
        Byte::Below => 0,
    }
}

/// Writes to an image; what it must then read as, and the file.
fn write(file: &[u8], mut ops: &[u8], expected: &mut [Byte]) -> Result<Vec<u8>, ImageError> {
    let storage = Arc::new(MemStorage::new(file.to_vec()));
    let mut disk = Driver::new(vec![Arc::new(Vhd::open(Arc::clone(&storage) as _)?)]);
    for _ in 0..8 {
        let [op, at, len, seed] = *take(&mut ops, 4) else { break };
        let sectors = expected.len() / 512;
        let at = usize::from(at) % sectors;
        let len = (1 + usize::from(len) % 20).min(sectors - at);
        let (start, part) = (at as u64 * 512, &mut expected[at * 512..(at + len) * 512]);
        match op % 5 {
            0 => {
                disk.zero(start, part.len() as u64)?;
                part.fill(Byte::Is(0));
            }
            1 => {
                disk.discard(start, part.len() as u64)?;
                let now = disk.read(start, part.len())?;
                for (now, byte) in now.into_iter().zip(part) {
                    assert!(now == 0 || now == as_read(byte), "neither zero nor as it was");
                    if now != as_read(byte) {
                        *byte = Byte::Is(0);
                    }
                }
            }
            2 => disk.flush()?,
            _ => {
                disk.write(start, &vec![seed | 1; part.len()])?;
                part.fill(Byte::Is(seed | 1));
            }
        }
    }
    let now = disk.read(0, expected.len())?;
    assert!(now.iter().zip(&*expected).all(|(now, byte)| *now == as_read(byte)), "as written");
    disk.close()?;
    Ok(storage.bytes())
}

/// How an image was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Taken {
    Refused,
    ReadOnly,
    Written,
}

fn judge(input: &[u8]) -> Taken {
    let [which, right, count] = [0, 1, 2].map(|i| input.get(i).copied().unwrap_or(0));
    let mut input = input.get(3..).unwrap_or_default();
    let kinds = [Kind::Dynamic, Kind::Differencing, Kind::Dynamic, Kind::Fixed];
    let mut file = model::image(kinds[usize::from(which) % 4]);
    change(&mut file, right, take(&mut input, usize::from(count) % 12 * 5));

    let judged = Model::open(&file);
    let opened = Vhd::open(Arc::new(ReadOnly(MemStorage::new(file.clone()))));
    let repaired = MemStorage::new(file.clone());
    let check = Vhd::check(&repaired, Repair::All);
    let (Ok(image), Some(judged)) = (&opened, &judged) else {
        let error = opened.as_ref().err().map(ToString::to_string);
        assert!(opened.is_ok() == judged.is_some(), "accepted by one of both: {error:?}");
        assert!(Vhd::open(Arc::new(MemStorage::new(file))).is_err(), "only for writing");
        return Taken::Refused;
    };
    assert_eq!(image.size(), judged.size);
    let mut expected = expected(judged);
    let image = Arc::new(opened.unwrap_or_else(|e| panic!("{e}")));
    let read = Driver::new(vec![image]).read(0, expected.len()).expect("read");
    assert!(read.iter().zip(&expected).all(|(now, byte)| *now == as_read(byte)));
    // What is repaired reads the same.
    if check.is_ok() {
        let after = Model::open(&repaired.bytes()).expect("a repaired image");
        assert!(expected.iter().enumerate().all(|(at, b)| after.byte(at as u64) == *b));
    }
    match write(&file, input, &mut expected) {
        Ok(bytes) => {
            let after = Model::open(&bytes).expect("an image that was written");
            assert_eq!((after.kind, after.size), (judged.kind, judged.size));
            let same = |(at, byte): (usize, &Byte)| match after.byte(at as u64) {
                // A discarded sector may have been zero before.
                Byte::Is(0) => as_read(byte) == 0,
                now => now == *byte,
            };
            assert!(expected.iter().enumerate().all(same), "as it was closed");
            Taken::Written
        }
        Err(_) => Taken::ReadOnly,
    }
}

#[test]
fn images() {
    bolero::check!().with_max_len(100).with_iterations(300).for_each(|input: &[u8]| {
        judge(input);
    });
}

#[test]
fn a_run_that_is_the_same_each_time() {
    for kind in 0..4 {
        assert_eq!(judge(&[kind]), Taken::Written);
    }
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 56) as u8
    };
    let mut taken = Vec::new();
    for round in 0..1200 {
        let mut input: Vec<u8> = (0..100).map(|_| next()).collect();
        (input[1], input[2]) = (if round % 4 == 0 { input[1] } else { 7 }, 1 + round as u8 % 5);
        taken.push(judge(&input));
    }
    let count = |what| taken.iter().filter(|t| **t == what).count();
    let counts = [Taken::Refused, Taken::ReadOnly, Taken::Written].map(count);
    assert!(counts[0] > 100 && counts[1] > 5 && counts[2] > 100, "{counts:?}");
}

/// Numbers that are absurd are refused without the memory or the time that they ask for.
#[test]
fn absurd_sizes() {
    let image = model::image(Kind::Dynamic);
    let end = image.len();
    let cases: [(&str, usize, &[u8]); 6] = [
        ("2040 GiB", 48, &[0xff; 8]),
        ("entries", HEADER + 28, &[0xff; 4]),
        ("block size", HEADER + 32, &[0x80, 0, 0, 0]),
        ("block table cannot", HEADER + 16, &[0xff; 8]),
        ("dynamic header cannot", 16, &[0x7f; 8]),
        ("beyond the end", TABLE, &[0xff, 0xff, 0xff, 0xfe]),
    ];
    for (reason, at, bytes) in cases {
        let mut file = image.clone();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        file.copy_within(0..512, end - 512);
        model::seal(&mut file[..512], 64);
        model::seal(&mut file[end - 512..], 64);
        model::seal(&mut file[HEADER..TABLE], 36);
        let opened = Vhd::open(Arc::new(MemStorage::new(file)));
        let error = opened.err().unwrap_or_else(|| panic!("{reason}: opened")).to_string();
        assert!(error.contains(reason), "{reason}: {error}");
    }
}

/// A guest that writes a footer of its own into its disk does not get to choose the format.
#[test]
fn a_guests_own_footer_is_not_believed() {
    let mut fixed = model::image(Kind::Fixed);
    let forged = model::image(Kind::Differencing);
    fixed[..2048].copy_from_slice(&forged[..2048]);
    let opened = Vhd::open(Arc::new(MemStorage::new(fixed)));
    let error = opened.err().expect("which of the two is it?").to_string();
    assert!(error.contains("different images"), "{error}");
}
