//! Cutting an unsegmented TCP packet in software, for ends that cannot. Pure.

use std::collections::VecDeque;
use std::ops::Range;

use crate::checksum::{Ip, Layers, Transport, fold, sum};
use crate::frame::{Checksum, Frame, Gso, GsoKind, Offload, Pool};

/// TCP's flags that only a packet's last segment keeps: FIN and PSH.
const LAST_ONLY: u8 = 0x09;
/// And the one that only its first has: CWR (RFC 3168).
const FIRST_ONLY: u8 = 0x80;

/// Finds the headers of a packet that is to be cut as `gso` says; `None` if it cannot be.
pub fn layers(frame: &[u8], gso: Gso) -> Option<Layers> {
    let layers = Layers::of(frame)?;
    let kind = match layers.ip {
        Ip::V4 => GsoKind::TcpV4,
        Ip::V6 => GsoKind::TcpV6,
    };
    (layers.transport == Transport::Tcp && kind == gso.kind).then_some(layers)
}

/// Segments that a packet is cut into.
pub fn count(layers: &Layers, gso: Gso) -> usize {
    (layers.end - layers.payload).div_ceil(usize::from(gso.size).max(1)).max(1)
}

/// Cuts a packet and appends its segments with right checksums. `false`: the pool has too few
/// frames, or it is no such packet; nothing was appended.
pub fn cut(packet: &[u8], gso: Gso, pool: &mut Pool, into: &mut VecDeque<Frame>) -> bool {
    let Some(layers) = layers(packet, gso) else { return false };
    let segments = count(&layers, gso);
    if segments > pool.free() {
        return false;
    }
    let size = usize::from(gso.size).max(1);
    for number in 0..segments {
        let Some(mut frame) = pool.take() else { return false };
        let from = layers.payload + number * size;
        let bytes = from..(from + size).min(layers.end);
        frame.set_len(layers.payload + bytes.len());
        frame[..layers.payload].copy_from_slice(&packet[..layers.payload]);
        frame[layers.payload..].copy_from_slice(&packet[bytes.clone()]);
        let last = number + 1 == segments;
        finish(&mut frame, &layers, number, bytes, last);
        frame.offload = Offload { checksum: Checksum::Valid, gso: None };
        into.push_back(frame);
    }
    true
}

/// Makes a copy of the packet's headers those of one segment.
fn finish(frame: &mut Frame, layers: &Layers, number: usize, bytes: Range<usize>, last: bool) {
    let network = layers.network;
    let whole = Layers { end: frame.len(), ..*layers };
    match layers.ip {
        Ip::V4 => {
            let total = (frame.len() - network) as u16;
            put16(frame, network + 2, total);
            let id = get16(frame, network + 4).wrapping_add(number as u16);
            put16(frame, network + 4, id);
            put16(frame, network + 10, 0);
            let header = !fold(sum(&frame[network..layers.start]));
            frame[network + 10..network + 12].copy_from_slice(&header.to_ne_bytes());
        }
        Ip::V6 => {
            let payload = (frame.len() - network - 40) as u16;
            put16(frame, network + 4, payload);
        }
    }
    let at = layers.start + 4;
    let sequence = u32::from_be_bytes([frame[at], frame[at + 1], frame[at + 2], frame[at + 3]]);
    let sequence = sequence.wrapping_add((bytes.start - layers.payload) as u32);
    frame[at..at + 4].copy_from_slice(&sequence.to_be_bytes());
    let flags = layers.start + 13;
    if !last {
        frame[flags] &= !LAST_ONLY;
    }
    if number > 0 {
        frame[flags] &= !FIRST_ONLY;
    }
    whole.fill(frame);
}

fn get16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn put16(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

#[cfg(test)]
#[path = "segment_tests.rs"]
mod tests;
