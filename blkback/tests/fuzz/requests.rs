//! A slot's bytes and the bytes of its indirect pages, through [`Abi::parse`], [`validate`] and
//! [`validate_segments`] as the backend uses them.

use blkback::proto::{
    Abi, Body, Checked, DirectOp, Discard, Features, Indirect, Limits, Mode, Range, Request,
    Segment, WireSegment, X86_32, X86_64, validate, validate_segments,
};
use zerocopy::{FromBytes, IntoBytes};

use crate::{Source, bytes};

/// What comes of a request: this status at once, or this work for the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Verdict {
    Answer(i16),
    /// Operation on the wire; sector and sectors; reference, first byte and bytes of each piece.
    Move {
        op: u8,
        at: (u64, u64),
        pieces: Vec<(u32, u64, u64)>,
    },
    Flush(u8),
    Discard {
        at: (u64, u64),
        secure: bool,
    },
}

/// Where fields lie, from io/blkif.h and the ABIs' rules of alignment, by hand.
struct Offsets {
    id: usize,
    sector: usize,
    segments: usize,
    /// Of a discard.
    count: usize,
    /// Of an indirect request.
    grefs: usize,
}
const WIDE: Offsets = Offsets { id: 8, sector: 16, segments: 24, count: 24, grefs: 28 };
const PACKED: Offsets = Offsets { id: 4, sector: 12, segments: 20, count: 20, grefs: 24 };

fn number(raw: &[u8], at: usize, len: usize) -> u64 {
    raw[at..at + len].iter().rev().fold(0, |n, byte| n << 8 | u64::from(*byte))
}

/// The model. `tables` are the pages that the request names, in order, without gaps.
fn model(raw: &[u8], o: &Offsets, limits: &Limits, tables: &[u8]) -> Verdict {
    const ERROR: Verdict = Verdict::Answer(-1);
    const UNSUPPORTED: Verdict = Verdict::Answer(-2);
    let (op, second) = (raw[0], raw[1]);
    let sector = number(raw, o.sector, 8);
    let read_only = limits.mode == Mode::ReadOnly;
    let f = &limits.features;
    let fits = |count: u128| {
        let block = u128::from(limits.block_size / 512);
        let end = u128::from(sector) + count;
        end <= u128::from(limits.sectors)
            && u128::from(sector).is_multiple_of(block)
            && count.is_multiple_of(block)
    };
    let segments = |list: &[u8], op: u8| {
        let mut pieces = Vec::new();
        for entry in list.chunks(8) {
            let (first, last) = (u64::from(entry[4]), u64::from(entry[5]));
            if first > last || last > 7 {
                return ERROR;
            }
            pieces.push((number(entry, 0, 4) as u32, first * 512, (last - first + 1) * 512));
        }
        let count = pieces.iter().map(|p| u128::from(p.2 / 512)).sum::<u128>();
        match count > 0 && fits(count) {
            true => Verdict::Move { op, at: (sector, count as u64), pieces },
            false => ERROR,
        }
    };
    match op {
        2 if !f.barrier => UNSUPPORTED,
        3 if !f.flush => UNSUPPORTED,
        0..=3 if second > 11 => ERROR,
        2 | 3 if second == 0 => Verdict::Flush(op),
        1..=3 if read_only => ERROR,
        0..=3 => segments(&raw[o.segments..o.segments + 8 * usize::from(second)], op),
        5 if !f.discard => UNSUPPORTED,
        5 if read_only => ERROR,
        5 => match number(raw, o.count, 8) {
            0 => Verdict::Answer(0),
            count if fits(count.into()) => {
                let secure = second & 1 == 1 && f.secure_discard;
                Verdict::Discard { at: (sector, count), secure }
            }
            _ => ERROR,
        },
        6 if limits.max_indirect_segments == 0 => UNSUPPORTED,
        6 if second > 1 || second == 1 && read_only => ERROR,
        6 => match number(raw, 2, 2) as usize {
            count if count > usize::from(limits.max_indirect_segments).min(4096) => ERROR,
            count => segments(&tables[..8 * count], second),
        },
        _ => UNSUPPORTED,
    }
}

/// What the code says, asked in the backend's own order.
fn verdict(request: &Request, limits: &Limits, tables: &[u8]) -> Verdict {
    let at = |range: Range| (range.sector, range.sectors);
    let pieces = |list: &[Segment]| {
        list.iter().map(|s| (s.gref, s.offset() as u64, s.len() as u64)).collect::<Vec<_>>()
    };
    match validate(request, limits) {
        Err(refusal) => Verdict::Answer(refusal.status()),
        Ok(Checked::Nothing) => Verdict::Answer(0),
        Ok(Checked::Flush { op }) => Verdict::Flush(op.code()),
        Ok(Checked::Discard { range, kind }) => {
            Verdict::Discard { at: at(range), secure: kind == Discard::Secure }
        }
        Ok(Checked::Transfer { op, range, segments }) => {
            let Body::Direct { segments: all, .. } = &request.body else {
                panic!("a transfer of {request:?}")
            };
            Verdict::Move { op: op.code(), at: at(range), pieces: pieces(&all[..segments]) }
        }
        Ok(Checked::Indirect { op, sector, segments, pages }) => {
            assert_eq!(pages, segments.div_ceil(512));
            let wire = <[WireSegment]>::ref_from_bytes(&tables[..segments * 8]).unwrap();
            let list: Vec<Segment> = wire.iter().map(|w| Segment::from(*w)).collect();
            match validate_segments(sector, &list, limits) {
                Err(refusal) => Verdict::Answer(refusal.status()),
                Ok(range) => {
                    let op = if op == Indirect::Read { 0 } else { 1 };
                    Verdict::Move { op, at: at(range), pieces: pieces(&list) }
                }
            }
        }
    }
}

fn limits(s: &mut Source<'_>) -> Limits {
    let flags = s.byte();
    let on = |bit: u8| flags & 1 << bit != 0;
    Limits {
        sectors: s.pick(&[0, 8, 1000, 40_000, 1 << 40, 1 << 40, 1 << 40, u64::MAX / 512]),
        block_size: s.pick(&[512, 512, 512, 4096, 1024]),
        mode: if flags & 0x70 == 0 { Mode::ReadOnly } else { Mode::ReadWrite },
        max_indirect_segments: s.pick(&[0, 12, 256, 256, 512, 513, 4096, u16::MAX]),
        features: Features { flush: on(0), barrier: on(1), discard: on(2), secure_discard: on(3) },
    }
}

/// A slot whose fields are near what is allowed as often as not; the rest is noise.
fn slot(s: &mut Source<'_>, o: &Offsets, l: &Limits, size: usize) -> Vec<u8> {
    let mut raw: Vec<u8> = (0..size).map(|_| s.byte()).collect();
    let noise = s.byte();
    raw[0] = s.pick(&[0, 1, 2, 3, 5, 6, 6, 6, 6, raw[0]]);
    let count = s.pick(&[0, 1, 2, 10, 11, 12, 255, raw[1]]);
    let inner = s.pick(&[0, 1, 0, 1, 0, 1, 2, raw[1]]);
    raw[1] = if raw[0] == 6 { inner } else { count };
    if raw[0] == 6 && noise & 7 != 0 {
        let limit = l.max_indirect_segments;
        let count = s.pick(&[
            0,
            1,
            12,
            256,
            257,
            513,
            4096,
            limit,
            limit,
            limit / 2,
            limit.wrapping_add(1),
        ]);
        raw[2..4].copy_from_slice(&count.to_le_bytes());
    }
    if noise & 24 != 0 {
        let small = u64::from(s.byte() & 0xf8);
        let sector = s.pick(&[
            0,
            small,
            small + 1,
            l.sectors,
            l.sectors.wrapping_sub(small),
            u64::MAX - small,
        ]);
        raw[o.sector..o.sector + 8].copy_from_slice(&sector.to_le_bytes());
    }
    if raw[0] == 5 && noise & 24 != 0 {
        let small = u64::from(s.byte());
        let count = s.pick(&[0, 8, small, l.sectors, l.sectors + 1, u64::MAX, u64::MAX - small]);
        raw[o.count..o.count + 8].copy_from_slice(&count.to_le_bytes());
    } else if raw[0] < 4 && noise & 24 != 0 {
        let list = bounds(s, 11);
        raw[o.segments..o.segments + 88].copy_from_slice(&list);
    }
    raw
}

/// Segments, nearly all of them good, in one way or another.
fn bounds(s: &mut Source<'_>, count: usize) -> Vec<u8> {
    let mut list = bytes(u64::from(s.word()), count * 8);
    let (style, bad) = (s.byte(), usize::from(s.byte()) * count / 256);
    for (i, entry) in list.chunks_mut(8).enumerate() {
        let (a, b) = (entry[4] & 7, entry[5] & 7);
        let worst = style & 0xe0 == 0 && i == bad;
        (entry[4], entry[5]) = match style % 4 {
            _ if worst => (entry[4], entry[5]),
            0 | 1 => (0, 7),
            _ => (a.min(b), a.max(b)),
        };
    }
    list
}

/// Which kinds of verdict a run has seen.
#[derive(Debug, Default)]
struct Seen {
    moved: u32,
    indirect: u32,
    large: u32,
    discards: u32,
    flushes: u32,
    refused: u32,
}

fn judge<A: Abi>(s: &mut Source<'_>, o: &Offsets, seen: &mut Seen) {
    let limits = limits(s);
    let raw = slot(s, o, &limits, size_of::<A::Req>());
    let tables = if raw[0] == 6 { bounds(s, 4096) } else { Vec::new() };
    let request = A::parse(&A::Req::read_from_bytes(&raw).unwrap());
    let wanted = model(&raw, o, &limits, &tables);
    assert_eq!(verdict(&request, &limits, &tables), wanted, "{raw:?} within {limits:?}");
    // The answer echoes the id and the operation, the inner one where there is one.
    let answer = A::encode_response(&request.answer(-1));
    let echo = answer.as_bytes();
    assert_eq!(number(echo, 0, 8), number(&raw, o.id, 8));
    assert_eq!(echo[8..12], [if raw[0] == 6 { raw[1] } else { raw[0] }, 0, 0xff, 0xff]);
    assert!(echo[12..].iter().all(|byte| *byte == 0));
    if let Body::Indirect { grefs, .. } = request.body {
        let named = |i: usize| number(&raw, o.grefs + 4 * i, 4) as u32;
        assert!((0..8).all(|i| grefs[i] == named(i)));
    }
    match wanted {
        Verdict::Move { pieces, .. } if raw[0] == 6 => {
            seen.indirect += 1;
            seen.large += u32::from(pieces.len() > 512);
        }
        Verdict::Move { .. } => seen.moved += 1,
        Verdict::Discard { .. } => seen.discards += 1,
        Verdict::Flush(_) => seen.flushes += 1,
        Verdict::Answer(_) => seen.refused += 1,
    }
}

fn run(input: &[u8], seen: &mut Seen) {
    let mut s = Source(input);
    match s.byte() & 1 {
        0 => judge::<X86_64>(&mut s, &WIDE, seen),
        _ => judge::<X86_32>(&mut s, &PACKED, seen),
    }
}

#[test]
fn requests() {
    bolero::check!()
        .with_max_len(200)
        .with_iterations(2000)
        .for_each(|input: &[u8]| run(input, &mut Seen::default()));
}

#[test]
fn requests_that_are_the_same_each_time() {
    let mut seen = Seen::default();
    (0..10_000).for_each(|n| run(&bytes(n + 1, 200), &mut seen));
    let Seen { moved, indirect, large, discards, flushes, refused } = seen;
    let enough = moved > 200 && indirect > 200 && large > 20 && discards > 20 && flushes > 50;
    assert!(enough && refused > 200, "the run hardly tried: {seen:?}");
}

/// The model itself is no echo: it refuses what the code of a broken check would let pass.
#[test]
fn a_model_that_disagrees_is_noticed() {
    let l = limits(&mut Source(&[0xff, 3, 0, 2]));
    let good = Segment { gref: 9, first_sect: 0, last_sect: 7 };
    let mut segments = [Segment::default(); 11];
    segments[0] = good;
    let body = Body::Direct { op: DirectOp::Read, sector: l.sectors - 8, nr_segments: 1, segments };
    let request = Request { id: 1, handle: 0, body };
    let raw = X86_64::encode(&request);
    let at = (l.sectors - 8, 8);
    let wanted = Verdict::Move { op: 0, at, pieces: vec![(9, 0, 4096)] };
    assert_eq!(model(raw.as_bytes(), &WIDE, &l, &[]), wanted);
    assert_eq!(verdict(&request, &l, &[]), wanted);
    // With one sector less both refuse; a code that still saw the old size would not.
    let less = Limits { sectors: l.sectors - 1, ..l };
    assert_eq!(model(raw.as_bytes(), &WIDE, &less, &[]), Verdict::Answer(-1));
    assert_ne!(model(raw.as_bytes(), &WIDE, &less, &[]), verdict(&request, &l, &[]));
}
