//! Limits that several disks share, and whose turn it is.
//!
//! Who waits gets its turn by start-time fair queuing, in two steps: among the disks that have
//! something waiting which the limits would let go, the one that was served least; among its
//! queues likewise. Whoever is served more than [`AHEAD_S`] beyond that waits, and so a disk with
//! a deep queue gets no more than one with a shallow one that always has something waiting.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::bucket::Bucket;
use super::limits::Limits;

/// How far ahead of the others, in seconds of the limits' whole rate, somebody may be served. It
/// spares a change of threads for each request.
const AHEAD_S: f64 = 0.005;
/// Who has asked counts as waiting for so long after it was told to come again.
const GRACE: Duration = Duration::from_millis(20);
/// When to come again who has only to let others go first.
const TURN: Duration = Duration::from_millis(1);
/// Shortest and longest wait that somebody is told. Short ones cost a wake-up for each request,
/// and a bucket makes up for it; long ones would miss a change of the limits.
const SHORTEST: f64 = 0.0005;
const LONGEST: f64 = 0.1;

/// Which way payload goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    Read,
    Write,
}

impl Way {
    pub(super) const BOTH: [Way; 2] = [Way::Read, Way::Write];
    pub(super) fn other(self) -> Way {
        match self {
            Way::Read => Way::Write,
            Way::Write => Way::Read,
        }
    }
}

/// What a request counts for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Load {
    pub way: Way,
    pub bytes: u64,
}

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Asker {
    pub disk: u64,
    pub queue: u64,
}

/// The answer to one who asks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Turn {
    Go,
    /// Ask again after this.
    Wait(Duration),
}

/// How much somebody was served, for each way, in seconds of the limits' whole rate.
#[derive(Clone, Copy, Debug, Default)]
struct Served([f64; 2]);

#[derive(Debug, Default)]
struct QueueState {
    served: Served,
    /// Until when it counts as waiting.
    waits: [Option<Instant>; 2],
}

impl QueueState {
    fn waits(&self, way: Way, now: Instant) -> bool {
        self.waits[way as usize].is_some_and(|until| until >= now)
    }
}

#[derive(Debug, Default)]
struct DiskState {
    served: Served,
    queues: BTreeMap<u64, QueueState>,
}

impl DiskState {
    fn waits(&self, way: Way, now: Instant) -> bool {
        self.queues.values().any(|queue| queue.waits(way, now))
    }
}

pub(super) struct State {
    limits: Limits,
    /// By requests, then by bytes: all, reads, writes.
    buckets: [Bucket; 6],
    leaked: Instant,
    disks: BTreeMap<u64, DiskState>,
    /// How much those who are served now had been served before: newcomers begin there.
    clock: Served,
}

impl State {
    fn set(&mut self, limits: Limits) {
        self.limits = limits;
        let all = limits.iops.iter().chain(&limits.bps);
        for (bucket, limit) in self.buckets.iter_mut().zip(all) {
            *bucket = Bucket::new(*limit);
        }
    }

    /// The buckets that a way goes through, by requests and by bytes.
    fn of(way: Way) -> [(usize, Unit); 4] {
        let own = 1 + way as usize;
        [(0, Unit::Requests), (own, Unit::Requests), (3, Unit::Bytes), (3 + own, Unit::Bytes)]
    }

    fn units(&self, unit: Unit, load: Load) -> f64 {
        match (unit, self.limits.iops_size) {
            (Unit::Bytes, _) => load.bytes as f64,
            (Unit::Requests, 0) => 1.0,
            (Unit::Requests, size) => (load.bytes as f64 / size as f64).max(1.0),
        }
    }

    /// Whether reads and writes share a limit.
    fn is_shared(&self) -> bool {
        self.buckets[0].limits() || self.buckets[3].limits()
    }

    /// Seconds until the limits let the next request of a way go.
    fn wait(&self, way: Way) -> f64 {
        Self::of(way).iter().map(|(at, _)| self.buckets[*at].wait()).fold(0.0, f64::max)
    }

    /// Time has passed: to be called before the questions of a batch.
    pub(super) fn advance(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.leaked).as_secs_f64();
        self.leaked = self.leaked.max(now);
        self.buckets.iter_mut().for_each(|bucket| bucket.leak(passed));
    }

    /// May a request go? If so it is counted.
    pub(super) fn ask(&mut self, asker: Asker, load: Load, now: Instant) -> Turn {
        let way = load.way as usize;
        self.arrive(asker, load.way, now);
        let wait = self.wait(load.way);
        let told = if wait > 0.0 {
            Duration::from_secs_f64(wait.clamp(SHORTEST, LONGEST))
        } else if self.is_ahead(asker, load.way, now) {
            TURN
        } else {
            self.serve(asker, load);
            return Turn::Go;
        };
        if let Some(queue) = self.queue(asker) {
            queue.waits[way] = Some(now + told + GRACE);
        }
        Turn::Wait(told)
    }

    /// The queue has nothing waiting on this way any more.
    pub(super) fn leave(&mut self, asker: Asker, way: Way) {
        if let Some(queue) = self.queue(asker) {
            queue.waits[way as usize] = None;
        }
    }

    fn queue(&mut self, asker: Asker) -> Option<&mut QueueState> {
        self.disks.get_mut(&asker.disk)?.queues.get_mut(&asker.queue)
    }

    /// The ways that are served together with this one.
    fn together(&self, way: Way) -> impl Iterator<Item = Way> + Clone + use<> {
        let shared = self.is_shared();
        Way::BOTH.into_iter().filter(move |w| *w == way || shared)
    }

    /// Who has not waited until now begins where the others are: nobody saves up turns.
    fn arrive(&mut self, asker: Asker, way: Way, now: Instant) {
        let (clock, ways) = (self.clock, self.together(way));
        let Some(disk) = self.disks.get_mut(&asker.disk) else { return };
        if !ways.clone().any(|w| disk.waits(w, now)) {
            ways.clone().map(|w| w as usize).for_each(|at| {
                disk.served.0[at] = disk.served.0[at].max(clock.0[at]);
            });
        }
        let waits = |queue: &QueueState| ways.clone().any(|w| queue.waits(w, now));
        for at in ways.clone().map(|w| w as usize) {
            let others = disk.queues.values().filter(|q| waits(q)).map(|q| q.served.0[at]);
            let least = others.fold(f64::INFINITY, f64::min);
            if let Some(queue) = disk.queues.get_mut(&asker.queue)
                && !waits(queue)
                && least.is_finite()
            {
                queue.served.0[at] = queue.served.0[at].max(least);
            }
        }
    }

    /// Whether others who could go were served less.
    fn is_ahead(&self, asker: Asker, way: Way, now: Instant) -> bool {
        let ways = || self.together(way);
        let could = |w: &Way| self.wait(*w) <= 0.0;
        let at = way as usize;
        let Some(mine) = self.disks.get(&asker.disk) else { return false };
        let ahead = |mine: Served, least: f64| mine.0[at] > least + AHEAD_S;
        let disks = self.disks.iter().filter(|(id, disk)| {
            **id != asker.disk && ways().any(|w| disk.waits(w, now) && could(&w))
        });
        let least = disks.map(|(_, disk)| disk.served.0[at]).fold(f64::INFINITY, f64::min);
        if ahead(mine.served, least) {
            return true;
        }
        let queues = mine.queues.iter().filter(|(id, queue)| {
            **id != asker.queue && ways().any(|w| queue.waits(w, now) && could(&w))
        });
        let least = queues.map(|(_, queue)| queue.served.0[at]).fold(f64::INFINITY, f64::min);
        mine.queues.get(&asker.queue).is_some_and(|queue| ahead(queue.served, least))
    }

    fn serve(&mut self, asker: Asker, load: Load) {
        let mut cost = 0.0f64;
        for (at, unit) in Self::of(load.way) {
            let units = self.units(unit, load);
            self.buckets[at].fill(units);
            cost = cost.max(self.buckets[at].cost(units));
        }
        let ways = self.together(load.way);
        let Some(disk) = self.disks.get_mut(&asker.disk) else { return };
        for way in ways {
            let at = way as usize;
            self.clock.0[at] = self.clock.0[at].max(disk.served.0[at]);
            disk.served.0[at] += cost;
            if let Some(queue) = disk.queues.get_mut(&asker.queue) {
                queue.served.0[at] += cost;
            }
        }
    }
}

/// What a bucket counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    Requests,
    Bytes,
}

/// Limits, and the disks that share them.
pub struct Group {
    /// Whether there is any limit: all that a disk without limits looks at.
    on: AtomicBool,
    next: AtomicU64,
    state: Mutex<State>,
}

impl Group {
    /// With these limits.
    pub fn new(limits: Limits) -> Arc<Group> {
        let mut state = State {
            limits,
            buckets: [Bucket::default(); 6],
            leaked: Instant::now(),
            disks: BTreeMap::new(),
            clock: Served::default(),
        };
        state.set(limits);
        let on = AtomicBool::new(!limits.are_none());
        Arc::new(Group { on, next: AtomicU64::new(0), state: Mutex::new(state) })
    }

    /// Changes the limits, for what waits too (within a tenth of a second).
    pub fn set(&self, limits: Limits) {
        let mut state = self.state.lock();
        if state.limits != limits {
            state.set(limits);
        }
        self.on.store(!limits.are_none(), Ordering::Relaxed);
    }

    /// The limits in force.
    pub fn limits(&self) -> Limits {
        self.state.lock().limits
    }

    /// Whether anything is limited.
    pub(super) fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }

    pub(super) fn lock(&self) -> parking_lot::MutexGuard<'_, State> {
        self.state.lock()
    }

    /// A number for one more disk or queue.
    pub(super) fn number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    pub(super) fn join(&self, asker: Asker) {
        let mut state = self.state.lock();
        state.disks.entry(asker.disk).or_default().queues.entry(asker.queue).or_default();
    }

    pub(super) fn part(&self, asker: Asker) {
        let mut state = self.state.lock();
        if let Some(disk) = state.disks.get_mut(&asker.disk) {
            disk.queues.remove(&asker.queue);
            if disk.queues.is_empty() {
                state.disks.remove(&asker.disk);
            }
        }
    }
}

/// The groups of a process by their names; one lives as long as a disk is in it.
#[derive(Default)]
pub struct Groups(Mutex<HashMap<String, Weak<Group>>>);

impl Groups {
    /// The group of this name, made without limits if there is none.
    pub fn get(&self, name: &str) -> Arc<Group> {
        let mut groups = self.0.lock();
        groups.retain(|_, group| group.strong_count() > 0);
        if let Some(group) = groups.get(name).and_then(Weak::upgrade) {
            return group;
        }
        let group = Group::new(Limits::default());
        groups.insert(name.to_owned(), Arc::downgrade(&group));
        group
    }
}

#[cfg(test)]
mod tests {
    use super::super::limits::Limit;
    use super::*;

    /// Serves askers, each with its number of requests always waiting, for some seconds in steps
    /// of a millisecond: how many went for each.
    fn contest(limits: Limits, askers: &[(Asker, Way, usize)], ms: u64) -> Vec<usize> {
        let group = Group::new(limits);
        askers.iter().for_each(|(asker, ..)| group.join(*asker));
        let begin = Instant::now();
        let mut went = vec![0; askers.len()];
        for step in 0..ms {
            let now = begin + Duration::from_millis(step);
            let mut state = group.lock();
            state.advance(now);
            for (n, (asker, way, depth)) in askers.iter().enumerate() {
                let load = Load { way: *way, bytes: 4096 };
                let mut left = *depth;
                while left > 0 && state.ask(*asker, load, now) == Turn::Go {
                    (left, went[n]) = (left - 1, went[n] + 1);
                }
                // What went is back at once as the next one, in the next step.
                state.ask_again_later(*asker, *way, now);
            }
        }
        went
    }

    impl State {
        fn ask_again_later(&mut self, asker: Asker, way: Way, now: Instant) {
            if let Some(queue) = self.queue(asker) {
                queue.waits[way as usize] = Some(now + GRACE);
            }
        }
    }

    fn limits(iops: u64) -> Limits {
        Limits { iops: [Limit::of(iops), Limit::default(), Limit::default()], ..Default::default() }
    }

    fn nearly(what: usize, wanted: usize) -> bool {
        what.abs_diff(wanted) * 50 <= wanted
    }

    #[test]
    fn a_deep_disk_and_a_shallow_one_get_the_same() {
        let ask = |disk, queue| Asker { disk, queue };
        let two = [(ask(1, 1), Way::Read, 64), (ask(2, 2), Way::Read, 1)];
        let went = contest(limits(1000), &two, 10_000);
        assert!(nearly(went[0], 5000) && nearly(went[1], 5000), "{went:?}");
        // Three queues of one disk share what one queue of another gets.
        let four: Vec<_> =
            [(1, 1), (1, 2), (1, 3), (2, 4)].map(|(d, q)| (ask(d, q), Way::Write, 32)).into();
        let went = contest(limits(3000), &four, 10_000);
        assert!(nearly(went[3], 15_000), "{went:?}");
        assert!(went[..3].iter().all(|n| nearly(*n, 5000)), "{went:?}");
        // Reads of one against writes of the other.
        let ways = [(ask(1, 1), Way::Read, 64), (ask(2, 2), Way::Write, 4)];
        let went = contest(limits(1000), &ways, 10_000);
        assert!(nearly(went[0], 5000) && nearly(went[1], 5000), "{went:?}");
    }

    #[test]
    fn nobody_waits_for_one_that_the_limits_hold() {
        let mut limits = limits(1000);
        limits.iops[2] = Limit::of(10);
        let ask = |disk, queue| Asker { disk, queue };
        let two = [(ask(1, 1), Way::Read, 64), (ask(2, 2), Way::Write, 64)];
        let went = contest(limits, &two, 10_000);
        assert!(nearly(went[0], 10_000) && nearly(went[1], 100), "{went:?}");
    }

    #[test]
    fn groups_have_names_and_end_with_their_disks() {
        let groups = Groups::default();
        let a = groups.get("a");
        a.set(limits(5));
        assert_eq!(groups.get("a").limits(), limits(5));
        assert!(groups.get("b").limits().are_none());
        drop(a);
        assert!(groups.get("a").limits().are_none());
    }
}
