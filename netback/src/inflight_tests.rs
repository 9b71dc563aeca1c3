use super::*;
use crate::endpoint::Accepts;
use crate::negotiate::{CtrlKeys, Multicast, Ports, QueueKeys, RxNotify};

fn id() -> DeviceId {
    DeviceId { kind: "vif", domid: 3, devid: 0 }
}

fn accepted(port: u32) -> Accepted {
    let queue = |ports, first: u32| QueueKeys {
        tx_refs: vec![first],
        rx_refs: vec![first + 1, first + 2],
        ports,
    };
    Accepted {
        accepts: Accepts::default(),
        rx_notify: RxNotify::Yes,
        multicast: Multicast::Flood,
        xdp_headroom: 0,
        ctrl: None,
        queues: vec![
            queue(Ports::Shared(port), 10),
            queue(Ports::Split { tx: port + 1, rx: port + 2 }, 20),
        ],
    }
}

#[test]
fn two_tables_a_queue_each_as_long_as_its_ring_needs() {
    let run = tempfile::tempdir().unwrap();
    let made = tables(run.path(), &id(), &accepted(5), Meeting::Fresh);
    assert_eq!((made.queues.len(), made.past), (2, Past::None));
    let slots = [rings::slot_count::<Tx>(1), rings::slot_count::<Rx>(2)];
    for pair in made.queues {
        assert!(Table::<<Tx as Protocol>::Req, _>::format(pair[0].clone(), slots[0]).is_ok());
        assert!(Table::<<Rx as Protocol>::Req, _>::format(pair[1].clone(), slots[1]).is_ok());
    }
    let found = tables(run.path(), &id(), &accepted(5), Meeting::Attach);
    assert_eq!(found.past, Past::Kept);
    for pair in found.queues {
        assert!(Table::<<Tx as Protocol>::Req, _>::open(pair[0].clone(), slots[0]).is_ok());
        assert!(Table::<<Rx as Protocol>::Req, _>::open(pair[1].clone(), slots[1]).is_ok());
    }
}

#[test]
fn those_of_another_connection_are_not_taken() {
    let run = tempfile::tempdir().unwrap();
    drop(tables(run.path(), &id(), &accepted(5), Meeting::Fresh));
    let other = tables(run.path(), &id(), &accepted(6), Meeting::Attach);
    assert!(matches!(other.past, Past::Lost(why) if why.ends_with("is of another connection")));
}

#[test]
fn with_a_control_ring_each_queue_has_room_for_what_is_kept_mapped() {
    let run = tempfile::tempdir().unwrap();
    let with = Accepted { ctrl: Some(CtrlKeys { ring_ref: 90, port: 91 }), ..accepted(5) };
    let made = tables(run.path(), &id(), &with, Meeting::Fresh);
    assert_eq!((made.noted.len(), made.queues.len()), (2, 2));
    assert!(made.noted.iter().all(|memory| memory.len() == noted::BYTES));
    made.noted[1].write(noted::BYTES - 1, &[7]);
    let found = tables(run.path(), &id(), &with, Meeting::Attach);
    let mut last = [0];
    found.noted[1].read(noted::BYTES - 1, &mut last);
    assert_eq!((found.past, last), (Past::Kept, [7]));
    assert!(tables(run.path(), &id(), &accepted(5), Meeting::Fresh).noted.is_empty());
}
