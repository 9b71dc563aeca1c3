//! `ringback disk ... --live`: jobs on the disks of running guests.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use serde_json::{Value, json};

use blktap::storage::Cache;

use super::create::{self, NewImage};
use super::open::{is_nbd, parse_format};
use super::options::Options;
use super::resize::new_size;
use super::work::Work;
use super::{Result, Usage, document};
use crate::cli::disk::live::{Coalesce, CreateSnapshot, Mirror, OnLive, Stream};
use crate::cli::disk::{Commit, Resize};
use crate::commands::{Context, live};

/// How often a job is asked how far it is.
const LOOK: Duration = Duration::from_millis(50);

/// A device and the job that was begun on it.
struct Begun<'a> {
    context: &'a Context,
    device: &'a str,
    id: u64,
}

/// What a job was when it was asked.
struct Job(Value);

impl Job {
    fn text(&self, key: &str) -> &str {
        self.0.get(key).and_then(Value::as_str).unwrap_or_default()
    }
    fn number(&self, key: &str) -> u64 {
        self.0.get(key).and_then(Value::as_u64).unwrap_or_default()
    }
    fn state(&self) -> &str {
        self.text("state")
    }
    fn has_ended(&self) -> bool {
        matches!(self.state(), "done" | "failed" | "cancelled")
    }
}

fn job_of(answer: &Value) -> Job {
    Job(answer.get("job").cloned().unwrap_or_default())
}

impl<'a> Begun<'a> {
    fn new(context: &'a Context, device: &'a str, request: &Value) -> Result<Begun<'a>> {
        let job = job_of(&live::ask(context, device, request)?);
        Ok(Begun { context, device, id: job.number("id") })
    }

    fn look(&self) -> Result<Job> {
        let job = job_of(&self.say("job")?);
        match job.number("id") == self.id {
            true => Ok(job),
            false => Err(format!("{}: another job has begun", self.device).into()),
        }
    }

    fn say(&self, command: &str) -> Result<Value> {
        live::ask(self.context, self.device, &json!({"command": command}))
    }

    /// Cancels the job, unless it has ended, and waits for its end.
    fn give_up(&self) -> Result<()> {
        if !self.look()?.has_ended() {
            // It may end meanwhile.
            let _ = self.say("cancel");
            while !self.look()?.has_ended() {
                std::thread::sleep(LOOK);
            }
        }
        Ok(())
    }

    /// Waits until the job has come to `state`, or fails. A signal cancels it.
    fn until(&self, state: &str, work: &mut Work) -> Result<Job> {
        let mut told = false;
        loop {
            let job = self.look()?;
            if job.state() == state {
                return Ok(job);
            }
            if job.has_ended() {
                let (kind, state) = (job.text("kind"), job.state());
                return Err(match job.text("error") {
                    "" => format!("{}: {kind}: {state}", self.device),
                    error => format!("{}: {kind}: {error}", self.device),
                }
                .into());
            }
            if work.tick(job.number("done"), job.number("total")).is_break() && !told {
                told = true;
                errln!("ringback: {}: cancelling", self.device);
                // It may have ended meanwhile; how is told next.
                let _ = self.say("cancel");
            }
            std::thread::sleep(LOOK);
        }
    }
}

/// `ringback disk resume`.
pub fn resume(context: &Context, on: &OnLive) -> Result {
    let job = job_of(&live::ask(context, &on.live, &json!({"command": "resume"}))?);
    let opens = matches!(job.text("kind"), "pause" | "resume") && !job.has_ended();
    if !opens || on.no_wait {
        // What an error had stopped goes on at once, beside whatever job.
        tell(&on.live, &job, on.output.json);
        return Ok(ExitCode::SUCCESS);
    }
    let begun = Begun { context, device: &on.live, id: job.number("id") };
    finish(on, &begun, "done")
}

/// Begins a job and, unless told otherwise, waits until it has come to `state`.
pub fn run(context: &Context, on: &OnLive, request: &Value, state: &str) -> Result {
    let begun = Begun::new(context, &on.live, request)?;
    if on.no_wait {
        tell(&on.live, &begun.look()?, on.output.json);
        return Ok(ExitCode::SUCCESS);
    }
    finish(on, &begun, state)
}

fn finish(on: &OnLive, begun: &Begun<'_>, state: &str) -> Result {
    let mut work = Work::new(on.progress.progress)?;
    let job = begun.until(state, &mut work)?;
    work.end();
    tell(&on.live, &job, on.output.json);
    Ok(ExitCode::SUCCESS)
}

fn tell(device: &str, job: &Job, in_json: bool) {
    if in_json {
        return document(json!({"device": device, "job": job.0}));
    }
    if job.0.is_null() {
        return outln!("{device}: no job");
    }
    let (kind, state) = (job.text("kind"), job.state());
    let (done, total) = (job.number("done"), job.number("total"));
    let far = if total > 0 { format!(", {done} of {total} bytes") } else { String::new() };
    let error = match job.text("error") {
        "" => String::new(),
        error => format!(": {error}"),
    };
    outln!("{device}: {kind} {state}{far}{error} ({})", job.text("disk"));
}

/// A word to the job of a device.
pub fn word(context: &Context, on: &OnLive, command: &str) -> Result {
    let answer = live::ask(context, &on.live, &json!({"command": command}))?;
    let (device, job, stopped) = (&on.live, job_of(&answer), answer.get("stopped"));
    if on.output.json {
        document(json!({"device": device, "job": job.0, "stopped": stopped}));
        return Ok(ExitCode::SUCCESS);
    }
    tell(device, &job, false);
    if let Some(stopped) = stopped {
        let error = stopped.get("error").and_then(Value::as_str).unwrap_or_default();
        let requests = stopped.get("requests").and_then(Value::as_u64).unwrap_or_default();
        outln!(
            "{device}: paused by an error: {error}; {requests} request(s) are tried again by \
             `ringback disk resume`"
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// A file as a device is to know it: `FORMAT:PATH`, absolute; or a server's export.
pub fn target(file: &str, format: &str) -> Result<String> {
    if is_nbd(file) {
        return Ok(file.to_owned());
    }
    let path = std::path::absolute(file)?;
    let path = path.to_str().ok_or("the file's name is not UTF-8")?;
    Ok(format!("{}:{path}", parse_format(format)?))
}

/// A file of the chain as the device is to find it.
fn file(path: Option<&Path>) -> Result<Option<String>> {
    let Some(path) = path else { return Ok(None) };
    let path = std::path::absolute(path)?;
    let text = path.to_str().ok_or("the file's name is not UTF-8")?;
    Ok(Some(text.to_owned()))
}

/// `ringback disk stream`.
pub fn stream(context: &Context, options: &Stream) -> Result {
    let base = file(options.base.as_deref())?;
    run(context, &options.on, &json!({"command": "stream", "base": base}), "done")
}

/// `ringback disk coalesce`.
pub fn coalesce(context: &Context, options: &Coalesce) -> Result {
    let layer = file(Some(&options.layer))?;
    run(context, &options.on, &json!({"command": "coalesce", "layer": layer}), "done")
}

/// `ringback disk commit --live`.
pub fn commit(context: &Context, options: &Commit) -> Result {
    let base = file(options.base.as_deref().map(Path::new))?;
    let on = OnLive {
        live: options.live.clone().unwrap_or_default(),
        no_wait: options.no_wait,
        progress: options.progress.clone(),
        output: options.output.clone(),
    };
    run(context, &on, &json!({"command": "commit", "base": base}), "done")
}

/// `ringback disk resize --live`.
pub fn resize(context: &Context, options: &Resize) -> Result {
    let device = options.live.clone().unwrap_or_default();
    let old = live::ask(context, &device, &json!({"command": "job"}))?;
    let old = old.get("size").and_then(Value::as_u64).ok_or("no size")?;
    let size = new_size(&options.file, old)?;
    let (progress, output) = (options.progress.clone(), options.output.clone());
    let on = OnLive { live: device.clone(), no_wait: false, progress, output };
    let code = run(context, &on, &json!({"command": "grow", "size": size}), "done")?;
    // At once, and not when the device looks the next time.
    live::ask(context, &device, &json!({"command": "resize"}))?;
    Ok(code)
}

/// `ringback disk mirror`.
pub fn mirror(context: &Context, options: &Mirror) -> Result {
    let target = target(&options.target, &options.output_format)?;
    let device = &options.on.live;
    if !options.no_create && !is_nbd(&options.target) {
        let size = live::ask(context, device, &json!({"command": "job"}))?;
        let size = size.get("size").and_then(Value::as_u64).ok_or("no size")?;
        let path = Path::new(&options.target);
        if path.exists() {
            let text = format!("{}: it exists: write into it with -n", options.target);
            return Err(Usage(text).into());
        }
        let (format, options) = (parse_format(&options.output_format)?, Options::default());
        let (backing, cache) = (None, Cache::Writeback);
        let new = NewImage { path, format, size, options, backing, cache };
        create::make(new, &mut Work::new(false)?)?;
    }
    let request = json!({
        "command": "mirror", "target": target, "switch": options.switch, "hold": options.hold,
    });
    let state = if options.hold { "ready" } else { "done" };
    run(context, &options.on, &request, state)
}

/// `ringback disk snapshot create --live`.
pub fn snapshot(context: &Context, options: &CreateSnapshot) -> Result {
    let count = options.live.len();
    if options.overlay.len() != count {
        return Err(Usage("give each --live its --overlay".into()).into());
    }
    if !options.rename.is_empty() && options.rename.len() != count {
        return Err(Usage("give --rename for each --live, or for none".into()).into());
    }
    let mut work = Work::new(false)?;
    let mut begun = Vec::new();
    let result = take(context, options, &mut begun, &mut work);
    if result.is_err() {
        // They go back to where they were.
        for job in &begun {
            if let Err(e) = job.give_up() {
                errln!("ringback: {e}");
            }
        }
    }
    let jobs = result?;
    if options.output.json {
        let all = options.live.iter().zip(&jobs);
        let all: Vec<Value> =
            all.map(|(device, job)| json!({"device": device, "job": job.0})).collect();
        document(json!({"snapshots": all}));
    } else {
        options.live.iter().zip(&jobs).for_each(|(device, job)| tell(device, job, false));
    }
    Ok(ExitCode::SUCCESS)
}

fn take<'a>(
    context: &'a Context,
    options: &'a CreateSnapshot,
    begun: &mut Vec<Begun<'a>>,
    work: &mut Work,
) -> Result<Vec<Job>> {
    let together = options.live.len() > 1;
    for (n, device) in options.live.iter().enumerate() {
        let overlay = target(&options.overlay[n], &options.output_format)?;
        let rename = options.rename.get(n).map(PathBuf::from);
        let rename = rename.as_deref().map(Path::as_os_str).and_then(|name| name.to_str());
        let request = json!({
            "command": "snapshot", "overlay": overlay, "rename": rename, "hold": together,
        });
        begun.push(Begun::new(context, device, &request)?);
    }
    if together {
        // None is changed before all are paused, and none goes on before all are changed.
        for state in ["paused", "swapped"] {
            for job in begun.iter() {
                job.until(state, work)?;
            }
            for job in begun.iter() {
                job.say("complete")?;
            }
        }
    }
    begun.iter().map(|job| job.until("done", work)).collect()
}
