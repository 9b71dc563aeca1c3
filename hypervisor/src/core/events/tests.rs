use proptest::prelude::*;

use super::*;

fn two() -> Events {
    let mut events = Events::new();
    events.add_domain(0);
    events.add_domain(1);
    events
}

#[test]
fn bind_send_take_close() {
    let mut events = two();
    let guest = events.alloc_unbound(1, 0).unwrap();
    assert_eq!(guest, 1);
    assert_eq!(events.send(1, guest), Ok(None));
    let local = events.bind_interdomain(0, 1, guest).unwrap();
    assert!(events.pending(0, local), "a bound port starts pending");
    assert_eq!(events.take(0, local), Ok(true));
    let raised = Raised { domid: 0, port: local, upcall: true };
    assert_eq!(events.send(1, guest), Ok(Some(raised)));
    assert_eq!(events.send(1, guest), Ok(Some(Raised { upcall: false, ..raised })));
    assert_eq!(events.next_pending(0), Some(local));
    assert_eq!(events.take(0, local), Ok(true));
    assert_eq!(events.next_pending(0), None);
    events.close(0, local).unwrap();
    assert_eq!(events.channel(1, guest), Channel::Unbound { remote: 0 });
    assert_eq!(events.bind_interdomain(0, 1, guest), Ok(local));
}

#[test]
fn only_the_named_domain_binds_and_only_once() {
    let mut events = two();
    events.add_domain(2);
    let port = events.alloc_unbound(1, 0).unwrap();
    assert_eq!(events.bind_interdomain(2, 1, port), Err(EventError::BadPort));
    assert_eq!(events.bind_interdomain(0, 1, port + 1), Err(EventError::BadPort));
    assert_eq!(events.bind_interdomain(0, 9, port), Err(EventError::BadDomain));
    events.bind_interdomain(0, 1, port).unwrap();
    assert_eq!(events.bind_interdomain(0, 1, port), Err(EventError::BadPort));
}

#[test]
fn a_masked_port_waits() {
    let mut events = two();
    let guest = events.alloc_unbound(1, 0).unwrap();
    let local = events.bind_interdomain(0, 1, guest).unwrap();
    events.take(0, local).unwrap();
    events.mask(0, local).unwrap();
    assert_eq!(events.send(1, guest).unwrap().map(|r| r.upcall), Some(false));
    assert!(events.pending(0, local));
    assert_eq!(events.next_pending(0), None);
    assert_eq!(events.unmask(0, local), Ok(true));
    assert_eq!(events.next_pending(0), Some(local));
    assert_eq!(events.unmask(0, local), Ok(false));
    assert_eq!(events.unmask(0, PORTS as Port), Err(EventError::BadPort));
}

#[test]
fn ports_run_out_and_come_back() {
    let mut events = two();
    for port in 1..PORTS as Port {
        assert_eq!(events.alloc_unbound(1, 0), Ok(port));
    }
    assert_eq!(events.alloc_unbound(1, 0), Err(EventError::NoSpace));
    events.close(1, 77).unwrap();
    assert_eq!(events.alloc_unbound(1, 0), Ok(77));
}

#[test]
fn a_domain_that_goes_leaves_its_peers_unbound() {
    let mut events = two();
    let port = events.alloc_unbound(1, 0).unwrap();
    let local = events.bind_interdomain(0, 1, port).unwrap();
    events.remove_domain(1);
    assert_eq!(events.channel(0, local), Channel::Unbound { remote: 1 });
    assert_eq!(events.send(0, local), Ok(None));
    assert_eq!(events.send(1, port), Err(EventError::BadDomain));
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Alloc(DomId, DomId),
    Bind(DomId, DomId, Port),
    Close(DomId, Port),
    Send(DomId, Port),
    Take(DomId, Port),
    Mask(DomId, Port),
    Unmask(DomId, Port),
}

fn any_step() -> impl Strategy<Value = Step> {
    let (d, p) = (0..3u16, 0..9u32);
    prop_oneof![
        (d.clone(), d.clone()).prop_map(|(a, b)| Step::Alloc(a, b)),
        (d.clone(), d.clone(), p.clone()).prop_map(|(a, b, p)| Step::Bind(a, b, p)),
        (d.clone(), p.clone()).prop_map(|(a, p)| Step::Close(a, p)),
        (d.clone(), p.clone()).prop_map(|(a, p)| Step::Send(a, p)),
        (d.clone(), p.clone()).prop_map(|(a, p)| Step::Take(a, p)),
        (d.clone(), p.clone()).prop_map(|(a, p)| Step::Mask(a, p)),
        (d, p).prop_map(|(a, p)| Step::Unmask(a, p)),
    ]
}

proptest! {
    /// Connected ends always name each other; an event that was sent to an unmasked port is
    /// found through the selector until it is taken.
    #[test]
    fn ends_agree_and_no_event_is_lost(steps in prop::collection::vec(any_step(), 1..300)) {
        let mut events = Events::new();
        (0..3).for_each(|d| events.add_domain(d));
        for step in steps {
            match step {
                Step::Alloc(a, b) => drop(events.alloc_unbound(a, b)),
                Step::Bind(a, b, p) => {
                    let before = events.channel(b, p);
                    let bound = events.bind_interdomain(a, b, p);
                    prop_assert_eq!(bound.is_ok(), before == Channel::Unbound { remote: a });
                }
                Step::Close(a, p) => drop(events.close(a, p)),
                Step::Send(a, p) => {
                    if let Ok(Some(raised)) = events.send(a, p) {
                        prop_assert!(events.pending(raised.domid, raised.port));
                    }
                }
                Step::Take(a, p) => drop(events.take(a, p)),
                Step::Mask(a, p) => drop(events.mask(a, p)),
                Step::Unmask(a, p) => drop(events.unmask(a, p)),
            }
            for domid in 0..3 {
                for port in events.ports(domid) {
                    if let Channel::Interdomain { remote, port: there } = events.channel(domid, port) {
                        let back = Channel::Interdomain { remote: domid, port };
                        prop_assert_eq!(events.channel(remote, there), back);
                    }
                }
                let open = |e: &Events, p: &Port| {
                    let (word, bit) = locate(*p).unwrap();
                    let table = &e.tables[&domid];
                    table.pending[word] & !table.mask[word] & bit != 0
                };
                let lowest = (0..64).find(|p| open(&events, p));
                prop_assert_eq!(events.next_pending(domid), lowest);
            }
        }
    }
}
