// Stands in for memory that the driver would map.
#![allow(unsafe_code)]

use std::sync::atomic::Ordering;

use super::*;

fn null() -> File {
    File::options().read(true).write(true).open("/dev/null").unwrap()
}

/// Pages that no driver granted: plain memory.
fn pages(count: usize) -> Granted {
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    let len = count * PAGE_SIZE;
    // SAFETY: a new mapping, which the value's drop unmaps.
    let base = unsafe {
        rustix::mm::mmap_anonymous(ptr::null_mut(), len, protection, MapFlags::PRIVATE).unwrap()
    };
    Granted { device: null(), index: 0, base: base.cast(), refs: (8..).take(count).collect() }
}

#[test]
fn words_and_bytes_are_the_same_memory() {
    let p = pages(2);
    assert_eq!((p.len(), p.refs()), (8192, &[8, 9][..]));
    p.word(8188).store(u32::from_ne_bytes(*b"ring"), Ordering::Relaxed);
    let mut out = [0; 6];
    p.read(8186, &mut out);
    assert_eq!(&out, b"\0\0ring");
    p.write(8190, b"ed");
    assert_eq!(p.word(8188).load(Ordering::Relaxed).to_ne_bytes(), *b"ried");
}

#[test]
#[should_panic]
fn reading_past_the_end_is_a_bug() {
    pages(1).read(4095, &mut [0; 2]);
}

#[test]
#[should_panic]
fn an_unaligned_word_is_a_bug() {
    pages(1).word(2);
}

#[test]
fn granting_without_the_driver_fails() {
    let error = Granted::alloc(null(), 0, 1, Access::ReadWrite).err().unwrap();
    assert_eq!(error.raw_os_error(), Some(25), "ENOTTY");
    let error = Granted::alloc(null(), 0, 0, Access::ReadWrite).err().unwrap();
    assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
}
