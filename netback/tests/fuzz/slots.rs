//! Slots of the ring of packets from the guest, through [`Batch`] and the list of group addresses,
//! as a queue's thread uses them.

use hypervisor::Direction;
use netback::live::Wishes;
use netback::negotiate::Multicast;
use netback::offload::claimed;
use netback::proto::TxRequest;
use netback::tx::{Batch, Claim, Dropped, Verdict};
use zerocopy::FromBytes;

use crate::{Source, bytes};

const DATA_BLANK: u16 = 1;
const DATA_VALID: u16 = 2;
const MORE: u16 = 4;
const EXTRA: u16 = 8;
/// References from here on name no page.
const BAD: u32 = 0x8000;

/// A page's byte.
fn byte_of(gref: u32, at: usize) -> u8 {
    (gref.wrapping_mul(2_654_435_761) >> 16) as u8 ^ (at as u8).wrapping_mul(31) ^ (at >> 8) as u8
}

type Slot = [u8; 12];

/// What one packet comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Fate {
    /// The frame that leaves, if one does.
    frame: Option<Vec<u8>>,
    /// What is said of its checksum; kind and size of its segments; its hash.
    claim: u8,
    gso: Option<(u8, u16)>,
    hash: Option<u32>,
    /// Identifier and status of each answer.
    answers: Vec<(u16, i16)>,
    /// Group addresses that the guest has named so far.
    groups: Vec<[u8; 6]>,
}

/// Why the walk ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// All slots belong to whole packets.
    Whole,
    /// The last packet is not all there.
    Open,
    /// The vif ends.
    Dead,
}

fn half(slot: &Slot, at: usize) -> u16 {
    u16::from_le_bytes([slot[at], slot[at + 1]])
}
fn gref(slot: &Slot) -> u32 {
    u32::from_le_bytes([slot[0], slot[1], slot[2], slot[3]])
}

/// The model: netif.h's format of packets, and which faults xen-netback takes for the end.
fn model(slots: &[Slot]) -> (Vec<Fate>, End) {
    let (mut fates, mut groups, mut at) = (Vec::new(), Vec::new(), 0);
    while at < slots.len() {
        match packet(&slots[at..], &mut groups) {
            Ok((fate, used)) => {
                fates.push(fate);
                at += used;
            }
            Err(end) => return (fates, end),
        }
    }
    (fates, End::Whole)
}

/// What the extra infos behind a first slot say.
#[derive(Default)]
struct Said {
    gso: Option<(u8, u16)>,
    hash: Option<u32>,
    group: Option<(u8, [u8; 6])>,
}

fn extras(slots: &[Slot], used: &mut usize) -> Result<Said, End> {
    let mut said = Said::default();
    for count in 1.. {
        let slot = slots.get(*used).ok_or(End::Open)?;
        let data: [u8; 6] = slot[2..8].try_into().unwrap();
        if count > 8 {
            return Err(End::Dead);
        }
        match slot[0] {
            1 if half(slot, 2) == 0 || !(1..=2).contains(&slot[4]) => return Err(End::Dead),
            1 => said.gso = Some((slot[4], half(slot, 2))),
            kind @ (2 | 3) => said.group = Some((kind, data)),
            4 if slot[2] < 4 && slot[3] == 1 => {
                said.hash = Some(u32::from_le_bytes(data[2..].try_into().unwrap()));
            }
            4 => said.hash = None,
            5 => {}
            _ => return Err(End::Dead),
        }
        *used += 1;
        if slot[1] & 1 == 0 {
            break;
        }
    }
    Ok(said)
}

fn packet(slots: &[Slot], groups: &mut Vec<[u8; 6]>) -> Result<(Fate, usize), End> {
    let (first, mut used) = (&slots[0], 1);
    let (flags, total) = (half(first, 6), half(first, 10));
    let said = if flags & EXTRA != 0 { extras(slots, &mut used)? } else { Said::default() };
    let nulls = used - 1;
    let mut ids = vec![half(first, 8)];
    let (mut rest, mut good, mut behind) = (total, true, Vec::new());
    let mut more = flags & MORE != 0 && said.group.is_none();
    while more {
        let slot = slots.get(used).ok_or(End::Open)?;
        used += 1;
        if behind.len() == 20 {
            return Err(End::Dead);
        }
        let (offset, size) = (half(slot, 4), half(slot, 10));
        if u32::from(offset) + u32::from(size) > 4096 {
            return Err(End::Dead);
        }
        good &= behind.len() < 18 && size <= rest;
        rest = rest.saturating_sub(if size <= rest { size } else { 0 });
        behind.push((gref(slot), offset, size));
        ids.push(half(slot, 8));
        more = half(slot, 6) & MORE != 0;
    }
    let mut frame = None;
    if said.group.is_none() && good && total >= 14 {
        if u32::from(half(first, 4)) + u32::from(rest) > 4096 {
            return Err(End::Dead);
        }
        behind.insert(0, (gref(first), half(first, 4), rest));
        if behind.iter().all(|(gref, _, len)| *len == 0 || *gref < BAD) {
            let bytes = behind.iter().flat_map(|(gref, offset, len)| {
                let from = usize::from(*offset);
                (from..from + usize::from(*len)).map(|at| byte_of(*gref, at))
            });
            frame = Some(bytes.collect());
        }
    }
    let listed = said.group.is_some_and(|(kind, group)| change(groups, kind, group));
    let status = if frame.is_some() || listed { 0 } else { -1 };
    let mut answers = vec![(ids[0], status)];
    answers.extend(std::iter::repeat_n((0, 1), nulls));
    answers.extend(ids[1..].iter().map(|id| (*id, status)));
    let claim = if flags & DATA_BLANK != 0 { 2 } else { u8::from(flags & DATA_VALID != 0) };
    let (gso, hash) = (said.gso, said.hash);
    Ok((Fate { frame, claim, gso, hash, answers, groups: groups.clone() }, used))
}

fn change(groups: &mut Vec<[u8; 6]>, kind: u8, group: [u8; 6]) -> bool {
    if kind == 2 {
        let fits = group[0] % 2 == 1 && groups.len() < 64;
        groups.extend(fits.then_some(group));
        return fits;
    }
    let at = groups.iter().position(|known| *known == group);
    at.map(|at| groups.remove(at));
    true
}

/// What the code makes of it. `ends` says after how many packets each batch is done.
fn run(slots: &[Slot], ends: &mut Source<'_>) -> (Vec<Fate>, End) {
    let (mut batch, mut fates) = (Batch::default(), Vec::new());
    let mut wishes = Wishes { multicast: Multicast::Listed, ..Wishes::default() };
    let (mut open, mut limit) = (false, 1);
    for slot in slots {
        let Ok(complete) = batch.push(&TxRequest::read_from_bytes(slot).unwrap()) else {
            finish(&mut batch, &mut wishes, &mut fates);
            return (fates, End::Dead);
        };
        open = !complete;
        // Also while a packet is open.
        if batch.packets().len() >= limit {
            finish(&mut batch, &mut wishes, &mut fates);
            limit = usize::from(ends.byte() % 5);
        }
    }
    finish(&mut batch, &mut wishes, &mut fates);
    (fates, if open { End::Open } else { End::Whole })
}

fn finish(batch: &mut Batch, wishes: &mut Wishes, fates: &mut Vec<Fate>) {
    let mut frames = Vec::new();
    let mut ops = Vec::new();
    for packet in batch.packets() {
        ops.clear();
        let mut bytes = vec![0xa5; usize::from(packet.len)];
        let mut written = 0;
        if packet.verdict == Verdict::Frame {
            batch.copies(packet, 100, 0..usize::MAX, &mut ops);
        }
        for op in &ops {
            assert!(op.len > 0 && usize::from(op.offset) + usize::from(op.len) <= 4096, "{op:?}");
            assert_eq!(op.direction, Direction::FromGrant);
            let from = usize::from(op.offset);
            let to = &mut bytes[op.at - 100..][..usize::from(op.len)];
            to.iter_mut().zip(from..).for_each(|(to, at)| *to = byte_of(op.gref, at));
            written += to.len();
        }
        let failed = ops.iter().any(|op| op.gref >= BAD);
        // Each byte of a frame is written, and none twice.
        assert!(written == if ops.is_empty() { 0 } else { bytes.len() });
        frames.push((!ops.is_empty() && !failed).then_some(bytes));
    }
    for (packet, frame) in batch.packets_mut().iter_mut().zip(&frames) {
        if frame.is_none() && packet.verdict == Verdict::Frame {
            packet.verdict = Verdict::Dropped(Dropped::Copy);
        }
    }
    for (packet, frame) in batch.packets().iter().zip(frames) {
        let accepted = match packet.verdict {
            Verdict::Multicast(group) => wishes.change(group),
            _ => false,
        };
        if let Some(bytes) = &frame {
            // Whatever the bytes are, this ends.
            let _ = claimed(&mut bytes.clone(), packet.claim, packet.gso);
        }
        let mut groups = wishes.groups.clone();
        groups.sort_unstable();
        fates.push(Fate {
            frame,
            claim: match packet.claim {
                Claim::Nothing => 0,
                Claim::Validated => 1,
                Claim::Blank => 2,
            },
            gso: packet.gso.map(|gso| (gso.kind as u8 + 1, gso.size)),
            hash: packet.hash.map(|hash| hash.value),
            answers: batch.answers(packet, accepted).map(|a| (a.id, a.status)).collect(),
            groups,
        });
    }
    batch.clear();
}

/// Slots that make sense as often as not.
fn chain(s: &mut Source<'_>) -> Vec<Slot> {
    let mut slots = Vec::new();
    for _ in 0..s.byte() % 12 + 1 {
        one(s, &mut slots);
    }
    // What is left of a packet, or noise.
    if s.byte() & 7 == 0 {
        slots.truncate(slots.len() - usize::from(s.byte()) % slots.len());
    }
    if s.byte() & 15 == 0 {
        slots.push(std::array::from_fn(|_| s.byte()));
    }
    slots
}

fn slot(gref: u32, offset: u16, flags: u16, id: u16, size: u16) -> Slot {
    let mut slot = [0; 12];
    slot[..4].copy_from_slice(&gref.to_le_bytes());
    for (at, value) in [(4, offset), (6, flags), (8, id), (10, size)] {
        slot[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }
    slot
}

fn one(s: &mut Source<'_>, slots: &mut Vec<Slot>) {
    let style = s.byte();
    let count = s.pick(&[0, 0, 0, 1, 2, 3, 16, 17, 18, 19, 20, 21]);
    let mut sizes: Vec<u16> = (0..count).map(|_| s.pick(&[0, 1, 60, 100, 700])).collect();
    if style & 0x1f == 1 {
        sizes.push(s.half());
    }
    let behind = sizes.iter().fold(0u16, |sum, size| sum.saturating_add(*size));
    let small = u16::from(s.byte());
    let own = s.pick(&[0, 1, 13, 14, 60, 60, small, 4096]);
    let total = match style >> 5 {
        0 => s.half(),
        1 => behind.saturating_sub(small),
        _ => behind.saturating_add(own),
    };
    let fits = |size: u16, s: &mut Source<'_>| match s.byte() {
        0 => s.half(),
        1 => 4097 - size.min(4097),
        _ => s.half() % (4097 - size.min(4096)),
    };
    let page = |s: &mut Source<'_>| match s.byte() {
        n if n < 6 => BAD + u32::from(n),
        n => u32::from(n),
    };
    let infos = s.pick(&[0, 0, 0, 0, 1, 1, 2, 8, 9]);
    let noise = s.half() & (DATA_BLANK | DATA_VALID);
    let extra = if infos > 0 { EXTRA } else { 0 };
    let more = |last: bool| if last { 0 } else { MORE };
    let offset = fits(own, s);
    slots.push(slot(page(s), offset, noise | extra | more(sizes.is_empty()), s.half(), total));
    for n in 1..=infos {
        let mut info: Slot = std::array::from_fn(|_| s.byte());
        info[0] = s.pick(&[1, 1, 2, 2, 2, 3, 4, 4, 5, info[0]]);
        info[1] = u8::from(n < infos);
        if s.byte() > 8 {
            let kind = s.pick(&[1, 2]);
            match info[0] {
                1 => (info[3], info[4]) = (info[3] | 1, kind),
                // Few addresses, so that some meet.
                2 | 3 => info[2..8].copy_from_slice(&[1, 0, 0, 0, 0, kind]),
                4 => (info[2], info[3]) = (info[2] & 3, 1),
                _ => {}
            }
        }
        slots.push(info);
    }
    for (n, size) in sizes.iter().enumerate() {
        let offset = fits(*size, s);
        slots.push(slot(page(s), offset, more(n + 1 == sizes.len()), s.half(), *size));
    }
}

#[derive(Debug, Default)]
struct Seen {
    frames: u32,
    long: u32,
    dropped: u32,
    groups: u32,
    gso: u32,
    dead: u32,
    open: u32,
}

fn judge(input: &[u8], seen: &mut Seen) {
    let mut s = Source(input);
    let slots = chain(&mut s);
    let (mut wanted, end) = model(&slots);
    wanted.iter_mut().for_each(|fate| fate.groups.sort_unstable());
    let (got, got_end) = run(&slots, &mut s);
    assert_eq!(got_end, end, "{slots:?}");
    assert_eq!(got.len(), wanted.len(), "{slots:?}");
    for (got, wanted) in got.iter().zip(&wanted) {
        assert_eq!(got, wanted, "{slots:?}");
    }
    for fate in &wanted {
        let sent = fate.frame.is_some();
        seen.frames += u32::from(sent);
        seen.long += u32::from(sent && fate.answers.len() > 16);
        seen.dropped += u32::from(fate.answers[0].1 < 0);
        seen.groups += u32::from(!sent && fate.answers[0].1 == 0);
        seen.gso += u32::from(sent && fate.gso.is_some());
    }
    seen.dead += u32::from(end == End::Dead);
    seen.open += u32::from(end == End::Open);
}

#[test]
fn slots() {
    bolero::check!()
        .with_max_len(1500)
        .with_iterations(2000)
        .for_each(|input: &[u8]| judge(input, &mut Seen::default()));
}

#[test]
fn slots_that_are_the_same_each_time() {
    let mut seen = Seen::default();
    (0..10_000).for_each(|n| judge(&bytes(n + 1, 1500), &mut seen));
    let Seen { frames, long, dropped, groups, gso, dead, open } = seen;
    let enough = frames > 2000 && long > 100 && dropped > 500 && groups > 200 && gso > 200;
    assert!(enough && dead > 500 && open > 100, "the run hardly tried: {seen:?}");
}

/// The model itself is no echo of the code: each of these it knows by itself.
#[test]
fn a_model_that_disagrees_is_noticed() {
    let fine = slot(5, 100, DATA_VALID, 7, 60);
    let (fates, end) = model(&[fine]);
    let frame: Vec<u8> = (100..160).map(|at| byte_of(5, at)).collect();
    assert_eq!((end, fates[0].frame.as_ref()), (End::Whole, Some(&frame)));
    assert_eq!((fates[0].answers.clone(), fates[0].claim), (vec![(7, 0)], 1));
    // The same past its page, short of a header, on a page that is not there, with more to come.
    assert_eq!(model(&[slot(5, 4037, 0, 7, 60)]).1, End::Dead);
    assert_eq!(model(&[slot(5, 0, 0, 7, 13)]).0[0].answers, [(7, -1)]);
    assert_eq!(model(&[slot(BAD, 0, 0, 7, 60)]).0[0].answers, [(7, -1)]);
    assert_eq!(model(&[slot(5, 0, MORE, 7, 60)]), (vec![], End::Open));
    // And a code that let one of these pass would not agree.
    let (other, _) = run(&[slot(5, 101, DATA_VALID, 7, 60)], &mut Source(&[]));
    assert_ne!(other, fates);
}
