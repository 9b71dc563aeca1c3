use super::*;
use crate::frame::Checksum;
use crate::hash::Hash;
use crate::mailbox::FRAMES;
use crate::proto::Extra;

struct End {
    queue: Box<dyn EndpointQueue>,
    pool: Pool,
    mac: Mac,
}

fn end(switch: &Arc<Switch>, last: u8) -> (SwitchPort, End) {
    let port = switch.port(1500);
    port.connect(1, Accepts::default()).expect("a port");
    let queue = port.queue(0).expect("a queue");
    (port, End { queue, pool: Pool::private(300), mac: [2, 0, 0, 0, 0, last] })
}

impl End {
    fn send(&mut self, to: Mac, byte: u8) {
        let from = self.mac;
        self.send_from(from, to, byte);
    }
    fn send_from(&mut self, from: Mac, to: Mac, byte: u8) {
        let mut frame = self.pool.take().expect("a frame");
        frame.set_len(60);
        frame.fill(byte);
        frame[..6].copy_from_slice(&to);
        frame[6..12].copy_from_slice(&from);
        frame.offload.checksum = Checksum::Valid;
        let mut frames = VecDeque::from([frame]);
        self.queue.send(&mut frames, &mut self.pool).expect("sent");
        assert!(frames.is_empty());
    }
    /// The last bytes of what has come.
    fn got(&mut self) -> Vec<u8> {
        let mut frames = VecDeque::new();
        self.queue.receive(&mut frames, 1000, &mut self.pool).expect("received");
        let bytes = frames.iter().map(|frame| frame[59]).collect();
        assert!(frames.iter().all(|frame| frame.offload.checksum == Checksum::Valid));
        frames.drain(..).for_each(|frame| self.pool.give(frame));
        bytes
    }
    fn is_woken(&self) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let waits = self.queue.waits();
        let fd = waits.readable.expect("a descriptor");
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], Some(&now)).expect("poll") > 0
    }
}

#[test]
fn a_frame_goes_to_all_until_it_is_known_where_it_belongs() {
    let switch = Switch::new();
    let ((_a, mut a), (_b, mut b), (_c, mut c)) =
        (end(&switch, 1), end(&switch, 2), end(&switch, 3));
    a.send(b.mac, 7);
    assert!(b.is_woken() && !a.is_woken());
    assert_eq!((a.got(), b.got(), c.got()), (vec![], vec![7], vec![7]));
    assert!(!b.is_woken());
    b.send(a.mac, 8);
    assert_eq!((a.got(), b.got(), c.got()), (vec![8], vec![], vec![]));
    a.send(b.mac, 9);
    assert_eq!((b.got(), c.got()), (vec![9], vec![]));
    a.send([0xff; 6], 10);
    assert_eq!((a.got(), b.got(), c.got()), (vec![], vec![10], vec![10]));
    // An address that moves is followed.
    c.send_from(b.mac, a.mac, 11);
    assert_eq!(a.got(), [11]);
    a.send(b.mac, 12);
    assert_eq!((b.got(), c.got()), (vec![], vec![12]));
}

#[test]
fn a_guest_that_has_gone_is_forgotten() {
    let switch = Switch::new();
    let ((_a, mut a), (port, mut b), (_c, mut c)) =
        (end(&switch, 1), end(&switch, 2), end(&switch, 3));
    b.send(a.mac, 1);
    port.disconnect();
    a.send(b.mac, 2);
    assert_eq!((b.got(), c.got()), (vec![], vec![1, 2]));
    assert!(port.queue(0).is_err());
}

#[test]
fn a_guest_that_takes_nothing_and_one_that_invents_addresses_cost_little() {
    let switch = Switch::new();
    let ((_a, mut a), (_b, mut b)) = (end(&switch, 1), end(&switch, 2));
    for n in 0..1000u32 {
        let [x, y, ..] = n.to_le_bytes();
        a.send_from([2, 1, 0, 0, x, y], b.mac, 1);
    }
    assert_eq!(a.queue.take_dropped(), 1000 - FRAMES as u64);
    assert_eq!(b.got().len(), FRAMES);
    assert_eq!(switch.inner.read().addresses.len(), ADDRESSES);
    // Another guest's addresses have room all the same.
    b.send(a.mac, 2);
    assert_eq!(switch.inner.read().addresses.len(), ADDRESSES + 1);
    let mut short = a.pool.take().expect("a frame");
    short.set_len(13);
    a.queue.send(&mut VecDeque::from([short]), &mut a.pool).expect("sent");
    assert!(b.got().is_empty());
}

#[test]
fn guests_in_threads_of_their_own_lose_nothing_that_there_is_room_for() {
    let switch = Switch::new();
    let ((_a, mut a), (_b, mut b)) = (end(&switch, 1), end(&switch, 2));
    let to = b.mac;
    let sender = std::thread::spawn(move || {
        for n in 0..20_000u32 {
            a.send(to, n as u8);
        }
        a.queue.take_dropped()
    });
    let mut got: u64 = 0;
    while !sender.is_finished() || b.is_woken() {
        got += b.got().len() as u64;
    }
    assert_eq!(got + sender.join().expect("no panic"), 20_000);
}

#[test]
fn a_hash_that_came_with_a_frame_chooses_the_receivers_queue() {
    let switch = Switch::new();
    let (_port, mut a) = end(&switch, 1);
    let receiver = switch.port(1500);
    receiver.connect(4, Accepts::default()).expect("a port");
    let mut queues: Vec<_> = (0..4).map(|n| receiver.queue(n).expect("a queue")).collect();
    let mut pool = Pool::private(16);
    for value in [0, 1, 2, 3, 7, u32::MAX - 1] {
        let mut frame = a.pool.take().expect("a frame");
        frame.set_len(60);
        frame.fill(0xff);
        frame.hash = Hash::of_extra(&Extra::Hash { kind: 0, algorithm: 1, value });
        let hash = frame.hash;
        a.queue.send(&mut VecDeque::from([frame]), &mut a.pool).expect("sent");
        for (number, queue) in queues.iter_mut().enumerate() {
            let mut frames = VecDeque::new();
            queue.receive(&mut frames, 10, &mut pool).expect("received");
            assert_eq!(frames.len(), usize::from(value as usize % 4 == number), "{value}");
            assert!(frames.iter().all(|frame| frame.hash == hash && hash.is_some()));
            frames.drain(..).for_each(|frame| pool.give(frame));
        }
    }
}
