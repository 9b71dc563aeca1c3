use super::*;

#[test]
fn numbers_count_upwards() {
    let mut domains = Domains::new();
    assert_eq!(domains.create(None, Kind::Guest), Ok(1));
    assert_eq!(domains.create(Some(2), Kind::Guest), Ok(2));
    assert_eq!(domains.create(None, Kind::Guest), Ok(3));
    assert!(domains.destroy(1));
    assert!(!domains.destroy(1));
    assert_eq!(domains.create(None, Kind::Guest), Ok(4), "a number was used again at once");
    assert_eq!(domains.create(Some(3), Kind::Guest), Err(CreateError::Exists));
    assert_eq!(domains.create(Some(0), Kind::Guest), Err(CreateError::BadNumber));
    assert_eq!(domains.create(Some(FIRST_RESERVED), Kind::Guest), Err(CreateError::BadNumber));
    assert!(!domains.destroy(0), "domain 0 was destroyed");
}

#[test]
fn numbers_wrap_below_the_reserved_ones() {
    let mut domains = Domains::new();
    domains.next = FIRST_RESERVED - 1;
    assert_eq!(domains.create(None, Kind::Guest), Ok(FIRST_RESERVED - 1));
    assert_eq!(domains.create(None, Kind::Guest), Ok(1));
}

#[test]
fn domains_are_bounded() {
    let mut domains = Domains::new();
    for _ in 1..MAX_DOMAINS {
        domains.create(None, Kind::Guest).unwrap();
    }
    assert_eq!(domains.create(None, Kind::Guest), Err(CreateError::Full));
}

#[test]
fn a_batch_is_mapped_whole_or_not_at_all() {
    let mut domains = Domains::new();
    let domid = domains.create(None, Kind::Guest).unwrap();
    let table = &mut domains.get_mut(domid).unwrap().grants;
    let good: Vec<_> =
        (0..4).map(|frame| table.grant(0, frame, Access::ReadWrite).unwrap()).collect();
    let theirs = table.grant(7, 9, Access::ReadWrite).unwrap();
    for k in 0..=good.len() {
        let mut batch = good.clone();
        batch.insert(k, theirs);
        let mut frames = vec![1234];
        let refused = domains.map(0, domid, &batch, Access::ReadOnly, &mut frames).err();
        assert_eq!(refused, Some((k, GrantError::WrongDomain)));
        assert_eq!(frames, [1234]);
        assert_eq!(domains.get(domid).unwrap().grants.in_use(), 0);
    }
    let mut frames = Vec::new();
    let mapped = domains.map(0, domid, &good, Access::ReadOnly, &mut frames).unwrap();
    assert_eq!(frames, [0, 1, 2, 3]);
    assert_eq!(domains.get(domid).unwrap().grants.in_use(), 4);
    domains.unmap(&mapped);
    assert_eq!(domains.get(domid).unwrap().grants.in_use(), 0);
}

#[test]
fn a_mapping_of_a_dead_domain_does_not_touch_its_successor() {
    let mut domains = Domains::new();
    let make = |domains: &mut Domains| {
        domains.create(Some(5), Kind::Guest).unwrap();
        domains.get_mut(5).unwrap().grants.grant(0, 0, Access::ReadWrite).unwrap()
    };
    let gref = make(&mut domains);
    let old = domains.map(0, 5, &[gref], Access::ReadOnly, &mut Vec::new()).unwrap();
    domains.destroy(5);
    assert_eq!(make(&mut domains), gref);
    domains.map(0, 5, &[gref], Access::ReadOnly, &mut Vec::new()).unwrap();
    domains.unmap(&old);
    assert_eq!(domains.get(5).unwrap().grants.in_use(), 1);
}
