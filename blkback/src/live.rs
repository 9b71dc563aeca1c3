//! Jobs on a device's live disk: each on a thread of its own, asked about and steered over the
//! control socket.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use blktap::Disk;
use blktap::live::jobs::{self, AtTheEnd, Host, JobError, Old, Opening, Scene, Stage, Watch};
use blktap::live::{LiveDisk, Name, PATIENCE};
use hypervisor::xenbus::{Fault, Nodes};
use parking_lot::{Condvar, Mutex};
use serde_json::{Value, json};

use crate::backend::{ANOTHER_USER, Open, Wanted};

/// How long a guest's disk is held for the other disks of a snapshot.
const HOLD: Duration = Duration::from_secs(10);
/// How often a job that waits looks whether it can still go on.
const LOOK: Duration = Duration::from_millis(100);

/// What is to be done.
#[derive(Clone, Debug)]
pub(crate) enum Task {
    /// Hold requests back, with the disk closed, until the word to go on.
    Pause,
    /// Open the disk again that could not be opened.
    Revive,
    Snapshot {
        overlay: Name,
        old: Old,
        hold: Hold,
    },
    Mirror {
        target: Name,
        end: AtTheEnd,
        /// Whether the copy is kept equal until somebody says that it is enough.
        hold: Hold,
    },
    Commit {
        base: Option<PathBuf>,
    },
    Stream {
        base: Option<PathBuf>,
    },
    Coalesce {
        layer: PathBuf,
    },
    Grow {
        /// Bytes.
        size: u64,
    },
}

/// Whether a job waits for the word: a snapshot for those of other disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hold {
    No,
    /// It waits.
    Yes,
}

impl Task {
    fn kind(&self) -> &'static str {
        match self {
            Task::Pause => "pause",
            Task::Revive => "resume",
            Task::Snapshot { .. } => "snapshot",
            Task::Mirror { .. } => "mirror",
            Task::Commit { .. } => "commit",
            Task::Stream { .. } => "stream",
            Task::Coalesce { .. } => "coalesce",
            Task::Grow { .. } => "grow",
        }
    }

    /// How long the job waits at a stage for the word: `None` not at all.
    fn patience(&self, stage: Stage) -> Option<Duration> {
        match (self, stage) {
            (Task::Pause, Stage::Paused) => Some(Duration::MAX),
            (Task::Mirror { hold: Hold::Yes, .. }, Stage::Ready) => Some(Duration::MAX),
            (Task::Snapshot { hold: Hold::Yes, .. }, _) => Some(HOLD),
            _ => None,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Phase {
    Running,
    Waiting(Stage),
    Done,
    Cancelled,
    Failed(String),
}

impl Phase {
    fn name(&self) -> &'static str {
        match self {
            Phase::Running => "running",
            Phase::Waiting(Stage::Ready) => "ready",
            Phase::Waiting(Stage::Paused) => "paused",
            Phase::Waiting(Stage::Swapped) => "swapped",
            Phase::Done => "done",
            Phase::Cancelled => "cancelled",
            Phase::Failed(_) => "failed",
        }
    }
}

/// What is known of a job.
struct State {
    phase: Phase,
    /// The word to go on from this stage was given.
    word: bool,
    trouble: Option<String>,
}

/// A job as its thread and the device's control see it.
struct Job {
    number: u64,
    task: Task,
    state: Mutex<State>,
    changed: Condvar,
    cancelled: AtomicBool,
    done: AtomicU64,
    total: AtomicU64,
}

impl Job {
    fn tell(&self, name: &str) -> Value {
        let state = self.state.lock();
        let error = match &state.phase {
            Phase::Failed(why) => Some(why.clone()),
            _ => state.trouble.clone(),
        };
        json!({
            "id": self.number, "kind": self.task.kind(), "state": state.phase.name(),
            "done": self.done.load(Ordering::Relaxed),
            "total": self.total.load(Ordering::Relaxed),
            "error": error, "disk": name,
        })
    }

    fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
        // Under the lock: whoever is about to wait sees it or hears of it.
        let _state = self.state.lock();
        self.changed.notify_all();
    }

    fn go_on(&self, from: &[Stage]) -> Result<(), Fault> {
        let mut state = self.state.lock();
        match state.phase {
            Phase::Waiting(stage) if from.contains(&stage) => {
                state.word = true;
                self.changed.notify_all();
                Ok(())
            }
            _ => Err(Fault(format!("the job is {}", state.phase.name()))),
        }
    }

    fn has_ended(&self) -> bool {
        matches!(self.state.lock().phase, Phase::Done | Phase::Cancelled | Phase::Failed(_))
    }
}

impl Watch for Job {
    fn tick(&self, done: u64, total: u64) -> ControlFlow<()> {
        if total > 0 {
            self.done.store(done, Ordering::Relaxed);
            self.total.store(total, Ordering::Relaxed);
        }
        match self.cancelled.load(Ordering::Relaxed) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }

    fn decide(&self, stage: Stage, fails: &dyn Fn() -> Option<String>) -> ControlFlow<()> {
        let Some(patience) = self.task.patience(stage) else { return ControlFlow::Continue(()) };
        let begun = Instant::now();
        let mut state = self.state.lock();
        (state.phase, state.word) = (Phase::Waiting(stage), false);
        let flow = loop {
            if state.word {
                break ControlFlow::Continue(());
            }
            let over = self.cancelled.load(Ordering::Relaxed) || begun.elapsed() > patience;
            if over || fails().is_some() {
                break ControlFlow::Break(());
            }
            self.changed.wait_for(&mut state, LOOK);
        };
        state.phase = Phase::Running;
        flow
    }

    fn trouble(&self, error: &JobError) {
        self.state.lock().trouble = Some(error.to_string());
    }
}

/// How the jobs of a device open disks and note which one it has.
struct Place {
    open: Arc<Open>,
    wanted: Wanted,
    nodes: Nodes,
    /// `None`: a disk that only this backend's own opener knows. It has no jobs.
    name: Mutex<Option<Name>>,
}

impl Host for Place {
    fn open(&self, name: &Name, how: Opening) -> Result<Arc<dyn Disk>, JobError> {
        let wanted = Wanted { params: name.to_string(), how, ..self.wanted.clone() };
        (self.open)(&wanted).map_err(|fault| JobError::Other(fault.0))
    }

    fn record(&self, name: &Name) -> Result<(), JobError> {
        let params = ("params".to_owned(), name.to_string());
        let written = self.nodes.write(&[params]);
        written.map_err(|e| JobError::Other(format!("cannot write params: {e}")))?;
        *self.name.lock() = Some(name.clone());
        Ok(())
    }
}

/// The jobs of a connected device: one at a time.
pub(crate) struct Jobs {
    live: Arc<LiveDisk>,
    place: Arc<Place>,
    last: Option<(Arc<Job>, Option<JoinHandle<()>>)>,
    numbers: u64,
}

impl Jobs {
    /// For the disk that `wanted` names.
    pub(crate) fn new(live: Arc<LiveDisk>, open: Arc<Open>, wanted: Wanted, nodes: &Nodes) -> Jobs {
        let name = Mutex::new(wanted.params.parse().ok());
        let wanted = Wanted { patience: ANOTHER_USER, ..wanted };
        let place = Arc::new(Place { open, wanted, nodes: nodes.clone(), name });
        Jobs { live, place, last: None, numbers: 0 }
    }

    /// Begins a job, unless one runs.
    pub(crate) fn begin(&mut self, task: Task) -> Result<Value, Fault> {
        if let Some((job, _)) = self.last.as_ref().filter(|(job, _)| !job.has_ended()) {
            let kind = job.task.kind();
            return Err(Fault(format!("a job runs already ({kind}): wait for it or cancel it")));
        }
        if self.place.name.lock().is_none() {
            let params = &self.place.wanted.params;
            return Err(Fault(format!("{params}: not an image, a device or an export by NBD")));
        }
        self.wait();
        self.numbers += 1;
        let state = State { phase: Phase::Running, word: false, trouble: None };
        let job = Arc::new(Job {
            number: self.numbers,
            task,
            state: Mutex::new(state),
            changed: Condvar::new(),
            cancelled: AtomicBool::new(false),
            done: AtomicU64::new(0),
            total: AtomicU64::new(0),
        });
        let (live, place, own) = (self.live.clone(), self.place.clone(), job.clone());
        let thread = std::thread::Builder::new().name(format!("job {}", job.task.kind()));
        let thread = thread.spawn(move || run(&live, &place, &own))?;
        self.last = Some((job, Some(thread)));
        self.tell()
    }

    /// What is known of the last job.
    pub(crate) fn tell(&self) -> Result<Value, Fault> {
        let name = match &*self.place.name.lock() {
            Some(name) => name.to_string(),
            None => self.place.wanted.params.clone(),
        };
        let job = self.last.as_ref().map(|(job, _)| job.tell(&name));
        Ok(json!({"job": job, "disk": name, "size": self.live.geometry().size}))
    }

    /// Ends the job; what it has changed so far hides nothing.
    pub(crate) fn cancel(&self) -> Result<Value, Fault> {
        self.running()?.cancel();
        self.tell()
    }

    /// The word to go on.
    pub(crate) fn complete(&self) -> Result<Value, Fault> {
        self.running()?.go_on(&[Stage::Ready, Stage::Paused, Stage::Swapped])?;
        self.tell()
    }

    /// The end of a pause, however it has come.
    pub(crate) fn resume(&mut self) -> Result<Value, Fault> {
        match &self.last {
            Some((job, _)) if !job.has_ended() => {
                job.go_on(&[Stage::Paused])?;
                self.tell()
            }
            _ if self.live.with(|_| ()).is_some() => Err(Fault("it is not paused".into())),
            _ => self.begin(Task::Revive),
        }
    }

    fn running(&self) -> Result<&Arc<Job>, Fault> {
        let running = self.last.as_ref().map(|(job, _)| job).filter(|job| !job.has_ended());
        running.ok_or_else(|| Fault("no job runs".into()))
    }

    /// Asks the job to end. Requests that it holds back go on.
    pub(crate) fn stop(&self) {
        if let Some((job, _)) = &self.last {
            job.cancel();
        }
    }

    fn wait(&mut self) {
        if let Some((_, thread)) = &mut self.last
            && let Some(thread) = thread.take()
            && thread.join().is_err()
        {
            tracing::error!("a job's thread panicked");
        }
    }
}

impl Drop for Jobs {
    fn drop(&mut self) {
        self.stop();
        self.wait();
    }
}

fn run(live: &Arc<LiveDisk>, place: &Place, job: &Job) {
    let Some(name) = place.name.lock().clone() else { return };
    let scene = Scene { live, name: &name, host: place, watch: job, patience: PATIENCE };
    let result = match &job.task {
        Task::Pause | Task::Revive => jobs::pause(&scene),
        Task::Snapshot { overlay, old, .. } => jobs::snapshot(&scene, overlay, old).map(drop),
        Task::Mirror { target, end, .. } => jobs::mirror(&scene, target, *end),
        Task::Commit { base } => jobs::commit(&scene, base.as_deref()),
        Task::Stream { base } => jobs::stream(&scene, base.as_deref()),
        Task::Coalesce { layer } => jobs::coalesce(&scene, layer),
        Task::Grow { size } => jobs::grow(&scene, *size),
    };
    let id = place.nodes.id();
    let kind = job.task.kind();
    let phase = match result {
        Ok(()) => Phase::Done,
        Err(JobError::Cancelled) => Phase::Cancelled,
        Err(e) => Phase::Failed(e.to_string()),
    };
    match &phase {
        Phase::Failed(why) => tracing::error!("{id}: {kind}: {why}"),
        phase => tracing::info!("{id}: {kind}: {}", phase.name()),
    }
    job.state.lock().phase = phase;
}

/// A new name for the file that an overlay is made on.
pub(crate) fn old(rename: Option<PathBuf>) -> Old {
    rename.map_or(Old::Keeps, Old::Moves)
}

/// Whether a job is to wait.
pub(crate) fn hold(asked: bool) -> Hold {
    if asked { Hold::Yes } else { Hold::No }
}
