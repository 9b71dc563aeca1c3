//! A tapdisk: a process that serves images of its minors by NBD and takes commands.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

use crossbeam::channel::{Sender, bounded, select};
use parking_lot::Mutex;
use serde::Deserialize;
use serde_json::{Value, json};

use super::super::Result;
use super::super::control::Control;
use super::vbd::{Opened, Wanted};
use super::{Taps, minors};
use crate::signals;

/// State of a minor without an image: TD_VBD_DEAD and so on of blktap's tapdisk-vbd.h.
const CLOSED: u32 = 0x2;

/// A request.
#[derive(Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
enum Command {
    List,
    Attach {
        minor: u32,
    },
    Detach {
        minor: u32,
    },
    Destroy {
        minor: u32,
    },
    Open {
        minor: u32,
        #[serde(flatten)]
        wanted: Wanted,
    },
    Close {
        minor: u32,
    },
    Pause {
        minor: u32,
    },
    Unpause {
        minor: u32,
        args: Option<String>,
    },
    Stats {
        minor: u32,
    },
}

/// The minors, each with its image if one is open.
struct Minors {
    pid: u32,
    folder: PathBuf,
    vbds: BTreeMap<u32, Option<Opened>>,
    ended: Sender<()>,
}

/// Serves until its last minor is gone, or a signal.
pub(super) fn run(taps: &Taps) -> Result<()> {
    // It outlives whoever started it.
    let _ = rustix::process::setsid();
    let stop = signals::stop()?;
    let (send, ended) = bounded(1);
    let pid = std::process::id();
    let minors = Minors { pid, folder: taps.folder.clone(), vbds: BTreeMap::new(), ended: send };
    let minors = Arc::new(Mutex::new(minors));
    let shared = Arc::clone(&minors);
    let answer = move |request: Value| shared.lock().answer(serde_json::from_value(request)?);
    let control = Control::serve(&taps.control(pid), Arc::new(answer))?;
    let mut out = std::io::stdout();
    writeln!(out, "{pid}").and_then(|()| out.flush())?;
    select! {
        recv(stop) -> _ => {}
        recv(ended) -> _ => {}
    }
    drop(control);
    let open = std::mem::take(&mut minors.lock().vbds);
    open.into_values().flatten().try_for_each(Opened::close)
}

impl Minors {
    fn answer(&mut self, command: Command) -> Result<Value> {
        match command {
            Command::List => return Ok(json!({"rows": self.rows()})),
            Command::Attach { minor } => {
                if self.vbds.contains_key(&minor) {
                    return Err(format!("minor {minor} is attached already").into());
                }
                self.vbds.insert(minor, None);
            }
            Command::Detach { minor } => self.detach(minor)?,
            Command::Destroy { minor } => {
                self.close(minor)?;
                self.detach(minor)?;
            }
            Command::Open { minor, wanted } => {
                let at = self.folder.join(format!("nbd{}.{minor}", self.pid));
                let slot = self.slot(minor)?;
                if slot.is_some() {
                    return Err(format!("minor {minor} has an image open").into());
                }
                *slot = Some(Opened::open(wanted, minor, &at)?);
                minors::point(&self.folder, minor, Some(&at))?;
            }
            Command::Close { minor } => self.close(minor)?,
            Command::Pause { minor } => self.opened(minor)?.pause()?,
            Command::Unpause { minor, args } => self.opened(minor)?.unpause(args)?,
            Command::Stats { minor } => return Ok(self.opened(minor)?.stats()),
        }
        Ok(json!({}))
    }

    fn slot(&mut self, minor: u32) -> Result<&mut Option<Opened>> {
        self.vbds.get_mut(&minor).ok_or_else(|| format!("minor {minor} is not attached").into())
    }

    fn opened(&mut self, minor: u32) -> Result<&mut Opened> {
        let slot = self.slot(minor)?.as_mut();
        slot.ok_or_else(|| format!("minor {minor} has no image open").into())
    }

    fn close(&mut self, minor: u32) -> Result<()> {
        let closed = self.slot(minor)?.take().map_or(Ok(()), Opened::close);
        minors::point(&self.folder, minor, None)?;
        closed
    }

    fn detach(&mut self, minor: u32) -> Result<()> {
        if self.slot(minor)?.is_some() {
            return Err(format!("minor {minor} has an image open: close it first").into());
        }
        self.vbds.remove(&minor);
        if self.vbds.is_empty() {
            // Told once is enough.
            let _ = self.ended.try_send(());
        }
        Ok(())
    }

    fn rows(&self) -> Vec<Value> {
        if self.vbds.is_empty() {
            return vec![json!({"pid": self.pid})];
        }
        let row = |(minor, vbd): (&u32, &Option<Opened>)| match vbd {
            None => json!({"pid": self.pid, "minor": minor, "state": CLOSED}),
            Some(vbd) => {
                let (state, args) = (vbd.state(), vbd.args());
                json!({"pid": self.pid, "minor": minor, "state": state, "args": args})
            }
        };
        self.vbds.iter().map(row).collect()
    }
}
