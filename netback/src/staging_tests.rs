use std::cell::RefCell;
use std::rc::Rc;

use super::*;

/// What is mapped now, each page as often as it is.
#[derive(Clone, Default)]
pub(crate) struct Mapped(Rc<RefCell<Vec<GrantRef>>>);

/// Pages of it.
pub(crate) struct Fake {
    mapped: Mapped,
    refs: Vec<GrantRef>,
}

impl Mapped {
    pub(crate) fn map(&self, refs: &[GrantRef]) -> Fake {
        self.0.borrow_mut().extend(refs);
        Fake { mapped: self.clone(), refs: refs.to_vec() }
    }
    pub(crate) fn sorted(&self) -> Vec<GrantRef> {
        let mut all = self.0.borrow().clone();
        all.sort_unstable();
        all
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        let mut all = self.mapped.0.borrow_mut();
        for gref in &self.refs {
            let at = all.iter().position(|mapped| mapped == gref).expect("it was mapped");
            all.swap_remove(at);
        }
    }
}

fn run(mapped: &Mapped, refs: &[GrantRef]) -> Run<Fake> {
    Run::new(refs.to_vec(), Access::ReadWrite, mapped.map(refs))
}

/// What is in the table, each page with its place in its run.
fn listed(table: &Staging<Fake>) -> Vec<(GrantRef, GrantRef)> {
    let places = table.places.lock();
    let mut all: Vec<_> =
        places.iter().map(|(gref, place)| (*gref, place.run.memory.refs[place.page])).collect();
    all.sort_unstable();
    all
}

#[test]
fn a_table_takes_what_it_has_not_and_has_room_for() {
    let (table, mapped) = (Staging::new(5), Mapped::default());
    assert!(table.is_empty() && table.takes(&[1, 2, 3, 4, 5]) && !table.takes(&[1, 2, 3, 4, 5, 6]));
    assert!(!table.takes(&[7, 7]), "one is named twice");
    table.add(vec![run(&mapped, &[10, 11, 12])]);
    assert!(!table.is_empty());
    assert!(table.takes(&[1, 2]) && !table.takes(&[1, 2, 3]) && !table.takes(&[11]));
    assert_eq!(table.known([11, 9, 11, 10].into_iter()), [true, false, false, true]);
    assert!(Staging::<Fake>::new(0).takes(&[]) && !Staging::<Fake>::new(0).takes(&[1]));
}

#[test]
fn who_leaves_is_unmapped_and_its_neighbours_stay() {
    let (table, mapped) = (Staging::new(100), Mapped::default());
    table.add(vec![run(&mapped, &[1, 2, 3]), run(&mapped, &[4, 5]), run(&mapped, &[6])]);
    let mut again = Vec::new();
    table.remove(&[2, 6].into(), |refs, access| {
        assert_eq!(access, Access::ReadWrite);
        // Before the old ones go: the guest cannot take them back in between.
        assert!(mapped.sorted().starts_with(&[1, 2, 3]));
        again.push(refs.to_vec());
        Some(mapped.map(refs))
    });
    assert_eq!(again, [[1, 3]]);
    assert_eq!(mapped.sorted(), [1, 3, 4, 5]);
    assert_eq!(listed(&table), [1, 3, 4, 5].map(|gref| (gref, gref)));
    // Its neighbours cannot be mapped: they are not there any longer, and slots are copied.
    table.remove(&[1].into(), |_, _| None);
    assert_eq!((mapped.sorted(), table.runs().len()), (vec![4, 5], 1));
    table.remove(&[4, 5].into(), |_, _| unreachable!());
    assert!(table.is_empty() && mapped.sorted().is_empty());
}

#[test]
fn all_goes_with_the_table() {
    let (table, mapped) = (Staging::new(100), Mapped::default());
    table.add(vec![run(&mapped, &[1, 2, 3]), run(&mapped, &[4])]);
    drop(table);
    assert!(mapped.sorted().is_empty());
}
