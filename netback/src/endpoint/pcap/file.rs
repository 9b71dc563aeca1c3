//! libpcap's file format (draft-ietf-opsawg-pcap): a header of 24 bytes, then packets with a header
//! of 16 bytes each. Written in this machine's byte order, read in either.

use std::io::{self, BufReader, BufWriter, Read, Write};
use std::time::Duration;

use crate::frame::MAX_FRAME;

/// The first word: times in nanoseconds, or in microseconds.
const NANOSECONDS: u32 = 0xa1b2_3c4d;
const MICROSECONDS: u32 = 0xa1b2_c3d4;
/// `LINKTYPE_ETHERNET`
const ETHERNET: u32 = 1;
const HEADER: u64 = 24;
const PACKET_HEADER: u64 = 16;

/// A packet of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Since 1970.
    pub time: Duration,
    /// The Ethernet frame.
    pub bytes: Vec<u8>,
}

/// Why a file is none that can be replayed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotPcap {
    /// Its first word is another.
    #[error("not a file of libpcap (pcapng is not read)")]
    Magic,
    /// It is of a version that has never been.
    #[error("version {0} of libpcap's format is not known")]
    Version(u16),
    /// It holds no Ethernet frames.
    #[error("link type {0} instead of Ethernet (1)")]
    Link(u32),
    /// A packet is longer than any frame, or was cut when it was recorded.
    #[error(
        "packet {number} has {len} of {whole} bytes: a whole one of up to {MAX_FRAME} is needed"
    )]
    Packet {
        /// Which, from 0 on.
        number: usize,
        /// Bytes in the file.
        len: u32,
        /// Bytes that it had.
        whole: u32,
    },
    /// It ends in the middle of a packet.
    #[error("the file ends in packet {0}")]
    Cut(usize),
    /// Its packets are more than is wanted.
    #[error("more than {0} bytes of packets")]
    TooLong(u64),
}

impl From<NotPcap> for io::Error {
    fn from(e: NotPcap) -> io::Error {
        io::Error::new(io::ErrorKind::InvalidData, e)
    }
}

pub(super) struct Writer<W: Write> {
    file: BufWriter<W>,
    room: u64,
}

impl<W: Write> Writer<W> {
    pub(super) fn new(file: W, limit: u64) -> io::Result<Writer<W>> {
        let mut file = BufWriter::new(file);
        file.write_all(&NANOSECONDS.to_ne_bytes())?;
        for half in [2u16, 4] {
            file.write_all(&half.to_ne_bytes())?;
        }
        for word in [0, 0, MAX_FRAME as u32, ETHERNET] {
            file.write_all(&word.to_ne_bytes())?;
        }
        Ok(Writer { file, room: limit.saturating_sub(HEADER) })
    }

    /// Writes frames that pass now.
    pub(super) fn write<'a>(&mut self, frames: impl Iterator<Item = &'a [u8]>) -> io::Result<()> {
        let time = std::time::UNIX_EPOCH.elapsed().unwrap_or_default();
        for frame in frames {
            let Some(room) = self.room.checked_sub(PACKET_HEADER + frame.len() as u64) else {
                // Nothing shorter either: a record with holes is none.
                self.room = 0;
                return Ok(());
            };
            self.room = room;
            let len = frame.len() as u32;
            for word in [time.as_secs() as u32, time.subsec_nanos(), len, len] {
                self.file.write_all(&word.to_ne_bytes())?;
            }
            self.file.write_all(frame)?;
        }
        Ok(())
    }

    pub(super) fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

pub(super) struct Reader<R> {
    file: BufReader<R>,
    swapped: bool,
    /// Nanoseconds of the unit of times.
    unit: u32,
}

impl<R: Read> Reader<R> {
    pub(super) fn new(file: R) -> io::Result<Reader<R>> {
        let mut reader = Reader { file: BufReader::new(file), swapped: false, unit: 1 };
        let mut header = [0; HEADER as usize];
        if !reader.fill(&mut header)? {
            return Err(NotPcap::Magic.into());
        }
        let magic = reader.word(&header, 0);
        reader.swapped = [NANOSECONDS, MICROSECONDS].contains(&magic.swap_bytes());
        reader.unit = match reader.word(&header, 0) {
            NANOSECONDS => 1,
            MICROSECONDS => 1000,
            _ => return Err(NotPcap::Magic.into()),
        };
        let version = u16::from_ne_bytes([header[4], header[5]]);
        let version = if reader.swapped { version.swap_bytes() } else { version };
        // The upper bits of the link type say how long a check sequence is; there is none here.
        let link = reader.word(&header, 20) & 0x0fff_ffff;
        match (version, link) {
            (2, ETHERNET) => Ok(reader),
            (2, other) => Err(NotPcap::Link(other).into()),
            (other, _) => Err(NotPcap::Version(other).into()),
        }
    }

    /// All packets.
    pub(super) fn all(mut self, limit: u64) -> io::Result<Vec<Packet>> {
        let (mut packets, mut bytes) = (Vec::new(), 0);
        while let Some(packet) = self.next(packets.len())? {
            bytes += PACKET_HEADER + packet.bytes.len() as u64;
            if bytes > limit {
                return Err(NotPcap::TooLong(limit).into());
            }
            packets.push(packet);
        }
        Ok(packets)
    }

    fn next(&mut self, number: usize) -> io::Result<Option<Packet>> {
        let mut header = [0; PACKET_HEADER as usize];
        let start = self.file.read(&mut header[..1])?;
        if start == 0 {
            return Ok(None);
        }
        if !self.fill(&mut header[1..])? {
            return Err(NotPcap::Cut(number).into());
        }
        let [seconds, part, len, whole] = [0, 4, 8, 12].map(|at| self.word(&header, at));
        if len != whole || len as usize > MAX_FRAME {
            return Err(NotPcap::Packet { number, len, whole }.into());
        }
        let mut bytes = vec![0; len as usize];
        if !self.fill(&mut bytes)? {
            return Err(NotPcap::Cut(number).into());
        }
        let part = Duration::from_nanos(u64::from(part) * u64::from(self.unit));
        Ok(Some(Packet { time: Duration::from_secs(seconds.into()) + part, bytes }))
    }

    /// Whether there was enough.
    fn fill(&mut self, into: &mut [u8]) -> io::Result<bool> {
        match self.file.read_exact(into) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            Err(e) => Err(e),
        }
    }

    fn word(&self, bytes: &[u8], at: usize) -> u32 {
        let mut word = [0; 4];
        word.copy_from_slice(&bytes[at..at + 4]);
        let word = u32::from_ne_bytes(word);
        if self.swapped { word.swap_bytes() } else { word }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(frames: &[&[u8]], limit: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut writer = Writer::new(&mut bytes, limit).expect("a header");
        writer.write(frames.iter().copied()).expect("packets");
        writer.flush().expect("all");
        drop(writer);
        bytes
    }

    fn read(bytes: &[u8], limit: u64) -> Result<Vec<Packet>, String> {
        Reader::new(bytes).and_then(|r| r.all(limit)).map_err(|e| e.to_string())
    }

    /// The words of a file in the other byte order.
    fn swapped(bytes: &[u8]) -> Vec<u8> {
        let mut swapped = bytes.to_vec();
        for at in [0, 8, 12, 16, 20, 24, 28, 32, 36] {
            swapped[at..at + 4].reverse();
        }
        swapped[4..6].reverse();
        swapped[6..8].reverse();
        swapped
    }

    #[test]
    fn both_byte_orders_and_both_units_are_read() {
        let mut bytes = written(&[&[7; 60]], 1 << 20);
        let packets = read(&bytes, 1 << 20).expect("packets");
        assert_eq!((packets.len(), &packets[0].bytes[..]), (1, &[7; 60][..]));
        assert_eq!(read(&swapped(&bytes), 1 << 20), Ok(packets));
        bytes[..4].copy_from_slice(&MICROSECONDS.to_ne_bytes());
        bytes[24..32].copy_from_slice(&[[5u32, 250].map(u32::to_ne_bytes)].concat().concat());
        let packets = read(&bytes, 1 << 20).expect("packets");
        assert_eq!(packets[0].time, Duration::from_micros(5_000_250));
    }

    #[test]
    fn what_is_no_such_file_is_named() {
        let bytes = written(&[&[7; 60], &[8; 60]], 1 << 20);
        let with = |at: usize, byte: u8| {
            let mut bytes = bytes.clone();
            bytes[at] = byte;
            read(&bytes, 1 << 20).expect_err("refused")
        };
        assert!(with(0, 0).contains("not a file of libpcap"));
        assert!(with(4, 3).contains("version 3"));
        assert!(with(20, 113).contains("link type 113"));
        assert!(with(32, 59).contains("packet 0 has 59 of 60 bytes"));
        assert!(with(34, 2).contains("packet 0 has 131132"));
        for len in 1..bytes.len() {
            match read(&bytes[..len], 1 << 20) {
                Ok(packets) => assert!([24, 100].contains(&len) && packets.len() < 2, "{len}"),
                Err(e) => assert!(e.contains("ends in packet") || len < 24, "{len}: {e}"),
            }
        }
        assert!(read(&bytes, 100).expect_err("refused").contains("more than 100 bytes"));
    }

    #[test]
    fn a_record_ends_at_its_limit() {
        let bytes = written(&[&[7; 60], &[8; 1000], &[9; 60]], 250);
        assert!(bytes.len() <= 250);
        assert_eq!(read(&bytes, 1 << 20).expect("packets").len(), 1);
    }
}
