use proptest::prelude::*;
use zerocopy::{FromBytes, IntoBytes};

use super::*;

const LIMITS: Limits = Limits {
    sectors: 1000,
    block_size: 512,
    mode: Mode::ReadWrite,
    max_indirect_segments: 256,
    features: Features { flush: true, barrier: true, discard: true, secure_discard: true },
};
const PAGE: Segment = Segment { gref: 9, first_sect: 0, last_sect: 7 };

fn request(body: Body) -> Request {
    Request { id: 77, handle: 51712, body }
}

fn direct(op: DirectOp, sector: u64, list: &[Segment]) -> Request {
    let mut segments = [Segment::default(); MAX_SEGMENTS];
    segments[..list.len()].copy_from_slice(list);
    request(Body::Direct { op, sector, nr_segments: list.len() as u8, segments })
}

fn indirect(inner: u8, sector: u64, nr_segments: u16) -> Request {
    request(Body::Indirect { inner, nr_segments, sector, grefs: [8; MAX_INDIRECT_PAGES] })
}

fn discard(sector: u64, count: u64, flag: u8) -> Request {
    request(Body::Discard { sector, count, flag })
}

#[test]
fn what_passes() {
    use DirectOp::*;
    let range = |sector, sectors| Range { sector, sectors };
    for (r, want) in [
        (direct(Read, 0, &[PAGE]), Checked::Transfer { op: Read, range: range(0, 8), segments: 1 }),
        (
            direct(Write, 999, &[Segment { gref: 1, first_sect: 7, last_sect: 7 }]),
            Checked::Transfer { op: Write, range: range(999, 1), segments: 1 },
        ),
        (
            direct(Barrier, 912, &[PAGE; 11]),
            Checked::Transfer { op: Barrier, range: range(912, 88), segments: 11 },
        ),
        (
            direct(Flush, 4, &[PAGE]),
            Checked::Transfer { op: Flush, range: range(4, 8), segments: 1 },
        ),
        (direct(Flush, u64::MAX, &[]), Checked::Flush { op: Flush }),
        (direct(Barrier, u64::MAX, &[]), Checked::Flush { op: Barrier }),
        (
            indirect(OP_READ, 5, 256),
            Checked::Indirect { op: Indirect::Read, sector: 5, segments: 256, pages: 1 },
        ),
        (discard(0, 1000, 0), Checked::Discard { range: range(0, 1000), kind: Discard::Plain }),
        (discard(1, 2, 1), Checked::Discard { range: range(1, 2), kind: Discard::Secure }),
        (discard(u64::MAX, 0, 1), Checked::Nothing),
    ] {
        assert_eq!(validate(&r, &LIMITS), Ok(want), "{r:?}");
    }
}

#[test]
fn what_is_refused() {
    let read = |sector, list: &[Segment]| direct(DirectOp::Read, sector, list);
    let segment = |first_sect, last_sect| Segment { gref: 1, first_sect, last_sect };
    let mut twelve = read(0, &[PAGE; 11]);
    if let Body::Direct { nr_segments, .. } = &mut twelve.body {
        *nr_segments = 12;
    }
    for (r, text) in [
        (request(Body::Unknown(4)), "unknown operation 4"),
        (read(0, &[]), "no segments"),
        (direct(DirectOp::Write, 0, &[]), "no segments"),
        (twelve, "12 segments, at most 11 allowed"),
        (read(0, &[PAGE, segment(3, 2)]), "segment 1: sectors 3 to 2 of a page of 8"),
        (read(0, &[segment(0, 8)]), "segment 0: sectors 0 to 8 of a page of 8"),
        (read(0, &[segment(255, 255)]), "segment 0: sectors 255 to 255 of a page of 8"),
        (read(993, &[PAGE]), "8 sectors from sector 993 on a disk of 1000 sectors"),
        (
            read(u64::MAX - 7, &[PAGE]),
            "8 sectors from sector 18446744073709551608 on a disk of 1000 sectors",
        ),
        (indirect(OP_READ, 0, 0), "no segments"),
        (indirect(OP_READ, 0, 257), "257 segments, at most 256 allowed"),
        (indirect(OP_INDIRECT, 0, 1), "indirect operation 6 is neither read nor write"),
        (indirect(OP_DISCARD, 0, 1), "indirect operation 5 is neither read nor write"),
        (indirect(OP_WRITE, 1000, 1), "1 sectors from sector 1000 on a disk of 1000 sectors"),
        (discard(1, 1000, 0), "1000 sectors from sector 1 on a disk of 1000 sectors"),
        (
            discard(2, u64::MAX, 0),
            "18446744073709551615 sectors from sector 2 on a disk of 1000 sectors",
        ),
    ] {
        let refusal = validate(&r, &LIMITS).unwrap_err();
        assert_eq!(refusal.to_string(), text);
        let unsupported = matches!(refusal, Refusal::UnknownOperation(_));
        assert_eq!(refusal.status(), if unsupported { RSP_EOPNOTSUPP } else { RSP_ERROR });
    }
}

#[test]
fn what_was_not_offered() {
    let bare = Limits { max_indirect_segments: 0, features: Features::default(), ..LIMITS };
    for r in [
        direct(DirectOp::Barrier, 0, &[PAGE]),
        direct(DirectOp::Flush, 0, &[]),
        discard(0, 1, 0),
        indirect(OP_READ, 0, 1),
    ] {
        let refusal = validate(&r, &bare).unwrap_err();
        assert_eq!(refusal.to_string(), format!("operation {} was not offered", r.operation()));
        assert_eq!(refusal.status(), RSP_EOPNOTSUPP);
    }
    let no_secure = Features { secure_discard: false, ..LIMITS.features };
    let got = validate(&discard(0, 1, 1), &Limits { features: no_secure, ..LIMITS });
    let range = Range { sector: 0, sectors: 1 };
    assert_eq!(got, Ok(Checked::Discard { range, kind: Discard::Plain }));
}

#[test]
fn a_read_only_disk() {
    let limits = Limits { mode: Mode::ReadOnly, ..LIMITS };
    for r in [
        direct(DirectOp::Write, 0, &[PAGE]),
        direct(DirectOp::Barrier, 0, &[PAGE]),
        direct(DirectOp::Flush, 0, &[PAGE]),
        indirect(OP_WRITE, 0, 1),
        discard(0, 1, 0),
    ] {
        assert_eq!(validate(&r, &limits), Err(Refusal::ReadOnly), "{r:?}");
        assert_eq!(Refusal::ReadOnly.status(), RSP_ERROR);
    }
    for r in [
        direct(DirectOp::Read, 0, &[PAGE]),
        indirect(OP_READ, 0, 1),
        direct(DirectOp::Flush, 0, &[]),
    ] {
        assert!(validate(&r, &limits).is_ok());
    }
}

#[test]
fn blocks_of_4096_bytes() {
    let limits = Limits { block_size: 4096, ..LIMITS };
    let half = Segment { gref: 1, first_sect: 0, last_sect: 3 };
    assert!(validate(&direct(DirectOp::Read, 8, &[PAGE]), &limits).is_ok());
    assert!(validate(&direct(DirectOp::Read, 8, &[half, half]), &limits).is_ok());
    for r in [
        direct(DirectOp::Read, 4, &[PAGE]),
        direct(DirectOp::Write, 8, &[half]),
        discard(8, 4, 0),
        discard(4, 8, 0),
    ] {
        let refusal = validate(&r, &limits).unwrap_err();
        assert!(matches!(refusal, Refusal::Misaligned { .. }), "{refusal}");
        assert_eq!(refusal.status(), RSP_ERROR);
    }
    let text = validate_segments(8, &[half], &limits).unwrap_err().to_string();
    assert_eq!(text, "4 sectors from sector 8 are not whole blocks of 4096 bytes");
}

#[test]
fn no_more_than_the_format_holds() {
    let limits = Limits { max_indirect_segments: u16::MAX, sectors: 1 << 40, ..LIMITS };
    let pages = |n| match validate(&indirect(OP_READ, 0, n), &limits) {
        Ok(Checked::Indirect { pages, .. }) => Some(pages),
        _ => None,
    };
    assert_eq!([1, 512, 513, 4096, 4097].map(pages), [Some(1), Some(1), Some(2), Some(8), None]);
}

#[test]
fn answers_echo_the_inner_operation() {
    assert_eq!(indirect(OP_WRITE, 0, 1).answer(RSP_OKAY).operation, OP_WRITE);
    assert_eq!(request(Body::Unknown(9)).answer(RSP_EOPNOTSUPP).operation, 9);
    let r = discard(0, 1, 0).answer(RSP_ERROR);
    assert_eq!(r, Response { id: 77, operation: OP_DISCARD, status: -1 });
}

fn any_segment() -> impl Strategy<Value = Segment> {
    any::<(u32, u8, u8)>().prop_map(|(gref, first_sect, last_sect)| Segment {
        gref,
        first_sect,
        last_sect,
    })
}

fn any_body() -> impl Strategy<Value = Body> {
    let op = prop_oneof![
        Just(DirectOp::Read),
        Just(DirectOp::Write),
        Just(DirectOp::Barrier),
        Just(DirectOp::Flush)
    ];
    prop_oneof![
        (op, any::<u64>(), any::<u8>(), prop::array::uniform11(any_segment())).prop_map(
            |(op, sector, nr_segments, mut segments)| {
                segments.iter_mut().skip(nr_segments.into()).for_each(|s| *s = Segment::default());
                Body::Direct { op, sector, nr_segments, segments }
            }
        ),
        any::<(u8, u16, u64, [u32; 8])>().prop_map(|(inner, nr_segments, sector, grefs)| {
            Body::Indirect { inner, nr_segments, sector, grefs }
        }),
        any::<(u64, u64, bool)>().prop_map(|(sector, count, secure)| Body::Discard {
            sector,
            count,
            flag: secure.into()
        }),
        prop_oneof![Just(4u8), 7u8..].prop_map(Body::Unknown),
    ]
}

fn round_trip<A: Abi>(request: &Request, response: &Response) -> Result<(), TestCaseError> {
    prop_assert_eq!(A::parse(&A::encode(request)), *request);
    prop_assert_eq!(A::parse_response(&A::encode_response(response)), *response);
    Ok(())
}

fn any_bytes<A: Abi>(bytes: &[u8], limits: &Limits) -> Result<(), TestCaseError> {
    let raw = A::Req::read_from_prefix(bytes).unwrap().0;
    let request = A::parse(&raw);
    prop_assert_eq!(raw.as_bytes()[0], request.operation());
    // What is written again reads the same, whatever it is.
    prop_assert_eq!(A::parse(&A::encode(&request)), request);
    match validate(&request, limits) {
        Ok(Checked::Transfer { range, .. } | Checked::Discard { range, .. }) => {
            prop_assert!(range.sectors > 0 && range.sector + range.sectors <= limits.sectors);
        }
        Ok(Checked::Indirect { segments, pages, .. }) => {
            prop_assert!(
                segments <= MAX_INDIRECT_SEGMENTS && pages * SEGMENTS_PER_PAGE >= segments
            );
        }
        Ok(Checked::Flush { .. } | Checked::Nothing) => {}
        Err(refusal) => prop_assert!(refusal.status() < 0),
    }
    Ok(())
}

proptest! {
    #[test]
    fn requests_and_responses_round_trip(
        id: u64, handle: u16, body in any_body(), operation: u8, status: i16,
    ) {
        let (request, response) = (Request { id, handle, body }, Response { id, operation, status });
        round_trip::<Native>(&request, &response)?;
        round_trip::<X86_32>(&request, &response)?;
        round_trip::<X86_64>(&request, &response)?;
    }

    #[test]
    fn arbitrary_bytes_are_harmless(
        mut bytes in prop::collection::vec(any::<u8>(), 112), op in 0u8..8, sectors: u64, wide: bool,
    ) {
        bytes[0] = op;
        let sectors = if wide { u64::MAX } else { sectors };
        let limits = Limits { sectors, max_indirect_segments: u16::MAX, ..LIMITS };
        any_bytes::<Native>(&bytes, &limits)?;
        any_bytes::<X86_32>(&bytes, &limits)?;
        any_bytes::<X86_64>(&bytes, &limits)?;
    }
}
