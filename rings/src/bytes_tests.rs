use super::*;
use crate::mem::HeapPages;
use alloc::sync::Arc;
use alloc::vec::Vec;
use proptest::prelude::*;

type Ring = ByteRing<Arc<HeapPages>>;

fn pair(interface: Interface, start: u32) -> (Arc<HeapPages>, Ring, Ring) {
    let page = Arc::new(HeapPages::new(1));
    let (a, b) = interface.lanes();
    for lane in [a, b] {
        page.word(lane.consumer.0).store(start, Relaxed);
        page.word(lane.producer.0).store(start, Relaxed);
    }
    let front = ByteRing::attach(page.clone(), interface, End::Front).expect("front");
    let back = ByteRing::attach(page.clone(), interface, End::Back).expect("back");
    (page, front, back)
}

fn bytes(n: usize, seed: u8) -> Vec<u8> {
    (0..n).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed)).collect()
}

/// Sends `chunks` from one end to the other in the order of the model and compares the stream.
fn stream(from: &mut Ring, to: &mut Ring, size: usize, chunks: &[(usize, usize)]) {
    let (mut sent, mut got) = (Vec::new(), Vec::new());
    for (i, (write, read)) in chunks.iter().enumerate() {
        let data = bytes(*write, i as u8);
        let room = size - (sent.len() - got.len());
        assert_eq!(from.writable(), Ok(room));
        let n = from.write(&data).expect("write");
        assert_eq!(n, data.len().min(room));
        sent.extend_from_slice(&data[..n]);
        assert_eq!(to.readable(), Ok(sent.len() - got.len()));
        let mut buffer = alloc::vec![0; *read];
        let n = to.read(&mut buffer).expect("read");
        assert_eq!(n, (*read).min(sent.len() - got.len()));
        got.extend_from_slice(&buffer[..n]);
        assert_eq!(got[..], sent[..got.len()]);
    }
}

proptest! {
    #[test]
    fn each_lane_is_a_stream_even_where_indices_wrap(
        chunks in prop::collection::vec((0usize..2500, 0usize..2500), 1..40),
        start in prop_oneof![Just(0u32), Just(u32::MAX - 700), any::<u32>()],
    ) {
        for interface in [Interface::Xenstore, Interface::Console] {
            let (_, mut front, mut back) = pair(interface, start);
            let (from_guest, to_guest) = interface.lanes();
            stream(&mut front, &mut back, from_guest.size as usize, &chunks);
            stream(&mut back, &mut front, to_guest.size as usize, &chunks);
        }
    }

    #[test]
    fn an_index_is_accepted_or_corrupt_as_the_model_says(found in any::<u32>(), at in any::<u32>(), near in -1100i32..1100) {
        for found in [found, at.wrapping_add_signed(near)] {
            let (page, _, mut back) = pair(Interface::Xenstore, at);
            page.word(2052).store(found, Relaxed);
            let there = found.wrapping_sub(at);
            match back.read(&mut [0; 4]) {
                Ok(n) => prop_assert!(there <= 1024 && n == there.min(4) as usize),
                Err(e) => {
                    prop_assert!(there > 1024);
                    prop_assert_eq!((e.found, e.index), (found, "req_prod"));
                    // Nothing moved.
                    prop_assert_eq!(page.word(2048).load(Relaxed), at);
                }
            }
            let (page, _, mut back) = pair(Interface::Xenstore, at);
            page.word(2056).store(found, Relaxed);
            let used = at.wrapping_sub(found);
            match back.write(&[0; 4]) {
                Ok(n) => prop_assert!(used <= 1024 && n == (1024 - used).min(4) as usize),
                Err(e) => prop_assert!(used > 1024 && e.index == "rsp_cons"),
            }
        }
    }
}

#[test]
fn a_page_that_is_already_impossible_is_not_attached() {
    let page = Arc::new(HeapPages::new(1));
    page.word(3084).store(2049, Relaxed);
    let e = ByteRing::attach(page, Interface::Console, End::Back).err().expect("corrupt");
    let text = alloc::format!("{e}");
    assert_eq!(text, "corrupt console ring: out_prod is 2049, possible is 0 to 2048");
}
