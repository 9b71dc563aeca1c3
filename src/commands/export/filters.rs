//! What lies before exported images, by the options of a command.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use blktap::Disk;
use blktap::filters::changed::{Frozen, FrozenDisk, LogOptions};
use blktap::filters::fault::Faults;
use blktap::filters::mirror::OnError;
use blktap::filters::priority::Priority;
use blktap::filters::stall::{Policies, Policy, Stall};
use blktap::filters::throttle::{Group, Limits};
use blktap::filters::{
    ChangedDisk, DelayDisk, FaultyDisk, MirrorDisk, PriorityDisk, StallDisk, ThrottleDisk,
};
use serde::Deserialize;
use serde_json::{Value, json};

use super::super::Result;
use super::super::control::Answer;
use crate::cli::{Filters, MirrorErrors};

/// Opens an image by its format and path.
pub type Open<'a> = dyn Fn(&str, &str) -> Result<Arc<dyn Disk>> + 'a;

/// The filters of a command's images, in one order: limits, the stop at errors, delay, faults,
/// logs, the mirror, priority, the image.
pub struct Stack<'a> {
    /// How images are opened, by format and path.
    open: &'a Open<'a>,
    options: Filters,
    read_only: bool,
    later: Later,
    limits: Limits,
    groups: Vec<Arc<Group>>,
    stalls: Vec<Arc<Stall>>,
    changed: Vec<Arc<ChangedDisk>>,
}

/// Whether filters can change while they are in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Later {
    /// There is a control socket.
    Changes,
    /// They stay as they are.
    Stays,
}

/// What can be asked of filters in use.
#[derive(Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Command {
    /// Change a limit.
    Set { knob: String, value: String },
    /// Try again what an error has stopped.
    Resume {},
    /// Whether an error has stopped an image.
    Job {},
    /// Begin a log.
    ChangedLogStart { path: PathBuf },
    /// End the log.
    ChangedLogStop {},
    /// Show a log no more that has ended.
    ChangedLogForget { name: String },
}

impl<'a> Stack<'a> {
    /// For `count` images. What is not asked for is left out, unless it may be `later`, by
    /// commands.
    pub fn new(
        options: &Filters,
        open: &'a Open<'a>,
        (read_only, later, count): (bool, Later, usize),
    ) -> Result<Stack<'a>> {
        if (options.changed_log.is_some() || options.mirror.is_some()) && count > 1 {
            return Err("--changed-log and --mirror are for one image".into());
        }
        let mut limits = Limits::default();
        for item in options.throttle.iter().flat_map(|list| list.split(',')) {
            let (name, value) = item
                .split_once('=')
                .ok_or_else(|| format!("--throttle {item}: write it as LIMIT=N"))?;
            set(&mut limits, name, value)?;
        }
        limits.agree()?;
        options.io_priority.is_allowed()?;
        let options = options.clone();
        if (options.on_error, options.on_enospc) != Default::default() && later == Later::Stays {
            return Err("--on-error, --on-enospc pause: by which --control is it resumed?".into());
        }
        Ok(Stack {
            open,
            options,
            read_only,
            later,
            limits,
            groups: Vec::new(),
            stalls: Vec::new(),
            changed: Vec::new(),
        })
    }

    /// Puts the filters on one more image.
    pub fn put_on(&mut self, disk: Arc<dyn Disk>) -> Result<Arc<dyn Disk>> {
        let disk = match self.options.io_priority {
            Priority::None => disk,
            priority => PriorityDisk::new(disk, priority),
        };
        let disk = self.mirror(disk)?;
        let disk = self.log(disk)?;
        let disk = match self.options.fault == Faults::default() {
            true => disk,
            false => FaultyDisk::new(disk, self.options.fault.clone()),
        };
        let disk = match self.options.delay_us.most_us {
            0 => disk,
            _ => DelayDisk::new(disk, self.options.delay_us),
        };
        let disk = self.stop(disk);
        if self.limits.are_none() && self.later == Later::Stays {
            return Ok(disk);
        }
        let group = match self.groups.first() {
            Some(group) if self.options.throttle_group => Arc::clone(group),
            _ => {
                self.groups.push(Group::new(self.limits));
                Arc::clone(&self.groups[self.groups.len() - 1])
            }
        };
        Ok(ThrottleDisk::new(disk, group))
    }

    /// Without any error that stops it, the image pays nothing.
    fn stop(&mut self, disk: Arc<dyn Disk>) -> Arc<dyn Disk> {
        let Filters { on_error, on_enospc, .. } = self.options;
        if [on_error, on_enospc] == [Policy::Report; 2] {
            return disk;
        }
        let name = format!("image {}", self.stalls.len() + 1);
        let stall = Stall::new(name, Policies { on_error, on_enospc });
        self.stalls.push(Arc::clone(&stall));
        StallDisk::new(disk, stall)
    }

    /// What stops images: to be ended before their servers are.
    pub fn stalls(&self) -> Vec<Arc<Stall>> {
        self.stalls.clone()
    }

    fn mirror(&self, disk: Arc<dyn Disk>) -> Result<Arc<dyn Disk>> {
        let Some(target) = &self.options.mirror else { return Ok(disk) };
        if self.read_only {
            return Err("--mirror: nothing is written that is read-only".into());
        }
        let (format, path) = target.split_once(':').ok_or("--mirror: write FORMAT:PATH")?;
        let second = (self.open)(format, path)?;
        let on_error = match self.options.mirror_errors {
            MirrorErrors::Report => OnError::Report,
            MirrorErrors::Drop => OnError::Drop,
        };
        let mirror = MirrorDisk::new(disk, second, on_error);
        Ok(mirror.map_err(|e| format!("--mirror {target}: {e}"))?)
    }

    fn log(&mut self, disk: Arc<dyn Disk>) -> Result<Arc<dyn Disk>> {
        match &self.options.changed_log {
            Some(path) if self.read_only => Ok(FrozenDisk::new(disk, Frozen::read(path)?)),
            _ if self.read_only => Ok(disk),
            None if self.later == Later::Stays => Ok(disk),
            path => {
                let changed = ChangedDisk::new(disk);
                if let Some(path) = path {
                    changed.log_to(path, &log_options(&self.options, path)?)?;
                }
                self.changed.push(Arc::clone(&changed));
                Ok(changed)
            }
        }
    }

    /// What a control socket answers.
    pub fn answers(&self) -> Arc<Answer> {
        let (groups, changed) = (self.groups.clone(), self.changed.clone());
        let (options, stalls) = (self.options.clone(), self.stalls());
        Arc::new(move |request: Value| match serde_json::from_value(request)? {
            Command::Resume {} => {
                let stood = stalls.iter().filter(|stall| stall.go_on()).count();
                if stood == 0 {
                    return Err("it is not paused".into());
                }
                Ok(json!({"job": null}))
            }
            Command::Job {} => Ok(told(&stalls)),
            Command::Set { knob, value } => {
                for group in &groups {
                    let mut limits = group.limits();
                    set(&mut limits, &knob, &value)?;
                    limits.agree()?;
                    group.set(limits);
                }
                Ok(json!({"knob": knob, "value": value}))
            }
            Command::ChangedLogStart { path } => {
                let disk = the_only(&changed)?;
                disk.start(&path, &log_options(&options, &path)?)?;
                Ok(json!({"logs": disk.names()}))
            }
            Command::ChangedLogStop {} => {
                let disk = the_only(&changed)?;
                disk.stop()?;
                Ok(json!({"logs": disk.names()}))
            }
            Command::ChangedLogForget { name } => {
                let disk = the_only(&changed)?;
                disk.remove(&name)?;
                Ok(json!({"logs": disk.names()}))
            }
        })
    }
}

/// No job, and the first image that an error has stopped.
fn told(stalls: &[Arc<Stall>]) -> Value {
    match stalls.iter().find_map(|stall| stall.standing()) {
        None => json!({"job": null}),
        Some(standing) => {
            let stopped = json!({"error": standing.error(), "requests": standing.requests});
            json!({"job": null, "stopped": stopped})
        }
    }
}

fn set(limits: &mut Limits, name: &str, value: &str) -> Result<()> {
    let known = limits.set(name, value);
    known.ok_or_else(|| format!("{name}={value}: no limit, see `ringback knobs`").into())
}

fn log_options(options: &Filters, path: &Path) -> Result<LogOptions> {
    let text = &options.changed_log_granularity;
    let made = LogOptions::of(path).granularity(text);
    made.ok_or_else(|| format!("{text}: a granularity is a power of two from 512 to 2G").into())
}

fn the_only(changed: &[Arc<ChangedDisk>]) -> Result<&ChangedDisk> {
    match changed {
        [one] => Ok(one),
        _ => Err("a log is of one image, which is not read-only".into()),
    }
}
