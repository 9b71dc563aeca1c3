//! One device under the handshake: a thread that looks at its nodes, steps the machine and calls
//! the [`Device`].

use std::io;
use std::sync::Arc;
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, after, select};

use super::control::Request;
use super::log_limit::LogLimit;
use super::machine::{Action, Phase, Seen, State, step};
use super::nodes::{Key, Nodes};

/// Why a device cannot go on. Its text reaches the guest's administrator through xenstore.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault(pub String);

impl<E: std::error::Error> From<E> for Fault {
    fn from(e: E) -> Self {
        Fault(e.to_string())
    }
}

/// Where a device's own threads say that it cannot go on.
#[derive(Clone)]
pub struct Faults(Sender<Fault>);

impl Faults {
    /// A place to report to, and where it arrives. Later reports than the first are dropped.
    pub fn channel() -> (Faults, Receiver<Fault>) {
        let (send, receive) = crossbeam::channel::bounded(1);
        (Faults(send), receive)
    }

    /// Reports. The first fault is the one that counts.
    pub fn report(&self, fault: Fault) {
        // Full: a fault is being handled. Disconnected: the device is going away.
        drop(self.0.try_send(fault));
    }
}

/// How a device meets its frontend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meeting {
    /// The frontend has written new rings.
    Fresh,
    /// The frontend goes on with rings that a predecessor of this process served.
    Attach,
}

/// Why a device stops serving.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parting {
    /// The frontend closes, is gone, or broke the protocol.
    Frontend,
    /// This process ends, and a successor goes on with the same rings: leave what was answered
    /// safe on the disk.
    Leave,
}

/// A backend device, called by its own thread alone.
pub trait Device: Send {
    /// What the frontend must see before it chooses; written before state 2.
    fn advertise(&mut self, nodes: &Nodes) -> Result<Vec<Key>, Fault>;
    /// Maps the rings and serves them. What it returns is written before state 4.
    fn connect(&mut self, nodes: &Nodes, how: Meeting, faults: Faults) -> Result<Vec<Key>, Fault>;
    /// While connected: the frontend may have changed a key of [`Backend::live_keys`], or it
    /// reconfigures (state 7) and waits until this was called. What it has not changed is there too.
    ///
    /// [`Backend::live_keys`]: super::Backend::live_keys
    fn reconfigure(&mut self, _: &Nodes) -> Result<(), Fault> {
        Ok(())
    }
    /// Answers what is in flight, stops and unmaps. Called in any state.
    fn disconnect(&mut self, why: Parting);
    /// Closes what the device stands on. Called in any state.
    fn release(&mut self);
    /// Called each second while connected, for what nobody announces (a file that has grown).
    fn tick(&mut self, nodes: &Nodes) -> Result<(), Fault>;
    /// Answers one line of the control socket with one line.
    fn control(&mut self, nodes: &Nodes, line: &str) -> String;
}

/// What the server says to a device's thread.
pub(crate) enum Word {
    /// Something may have changed.
    Look,
    /// The process ends: drain and go, leave the nodes for a successor.
    Leave,
}

pub(crate) struct Runner {
    pub nodes: Nodes,
    pub device: Box<dyn Device>,
    pub words: Receiver<Word>,
    pub requests: Receiver<Request>,
    pub log: LogLimit,
}

impl Runner {
    /// Runs until the node is gone or the process ends.
    pub(crate) fn run(mut self) {
        let mut phase = Phase::New;
        let (faults, reported) = Faults::channel();
        let mut fault: Option<Fault> = None;
        loop {
            match self.settle(&mut phase, &mut fault, (&faults, &reported)) {
                Ok(()) => {}
                Err(e) => {
                    tracing::error!("{}: {e}", self.nodes.id());
                    break;
                }
            }
            if phase == Phase::Gone {
                break;
            }
            select! {
                recv(self.words) -> word => match word {
                    Ok(Word::Look) if phase == Phase::Connected => {
                        fault = self.device.reconfigure(&self.nodes).err();
                    }
                    Ok(Word::Look) => {}
                    Ok(Word::Leave) | Err(_) => break,
                },
                recv(reported) -> reason => fault = reason.ok(),
                recv(self.requests) -> request => {
                    if let Ok(request) = request {
                        let answer = self.device.control(&self.nodes, &request.line);
                        request.answer(answer);
                    }
                }
                recv(after(Duration::from_secs(1))) -> _ => {
                    if phase == Phase::Connected && let Err(e) = self.device.tick(&self.nodes) {
                        fault = Some(e);
                    }
                }
            }
        }
        self.device.disconnect(Parting::Leave);
        self.device.release();
    }

    /// Steps until there is nothing to do.
    fn settle(
        &mut self,
        phase: &mut Phase,
        fault: &mut Option<Fault>,
        faults: (&Faults, &Receiver<Fault>),
    ) -> io::Result<()> {
        loop {
            let seen = self.nodes.look(*phase, fault.is_some())?;
            let (next, actions) = step(*phase, &seen);
            if actions.is_empty() && next == *phase {
                return Ok(());
            }
            tracing::debug!("{}: {phase:?} to {next:?}: {actions:?}", self.nodes.id());
            *phase = next;
            let reason = fault.take();
            if let Err(e) = self.carry_out(&actions, &reason, &seen, faults)? {
                *fault = Some(e);
            }
        }
    }

    /// A device's keys go with the state that they are said for, in one transaction: a toolstack
    /// may make the directory anew at any time, and a frontend must not find our state there
    /// without them.
    fn carry_out(
        &mut self,
        actions: &[Action],
        reason: &Option<Fault>,
        seen: &Seen,
        faults: (&Faults, &Receiver<Fault>),
    ) -> io::Result<Result<(), Fault>> {
        let (faults, reported) = faults;
        let (mut keys, mut own) = (Vec::new(), seen.own);
        for action in actions {
            let more = match *action {
                Action::Advertise => self.device.advertise(&self.nodes),
                Action::Connect => self.device.connect(&self.nodes, Meeting::Fresh, faults.clone()),
                Action::Attach => self.device.connect(&self.nodes, Meeting::Attach, faults.clone()),
                Action::Reconfigure => self.device.reconfigure(&self.nodes).map(|()| Vec::new()),
                Action::Disconnect => {
                    self.device.disconnect(Parting::Frontend);
                    // What else its threads had to say is about a connection that is no more.
                    while reported.try_recv().is_ok() {}
                    Ok(Vec::new())
                }
                Action::Release => {
                    self.device.release();
                    Ok(Vec::new())
                }
                // Writing what is there already would fire everybody's watches for nothing.
                Action::Set(state) if own == Some(state) && state != State::Connected => {
                    self.nodes.write(&std::mem::take(&mut keys))?;
                    Ok(Vec::new())
                }
                Action::Set(state) => {
                    self.nodes.write_state(&std::mem::take(&mut keys), state, own)?;
                    own = Some(state);
                    Ok(Vec::new())
                }
                Action::Report => {
                    self.report(reason.as_ref().map_or("unknown", |f| &f.0))?;
                    Ok(Vec::new())
                }
            };
            match more {
                Ok(more) => keys.extend(more),
                Err(fault) => return Ok(Err(fault)),
            }
        }
        self.nodes.write(&keys)?;
        Ok(Ok(()))
    }

    fn report(&mut self, text: &str) -> io::Result<()> {
        if self.log.permits(self.nodes.id()) {
            tracing::error!("{}: {text}", self.nodes.id());
        }
        Ok(self.nodes.report(text)?)
    }
}

/// A device's thread as the server sees it.
pub(crate) struct Thread {
    pub words: Sender<Word>,
    pub handle: std::thread::JoinHandle<()>,
    /// Tells that the frontend's state node is watched, to end the watch with the device.
    pub frontend_path: String,
    /// Kept for as long as the device is served: sockets and locks in the run directory.
    pub _kept: Arc<dyn Send + Sync>,
}
