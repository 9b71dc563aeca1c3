//! The backend's side of the xenbus handshake as a pure function.
//!
//! It is driven by levels, not edges: each time something may have changed, the server looks at
//! everything ([`Seen`]) and asks [`step`] what to do. A watch that fired once for two changes, or
//! twice for none, makes no difference.

use std::fmt;

/// State of one end (`enum xenbus_state`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum State {
    Unknown = 0,
    Initialising = 1,
    InitWait = 2,
    Initialised = 3,
    Connected = 4,
    Closing = 5,
    Closed = 6,
    Reconfiguring = 7,
    Reconfigured = 8,
}

impl State {
    /// Parses the value of a `state` node; anything that is not a state is `Unknown`, as for
    /// Linux's `xenbus_read_driver_state`.
    pub fn parse(text: &str) -> State {
        use State::*;
        let all = [
            Unknown,
            Initialising,
            InitWait,
            Initialised,
            Connected,
            Closing,
            Closed,
            Reconfiguring,
            Reconfigured,
        ];
        let number = text.trim().parse::<usize>().unwrap_or(0);
        all.get(number).copied().unwrap_or(Unknown)
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", *self as u32)
    }
}

/// What the hotplug script has said so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Hotplug {
    /// It has not run yet.
    Pending,
    /// `hotplug-status` is `connected`, or there is no script to wait for.
    Ready,
}

/// How far a device has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// The node is there, nothing was done about it.
    New,
    /// InitWait was written; the frontend has not said what it wants.
    Waiting,
    /// The rings are mapped and served.
    Connected,
    /// One end is closing. The rings may still be served.
    Closing,
    /// Both ends are done with each other; the frontend may come again.
    Closed,
    /// The node is gone, or the device is done with for good.
    Gone,
}

/// What the server sees at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Seen {
    /// The frontend's state; `None` when its node is gone (`xl destroy`).
    pub frontend: Option<State>,
    /// Our own state node; `None` when it is gone. The toolstack writes Closing here to detach.
    pub own: Option<State>,
    /// The `online` node: whether the device stays after a close.
    pub online: bool,
    /// The hotplug script.
    pub hotplug: Hotplug,
    /// The device gave up since the last look (the server has its reason).
    pub fault: bool,
}

/// What the server must do, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Write what the frontend must see before it chooses.
    Advertise,
    /// Write our state.
    Set(State),
    /// Open what the device stands on, map the rings, serve them, write what belongs to that.
    Connect,
    /// As `Connect`, to a frontend that a predecessor of this process had connected.
    Attach,
    /// Take over what a connected frontend has changed (netif's `xdp-headroom`).
    Reconfigure,
    /// Stop serving, answer what is in flight, unmap.
    Disconnect,
    /// Close what the device stands on (the image and its lock).
    Release,
    /// Write the reason of a fault to `error/...` before the state.
    Report,
}

/// One step: the next phase and what to do on the way. Call it again until it has nothing to do.
///
/// If `Connect` or `Attach` fails, the rest of the actions is dropped and the machine is stepped
/// with `fault` set and the phase it returned.
pub fn step(phase: Phase, seen: &Seen) -> (Phase, Vec<Action>) {
    use Action::*;
    use Phase::*;
    let serving = matches!(phase, Connected | Closing);
    let stop = if serving { vec![Disconnect, Release] } else { vec![Release] };
    let then = |more: &[Action]| [&stop[..], more].concat();
    let Some(own) = seen.own else {
        return if phase == Gone { (Gone, vec![]) } else { (Gone, stop) };
    };
    // The toolstack has made the directory anew while we were not looking: nobody else writes this
    // state. What was served is another device's, and so is what failed, unless that was the
    // advertisement in this very directory.
    let anew = own == State::Initialising && !matches!(phase, New | Gone);
    if anew && (serving || !seen.fault) {
        return (New, stop);
    }
    if seen.fault && !matches!(phase, Gone) {
        // State 5 tells the frontend to close; 6 follows when it has.
        return (Closing, then(&[Report, Set(State::Closing)]));
    }
    match (phase, seen.frontend) {
        (New, _) => begin(own, seen),
        // Nobody will ever answer: libxl waits for our 6.
        (Waiting | Connected | Closing, None) => (Closed, then(&[Set(State::Closed)])),
        (Waiting, Some(State::Initialised | State::Connected)) => match seen.hotplug {
            Hotplug::Ready if own != State::Closing => {
                (Connected, vec![Connect, Set(State::Connected)])
            }
            _ if own == State::Closing => (Closing, vec![]),
            _ => (Waiting, vec![]),
        },
        // The toolstack detaches a device that was never connected.
        (Waiting, Some(State::Closed | State::Unknown)) | (Waiting, Some(State::Closing)) => {
            (Closed, then(&[Set(State::Closed)]))
        }
        (Waiting, Some(_)) if matches!(own, State::Closing) => {
            (Closed, then(&[Set(State::Closed)]))
        }
        // A frontend that closes may still have requests in flight until it says Closed.
        (Connected, Some(State::Closing)) => (Closing, vec![Set(State::Closing)]),
        (Connected | Closing, Some(State::Closed | State::Unknown)) => {
            (Closed, then(&[Set(State::Closed)]))
        }
        // A frontend that starts anew without having closed (kexec after a crash).
        (Connected | Closing, Some(State::Initialising | State::InitWait)) => {
            (Waiting, then(&[Advertise, Set(State::InitWait)]))
        }
        (Connected, Some(_)) if own == State::Closing => (Closing, vec![]),
        // 7, our 8, 4, our 4 again: a frontend that reconfigures a second time waits for a new 8.
        (Connected, Some(State::Reconfiguring)) if own == State::Connected => {
            (Connected, vec![Reconfigure, Set(State::Reconfigured)])
        }
        (Connected, Some(State::Connected)) if own == State::Reconfigured => {
            (Connected, vec![Set(State::Connected)])
        }
        (Closed, Some(State::Initialising)) if seen.online => {
            (Waiting, vec![Advertise, Set(State::InitWait)])
        }
        // The toolstack asks what is closed to close, and waits for the answer.
        (Closed, frontend)
            if own == State::Closing || (frontend.is_none() && own != State::Closed) =>
        {
            (Closed, vec![Set(State::Closed)])
        }
        (Waiting | Connected | Closing | Closed | Gone, _) => (phase, vec![]),
    }
}

/// The first look at a node, which a predecessor may have left in any state.
fn begin(own: State, seen: &Seen) -> (Phase, Vec<Action>) {
    use Action::*;
    let connected = matches!(seen.frontend, Some(State::Connected | State::Reconfiguring));
    match own {
        State::Connected | State::Reconfigured if connected => (Phase::Connected, vec![Attach]),
        State::Connected | State::Reconfigured | State::Closing => match seen.frontend {
            // The predecessor died while the two were closing.
            Some(State::Closing | State::Initialised | State::Connected)
                if own == State::Closing =>
            {
                (Phase::Closing, vec![])
            }
            Some(State::Closing) => (Phase::Closing, vec![Set(State::Closing)]),
            Some(State::Initialising | State::InitWait) => {
                (Phase::Waiting, vec![Advertise, Set(State::InitWait)])
            }
            Some(State::Initialised) => (Phase::Waiting, vec![Advertise]),
            _ => (Phase::Closed, vec![Set(State::Closed)]),
        },
        State::Closed => (Phase::Closed, vec![]),
        _ => (Phase::Waiting, vec![Advertise, Set(State::InitWait)]),
    }
}

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;
