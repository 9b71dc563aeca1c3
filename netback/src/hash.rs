//! The hash by which a guest may have its packets spread over its queues (netif.h, "Hash types").
//! Pure; packets are hostile.

use crate::checksum::{ETHERTYPE_IPV4, ETHERTYPE_IPV6, Layers, Transport, ethertype};
use crate::proto::{
    Extra, HASH_ALGORITHM_NONE, HASH_ALGORITHM_TOEPLITZ, HASH_TYPE_IPV4, HASH_TYPE_IPV4_TCP,
    HASH_TYPE_IPV6, HASH_TYPE_IPV6_TCP,
};

/// Longest key in bytes: more have no effect on the longest input.
pub const MAX_KEY: usize = 40;
/// Most entries of a table of queues (xen-netback's).
pub const MAX_MAPPING: usize = 128;
/// All kinds of hash that there are.
pub const HASH_TYPES: u32 =
    HASH_TYPE_IPV4 | HASH_TYPE_IPV4_TCP | HASH_TYPE_IPV6 | HASH_TYPE_IPV6_TCP;
/// Longest input: two IPv6 addresses and two ports.
const MAX_INPUT: usize = 36;

/// A packet's hash (`XEN_NETIF_EXTRA_TYPE_HASH`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hash {
    /// Number of its bit in `HASH_TYPE_*`.
    kind: u8,
    /// The hash.
    pub value: u32,
}

impl Hash {
    /// Its kind, as one of `HASH_TYPE_*`.
    pub fn kind(self) -> u32 {
        1 << self.kind
    }
    /// What an extra info says; `None` if it is of no known kind or algorithm.
    pub fn of_extra(extra: &Extra) -> Option<Hash> {
        match *extra {
            Extra::Hash { kind, algorithm, value }
                if u32::from(algorithm) == HASH_ALGORITHM_TOEPLITZ
                    && u32::from(kind) < HASH_TYPES.count_ones() =>
            {
                Some(Hash { kind, value })
            }
            _ => None,
        }
    }
}

impl From<Hash> for Extra {
    fn from(hash: Hash) -> Extra {
        let algorithm = HASH_ALGORITHM_TOEPLITZ as u8;
        Extra::Hash { kind: hash.kind, algorithm, value: hash.value }
    }
}

/// Toeplitz's hash with one key. A table of what each half byte of the input adds spares going
/// through its bits.
#[derive(Clone)]
pub struct Toeplitz(Box<[[u32; 16]; 2 * MAX_INPUT]>);

impl Toeplitz {
    /// Of a key, which zeros follow; what is beyond [`MAX_KEY`] is left out.
    pub fn new(key: &[u8]) -> Toeplitz {
        let mut padded = [0; MAX_KEY];
        padded.iter_mut().zip(key).for_each(|(to, from)| *to = *from);
        // The key's 32 bits from `bit` on.
        let window = |bit: usize| {
            let mut wide = [0; 8];
            wide.iter_mut().zip(&padded[bit / 8..]).for_each(|(to, from)| *to = *from);
            (u64::from_be_bytes(wide) << (bit % 8) >> 32) as u32
        };
        let mut table = Box::new([[0; 16]; 2 * MAX_INPUT]);
        for (place, values) in table.iter_mut().enumerate() {
            for (half, value) in values.iter_mut().enumerate() {
                let set = (0..4).filter(|bit| half & (8 >> bit) != 0);
                *value = set.fold(0, |sum, bit| sum ^ window(4 * place + bit));
            }
        }
        Toeplitz(table)
    }

    /// The hash of up to 36 bytes.
    pub fn hash(&self, input: &[u8]) -> u32 {
        let places = self.0.as_chunks().0.iter();
        input.iter().zip(places).fold(0, |sum, (byte, [high, low])| {
            sum ^ high[usize::from(byte >> 4)] ^ low[usize::from(byte & 15)]
        })
    }
}

/// Which algorithm the guest has chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Algorithm {
    /// None: the backend chooses queues as it likes.
    #[default]
    None,
    /// Toeplitz's.
    Toeplitz,
}

impl Algorithm {
    /// Of `HASH_ALGORITHM_*`.
    pub fn of(number: u32) -> Option<Algorithm> {
        match number {
            HASH_ALGORITHM_NONE => Some(Algorithm::None),
            HASH_ALGORITHM_TOEPLITZ => Some(Algorithm::Toeplitz),
            _ => None,
        }
    }
}

/// How a guest wants its packets spread.
#[derive(Clone)]
pub struct Spread {
    /// By which algorithm.
    pub algorithm: Algorithm,
    /// Over which parts of packets (`HASH_TYPE_*`).
    pub types: u32,
    /// The key, and what is made of it.
    key: [u8; MAX_KEY],
    toeplitz: Toeplitz,
    /// A queue for each hash modulo the length; without entries the hash modulo the queues' number.
    pub mapping: Vec<u32>,
}

impl Default for Spread {
    fn default() -> Spread {
        let key = [0; MAX_KEY];
        let toeplitz = Toeplitz::new(&key);
        Spread { algorithm: Algorithm::None, types: 0, key, toeplitz, mapping: Vec::new() }
    }
}

impl Spread {
    /// Whether packets are hashed at all.
    pub fn is_on(&self) -> bool {
        self.algorithm == Algorithm::Toeplitz && self.types != 0
    }

    /// The key.
    pub fn key(&self) -> &[u8; MAX_KEY] {
        &self.key
    }

    /// Changes the key; the bytes that are not there are 0.
    pub fn set_key(&mut self, key: &[u8]) {
        self.key = [0; MAX_KEY];
        self.key.iter_mut().zip(key).for_each(|(to, from)| *to = *from);
        self.toeplitz = Toeplitz::new(&self.key);
    }

    /// The hash of a frame over as much of it as was asked for; `None` for what is no IP, or of a
    /// kind that was not asked for.
    pub fn hash(&self, frame: &[u8]) -> Option<Hash> {
        let (found, at) = ethertype(frame)?;
        let version = frame.get(at)? >> 4;
        let (addresses, plain, tcp) = match (found, version) {
            (ETHERTYPE_IPV4, 4) => (at + 12..at + 20, HASH_TYPE_IPV4, HASH_TYPE_IPV4_TCP),
            (ETHERTYPE_IPV6, 6) => (at + 8..at + 40, HASH_TYPE_IPV6, HASH_TYPE_IPV6_TCP),
            _ => return None,
        };
        let addresses = frame.get(addresses)?;
        let mut input = [0; MAX_INPUT];
        let (front, behind) = input.split_at_mut(addresses.len());
        front.copy_from_slice(addresses);
        let ports = if self.types & tcp != 0 { tcp_ports(frame) } else { None };
        let (kind, len) = match ports {
            Some(ports) => {
                behind[..4].copy_from_slice(ports);
                (tcp, addresses.len() + 4)
            }
            None if self.types & plain != 0 => (plain, addresses.len()),
            None => return None,
        };
        Some(Hash { kind: kind.trailing_zeros() as u8, value: self.toeplitz.hash(&input[..len]) })
    }

    /// The queue of a frame with this hash, below `queues`. One without counts as 0, as in
    /// xen-netback.
    pub fn queue(&self, hash: Option<Hash>, queues: usize) -> usize {
        let value = hash.map_or(0, |hash| hash.value) as usize;
        let mapped = value.checked_rem(self.mapping.len()).and_then(|at| self.mapping.get(at));
        mapped.map_or(value, |queue| *queue as usize) % queues.max(1)
    }
}

/// The two ports of an unfragmented TCP packet.
fn tcp_ports(frame: &[u8]) -> Option<&[u8]> {
    let layers = Layers::of(frame).filter(|layers| layers.transport == Transport::Tcp)?;
    frame.get(layers.start..layers.start + 4)
}

#[cfg(test)]
#[path = "hash_tests.rs"]
mod tests;
