//! A hostile device between two witnesses.

use std::time::Duration;

use hypervisor::xenbus::State;

use crate::guest::{Domain, PERSISTENT, PLAIN, Queue, Wish};
use crate::image::Image;
use crate::process::Holdings;
use crate::rig::{PATIENCE, Rig};
use crate::witness::{Mark, Witness};

/// The witness's device.
pub const GOOD: u32 = 51712;
/// The hostile one.
pub const BAD: u32 = 51728;
/// Bytes and sectors of the hostile device's disk.
pub const BYTES: usize = 4 << 20;
pub const SECTORS: u64 = BYTES as u64 / 512;
/// Verified requests that a witness must do during an attack.
const LEAST: u64 = 5;
/// The longest that it may wait for one: generous, for a busy machine.
const MOST_GAP: Duration = Duration::from_secs(5);

pub struct Scene {
    pub rig: Rig,
    pub domain: Domain,
    pub other: Domain,
    pub image: Image,
    /// Of another guest, and of the hostile one.
    pub witnesses: Vec<Witness>,
    before: Holdings,
}

impl Scene {
    pub fn start() -> Scene {
        Scene::with(&[])
    }

    /// With arguments for the backend.
    pub fn with(args: &[&str]) -> Scene {
        let rig = Rig::start(args);
        let (domain, other) = (rig.domain("hostile"), rig.domain("good"));
        let before = rig.holdings_at_rest();
        let image = rig.image("hostile.img", BYTES);
        rig.attach(domain.id, BAD, image.path(), "");
        let mut witnesses = Vec::new();
        for (guest, name, wish) in [(&other, "other.img", PERSISTENT), (&domain, "good.img", PLAIN)]
        {
            let disk = rig.image(name, 1 << 20);
            // Whatever the backend is told, a witness needs indirect requests.
            rig.attach(guest.id, GOOD, disk.path(), "ordering=both,max_indirect_segments=256");
            let queue = guest.connect(&rig, GOOD, wish).remove(0);
            witnesses.push(Witness::start(guest, queue));
        }
        Scene { rig, domain, other, image, witnesses, before }
    }

    /// Connects the hostile device.
    pub fn connect(&self, wish: Wish) -> Queue {
        self.connect_all(wish).remove(0)
    }
    pub fn connect_all(&self, wish: Wish) -> Vec<Queue> {
        self.domain.connect(&self.rig, BAD, wish)
    }
    /// Connects it again after it has failed or closed.
    pub fn again(&self, wish: Wish) -> Queue {
        self.domain.again(&self.rig, BAD, wish).remove(0)
    }
    pub fn wait(&self, state: State) {
        self.rig.wait(self.domain.id, BAD, state);
    }
    pub fn state(&self) -> Option<State> {
        self.rig.state(self.domain.id, BAD)
    }

    /// Waits until the hostile device has been given up for exactly this reason. `{}` stands for
    /// its name in messages.
    pub fn fails_with(&self, reason: &str) {
        let name = format!("vbd-{}-{BAD}", self.domain.id);
        let reason = reason.replace("{}", &name);
        self.wait(State::Closing);
        let found = self.rig.error(self.domain.id, BAD);
        assert_eq!(found.as_deref(), Some(reason.as_str()));
        assert!(self.threads().is_empty(), "threads of a failed device: {:?}", self.threads());
        self.rig.clear_error(self.domain.id, BAD);
    }

    /// Threads of the hostile device's queues.
    pub fn threads(&self) -> Vec<String> {
        let prefix = format!("vbd-{}-{BAD}.", self.domain.id);
        let prefix = &prefix[..prefix.len().min(15)];
        let threads = self.rig.process().threads();
        threads.into_iter().map(|(name, _)| name).filter(|n| n.starts_with(prefix)).collect()
    }

    /// Carries out an attack; both witnesses must go on between its beginning and its end.
    pub fn during<T>(&self, attack: impl FnOnce() -> T) -> T {
        let marks: Vec<Mark> = self.witnesses.iter().map(Witness::mark).collect();
        let result = attack();
        for (witness, mark) in self.witnesses.iter().zip(marks) {
            witness.goes_on(mark, LEAST, PATIENCE).unwrap();
            assert!(witness.gap() < MOST_GAP, "a witness waited for {:?}", witness.gap());
        }
        result
    }

    /// Ends the witnesses and takes all devices away: nothing may be left in the backend.
    pub fn finish(mut self) -> Image {
        for witness in std::mem::take(&mut self.witnesses) {
            witness.stop().unwrap();
        }
        if self.state().is_some_and(|s| s != State::Closed) {
            self.domain.set_state(BAD, State::Closed);
            self.wait(State::Closed);
        }
        self.domain.close(&self.rig, GOOD);
        self.other.close(&self.rig, GOOD);
        for (domid, devid) in [(self.domain.id, GOOD), (self.domain.id, BAD), (self.other.id, GOOD)]
        {
            self.rig.detach(domid, devid);
        }
        leaves_nothing(&self.rig, &self.before).unwrap();
        self.image.verify().unwrap();
        self.image
    }

    /// What the backend held before there was any device.
    pub fn before(&self) -> &Holdings {
        &self.before
    }
}

/// Waits until the backend holds what it held before there was any device.
pub fn leaves_nothing(rig: &Rig, before: &Holdings) -> Result<(), String> {
    leaves_nothing_within(rig, before, PATIENCE)
}

pub fn leaves_nothing_within(
    rig: &Rig,
    before: &Holdings,
    patience: Duration,
) -> Result<(), String> {
    let start = std::time::Instant::now();
    loop {
        let now = rig.process().holdings();
        if now == *before {
            return Ok(());
        }
        if start.elapsed() > patience {
            return Err(before.difference(&now));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
