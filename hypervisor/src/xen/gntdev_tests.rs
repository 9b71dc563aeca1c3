// Looks into memory and unions by address.
#![allow(unsafe_code)]

use super::*;

/// Opens a file that is no gntdev: every ioctl fails, which is how much of it there is without
/// Xen.
fn handle() -> Gntdev {
    Gntdev::new(File::options().read(true).write(true).open("/dev/null").unwrap())
}

fn op() -> CopyOp {
    CopyOp { gref: 8, offset: 96, len: 4000, at: 192, direction: Direction::FromGrant, status: 7 }
}

#[test]
fn buffers_are_whole_zeroed_pages() {
    let g = handle();
    let b = g.buffer(PAGE_SIZE + 1).unwrap();
    assert_eq!((b.len(), b.base() as usize % PAGE_SIZE), (2 * PAGE_SIZE, 0));
    // SAFETY: this test's own memory.
    let bytes = unsafe { std::slice::from_raw_parts(b.base(), b.len()) };
    assert!(bytes.iter().all(|b| *b == 0));
    assert_eq!(g.buffer(0).err().unwrap().kind(), io::ErrorKind::InvalidInput);
}

#[test]
fn a_segment_names_both_ends() {
    let b = handle().buffer(PAGE_SIZE * 2).unwrap();
    let bytes = |p: &CopyPtr| {
        // SAFETY: both members are 8 bytes, so one can be read as the other.
        let (virt, Foreign { gref, offset, domid }) = unsafe { (p.virt as usize, p.foreign) };
        (virt, (gref, offset, domid))
    };
    let local = b.base() as usize + 192;
    let s = segment(5, &b, &op()).unwrap();
    assert_eq!((bytes(&s.source).1, bytes(&s.dest).0, s.flags), ((8, 96, 5), local, 1));
    let s = segment(5, &b, &CopyOp { direction: Direction::ToGrant, ..op() }).unwrap();
    assert_eq!((bytes(&s.source).0, bytes(&s.dest).1, s.flags), (local, (8, 96, 5), 2));
    assert_eq!((s.len, s.status), (4000, 0));
}

#[test]
fn a_transfer_names_a_page_of_ours_or_of_another_domain() {
    let b = handle().buffer(PAGE_SIZE * 2).unwrap();
    // SAFETY: both members are 8 bytes, so one can be read as the other.
    let named = |p: &CopyPtr| unsafe { (p.virt as usize, p.foreign.gref, p.foreign.domid) };
    let op = |source| Transfer { source, gref: 8, offset: 96, len: 4000, status: 7 };
    let s = transfer_segment(5, &b, &op(Source::Buffer(192))).unwrap();
    assert_eq!((named(&s.source).0, named(&s.dest).1), (b.base() as usize + 192, 8));
    assert_eq!((named(&s.dest).2, s.flags, s.len, s.status), (5, 2, 4000, 0));
    let s = transfer_segment(5, &b, &op(Source::Page { domid: 3, gref: 9, offset: 1 })).unwrap();
    assert_eq!((named(&s.source).1, named(&s.source).2), (9, 3));
    assert_eq!((named(&s.dest).1, named(&s.dest).2, s.flags), (8, 5, 3));
    let outside = Source::Page { domid: 3, gref: 9, offset: 97 };
    for bad in [
        op(outside),
        op(Source::Buffer(2 * PAGE_SIZE - 3999)),
        Transfer { offset: 97, ..op(Source::Buffer(0)) },
    ] {
        let error = handle().transfer(5, &b, &mut [bad]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{bad:?}");
    }
}

#[test]
fn ranges_outside_are_refused_before_the_kernel_sees_them() {
    let g = handle();
    let b = g.buffer(PAGE_SIZE).unwrap();
    for bad in [
        CopyOp { offset: 97, ..op() },
        CopyOp { offset: u16::MAX, len: u16::MAX, ..op() },
        CopyOp { at: 97, ..op() },
        CopyOp { at: usize::MAX, ..op() },
    ] {
        let error = g.copy(1, &b, &mut [CopyOp { at: 96, ..op() }, bad]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{bad:?}");
    }
    let good = CopyOp { at: 96, ..op() };
    assert_eq!(g.copy(1, &b, &mut [good]).unwrap_err().raw_os_error(), Some(25), "ENOTTY");
    g.copy(1, &b, &mut []).unwrap();
}

#[test]
fn a_map_that_fails_reports_it() {
    let g = handle();
    let none = g.map(1, &[], Access::ReadWrite).err().unwrap();
    assert_eq!(none.kind(), io::ErrorKind::InvalidInput);
    assert_eq!(g.map(1, &[8], Access::ReadOnly).err().unwrap().raw_os_error(), Some(25), "ENOTTY");
}

#[test]
fn copies_allocate_only_once() {
    let g = handle();
    let b = g.buffer(PAGE_SIZE).unwrap();
    let mut ops = [CopyOp { at: 96, ..op() }; SEGMENTS];
    let before = g.segments.borrow().as_ptr();
    for _ in 0..3 {
        g.copy(1, &b, &mut ops).unwrap_err();
        assert_eq!(g.segments.borrow().as_ptr(), before);
    }
}
