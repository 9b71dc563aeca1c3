use super::*;

fn seen(own: u32, frontend: Option<u32>) -> Seen {
    Seen {
        own: Some(State::parse(&own.to_string())),
        frontend: frontend.map(|f| State::parse(&f.to_string())),
        online: true,
        hotplug: Hotplug::Ready,
        fault: false,
    }
}

/// Steps until nothing is left to do, applying what is written to the own state.
fn settle(phase: Phase, mut seen: Seen) -> (Phase, Seen, Vec<Action>) {
    let (mut phase, mut all) = (phase, Vec::new());
    for _ in 0..10 {
        let (next, actions) = step(phase, &seen);
        if actions.is_empty() && next == phase {
            return (phase, seen, all);
        }
        seen.fault = false;
        for action in &actions {
            if let Action::Set(state) = action
                && seen.own.is_some()
            {
                seen.own = Some(*state);
            }
        }
        phase = next;
        all.extend(actions);
    }
    panic!("{phase:?} does not settle on {seen:?}");
}

use Action::*;

#[test]
fn a_life_from_attach_to_detach() {
    let mut s = seen(1, Some(1));
    s.hotplug = Hotplug::Pending;
    let (phase, mut s, did) = settle(Phase::New, s);
    assert_eq!((phase, did), (Phase::Waiting, vec![Advertise, Set(State::InitWait)]));
    s.frontend = Some(State::Initialised);
    let (phase, mut s, did) = settle(phase, s);
    assert_eq!((phase, did), (Phase::Waiting, vec![]));
    s.hotplug = Hotplug::Ready;
    let (phase, mut s, did) = settle(phase, s);
    assert_eq!((phase, did), (Phase::Connected, vec![Connect, Set(State::Connected)]));
    s.frontend = Some(State::Connected);
    let (phase, mut s, did) = settle(phase, s);
    assert_eq!((phase, did), (Phase::Connected, vec![]));
    // xl block-detach: online 0, state 5.
    (s.online, s.own) = (false, Some(State::Closing));
    let (phase, mut s, did) = settle(phase, s);
    assert_eq!((phase, did), (Phase::Closing, vec![]));
    s.frontend = Some(State::Closing);
    let (phase, mut s, did) = settle(phase, s);
    assert_eq!((phase, did), (Phase::Closing, vec![]));
    s.frontend = Some(State::Closed);
    let (phase, mut s, did) = settle(phase, s);
    assert_eq!((phase, did), (Phase::Closed, vec![Disconnect, Release, Set(State::Closed)]));
    s.own = None;
    assert_eq!(settle(phase, s).0, Phase::Gone);
}

#[test]
fn shutdown_is_5_then_6() {
    let (phase, mut s, did) = settle(Phase::Connected, seen(4, Some(5)));
    assert_eq!((phase, did), (Phase::Closing, vec![Set(State::Closing)]));
    s.frontend = Some(State::Closed);
    let (phase, _, did) = settle(phase, s);
    assert_eq!((phase, did), (Phase::Closed, vec![Disconnect, Release, Set(State::Closed)]));
}

#[test]
fn a_connected_frontend_reconfigures_as_often_as_it_likes() {
    let (mut phase, mut s) = (Phase::Connected, seen(4, Some(4)));
    for _ in 0..2 {
        s.frontend = Some(State::Reconfiguring);
        let (next, seen, did) = settle(phase, s);
        assert_eq!((next, did), (Phase::Connected, vec![Reconfigure, Set(State::Reconfigured)]));
        s = seen;
        s.frontend = Some(State::Connected);
        let (next, seen, did) = settle(next, s);
        assert_eq!((next, did), (Phase::Connected, vec![Set(State::Connected)]));
        (phase, s) = (next, seen);
    }
    // It may also go without having come back, and be killed or begin anew.
    for (own, frontend) in [(8, 5), (8, 6), (8, 1), (4, 5)] {
        let (phase, _, did) = settle(Phase::Connected, seen(own, Some(frontend)));
        assert_ne!((phase, did.is_empty()), (Phase::Connected, true), "{own} {frontend}");
    }
    assert_eq!(settle(Phase::Connected, seen(8, None)).0, Phase::Closed);
}

#[test]
fn a_reconfiguration_that_nobody_waits_for_does_nothing() {
    for phase in [Phase::Waiting, Phase::Closing, Phase::Closed] {
        let (next, _, did) =
            settle(phase, seen(if phase == Phase::Waiting { 2 } else { 5 }, Some(7)));
        assert!(!did.contains(&Reconfigure) && !did.contains(&Connect), "{phase:?} {next:?}");
    }
}

#[test]
fn a_predecessor_that_died_while_reconfiguring() {
    for (own, frontend) in [(4, 7), (8, 7), (8, 4)] {
        let (phase, s, did) = settle(Phase::New, seen(own, Some(frontend)));
        assert_eq!((phase, did[0]), (Phase::Connected, Attach), "{own} {frontend}");
        let own = if frontend == 7 { State::Reconfigured } else { State::Connected };
        assert_eq!(s.own, Some(own));
    }
}

#[test]
fn destroy_is_answered_at_once() {
    for phase in [Phase::Waiting, Phase::Connected, Phase::Closing] {
        let (next, s, did) = settle(phase, seen(4, None));
        assert_eq!((next, s.own), (Phase::Closed, Some(State::Closed)));
        assert_eq!(did.last(), Some(&Set(State::Closed)));
        assert_eq!(did.contains(&Disconnect), phase != Phase::Waiting);
    }
}

#[test]
fn a_closed_device_answers_a_toolstack_that_closes_it() {
    for frontend in [None, Some(6), Some(1)] {
        let mut s = seen(5, frontend);
        s.online = false;
        let (phase, s, _) = settle(Phase::Closed, s);
        assert_eq!((phase, s.own), (Phase::Closed, Some(State::Closed)));
    }
}

#[test]
fn a_fault_closes_and_waits_for_the_frontend() {
    let mut s = seen(4, Some(4));
    s.fault = true;
    let (phase, mut s, did) = settle(Phase::Connected, s);
    assert_eq!(
        (phase, did),
        (Phase::Closing, vec![Disconnect, Release, Report, Set(State::Closing)])
    );
    s.frontend = Some(State::Closed);
    assert_eq!(settle(phase, s).1.own, Some(State::Closed));
}

#[test]
fn kexec_with_and_without_closing() {
    let (phase, s, did) = settle(Phase::Connected, seen(4, Some(1)));
    assert_eq!((phase, s.own), (Phase::Waiting, Some(State::InitWait)));
    assert_eq!(did, [Disconnect, Release, Advertise, Set(State::InitWait)]);
    let (phase, _, did) = settle(Phase::Closed, seen(6, Some(1)));
    assert_eq!((phase, did), (Phase::Waiting, vec![Advertise, Set(State::InitWait)]));
}

#[test]
fn a_successor_attaches_to_a_connected_frontend() {
    let (phase, _, did) = settle(Phase::New, seen(4, Some(4)));
    assert_eq!((phase, did), (Phase::Connected, vec![Attach]));
    let (phase, _, did) = settle(Phase::New, seen(4, None));
    assert_eq!((phase, did), (Phase::Closed, vec![Set(State::Closed)]));
}

#[test]
fn a_directory_made_anew_is_another_device() {
    for phase in [Phase::Waiting, Phase::Connected, Phase::Closing, Phase::Closed] {
        let serves = matches!(phase, Phase::Connected | Phase::Closing);
        // What is served no more has no faults that count.
        for fault in [false, serves] {
            let mut s = seen(1, Some(1));
            s.fault = fault;
            let (next, s, did) = settle(phase, s);
            assert_eq!((next, s.own), (Phase::Waiting, Some(State::InitWait)), "{phase:?}");
            let stops: &[Action] = if serves { &[Disconnect, Release] } else { &[Release] };
            assert_eq!(did, [stops, &[Advertise, Set(State::InitWait)]].concat(), "{phase:?}");
        }
    }
    // An advertisement that failed is this directory's own fault.
    let mut s = seen(1, Some(1));
    s.fault = true;
    assert_eq!(
        step(Phase::Waiting, &s),
        (Phase::Closing, vec![Release, Report, Set(State::Closing)])
    );
}

/// Every combination settles, and what it settles in is a state that some event leads out of.
#[test]
fn every_combination_settles() {
    use Phase::*;
    for phase in [New, Waiting, Connected, Closing, Closed, Gone] {
        for own in [None, Some(1), Some(2), Some(3), Some(4), Some(5), Some(6), Some(7)] {
            for frontend in [None, Some(0), Some(1), Some(2), Some(3), Some(4), Some(5), Some(6)] {
                for bits in 0..8 {
                    let mut s = seen(own.unwrap_or(0), frontend);
                    if own.is_none() {
                        s.own = None;
                    }
                    s.online = bits & 1 != 0;
                    s.fault = bits & 2 != 0;
                    if bits & 4 != 0 {
                        s.hotplug = Hotplug::Pending;
                    }
                    let (end, after, did) = settle(phase, s);
                    assert_eq!(s.own.is_none() || phase == Gone, end == Gone, "{phase:?} {s:?}");
                    if frontend.is_none() && end != Gone && phase != Gone && !s.fault {
                        assert_eq!(after.own.map(|o| o as u32 >= 5), Some(true), "{phase:?} {s:?}");
                    }
                    // Whatever stops serving says so to the device first.
                    if matches!(phase, Connected | Closing)
                        && matches!(end, Waiting | Closed | Gone)
                    {
                        assert_eq!(did.first(), Some(&Disconnect), "{phase:?} {s:?}");
                    }
                }
            }
        }
    }
}
