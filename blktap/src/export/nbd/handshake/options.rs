//! Options with data: which exports there are, what each is, which metadata contexts it has.

use bytes::{Buf, BufMut};

use super::super::proto::{BASE_ALLOCATION, DIRTY_BITMAP, MAX_PAYLOAD, MAX_STRING, info, opt, rep};
use super::super::request::Replies;
use super::{Context, Handshake, Offer, Step};

/// Why an option is refused: the answer's kind and a text.
type Refusal = (u32, &'static str);

const CUT_SHORT: Refusal = (rep::ERR_INVALID, "the option's data and its lengths disagree");
const UNKNOWN: Refusal = (rep::ERR_UNKNOWN, "no export of that name");

/// Takes a string with its length before it.
fn string<'d>(data: &mut &'d [u8]) -> Result<&'d str, Refusal> {
    let len = data.try_get_u32().map_err(|_| CUT_SHORT)? as usize;
    let (text, rest) = data.split_at_checked(len).ok_or(CUT_SHORT)?;
    if len > MAX_STRING {
        return Err((rep::ERR_TOO_BIG, "a name or query longer than 4096 bytes"));
    }
    *data = rest;
    std::str::from_utf8(text).map_err(|_| (rep::ERR_INVALID, "a name that is not UTF-8"))
}

/// What NBD_OPT_INFO and NBD_OPT_GO ask for.
fn infos(mut data: &[u8]) -> Result<(&str, Vec<u16>), Refusal> {
    let name = string(&mut data)?;
    let count = data.try_get_u16().map_err(|_| CUT_SHORT)?;
    if data.len() != usize::from(count) * 2 {
        return Err(CUT_SHORT);
    }
    let wanted = data.chunks_exact(2).map(|c| u16::from_be_bytes([c[0], c[1]]));
    Ok((name, wanted.collect()))
}

/// An export's name and queries for its metadata contexts.
fn queries(mut data: &[u8]) -> Result<(&str, Vec<&str>), Refusal> {
    let name = string(&mut data)?;
    let count = data.try_get_u32().map_err(|_| CUT_SHORT)? as usize;
    // Each takes four bytes at least.
    if count > data.len() / 4 {
        return Err(CUT_SHORT);
    }
    let queries = (0..count).map(|_| string(&mut data)).collect::<Result<Vec<_>, _>>()?;
    if data.is_empty() { Ok((name, queries)) } else { Err(CUT_SHORT) }
}

impl Offer {
    fn all_contexts(&self) -> impl Iterator<Item = Context> {
        let bitmaps = self.bitmaps.iter().cloned().map(Context::Bitmap);
        std::iter::once(Context::Allocation).chain(bitmaps)
    }
}

/// Whether a query of NBD_OPT_LIST_META_CONTEXT asks for a context: by its whole name, or by
/// the part up to a colon.
fn lists(query: &str, context: &str) -> bool {
    query == context
        || (query == "base:" && context == BASE_ALLOCATION)
        || (matches!(query, "qemu:" | DIRTY_BITMAP) && context.starts_with(DIRTY_BITMAP))
}

impl Handshake<'_> {
    pub(super) fn list(&mut self) {
        for offer in self.offers {
            let mut data = Vec::with_capacity(4 + offer.name.len() + offer.description.len());
            data.put_u32(offer.name.len() as u32);
            data.put_slice(offer.name.as_bytes());
            data.put_slice(offer.description.as_bytes());
            self.reply(opt::LIST, rep::SERVER, &data);
        }
        self.reply(opt::LIST, rep::ACK, &[]);
    }

    pub(super) fn info(&mut self, option: u32, data: &[u8]) -> Step {
        let found = infos(data).and_then(|(name, wanted)| {
            self.find(name).map(|export| (export, wanted)).ok_or(UNKNOWN)
        });
        let (export, wanted) = match found {
            Ok(found) => found,
            Err((kind, why)) => {
                self.refuse(option, kind, why);
                return Step::Next;
            }
        };
        let offer = &self.offers[export];
        let asked = wanted.contains(&info::BLOCK_SIZE);
        let mut data = Vec::with_capacity(64);
        let mut tell = |handshake: &mut Self, kind: u16, put: &dyn Fn(&mut Vec<u8>)| {
            data.clear();
            data.put_u16(kind);
            put(&mut data);
            handshake.reply(option, rep::INFO, &data);
        };
        let flags = self.flags_of(offer);
        if wanted.contains(&info::NAME) {
            tell(self, info::NAME, &|d| d.put_slice(offer.name.as_bytes()));
        }
        if wanted.contains(&info::DESCRIPTION) && !offer.description.is_empty() {
            tell(self, info::DESCRIPTION, &|d| d.put_slice(offer.description.as_bytes()));
        }
        // As QEMU: a client that has not asked need not keep to it, so it is told 1.
        let told = if asked || option == opt::INFO { offer.minimum } else { 1 };
        tell(self, info::BLOCK_SIZE, &|d| {
            d.put_u32(told);
            d.put_u32(offer.preferred);
            d.put_u32(MAX_PAYLOAD);
        });
        tell(self, info::EXPORT, &|d| {
            d.put_u64(offer.size);
            d.put_u16(flags);
        });
        self.reply(option, rep::ACK, &[]);
        if option == opt::INFO {
            return Step::Next;
        }
        Step::Begin(self.session(export, if asked { offer.minimum } else { 1 }))
    }

    pub(super) fn contexts(&mut self, option: u32, data: &[u8]) {
        let setting = option == opt::SET_META_CONTEXT;
        if setting {
            self.chosen = None;
        }
        if self.replies == Replies::Simple {
            let why = "structured replies come first: NBD_OPT_STRUCTURED_REPLY";
            return self.refuse(option, rep::ERR_INVALID, why);
        }
        let found = queries(data).and_then(|(name, queries)| {
            self.find(name).map(|export| (export, queries)).ok_or(UNKNOWN)
        });
        let (export, queries) = match found {
            Ok(found) => found,
            Err((kind, why)) => return self.refuse(option, kind, why),
        };
        let all = !setting && queries.is_empty();
        let wants = |name: &str| match setting {
            true => queries.contains(&name),
            false => all || queries.iter().any(|q| lists(q, name)),
        };
        let chosen: Vec<Context> =
            self.offers[export].all_contexts().filter(|c| wants(&c.name())).collect();
        for (number, context) in chosen.iter().enumerate() {
            let mut data = Vec::new();
            data.put_u32(if setting { number as u32 } else { 0 });
            data.put_slice(context.name().as_bytes());
            self.reply(option, rep::META_CONTEXT, &data);
        }
        self.reply(option, rep::ACK, &[]);
        if setting {
            self.chosen = Some((export, chosen));
        }
    }
}
