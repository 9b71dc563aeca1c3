//! The disks that go wrong do so, and a verifier that writes, flushes, cuts the power and
//! compares turns red for each fault.
mod support;

use std::sync::Arc;

use blktap::faults::{Fault, FaultDisk};
use blktap::{Disk, MemDisk, Op, Volatility, blocking};
use support::pattern;

const SIZE: usize = 64 << 10;

/// Writes all, flushes, cuts the power, reads back: what went wrong.
fn verify(faults: &[Fault]) -> Result<(), String> {
    let memory = MemDisk::with(SIZE, Volatility::Cached);
    let disk = FaultDisk::new(Arc::clone(&memory) as Arc<dyn Disk>, faults);
    let mut queue = disk.queue(4).expect("queue");
    let data = pattern(5, SIZE);
    for (n, part) in data.chunks(4096).enumerate() {
        blocking::write_at(&mut *queue, n as u64 * 4096, part).map_err(|e| format!("write {e}"))?;
    }
    blocking::flush(&mut *queue).map_err(|e| format!("flush {e}"))?;
    memory.power_cut();
    let mut back = vec![0; SIZE];
    blocking::read_at(&mut *queue, 0, &mut back).map_err(|e| format!("read {e}"))?;
    assert_eq!(disk.struck(), faults.len() as u64, "every fault struck");
    match back.iter().zip(&data).filter(|(a, b)| a != b).count() {
        0 => Ok(()),
        n => Err(format!("{n} bytes differ")),
    }
}

#[test]
fn each_fault_turns_a_verifier_red() {
    assert_eq!(verify(&[]), Ok(()));
    assert_eq!(verify(&[Fault::FlipByte { nth: 3, at: 4097 }]), Err("1 bytes differ".into()));
    let lost = verify(&[Fault::LoseWrite { nth: 15 }]).expect_err("lost");
    assert!(lost.ends_with("bytes differ"), "{lost}");
    let dropped = verify(&[Fault::DropFlushes]).expect_err("dropped");
    assert!(dropped.ends_with("bytes differ"), "{dropped}");
    for (op, what) in [(Op::Write, "write"), (Op::Flush, "flush"), (Op::Read, "read")] {
        let failed = verify(&[Fault::Fail { op, nth: 0, errno: libc::ENOSPC }]);
        assert!(failed.expect_err("failed").starts_with(what));
    }
}

#[test]
fn a_counted_fault_strikes_once_over_all_queues() {
    let disk = FaultDisk::new(MemDisk::new(SIZE), &[]);
    let (mut a, mut b) = (disk.queue(1).expect("queue"), disk.queue(1).expect("queue"));
    blocking::write_at(&mut *a, 0, &[1; 512]).expect("no fault yet");
    disk.add(Fault::Fail { op: Op::Write, nth: 1, errno: libc::EIO });
    blocking::write_at(&mut *a, 0, &[1; 512]).expect("the first");
    blocking::read_at(&mut *a, 0, &mut [0; 512]).expect("another operation");
    let error = blocking::write_at(&mut *b, 0, &[1; 512]).expect_err("the second");
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    blocking::write_at(&mut *b, 0, &[1; 512]).expect("the third");
    assert_eq!(disk.struck(), 1);
}

#[test]
fn forced_writes_survive_a_power_cut_unless_flushes_are_dropped() {
    for (faults, survives) in [(&[][..], true), (&[Fault::DropFlushes][..], false)] {
        let memory = MemDisk::with(SIZE, Volatility::Cached);
        let disk = FaultDisk::new(Arc::clone(&memory) as Arc<dyn Disk>, faults);
        let mut queue = disk.queue(2).expect("queue");
        let mut m = support::Memory::of(&[7; 512], 0);
        let bufs = [m.buf()];
        let forced = support::request(Op::WriteFua, 512, &bufs, 1);
        assert_eq!(support::perform(&mut *queue, &forced), 0);
        blocking::write_at(&mut *queue, 1024, &[8; 512]).expect("write");
        memory.power_cut();
        memory.with_bytes(|b| {
            assert_eq!(b[512] == 7, survives);
            assert_eq!(b[1024], 0, "not flushed");
        });
    }
}
