//! Requests over the control ring.

use std::sync::Arc;

use netback::ctrl::serve;
use netback::hash::{Algorithm, Spread};
use netback::proto::CtrlRequest;

use crate::{Source, bytes};

const PAGE: u32 = 9;

/// What the guest has set, as plain as can be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Model {
    toeplitz: bool,
    types: u32,
    key: Vec<u8>,
    table: Vec<u32>,
}

impl Model {
    /// Status and data of the answer.
    fn serve(&mut self, kind: u16, data: [u32; 3], page: &[u8], queues: u32) -> (u32, u32) {
        let [a, b, c] = data.map(u64::from);
        let there = a == u64::from(PAGE);
        match kind {
            1 if self.toeplitz => return (0, 15),
            1 => return (1, 0),
            2 if a > 15 || !self.toeplitz => return (2, 0),
            2 => self.types = a as u32,
            3 if b > 40 => return (3, 0),
            3 if b > 0 && !there => return (2, 0),
            3 => {
                self.key = page[..b as usize].to_vec();
                self.key.resize(40, 0);
            }
            4 => return (0, 128),
            5 if a > 128 => return (2, 0),
            5 => self.table = vec![0; a as usize],
            6 if b + c > self.table.len() as u64 || b > 0 && !there => return (2, 0),
            6 => {
                let entry = |n: usize| u32::from_le_bytes(page[4 * n..][..4].try_into().unwrap());
                let entries: Vec<u32> = (0..b as usize).map(entry).collect();
                if entries.iter().any(|queue| *queue >= queues) {
                    return (2, 0);
                }
                self.table[c as usize..][..entries.len()].copy_from_slice(&entries);
            }
            7 if a > 1 => return (2, 0),
            7 => self.toeplitz = a == 1,
            _ => return (1, 0),
        }
        (0, 0)
    }
}

fn seen(spread: &Spread) -> Model {
    Model {
        toeplitz: spread.algorithm == Algorithm::Toeplitz,
        types: spread.types,
        key: spread.key().to_vec(),
        table: spread.mapping.clone(),
    }
}

/// How many requests of each kind were carried out.
fn judge(input: &[u8], done: &mut [u32; 8]) {
    let mut s = Source(input);
    let queues = u32::from(s.pick(&[1u8, 2, 4, 64]));
    let mut spread = Arc::new(Spread::default());
    let mut model = seen(&spread);
    while !s.0.is_empty() {
        let noise = s.word();
        let kind = u16::from(s.pick(&[1u8, 2, 3, 4, 5, 5, 6, 6, 6, 6, 7, 7, 8, 255]));
        let small = u32::from(s.byte()) % 140;
        let first = match kind {
            3 | 6 => s.pick(&[PAGE, PAGE, PAGE, PAGE, PAGE, noise]),
            7 => s.pick(&[0, 1, 1, 1, 1, noise]),
            2 => s.pick(&[small & 15, small, noise]),
            _ => s.pick(&[small, small, 128, noise]),
        };
        let len = s.pick(&[small, small, small / 8, 0, 40, 41, 128, 129, noise, u32::MAX - small]);
        let offset = s.pick(&[0, 0, 0, small / 4, 128, noise, u32::MAX, len.wrapping_neg()]);
        let data = [first, len, offset];
        let mut page = bytes(noise.into(), 512);
        let style = s.byte() & 15;
        if style != 0 {
            // Queues that are there, and rarely the first one that is not.
            let end = queues + u32::from(style < 4);
            page.chunks_mut(4).for_each(|entry| {
                let queue = u32::from(entry[0]) % end;
                entry.copy_from_slice(&queue.to_le_bytes());
            });
        }
        let request = CtrlRequest { id: s.half(), kind, data };
        let served = serve(&request, &spread, queues as usize, |gref, into| {
            assert!(into.len() <= page.len());
            into.copy_from_slice(&page[..into.len()]);
            gref == PAGE
        });
        let answer = served.answer;
        let wanted = model.serve(kind, data, &page, queues);
        assert_eq!((answer.id, answer.kind), (request.id, kind));
        assert_eq!((answer.status, answer.data), wanted, "{request:?}");
        if let Some(changed) = served.spread {
            spread = Arc::new(changed);
        }
        assert_eq!(seen(&spread), model, "{request:?}");
        if wanted.0 == 0 {
            done[usize::from(kind)] += 1;
        }
    }
}

#[test]
fn control() {
    bolero::check!()
        .with_max_len(400)
        .with_iterations(2000)
        .for_each(|input: &[u8]| judge(input, &mut [0; 8]));
}

#[test]
fn control_that_is_the_same_each_time() {
    let mut done = [0; 8];
    (0..2000).for_each(|n| judge(&bytes(n + 1, 400), &mut done));
    assert!(done[1..].iter().all(|n| *n > 100), "the run hardly tried: {done:?}");
}
