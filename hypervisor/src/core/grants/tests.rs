use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

fn table() -> GrantTable {
    GrantTable::new(1)
}

#[test]
fn reserved_references_are_not_handed_out() {
    let mut table = table();
    let refs: Vec<_> = (0..10).map(|f| table.grant(0, f, Access::ReadWrite).unwrap()).collect();
    assert_eq!(refs[0], RESERVED);
    for gref in 0..RESERVED {
        assert_eq!(table.check(0, gref, Access::ReadOnly), Err(GrantError::NotGranted));
    }
}

#[test]
fn a_table_is_full_after_its_last_frame() {
    let mut table = table();
    for frame in 0..(ENTRIES_PER_FRAME as u32 - RESERVED) {
        table.grant(0, frame, Access::ReadWrite).unwrap();
    }
    assert_eq!(table.grant(0, 0, Access::ReadWrite), Err(GrantError::Full));
    table.end_access(100).unwrap();
    assert_eq!(table.grant(0, 0, Access::ReadWrite), Ok(100));
}

#[test]
fn flags_show_who_uses_a_page() {
    let mut table = table();
    let gref = table.grant(3, 77, Access::ReadWrite).unwrap();
    assert_eq!(table.entry(gref), Some(Entry { flags: GTF_PERMIT_ACCESS, domid: 3, frame: 77 }));
    assert_eq!(table.map(3, gref, Access::ReadOnly), Ok(77));
    assert_eq!(table.entry(gref).unwrap().flags, GTF_PERMIT_ACCESS | GTF_READING);
    assert_eq!(table.map(3, gref, Access::ReadWrite), Ok(77));
    assert_eq!(table.entry(gref).unwrap().flags, GTF_PERMIT_ACCESS | GTF_READING | GTF_WRITING);
    assert_eq!(table.end_access(gref), Err(GrantError::InUse));
    table.unmap(gref, Access::ReadWrite).unwrap();
    assert_eq!(table.entry(gref).unwrap().flags, GTF_PERMIT_ACCESS | GTF_READING);
    table.unmap(gref, Access::ReadOnly).unwrap();
    assert_eq!(table.unmap(gref, Access::ReadOnly), Err(GrantError::NotGranted));
    table.end_access(gref).unwrap();
    assert_eq!(table.entry(gref), Some(Entry::default()));
    assert_eq!(table.map(3, gref, Access::ReadOnly), Err(GrantError::NotGranted));
}

#[test]
fn pins_are_bounded() {
    let mut table = table();
    let gref = table.grant(3, 0, Access::ReadWrite).unwrap();
    for _ in 0..MAX_PINS {
        table.map(3, gref, Access::ReadOnly).unwrap();
    }
    assert_eq!(table.map(3, gref, Access::ReadOnly), Err(GrantError::TooManyPins));
}

#[test]
fn codes_and_numbers_of_xen() {
    for code in 0..100 {
        if let Some(e) = GrantError::from_code(code) {
            assert_eq!(e.code(), code);
            assert!((-13..0).contains(&e.gntst()));
        }
    }
    assert_eq!(GrantError::BadReference.gntst(), -3);
}

/// What the model knows of a reference.
#[derive(Clone, Copy, Debug)]
struct Known {
    peer: DomId,
    frame: u32,
    access: Access,
    readers: u32,
    writers: u32,
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Grant(DomId, u32, Access),
    End(GrantRef),
    Map(DomId, GrantRef, Access),
    Unmap(GrantRef, Access),
}

fn any_access() -> impl Strategy<Value = Access> {
    prop_oneof![Just(Access::ReadOnly), Just(Access::ReadWrite)]
}

fn any_step() -> impl Strategy<Value = Step> {
    let gref = 6..20u32;
    prop_oneof![
        (0..3u16, any::<u32>(), any_access()).prop_map(|(d, f, a)| Step::Grant(d, f, a)),
        gref.clone().prop_map(Step::End),
        (0..3u16, gref.clone(), any_access()).prop_map(|(d, g, a)| Step::Map(d, g, a)),
        (gref, any_access()).prop_map(|(g, a)| Step::Unmap(g, a)),
    ]
}

fn expected_map(known: Option<&Known>, caller: DomId, access: Access) -> Result<u32, GrantError> {
    match known {
        None => Err(GrantError::NotGranted),
        Some(k) if k.peer != caller => Err(GrantError::WrongDomain),
        Some(k) if k.access == Access::ReadOnly && access == Access::ReadWrite => {
            Err(GrantError::ReadOnly)
        }
        Some(k) => Ok(k.frame),
    }
}

proptest! {
    /// Every answer is the one that a map from references to what is known of them gives.
    #[test]
    fn agrees_with_a_model(steps in prop::collection::vec(any_step(), 1..200)) {
        let mut table = GrantTable::new(1);
        let mut model: BTreeMap<GrantRef, Known> = BTreeMap::new();
        let mut highest = RESERVED;
        for step in steps {
            match step {
                Step::Grant(peer, frame, access) => {
                    let gref = table.grant(peer, frame, access).unwrap();
                    highest = highest.max(gref + 1);
                    let new = Known { peer, frame, access, readers: 0, writers: 0 };
                    prop_assert!(model.insert(gref, new).is_none(), "{gref} was handed out twice");
                }
                Step::End(gref) => {
                    let expected = match model.get(&gref) {
                        _ if gref >= highest => Err(GrantError::BadReference),
                        None => Err(GrantError::NotGranted),
                        Some(k) if k.readers + k.writers > 0 => Err(GrantError::InUse),
                        Some(_) => Ok(()),
                    };
                    prop_assert_eq!(table.end_access(gref), expected);
                    if expected.is_ok() {
                        model.remove(&gref);
                    }
                }
                Step::Map(caller, gref, access) => {
                    let expected = match gref >= highest {
                        true => Err(GrantError::BadReference),
                        false => expected_map(model.get(&gref), caller, access),
                    };
                    prop_assert_eq!(table.map(caller, gref, access), expected);
                    if let (Ok(_), Some(k)) = (expected, model.get_mut(&gref)) {
                        match access {
                            Access::ReadOnly => k.readers += 1,
                            Access::ReadWrite => k.writers += 1,
                        }
                    }
                }
                Step::Unmap(gref, access) => {
                    let count = model.get_mut(&gref).map(|k| match access {
                        Access::ReadOnly => &mut k.readers,
                        Access::ReadWrite => &mut k.writers,
                    });
                    let done = count.filter(|c| **c > 0).map(|c| *c -= 1);
                    prop_assert_eq!(table.unmap(gref, access).is_ok(), done.is_some());
                }
            }
            prop_assert_eq!(table.granted(), model.len());
            let used = model.values().filter(|k| k.readers + k.writers > 0).count();
            prop_assert_eq!(table.in_use(), used);
        }
    }
}
