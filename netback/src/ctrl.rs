//! Requests of the control ring (netif.h, "Control messages"): how the guest wants its packets
//! hashed, and which pages it wants kept mapped ([`lists`]). Pure. Whatever a request says, it gets an
//! answer with a status, and what it got wrong changes nothing.

pub mod lists;
mod ring;

use std::sync::Arc;

use crate::hash::{Algorithm, HASH_TYPES, MAX_KEY, MAX_MAPPING, Spread};
use crate::proto::{
    CTRL_GET_HASH_FLAGS, CTRL_GET_HASH_MAPPING_SIZE, CTRL_SET_HASH_ALGORITHM, CTRL_SET_HASH_FLAGS,
    CTRL_SET_HASH_KEY, CTRL_SET_HASH_MAPPING, CTRL_SET_HASH_MAPPING_SIZE,
    CTRL_STATUS_BUFFER_OVERFLOW, CTRL_STATUS_INVALID_PARAMETER, CTRL_STATUS_NOT_SUPPORTED,
    CTRL_STATUS_SUCCESS, CtrlRequest, CtrlResponse,
};
pub(crate) use ring::{CtrlRing, Start};

/// Most bytes that a request has read from a page of the guest's.
pub const MAX_READ: usize = MAX_MAPPING * size_of::<u32>();
const _: () = assert!(MAX_KEY <= MAX_READ && MAX_READ <= rings::PAGE_SIZE);

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refusal {
    NotSupported,
    InvalidParameter,
    BufferOverflow,
}

impl Refusal {
    fn status(self) -> u32 {
        match self {
            Refusal::NotSupported => CTRL_STATUS_NOT_SUPPORTED,
            Refusal::InvalidParameter => CTRL_STATUS_INVALID_PARAMETER,
            Refusal::BufferOverflow => CTRL_STATUS_BUFFER_OVERFLOW,
        }
    }
}

use Refusal::{BufferOverflow, InvalidParameter, NotSupported};

/// What is there once a request was carried out.
pub struct Served {
    /// For the guest.
    pub answer: CtrlResponse,
    /// How packets are spread from now on, if that has changed.
    pub spread: Option<Spread>,
}

/// Carries out a request about hashes, of a guest with so many queues. `read` copies the first bytes of a page of
/// the guest's, up to [`MAX_READ`] of them; whether it could.
pub fn serve(
    request: &CtrlRequest,
    now: &Arc<Spread>,
    queues: usize,
    read: impl FnMut(u32, &mut [u8]) -> bool,
) -> Served {
    let (status, data, spread) = match act(request, now, queues, read) {
        Ok(Done::Says(data)) => (CTRL_STATUS_SUCCESS, data, None),
        Ok(Done::Changes(spread)) => (CTRL_STATUS_SUCCESS, 0, Some(spread)),
        Err(refusal) => (refusal.status(), 0, None),
    };
    let answer = CtrlResponse { id: request.id, kind: request.kind, status, data };
    Served { answer, spread }
}

enum Done {
    Says(u32),
    Changes(Spread),
}

fn act(
    request: &CtrlRequest,
    now: &Arc<Spread>,
    queues: usize,
    read: impl FnMut(u32, &mut [u8]) -> bool,
) -> Result<Done, Refusal> {
    let [first, len, offset] = request.data;
    let changed = |change: &dyn Fn(&mut Spread)| {
        let mut spread = Spread::clone(now);
        change(&mut spread);
        Ok(Done::Changes(spread))
    };
    match request.kind {
        CTRL_SET_HASH_ALGORITHM => {
            let algorithm = Algorithm::of(first).ok_or(InvalidParameter)?;
            changed(&|spread| spread.algorithm = algorithm)
        }
        // "A valid hash algorithm must be selected before this operation can succeed."
        CTRL_GET_HASH_FLAGS if now.algorithm == Algorithm::None => Err(NotSupported),
        CTRL_GET_HASH_FLAGS => Ok(Done::Says(HASH_TYPES)),
        CTRL_SET_HASH_FLAGS if first & !HASH_TYPES != 0 || now.algorithm == Algorithm::None => {
            Err(InvalidParameter)
        }
        CTRL_SET_HASH_FLAGS => changed(&|spread| spread.types = first),
        CTRL_SET_HASH_KEY => {
            let mut bytes = [0; MAX_KEY];
            let key = usize::try_from(len).ok().and_then(|len| bytes.get_mut(..len));
            let key = key.ok_or(BufferOverflow)?;
            fetch(first, key, read)?;
            let key = &*key;
            changed(&|spread| spread.set_key(key))
        }
        CTRL_GET_HASH_MAPPING_SIZE => Ok(Done::Says(MAX_MAPPING as u32)),
        CTRL_SET_HASH_MAPPING_SIZE => {
            let entries = usize::try_from(first).ok().filter(|n| *n <= MAX_MAPPING);
            let entries = entries.ok_or(InvalidParameter)?;
            changed(&|spread| spread.mapping = vec![0; entries])
        }
        CTRL_SET_HASH_MAPPING => {
            let mut mapping = now.mapping.clone();
            set_mapping(&mut mapping, (first, len, offset), queues, read)?;
            changed(&|spread| spread.mapping.clone_from(&mapping))
        }
        _ => Err(NotSupported),
    }
}

fn fetch(
    gref: u32,
    into: &mut [u8],
    mut read: impl FnMut(u32, &mut [u8]) -> bool,
) -> Result<(), Refusal> {
    if into.is_empty() || read(gref, into) { Ok(()) } else { Err(InvalidParameter) }
}

/// Changes `len` entries from `offset` on, all or none.
fn set_mapping(
    mapping: &mut [u32],
    (gref, len, offset): (u32, u32, u32),
    queues: usize,
    read: impl FnMut(u32, &mut [u8]) -> bool,
) -> Result<(), Refusal> {
    // XSA-270 was a sum of the two that wrapped.
    let end = offset.checked_add(len).ok_or(InvalidParameter)?;
    let (Ok(from), Ok(to)) = (usize::try_from(offset), usize::try_from(end)) else {
        return Err(InvalidParameter);
    };
    let part = mapping.get_mut(from..to).ok_or(InvalidParameter)?;
    let mut bytes = [0; MAX_READ];
    // No part is longer than the longest table.
    let bytes = bytes.get_mut(..size_of_val(part)).ok_or(BufferOverflow)?;
    fetch(gref, bytes, read)?;
    let (entries, _) = bytes.as_chunks();
    if entries.iter().any(|queue| u32::from_ne_bytes(*queue) as usize >= queues) {
        return Err(InvalidParameter);
    }
    part.iter_mut().zip(entries).for_each(|(to, queue)| *to = u32::from_ne_bytes(*queue));
    Ok(())
}

#[cfg(test)]
#[path = "ctrl_tests.rs"]
mod tests;
