//! Fuzz targets: any bytes are a client's handshake, or its requests, judged by models that are
//! written from the protocol's text and share no code with the server.
//!
//! `cargo test` replays the corpus and adds a short random run. Longer:
//! `BOLERO_RANDOM_TEST_TIME_MS=600000 BOLERO_RANDOM_ITERATIONS=1000000000 cargo test --release -p ringback-blktap --test nbd fuzz`.

use blktap::export::nbd::handshake::{Handshake, Offer, Security, Step};
use blktap::export::nbd::proto::RequestHeader;
use blktap::export::nbd::request::{Replies, Terms, Verdict, judge};
use zerocopy::FromBytes;

fn offers() -> Vec<Offer> {
    let offer = |name: &str, bitmaps: &[&str]| Offer {
        name: name.into(),
        description: "d".into(),
        size: 1 << 30,
        flags: 0x5ef & !0x80,
        minimum: 512,
        preferred: 4096,
        bitmaps: bitmaps.iter().map(|b| (*b).to_owned()).collect(),
    };
    vec![offer("", &["b"]), offer("x", &[])]
}

/// How a handshake ends.
#[derive(Debug, PartialEq)]
enum End {
    More,
    Broken,
    Abort,
    Tls,
    Begin { export: usize, alignment: u32, contexts: usize },
}

/// The last answer to each option, and the end.
type Story = (Vec<(u32, u32)>, End);

const ACK: u32 = 1;
const INVALID: u32 = 0x8000_0003;

/// The model: the whole input at once.
struct Model<'a> {
    rest: &'a [u8],
    told: Vec<(u32, u32)>,
    structured: bool,
    contexts: Option<(usize, usize)>,
}

fn cut<'a>(rest: &mut &'a [u8], n: usize) -> Option<&'a [u8]> {
    if rest.len() < n {
        return None;
    }
    let (taken, after) = rest.split_at(n);
    *rest = after;
    Some(taken)
}

fn number(rest: &mut &[u8], n: usize) -> Option<u64> {
    Some(cut(rest, n)?.iter().fold(0, |sum, b| sum << 8 | u64::from(*b)))
}

/// A counted string, or the error for it.
fn text<'a>(rest: &mut &'a [u8]) -> Result<&'a str, u32> {
    let len = number(rest, 4).ok_or(INVALID)? as usize;
    let bytes = cut(rest, len).ok_or(INVALID)?;
    if len > 4096 {
        return Err(0x8000_0009);
    }
    std::str::from_utf8(bytes).map_err(|_| INVALID)
}

fn export(name: &str) -> Result<usize, u32> {
    match name {
        "" => Ok(0),
        "x" => Ok(1),
        _ => Err(0x8000_0006),
    }
}

impl Model<'_> {
    fn info(mut data: &[u8]) -> Result<(usize, bool), u32> {
        let name = text(&mut data)?;
        let count = number(&mut data, 2).ok_or(INVALID)? as usize;
        if data.len() != 2 * count {
            return Err(INVALID);
        }
        Ok((export(name)?, data.chunks(2).any(|c| c == [0, 3])))
    }

    fn meta(mut data: &[u8]) -> Result<(usize, usize), u32> {
        let name = text(&mut data)?;
        let count = number(&mut data, 4).ok_or(INVALID)?;
        if count > data.len() as u64 / 4 {
            return Err(INVALID);
        }
        let mut queries = Vec::new();
        for _ in 0..count {
            queries.push(text(&mut data)?);
        }
        if !data.is_empty() {
            return Err(INVALID);
        }
        let export = export(name)?;
        let all: &[&str] = match export {
            0 => &["base:allocation", "qemu:dirty-bitmap:b"],
            _ => &["base:allocation"],
        };
        Ok((export, all.iter().filter(|c| queries.contains(*c)).count()))
    }

    fn begin(&self, export: usize, alignment: u32) -> End {
        let contexts = self.contexts.filter(|(of, _)| *of == export).map_or(0, |(_, n)| n);
        End::Begin { export, alignment, contexts }
    }

    fn run(&mut self, encrypted: bool) -> End {
        match number(&mut self.rest, 4) {
            None => return End::More,
            Some(flags) if flags > 3 => return End::Broken,
            Some(_) => {}
        }
        for count in 0.. {
            if self.rest.len() < 16 {
                return End::More;
            }
            let magic = number(&mut self.rest, 8);
            let option = number(&mut self.rest, 4).unwrap_or(0) as u32;
            let len = number(&mut self.rest, 4).unwrap_or(0) as usize;
            if magic != Some(0x4948_4156_454f_5054) || len > 65536 || count == 128 {
                return End::Broken;
            }
            let Some(data) = cut(&mut self.rest, len) else { return End::More };
            if let Some(end) = self.option(option, data, encrypted) {
                return end;
            }
        }
        End::More
    }

    fn option(&mut self, option: u32, data: &[u8], demanded: bool) -> Option<End> {
        let mut tell = |kind: u32| self.told.push((option, kind));
        match option {
            2 => {
                tell(ACK);
                return Some(End::Abort);
            }
            5 if !data.is_empty() => tell(INVALID),
            5 if demanded => {
                tell(ACK);
                return Some(End::Tls);
            }
            5 => tell(0x8000_0002),
            1 if demanded => return Some(End::Broken),
            _ if demanded => tell(0x8000_0005),
            1 => {
                let name = std::str::from_utf8(data).ok().and_then(|name| export(name).ok());
                return Some(name.map_or(End::Broken, |export| self.begin(export, 1)));
            }
            3 | 8 if !data.is_empty() => tell(INVALID),
            3 => tell(ACK),
            8 => {
                tell(ACK);
                self.structured = true;
            }
            6 | 7 => match Self::info(data) {
                Err(error) => tell(error),
                Ok((export, asked)) => {
                    tell(ACK);
                    if option == 7 {
                        return Some(self.begin(export, if asked { 512 } else { 1 }));
                    }
                }
            },
            9 | 10 => {
                let found = if self.structured { Self::meta(data) } else { Err(INVALID) };
                tell(found.map_or_else(|e| e, |_| ACK));
                if option == 10 {
                    self.contexts = found.ok();
                }
            }
            _ => tell(0x8000_0001),
        }
        None
    }
}

/// The server's handshake, fed piece by piece.
fn served(input: &[u8], piece: usize, security: Security) -> Story {
    let offers = offers();
    let mut handshake = Handshake::new(&offers, security);
    let (mut seen, mut fed) = (Vec::new(), 0);
    let end = loop {
        match handshake.advance(&seen) {
            Err(_) => break End::Broken,
            Ok((used, Step::More)) => {
                assert_eq!(used, 0);
                if fed == input.len() {
                    break End::More;
                }
                let next = (fed + piece).min(input.len());
                seen.extend_from_slice(&input[fed..next]);
                fed = next;
            }
            Ok((used, step)) => {
                assert!(used > 0 && used <= seen.len());
                seen.drain(..used);
                match step {
                    Step::Abort => break End::Abort,
                    Step::StartTls => break End::Tls,
                    Step::Begin(s) => {
                        assert_eq!(s.contexts.len(), s.terms.contexts);
                        let (export, alignment) = (s.export, s.terms.alignment);
                        break End::Begin { export, alignment, contexts: s.contexts.len() };
                    }
                    Step::More | Step::Next => {}
                }
            }
        }
    };
    let mut out = &handshake.out[18..];
    let mut told = Vec::new();
    // What NBD_OPT_EXPORT_NAME is answered with has no head.
    while out.starts_with(&[0, 3, 0xe8, 0x89, 4, 0x55, 0x65, 0xa9]) {
        cut(&mut out, 8);
        let option = number(&mut out, 4).expect("an option") as u32;
        let kind = number(&mut out, 4).expect("a kind") as u32;
        let len = number(&mut out, 4).expect("a length") as usize;
        cut(&mut out, len).expect("all of the data");
        if kind == ACK || kind >= 1 << 31 {
            told.push((option, kind));
        }
    }
    (told, end)
}

/// Bytes to a client's words: whole options, options with a length that lies, and any bytes.
fn words(input: &[u8]) -> Vec<u8> {
    let mut out = vec![0, 0, 0, 3];
    let mut rest = input;
    while let Some([kind, how, n]) = rest.first_chunk::<3>().copied() {
        rest = &rest[3..];
        let name: &[u8] = [&b""[..], b"x", b"nobody", &[0xff]][usize::from(how & 3)];
        let option: u32 =
            [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 7, 10, 8, 6, 10, 7][usize::from(kind & 15)];
        let mut data = Vec::new();
        match option {
            1 => data.extend(name),
            6 | 7 => {
                data.extend((name.len() as u32).to_be_bytes());
                data.extend(name);
                data.extend(u16::from(n & 3).to_be_bytes());
                (0..n & 3).for_each(|i| data.extend([0, (n >> 2) % 4 + i]));
            }
            9 | 10 => {
                data.extend((name.len() as u32).to_be_bytes());
                data.extend(name);
                data.extend(u32::from(n & 3).to_be_bytes());
                for i in 0..n & 3 {
                    let queries = [&b"base:allocation"[..], b"qemu:dirty-bitmap:b", b"base:", b""];
                    let query = queries[usize::from((n >> 2).wrapping_add(i) & 3)];
                    data.extend((query.len() as u32).to_be_bytes());
                    data.extend(query);
                }
            }
            _ => {}
        }
        // Now and then something is wrong with it.
        match how >> 4 {
            1 => data.push(n),
            2 => drop(data.pop()),
            3 => data.extend_from_slice(&rest[..rest.len().min(n.into())]),
            4 if !data.is_empty() => {
                let at = usize::from(n) % data.len();
                data[at] ^= 1 << (kind >> 5);
            }
            _ => {}
        }
        out.extend(b"IHAVEOPT");
        out.extend(option.to_be_bytes());
        let lie = if how >> 4 == 5 { u32::from(n) << (kind >> 3) } else { 0 };
        out.extend((data.len() as u32 ^ lie).to_be_bytes());
        out.extend(data);
    }
    out.extend(rest);
    out
}

fn compare_handshakes(input: &[u8]) -> End {
    let Some((how, rest)) = input.split_first() else { return End::More };
    let built = words(rest);
    let bytes = if how & 1 == 0 { &built } else { rest };
    let (security, demanded) = match how & 6 {
        6 => (Security::Demanded, true),
        _ => (Security::Plain, false),
    };
    let mut model = Model { rest: bytes, told: Vec::new(), structured: false, contexts: None };
    let end = model.run(demanded);
    let story = served(bytes, usize::from(how >> 3) + 1, security);
    assert_eq!(story, (model.told, end));
    story.1
}

/// What becomes of a request: an error, a yes, or the end.
fn modelled(bytes: &[u8; 28], terms: &Terms) -> Result<u16, i64> {
    let field = |at: usize, n: usize| number(&mut &bytes[at..], n).expect("bytes");
    let (flags, command) = (field(4, 2), field(6, 2));
    let (offset, len) = (u128::from(field(16, 8)), u128::from(field(24, 4)));
    if field(0, 4) != 0x2560_9513 || (command == 1 && len > 32 << 20) || command == 2 {
        return Err(-1);
    }
    let own = match command {
        0 if terms.flags & 0x80 != 0 => 4,
        6 => 2,
        7 => 8,
        _ => 0,
    };
    let (einval, enospc, eperm) = (Err(22), Err(28), Err(1));
    if flags & !(1 | own) != 0 || command > 7 {
        return einval;
    }
    if command == 3 {
        return Ok(3);
    }
    if command == 7 && (terms.contexts == 0) {
        return einval;
    }
    if matches!(command, 1 | 4 | 6) && terms.flags & 2 != 0 {
        return eperm;
    }
    let unit = u128::from(terms.alignment);
    if (command == 4 && terms.flags & 0x20 == 0) || offset % unit != 0 || len % unit != 0 {
        return einval;
    }
    if (command == 0 && len > 32 << 20) || (command == 7 && len == 0) {
        return einval;
    }
    if offset + len > u128::from(terms.size) {
        return if matches!(command, 1 | 6) { enospc } else { einval };
    }
    Ok(command as u16)
}

fn compare_requests(input: &[u8]) -> (u32, u32) {
    let (mut done, mut refused) = (0, 0);
    let Some((how, rest)) = input.split_first() else { return (0, 0) };
    let terms = Terms {
        size: 1 << 20,
        flags: 0x5ef & !if how & 1 == 0 { 2 } else { 0 } & !if how & 2 == 0 { 0x20 } else { 0 },
        alignment: if how & 4 == 0 { 512 } else { 1 },
        replies: Replies::Structured,
        contexts: usize::from(how >> 3 & 1),
    };
    for raw in rest.chunks_exact(12) {
        let mut bytes = [0u8; 28];
        bytes[..4].copy_from_slice(&0x2560_9513u32.to_be_bytes());
        bytes[3] ^= u8::from(raw[0] == 0xff);
        (bytes[5], bytes[7]) = (if raw[1] < 200 { raw[1] & 1 } else { raw[1] }, raw[0] % 9);
        // Small numbers around the limits, and any.
        let small = |b: &[u8]| (u64::from(b[0]) << 16 | u64::from(b[1]) << 8) & !0x1ff;
        let offset = if raw[2] & 1 == 0 {
            small(&raw[3..5])
        } else {
            u64::from_be_bytes([raw[3], 0, 0, 0, 0, raw[4], raw[5], raw[6]])
        };
        let len = if raw[2] & 2 == 0 {
            small(&raw[7..9]) as u32
        } else {
            u32::from_be_bytes([raw[7], raw[8], raw[9], raw[10]])
        };
        bytes[16..24].copy_from_slice(&offset.to_be_bytes());
        bytes[24..].copy_from_slice(&len.to_be_bytes());
        let header = RequestHeader::read_from_bytes(&bytes).expect("28 bytes");
        let verdict = match judge(&header, &terms) {
            Verdict::Do(_) => Ok(u16::from(bytes[7])),
            Verdict::Refuse(errno, payload) => {
                assert_eq!(payload, if bytes[7] == 1 { len } else { 0 });
                Err(errno.into())
            }
            Verdict::Disconnect | Verdict::Broken(_) => Err(-1),
        };
        assert_eq!(verdict, modelled(&bytes, &terms), "{header:?} {terms:?}");
        *if verdict.is_ok() { &mut done } else { &mut refused } += 1;
    }
    (done, refused)
}

#[test]
fn fuzz_handshake() {
    bolero::check!()
        .with_max_len(2000)
        .with_iterations(20_000)
        .for_each(|input: &[u8]| _ = compare_handshakes(input));
}

#[test]
fn fuzz_requests() {
    bolero::check!()
        .with_max_len(1201)
        .with_iterations(5_000)
        .for_each(|input: &[u8]| _ = compare_requests(input));
}

/// The same each time, and it reaches what it is for.
#[test]
fn fuzz_reaches_all_ends() {
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 56) as u8
    };
    let (mut begun, mut broken, mut tls, mut abort, mut contexts) = (0, 0, 0, 0, 0);
    let (mut done, mut refused) = (0, 0);
    for round in 0..20_000 {
        let mut input: Vec<u8> = (0..60).map(|_| next()).collect();
        input[0] &= !1;
        match compare_handshakes(&input) {
            End::Begin { contexts: n, .. } => (begun, contexts) = (begun + 1, contexts + n),
            End::Broken => broken += 1,
            End::Tls => tls += 1,
            End::Abort => abort += 1,
            End::More => {}
        }
        if round % 10 == 0 {
            let (d, r) = compare_requests(&input);
            (done, refused) = (done + d, refused + r);
        }
    }
    let all = [begun, broken, tls, abort, contexts as u32, done, refused];
    assert!(all.iter().all(|n| *n > 50), "{all:?}");
}
