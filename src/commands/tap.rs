//! `ringback tap-ctl`: tapdisks, processes with a control socket each.

mod connect;
mod device;
mod minors;
mod process;
mod standby;
mod vbd;

use std::fs::File;
use std::io::{BufRead, BufReader, IsTerminal};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};

use super::control::ask;
use super::{Context, Result};
use crate::cli::tap::{Image, Tap, Target};
pub use connect::{connect, disconnect};

/// How long a process may take where nothing else is said.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where the tapdisks of a run folder are.
struct Taps {
    folder: PathBuf,
    run_dir: PathBuf,
}

/// A row of `list`.
#[derive(Deserialize)]
struct Row {
    pid: u32,
    minor: Option<u32>,
    state: Option<u32>,
    args: Option<String>,
}

impl Row {
    /// TYPE and FILE.
    fn image(&self) -> Option<(&str, &str)> {
        self.args.as_deref()?.split_once(':')
    }
    fn state(&self) -> Option<String> {
        // As C's %#x.
        self.state.map(|s| if s == 0 { "0".to_owned() } else { format!("{s:#x}") })
    }
    /// For programs.
    fn pairs(&self) -> String {
        let mut parts = vec![format!("pid={}", self.pid)];
        parts.extend(self.minor.map(|minor| format!("minor={minor}")));
        parts.extend(self.state().map(|state| format!("state={state}")));
        parts.extend(self.args.as_ref().map(|args| format!("args={args}")));
        parts.join(" ")
    }
    /// For people.
    fn columns(&self) -> String {
        let dash = || "-".to_owned();
        let minor = self.minor.map_or_else(dash, |m| m.to_string());
        let state = self.state().unwrap_or_else(dash);
        let (kind, file) = self.image().unwrap_or(("-", "-"));
        format!("{:>8} {minor:>4} {state:>4} {kind:>10} {file}", self.pid)
    }
}

impl Taps {
    fn of(context: &Context) -> Taps {
        let run_dir = context.run_dir.clone();
        Taps { folder: run_dir.join("blktap"), run_dir }
    }

    fn control(&self, pid: u32) -> PathBuf {
        self.folder.join(format!("ctl-{pid}"))
    }

    fn nbd(&self, pid: u32, minor: u32) -> PathBuf {
        self.folder.join(format!("nbd{pid}.{minor}"))
    }

    fn ask(&self, pid: u32, patience: Duration, request: &Value) -> Result<Value> {
        let path = self.control(pid);
        ask(&path, patience, request).map_err(|e| format!("tapdisk {pid}: {e}").into())
    }

    fn to(&self, command: &str, target: &Target, more: &Value) -> Result<Value> {
        let mut request = json!({"command": command, "minor": target.minor});
        if let (Some(request), Some(more)) = (request.as_object_mut(), more.as_object()) {
            request.extend(more.clone());
        }
        self.ask(target.pid, Duration::from_secs(target.timeout.max(1)), &request)
    }

    fn is_dead(&self, pid: u32) -> bool {
        UnixStream::connect(self.control(pid))
            .is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionRefused)
    }

    /// All rows of all processes. What killed ones left is removed.
    fn list(&self) -> Result<Vec<Row>> {
        let mut rows = Vec::new();
        let entries = match std::fs::read_dir(&self.folder) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(rows),
            entries => entries.map_err(|e| format!("{}: {e}", self.folder.display()))?,
        };
        let name = |e: std::io::Result<std::fs::DirEntry>| e.ok()?.file_name().into_string().ok();
        let names: Vec<String> = entries.filter_map(name).collect();
        let pids = names.iter().filter_map(|name| name.strip_prefix("ctl-")?.parse::<u32>().ok());
        for pid in pids {
            match self.ask(pid, PATIENCE, &json!({"command": "list"})) {
                Ok(answer) => rows.extend(Vec::<Row>::deserialize(&answer["rows"])?),
                // Nobody listens there: it was killed.
                Err(_) if self.is_dead(pid) => {
                    let left = format!("nbd{pid}.");
                    let left = names.iter().filter(|n| n.starts_with(&left));
                    left.map(|n| self.folder.join(n)).chain([self.control(pid)]).for_each(|path| {
                        let _ = std::fs::remove_file(path);
                    });
                }
                Err(e) => tracing::warn!("{e}"),
            }
        }
        rows.sort_by_key(|row| (row.pid, row.minor));
        Ok(rows)
    }

    /// Starts a process and waits until it takes commands; its pid.
    fn spawn(&self) -> Result<u32> {
        std::fs::create_dir_all(&self.folder)?;
        let mut log = File::options();
        let log =
            log.create(true).append(true).mode(0o600).open(self.folder.join("tapdisk.log"))?;
        let mut child = Command::new(std::env::current_exe()?)
            .arg("--run-dir")
            .arg(&self.run_dir)
            .args(["tap-ctl", "tapdisk"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()?;
        let mut line = String::new();
        let out = child.stdout.take().ok_or("a tapdisk without output")?;
        if BufReader::new(out).read_line(&mut line)? == 0 {
            let status = child.wait()?;
            let log = self.folder.join("tapdisk.log");
            return Err(format!("the tapdisk ended ({status}); see {}", log.display()).into());
        }
        Ok(child.id())
    }

    /// Starts a process that has a free minor. Two that do so at once get different ones.
    fn attach_new(&self) -> Result<Target> {
        let _lock = self.lock()?;
        let minor = self.free_minor()?;
        let target = Target { pid: self.spawn()?, minor, timeout: PATIENCE.as_secs() };
        self.to("attach", &target, &json!({}))?;
        Ok(target)
    }

    fn open(&self, target: &Target, image: &Image) -> Result<()> {
        let log = image.log.as_deref().map(std::path::absolute).transpose()?;
        let more = json!({
            "args": image.args, "read_only": image.read_only, "no_o_direct": image.no_o_direct,
            "log": log, "secondary": image.secondary, "allow_backing": image.allow_backing,
            "standby": image.standby, "read_cache": image.read_cache,
        });
        self.to("open", target, &more).map(drop)
    }

    fn create(&self, image: &Image) -> Result<Target> {
        let target = self.attach_new()?;
        if let Err(e) = self.open(&target, image) {
            let _ = self.to("detach", &target, &json!({}));
            return Err(e);
        }
        Ok(target)
    }
}

/// Carries out the command.
pub fn run(context: &Context, command: &Tap) -> Result {
    let taps = Taps::of(context);
    match command {
        Tap::List { pid, minor, kind, file } => {
            let rows = taps.list()?;
            let is = |want: &Option<String>, has: Option<&str>| {
                // As blktap has it: a row that has none is shown.
                want.as_deref().zip(has).is_none_or(|(want, has)| want == has)
            };
            let wanted = |row: &&Row| {
                pid.is_none_or(|pid| row.pid == pid)
                    && minor.is_none_or(|minor| row.minor == Some(minor))
                    && is(kind, row.image().map(|(kind, _)| kind))
                    && is(file, row.image().map(|(_, file)| file))
            };
            let tty = std::io::stdout().is_terminal();
            for row in rows.iter().filter(wanted) {
                outln!("{}", if tty { row.columns() } else { row.pairs() });
            }
        }
        Tap::Create { image, device } => {
            let shown = match device {
                None => {
                    let target = taps.create(image)?;
                    taps.nbd(target.pid, target.minor)
                }
                Some(_) => {
                    let index = taps.create_device(image, device.as_deref())?;
                    format!("/dev/nbd{index}").into()
                }
            };
            outln!("{}", shown.display());
        }
        Tap::Spawn => match (taps.spawn()?, std::io::stdout().is_terminal()) {
            (pid, true) => outln!("tapdisk spawned with pid {pid}"),
            (pid, false) => outln!("{pid}"),
        },
        Tap::Destroy(target) => drop(taps.to("destroy", target, &json!({}))?),
        Tap::Attach(target) => drop(taps.to("attach", target, &json!({}))?),
        Tap::Detach(target) => drop(taps.to("detach", target, &json!({}))?),
        Tap::Open { target, image } => taps.open(target, image)?,
        Tap::Close { target, .. } => drop(taps.to("close", target, &json!({}))?),
        Tap::Pause(target) => drop(taps.to("pause", target, &json!({}))?),
        Tap::Unpause { target, args } => {
            drop(taps.to("unpause", target, &json!({"args": args}))?);
        }
        Tap::Stats(target) => outln!("{}", taps.to("stats", target, &json!({}))?),
        Tap::Allocate { device } => outln!("{}", taps.allocate(device.as_deref())?.display()),
        Tap::Free { minor } => taps.free(*minor)?,
        Tap::Major { char: true, .. } => {
            return Err("tapdisks have no character devices here".into());
        }
        Tap::Major { .. } => outln!("{}", minors::major()?),
        Tap::Check => outln!("{}", check(&taps)?),
        Tap::Tapdisk => process::run(&taps)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Whether tapdisks can run here.
fn check(taps: &Taps) -> Result<&'static str> {
    blktap::doctor()?;
    std::fs::create_dir_all(&taps.folder).map_err(|e| format!("{}: {e}", taps.folder.display()))?;
    Ok("ok")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_have_blktaps_forms() {
        let row = |minor, state, args: Option<&str>| Row {
            pid: 1234,
            minor,
            state,
            args: args.map(str::to_owned),
        };
        let open = row(Some(0), Some(0), Some("vhd:/a b.vhd"));
        assert_eq!(open.pairs(), "pid=1234 minor=0 state=0 args=vhd:/a b.vhd");
        assert_eq!(open.columns(), "    1234    0    0        vhd /a b.vhd");
        let paused = row(Some(12), Some(0x2a), Some("aio:/dev/vg/a"));
        assert_eq!(paused.pairs(), "pid=1234 minor=12 state=0x2a args=aio:/dev/vg/a");
        assert_eq!(paused.columns(), "    1234   12 0x2a        aio /dev/vg/a");
        assert_eq!(row(None, None, None).pairs(), "pid=1234");
        assert_eq!(row(None, None, None).columns(), "    1234    -    -          - -");
    }
}
