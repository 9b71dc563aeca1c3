use std::collections::HashMap;

use proptest::prelude::*;
use rings::PAGE_SIZE;

use super::*;
use crate::frame::Offload;
use crate::proto::{RxRequest, TX_MORE_DATA, TxRequest};
use crate::rx::{self, Shape};

const SENDER: DomId = 3;
/// Receiver's pages have references from here on.
const RECEIVER: u32 = 1000;

/// A packet of pieces so long, each in a page of its own at some offset, its bytes and its pages.
fn packet(pieces: &[(u16, u16)]) -> (tx::Batch, Vec<u8>, HashMap<u32, Vec<u8>>) {
    let total: usize = pieces.iter().map(|(_, len)| usize::from(*len)).sum();
    let bytes: Vec<u8> = (0..total).map(|n| (n * 31 + n / 251) as u8).collect();
    let (mut batch, mut pages, mut at) = (tx::Batch::default(), HashMap::new(), 0);
    for (number, (offset, len)) in pieces.iter().enumerate() {
        let offset = offset % (PAGE_SIZE as u16 - len + 1);
        let mut page = vec![0xee; PAGE_SIZE];
        let (from, len_of) = (usize::from(offset), usize::from(*len));
        page[from..][..len_of].copy_from_slice(&bytes[at..][..len_of]);
        at += len_of;
        pages.insert(number as u32, page);
        let more = number + 1 < pieces.len();
        let size = if number == 0 { total as u16 } else { *len };
        let flags = if more { TX_MORE_DATA } else { 0 };
        let slot = TxRequest { gref: number as u32, offset, flags, id: 0, size };
        assert_eq!(batch.push(&slot).expect("a good slot"), !more);
    }
    (batch, bytes, pages)
}

/// Makes transfers between pages that are plain memory.
fn carry_out(
    transfers: &[Transfer],
    frame: &Frame,
    from: &HashMap<u32, Vec<u8>>,
    to: &mut HashMap<u32, Vec<u8>>,
) {
    for t in transfers {
        let len = usize::from(t.len);
        let bytes = match t.source {
            Source::Buffer(at) => &frame[at - frame.at()..][..len],
            Source::Page { domid, gref, offset } => {
                assert_eq!(domid, SENDER);
                &from[&gref][usize::from(offset)..][..len]
            }
        };
        let page = to.entry(t.gref).or_insert_with(|| vec![0; PAGE_SIZE]);
        page[usize::from(t.offset)..][..len].copy_from_slice(bytes);
    }
}

proptest! {
    /// Whatever pages a packet comes from and however its receiver wants it, all bytes arrive, the head
    /// as it was looked at and each byte once.
    #[test]
    fn a_packet_arrives_whole(
        pieces in prop::collection::vec((0u16..4096, 1u16..=4096), 2..17),
        headroom in prop_oneof![Just(0u16), Just(256)],
        is_here in any::<bool>(),
    ) {
        let (batch, bytes, from) = packet(&pieces);
        prop_assume!(bytes.len() > PAGE_SIZE && bytes.len() <= 65_535);
        let mut pool = Pool::private(1);
        let mut frame = pool.take().expect("a frame");
        frame.set_len(bytes.len());
        frame.fill(0xdd);
        // The guest may have changed its page since.
        let here = if is_here { bytes.len() } else { HEAD };
        frame[..here].copy_from_slice(&bytes[..here]);
        let mut from = from;
        if !is_here {
            frame.beyond = Some(0);
            let first = batch.parts(&batch.packets()[0], 0..HEAD).collect::<Vec<_>>();
            for part in first {
                let page = from.get_mut(&part.gref).expect("its page");
                page[usize::from(part.offset)..][..usize::from(part.len)].fill(0xcc);
            }
        }
        let shape = Shape { headroom };
        let slots = shape.data_slots(bytes.len());
        let extras = usize::from(headroom > 0);
        let pages = (0..(slots + extras) as u32)
            .map(|n| RxRequest { id: n as u16, pad: 0, gref: RECEIVER + n });
        let (mut laid_out, mut ops) = (rx::Batch::default(), Vec::new());
        let place = (frame.at(), frame.len());
        laid_out.push(shape, place, (&Offload::default(), None), pages, &mut ops);
        let mut transfers = Vec::new();
        ops.iter().for_each(|op| split(&frame, op, (SENDER, &batch), &mut transfers));
        let moved: usize = transfers.iter().map(|t| usize::from(t.len)).sum();
        prop_assert_eq!(moved, bytes.len());
        let mut to = HashMap::new();
        carry_out(&transfers, &frame, &from, &mut to);
        let got: Vec<u8> = ops
            .iter()
            .flat_map(|op| &to[&op.gref][usize::from(op.offset)..][..usize::from(op.len)])
            .copied()
            .collect();
        prop_assert!(got == bytes);
    }
}
