//! Lists of pages that a guest wants kept mapped, over the control ring.

use std::cell::RefCell;
use std::collections::HashSet;
use std::rc::Rc;

use hypervisor::Access;
use netback::ctrl::lists::{MAX_LIST, Reach, serve};
use netback::proto::{CtrlRequest, GrefEntry};
use netback::staging::Staging;
use zerocopy::{FromBytes, IntoBytes};

use crate::{Source, bytes};

const QUEUES: usize = 2;
/// The page with the list, and one that may only be read.
const LIST: u32 = 9;
const READ_ONLY: u32 = 10;

/// The guest's grants: which pages there are, and which of them may be written.
fn is_granted(gref: u32) -> bool {
    gref < 48 && gref % 8 != 7
}
fn is_writable(gref: u32) -> bool {
    !gref.is_multiple_of(3)
}

/// As plain as can be: of each queue the pages that were mapped together.
struct Model {
    limit: usize,
    runs: [Vec<Vec<u32>>; QUEUES],
}

impl Model {
    fn has(&self, queue: usize, gref: u32) -> bool {
        self.runs[queue].iter().flatten().any(|known| *known == gref)
    }
    fn mapped(&self) -> Vec<u32> {
        let mut all: Vec<_> = self.runs.iter().flatten().flatten().copied().collect();
        all.sort_unstable();
        all
    }

    /// Status and data of the answer, and the entries' statuses if they are told.
    fn serve(
        &mut self,
        kind: u16,
        [queue, list, len]: [u32; 3],
        page: &[GrefEntry],
        maps: bool,
    ) -> ((u32, u32), Option<Vec<u16>>) {
        let queue = queue as usize;
        match kind {
            _ if self.limit == 0 => ((1, 0), None),
            _ if queue >= QUEUES => ((2, 0), None),
            8 => ((0, self.limit as u32), None),
            _ if len > 512 || len > 0 && list != LIST && list != READ_ONLY => ((2, 0), None),
            9 => ((if self.add(queue, &page[..len as usize], maps) { 0 } else { 2 }, 0), None),
            _ if len > 0 && list != LIST => ((2, 0), None),
            _ => {
                let mut going = Vec::new();
                let mut status = |entry: &GrefEntry| {
                    let goes = self.has(queue, entry.gref) && !going.contains(&entry.gref);
                    going.extend(goes.then_some(entry.gref));
                    if goes { 0 } else { 2 }
                };
                let statuses = page[..len as usize].iter().map(&mut status).collect();
                let count = going.len() as u32;
                self.runs[queue].retain_mut(|run| {
                    let before = run.len();
                    run.retain(|gref| !going.contains(gref));
                    // Who is left of a run is mapped anew.
                    run.len() == before || maps && !run.is_empty()
                });
                ((0, count), Some(statuses))
            }
        }
    }

    fn add(&mut self, queue: usize, entries: &[GrefEntry], maps: bool) -> bool {
        let total = self.runs[queue].iter().map(Vec::len).sum::<usize>() + entries.len();
        let bad = |(n, entry): (usize, &GrefEntry)| {
            entry.flags > 1
                || self.has(queue, entry.gref)
                || entries[..n].iter().any(|other| other.gref == entry.gref)
                || !is_granted(entry.gref)
                || entry.flags == 0 && !is_writable(entry.gref)
        };
        if total > self.limit || entries.iter().enumerate().any(bad) {
            return false;
        }
        if !entries.is_empty() && !maps {
            return false;
        }
        for flags in [0, 1] {
            let some = entries.iter().filter(|entry| entry.flags == flags);
            let some: Vec<_> = some.map(|entry| entry.gref).collect();
            self.runs[queue].extend((!some.is_empty()).then_some(some));
        }
        true
    }
}

type Mapped = Rc<RefCell<Vec<u32>>>;

struct Pages(Mapped, Vec<u32>);

impl Drop for Pages {
    fn drop(&mut self) {
        let mut all = self.0.borrow_mut();
        for gref in &self.1 {
            let at = all.iter().position(|mapped| mapped == gref).expect("mapped");
            all.swap_remove(at);
        }
    }
}

struct Guest {
    page: Vec<GrefEntry>,
    written: bool,
    mapped: Mapped,
    maps: bool,
    left: HashSet<u32>,
}

impl Reach for Guest {
    type Memory = Pages;
    fn read(&mut self, gref: u32, into: &mut [u8]) -> bool {
        into.copy_from_slice(&self.page.as_bytes()[..into.len()]);
        gref == LIST || gref == READ_ONLY
    }
    fn write(&mut self, gref: u32, from: &[u8]) -> bool {
        self.written = gref == LIST;
        if self.written {
            self.page.as_mut_bytes()[..from.len()].copy_from_slice(from);
        }
        self.written
    }
    fn map(&mut self, refs: &[u32], access: Access) -> Option<Pages> {
        assert!(!refs.is_empty() && refs.len() <= MAX_LIST);
        let may =
            |gref: &u32| is_granted(*gref) && (access == Access::ReadOnly || is_writable(*gref));
        if !self.maps || !refs.iter().all(may) {
            return None;
        }
        self.mapped.borrow_mut().extend(refs);
        Some(Pages(self.mapped.clone(), refs.to_vec()))
    }
    fn leaving(&mut self, _: usize, going: &HashSet<u32>) {
        self.left.clone_from(going);
    }
}

/// How many requests of each kind were carried out, and pages that have left.
fn judge(input: &[u8], done: &mut [u32; 4]) {
    let mut s = Source(input);
    let limit = s.pick(&[0u32, 5, 20, 20, 40, 600]);
    let tables: [_; QUEUES] = std::array::from_fn(|_| Staging::new(limit));
    let mut model = Model { limit: limit as usize, runs: Default::default() };
    let mapped = Mapped::default();
    while !s.0.is_empty() {
        let noise = s.word();
        let kind = s.pick(&[8u16, 9, 9, 9, 10, 10]);
        let list = s.pick(&[LIST, LIST, LIST, LIST, READ_ONLY, noise]);
        let len = s.pick(&[0, 1, 2, 3, 4, 5, 6, 512, 513, noise, u32::MAX]);
        let data = [s.pick(&[0, 0, 0, 1, 1, 2, noise]), list, len];
        let page = bytes(noise.into(), 4096);
        let mut page: Vec<_> =
            page.chunks(8).map(|entry| GrefEntry::read_from_bytes(entry).unwrap()).collect();
        let style = s.byte();
        for entry in &mut page {
            entry.gref %= if style & 1 == 0 { 48 } else { 64 };
            entry.flags = match style & 6 {
                // Each as it is granted.
                0 | 2 => u16::from(!is_writable(entry.gref)),
                4 => entry.flags & 1,
                _ => entry.flags,
            };
        }
        let mut guest = Guest {
            page: page.clone(),
            written: false,
            mapped: mapped.clone(),
            maps: style & 0xf0 != 0,
            left: HashSet::new(),
        };
        let request = CtrlRequest { id: s.half(), kind, data };
        let before = model.mapped().len();
        let served = serve(&request, &tables, &mut guest);
        let (wanted, statuses) = model.serve(kind, data, &page, guest.maps);
        let answer = served.answer;
        assert_eq!((answer.id, answer.kind), (request.id, kind));
        assert_eq!((answer.status, answer.data), wanted, "{request:?} {:?}", &page[..8]);
        assert_eq!(served.added, (kind == 9 && wanted.0 == 0).then_some(data[0] as usize));
        let told = guest.written.then(|| {
            let told = guest.page[..len as usize].iter().map(|entry| entry.status);
            told.collect::<Vec<_>>()
        });
        assert_eq!(told, statuses.filter(|statuses| !statuses.is_empty()), "{request:?}");
        let mut all = mapped.borrow().clone();
        all.sort_unstable();
        assert_eq!(all, model.mapped(), "{request:?}");
        if kind == 10 && wanted.0 == 0 {
            assert_eq!(guest.left.len(), wanted.1 as usize);
        }
        if wanted.0 == 0 {
            done[usize::from(kind - 8)] += 1;
            done[3] += before.saturating_sub(all.len()) as u32;
        }
    }
    drop(tables);
    assert!(mapped.borrow().is_empty());
}

#[test]
fn lists() {
    bolero::check!()
        .with_max_len(400)
        .with_iterations(1000)
        .for_each(|input: &[u8]| judge(input, &mut [0; 4]));
}

#[test]
fn lists_that_are_the_same_each_time() {
    let mut done = [0; 4];
    (0..1000).for_each(|n| judge(&bytes(n + 1, 400), &mut done));
    assert!(done.iter().all(|n| *n > 100), "the run hardly tried: {done:?}");
}
