//! Packets in files: [`Recorder`] writes what passes through another endpoint, [`Replay`] sends a
//! recorded file to the guest. The files are libpcap's, of Ethernet frames, with times in
//! nanoseconds (or microseconds, for reading).
//!
//! A frame is recorded as it passes: one whose checksum is left to others has none yet, and an
//! unsegmented one is long.

mod file;

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::{Abilities, Accepts, Endpoint, EndpointQueue, Waits};
use crate::config::Carrier;
use crate::frame::{Frame, Pool};
pub use file::{NotPcap, Packet};
use file::{Reader, Writer};

/// An endpoint whose frames are also written to a file. Its queues share the file behind a lock, and
/// their threads write it: it is for looking, not for speed.
pub struct Recorder<E> {
    below: E,
    file: Arc<Mutex<Writer<File>>>,
}

impl<E: Endpoint> Recorder<E> {
    /// Into a new file, which grows no longer than `limit` bytes: what passes after that is not
    /// recorded.
    pub fn new(below: E, path: &Path, limit: u64) -> io::Result<Recorder<E>> {
        let file = Writer::new(File::create_new(path)?, limit)?;
        Ok(Recorder { below, file: Arc::new(Mutex::new(file)) })
    }
}

impl<E: Endpoint> Endpoint for Recorder<E> {
    fn abilities(&self) -> Abilities {
        self.below.abilities()
    }
    fn most_queues(&self) -> u32 {
        self.below.most_queues()
    }
    fn connect(&self, queues: usize, accepts: Accepts) -> io::Result<()> {
        self.below.connect(queues, accepts)
    }
    fn queue(&self, number: usize) -> io::Result<Box<dyn EndpointQueue>> {
        let below = self.below.queue(number)?;
        Ok(Box::new(Recording { below, file: self.file.clone(), left: 0 }))
    }
    fn link(&self, carrier: Carrier) -> io::Result<()> {
        self.below.link(carrier)
    }
    fn disconnect(&self) {
        self.below.disconnect();
        if let Err(e) = self.file.lock().flush() {
            tracing::warn!("a record of packets: {e}");
        }
    }
}

struct Recording {
    below: Box<dyn EndpointQueue>,
    file: Arc<Mutex<Writer<File>>>,
    /// Frames that the endpoint has not taken, at the front of the list.
    left: usize,
}

impl EndpointQueue for Recording {
    fn send(&mut self, frames: &mut VecDeque<Frame>, pool: &mut Pool) -> io::Result<()> {
        // Those that were left behind the last time are written already.
        let written = self.left.min(frames.len());
        if frames.len() > written {
            self.file.lock().write(frames.range(written..).map(|frame| &**frame))?;
        }
        self.below.send(frames, pool)?;
        self.left = frames.len();
        Ok(())
    }

    fn receive(
        &mut self,
        frames: &mut VecDeque<Frame>,
        room: usize,
        pool: &mut Pool,
    ) -> io::Result<()> {
        let before = frames.len();
        self.below.receive(frames, room, pool)?;
        if frames.len() > before {
            self.file.lock().write(frames.range(before..).map(|frame| &**frame))?;
        }
        Ok(())
    }

    fn waits(&self) -> Waits<'_> {
        self.below.waits()
    }
    fn take_dropped(&mut self) -> u64 {
        self.below.take_dropped()
    }
}

/// How fast a file is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// As fast as the guest takes it.
    AtOnce,
    /// With the pauses between its packets, from the connection of the guest on.
    AsRecorded,
}

/// An endpoint that sends the packets of a file on its first queue, once for each connection, and
/// swallows what the guest sends.
pub struct Replay {
    packets: Arc<Vec<Packet>>,
    pace: Pace,
    mtu: u16,
}

impl Replay {
    /// Reads the whole file, at most `limit` bytes of packets. InvalidData: it is none of libpcap's.
    pub fn open(path: &Path, pace: Pace, limit: u64) -> io::Result<Replay> {
        let named = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", path.display()));
        let packets = Reader::new(File::open(path).map_err(named)?).and_then(|r| r.all(limit));
        let packets = packets.map_err(named)?;
        let longest = packets.iter().map(|packet| packet.bytes.len()).max().unwrap_or(0);
        let mtu = u16::try_from(longest.saturating_sub(14)).unwrap_or(u16::MAX).max(1500);
        Ok(Replay { packets: Arc::new(packets), pace, mtu })
    }
    /// Its packets.
    pub fn packets(&self) -> &[Packet] {
        &self.packets
    }
}

impl Endpoint for Replay {
    fn abilities(&self) -> Abilities {
        Abilities { checksum: true, tso4: true, tso6: true, mtu: self.mtu }
    }
    fn connect(&self, _: usize, _: Accepts) -> io::Result<()> {
        Ok(())
    }
    fn queue(&self, number: usize) -> io::Result<Box<dyn EndpointQueue>> {
        let packets = if number == 0 { self.packets.clone() } else { Arc::default() };
        Ok(Box::new(Playing { packets, next: 0, start: Instant::now(), pace: self.pace }))
    }
    fn disconnect(&self) {}
}

struct Playing {
    packets: Arc<Vec<Packet>>,
    next: usize,
    start: Instant,
    pace: Pace,
}

impl Playing {
    /// When the next packet is to leave.
    fn due(&self) -> Option<Instant> {
        let (first, next) = (self.packets.first()?, self.packets.get(self.next)?);
        let after = match self.pace {
            Pace::AtOnce => Duration::ZERO,
            Pace::AsRecorded => next.time.saturating_sub(first.time),
        };
        self.start.checked_add(after)
    }
}

impl EndpointQueue for Playing {
    fn send(&mut self, frames: &mut VecDeque<Frame>, pool: &mut Pool) -> io::Result<()> {
        frames.drain(..).for_each(|frame| pool.give(frame));
        Ok(())
    }

    fn receive(
        &mut self,
        frames: &mut VecDeque<Frame>,
        room: usize,
        pool: &mut Pool,
    ) -> io::Result<()> {
        if self.due().is_none() {
            return Ok(());
        }
        let now = Instant::now();
        for _ in 0..room {
            let is_due = self.due().is_some_and(|due| due <= now);
            let (Some(packet), true) = (self.packets.get(self.next), is_due) else { break };
            let Some(mut frame) = pool.take() else { break };
            frame.set_len(packet.bytes.len());
            frame.copy_from_slice(&packet.bytes);
            frames.push_back(frame);
            self.next += 1;
        }
        Ok(())
    }

    fn waits(&self) -> Waits<'_> {
        Waits { deadline: self.due(), ..Waits::default() }
    }
    fn take_dropped(&mut self) -> u64 {
        0
    }
}

#[cfg(test)]
mod tests {
    use super::super::loopback::Loopback;
    use super::*;

    fn frame(pool: &mut Pool, len: usize) -> Frame {
        let mut frame = pool.take().expect("a frame");
        frame.set_len(len);
        for (n, byte) in frame.iter_mut().enumerate() {
            *byte = (n * 7 + len) as u8;
        }
        frame
    }

    #[test]
    fn what_was_recorded_is_replayed() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("a.pcap");
        let (mut pool, mut frames) = (Pool::private(16), VecDeque::new());
        let recorder = Recorder::new(Loopback::new(1500), &path, 1 << 20).expect("a file");
        let mut queue = recorder.queue(0).expect("a queue");
        let lens = [14, 60, 1514, 9014, 65_549];
        frames.extend(lens.map(|len| frame(&mut pool, len)));
        queue.send(&mut frames, &mut pool).expect("sent");
        queue.receive(&mut frames, 10, &mut pool).expect("received");
        assert_eq!(frames.len(), lens.len());
        recorder.disconnect();

        // Both ways are in it.
        let replay = Replay::open(&path, Pace::AtOnce, 1 << 20).expect("a record");
        assert_eq!(replay.packets().len(), 2 * lens.len());
        assert_eq!(replay.abilities().mtu, 65_535);
        let mut queue = replay.queue(0).expect("a queue");
        let mut got = VecDeque::new();
        for _ in 0..3 {
            queue.receive(&mut got, 5, &mut pool).expect("received");
        }
        let got: Vec<&[u8]> = got.iter().map(|frame| &**frame).collect();
        let sent: Vec<&[u8]> = frames.iter().map(|frame| &**frame).collect();
        assert_eq!(got, [&sent[..], &sent[..]].concat());
        assert!(queue.waits().deadline.is_none(), "there is more");
        assert!(Recorder::new(Loopback::new(1500), &path, 0).is_err(), "a record was overwritten");
    }

    #[test]
    fn pauses_are_kept_if_wanted() {
        let packet = |ms| Packet { time: Duration::from_millis(ms), bytes: vec![0; 60] };
        let packets = Arc::new(vec![packet(5000), packet(5000), packet(5040)]);
        let replay = Replay { packets, pace: Pace::AsRecorded, mtu: 1500 };
        let (mut queue, mut pool) = (replay.queue(0).expect("a queue"), Pool::private(4));
        let (mut got, start) = (VecDeque::new(), Instant::now());
        queue.receive(&mut got, 10, &mut pool).expect("received");
        assert!(got.len() == 2 || start.elapsed() > Duration::from_millis(30));
        let due = queue.waits().deadline.expect("one is left");
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        queue.receive(&mut got, 10, &mut pool).expect("received");
        assert_eq!(got.len(), 3);
        assert!(start.elapsed() >= Duration::from_millis(35));
    }
}
