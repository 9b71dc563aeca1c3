//! What is done with a live disk: snapshots, copies, changes of the chain it stands on.
//!
//! Each job leaves a disk that is whole at every moment: what it has half done is not named by
//! anything, or lies below data that hide it. So after a crash the same job, begun anew, completes
//! it.
mod chain;
mod coalesce;
mod commit;
mod grow;
mod mirror;
mod paths;
mod snapshot;
mod stream;

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

pub use chain::Layer;
pub use coalesce::coalesce;
pub use commit::commit;
pub use grow::grow;
pub use mirror::{AtTheEnd, mirror};
pub use snapshot::{Old, snapshot};
pub use stream::stream;

use super::{LiveDisk, LiveError, Name, PassError, Paused};
use crate::disk::Disk;

/// Why a job did not do what it should. The guest's disk goes on as it was.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    /// Somebody ended it.
    #[error("cancelled")]
    Cancelled,
    /// The disk or a copy of it failed.
    #[error(transparent)]
    Live(#[from] LiveError),
    /// Anything else, in words.
    #[error("{0}")]
    Other(String),
}

impl From<PassError> for JobError {
    fn from(e: PassError) -> Self {
        match e {
            PassError::Copy(crate::copy::CopyError::Stopped) => JobError::Cancelled,
            PassError::Live(e) => JobError::Live(e),
            e => JobError::Other(e.to_string()),
        }
    }
}

/// For `map_err`: about `what`.
fn about<E: std::fmt::Display>(what: impl std::fmt::Display) -> impl FnOnce(E) -> JobError {
    move |e| JobError::Other(format!("{what}: {e}"))
}

/// How a disk is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opening {
    /// As the guest's: with all it builds on, locked.
    Guest,
    /// To be written beside a chain that has it open for reading, and that keeps it locked.
    Below,
    /// For reading, with all it builds on, beside those who have it open too.
    Read,
    /// For reading, without what it builds on.
    Alone,
}

/// What a job needs of whoever serves the disk.
pub trait Host: Send + Sync {
    /// Opens a disk.
    fn open(&self, name: &Name, how: Opening) -> Result<Arc<dyn Disk>, JobError>;
    /// Notes that the guest's disk is this one from now on: a successor of this process opens it.
    fn record(&self, name: &Name) -> Result<(), JobError>;
}

/// A moment at which a job waits for somebody's word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// A copy is complete and is kept so.
    Ready,
    /// The guest's requests are held back; nothing has changed.
    Paused,
    /// The guest's disk is another one, and its requests are still held back.
    Swapped,
}

/// Who watches a job.
pub trait Watch: Sync {
    /// So many bytes of so many are done; `Break`: the job is to end.
    fn tick(&self, done: u64, total: u64) -> ControlFlow<()>;
    /// The job has come to a stage: waits for the word to go on; `Break`: it is to go back. Asks
    /// now and then whether the job can still go on.
    fn decide(&self, stage: Stage, fails: &dyn Fn() -> Option<String>) -> ControlFlow<()>;
    /// The job has met with something that has to be remedied before it can go on.
    fn trouble(&self, error: &JobError);
}

/// The disk of a job, and who is around.
pub struct Scene<'a> {
    /// The guest's disk.
    pub live: &'a Arc<LiveDisk>,
    /// Its name.
    pub name: &'a Name,
    /// Opens disks.
    pub host: &'a dyn Host,
    /// Watches.
    pub watch: &'a dyn Watch,
    /// How long requests in flight may take to end when the guest is paused.
    pub patience: Duration,
}

/// A change of names while nothing is open.
trait Change {
    fn make(&mut self) -> Result<(), JobError>;
    /// Takes it back, as far as it was made.
    fn undo(&mut self) -> Result<(), JobError>;
}

/// No change.
struct Nothing;

impl Change for Nothing {
    fn make(&mut self) -> Result<(), JobError> {
        Ok(())
    }
    fn undo(&mut self) -> Result<(), JobError> {
        Ok(())
    }
}

impl Scene<'_> {
    /// Closes the paused disk, carries `change` out, and opens `to` in its place; on an error all
    /// of it is taken back.
    fn swap(&self, paused: &Paused, to: &Name, change: &mut dyn Change) -> Result<(), JobError> {
        paused.close()?;
        let swapped = change.make().and_then(|()| self.put(paused, to));
        let Err(e) = swapped else { return Ok(()) };
        self.back(paused, change).map_err(|worse| {
            JobError::Other(format!(
                "{e}; and the disk cannot be opened as it was: {worse}; the guest's requests \
                 wait: when that is remedied, `ringback disk resume`"
            ))
        })?;
        Err(e)
    }

    fn put(&self, paused: &Paused, to: &Name) -> Result<(), JobError> {
        paused.install(self.host.open(to, Opening::Guest)?)?;
        self.host.record(to)
    }

    /// Puts the disk there that was there before `change`.
    fn back(&self, paused: &Paused, change: &mut dyn Change) -> Result<(), JobError> {
        paused.close()?;
        change.undo()?;
        self.put(paused, self.name)
    }

    fn is_cancelled(&self) -> Result<(), JobError> {
        match self.watch.tick(0, 0) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(JobError::Cancelled),
        }
    }
}

/// Holds the guest's requests back, with the disk closed, until the word to go on.
pub fn pause(scene: &Scene<'_>) -> Result<(), JobError> {
    let paused = scene.live.pause(scene.patience)?;
    paused.close()?;
    // To go on and to go back are the same here. What keeps the disk from being opened again can
    // be remedied.
    loop {
        let _word = scene.watch.decide(Stage::Paused, &|| None);
        match scene.put(&paused, scene.name) {
            Ok(()) => return Ok(()),
            Err(e) => {
                tracing::error!("{}: it stays paused: {e}", scene.name);
                scene.watch.trouble(&e);
            }
        }
    }
}
