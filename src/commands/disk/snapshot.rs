//! `ringback disk snapshot`.

use std::process::ExitCode;

use serde_json::{Value, json};

use super::open::Opening;
use super::work::Work;
use super::{Result, Usage, document, formats, sizes};
use crate::cli::disk::{Backing, Output, Snapshot};

/// A snapshot inside an image.
pub struct SnapshotInfo {
    pub id: String,
    pub name: String,
    /// Bytes of a guest's memory that were saved with it.
    pub vm_state_size: u64,
    /// Seconds since 1970, and nanoseconds.
    pub date: (u64, u32),
    /// How long the guest had run, in nanoseconds.
    pub vm_clock: u64,
    pub icount: Option<u64>,
}

/// What is done with one.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Act {
    Create,
    Apply,
    Delete,
}

/// `ringback disk snapshot`.
pub fn run(what: &Snapshot) -> Result {
    let (act, named) = match what {
        Snapshot::List(list) => {
            let opening = Opening::to_read(&list.file, list.format.as_deref(), &Default::default());
            let opening = opening.force_share(list.force_share).alone();
            let format = opening.format()?;
            let snapshots = formats::details(&opening, format)?.snapshots;
            if list.output.json {
                let all: Vec<Value> = snapshots.iter().map(value).collect();
                document(json!({"filename": list.file, "snapshots": all}));
            } else if !snapshots.is_empty() {
                outln!("Snapshot list:");
                table(&snapshots).iter().for_each(|line| outln!("{line}"));
            }
            return Ok(ExitCode::SUCCESS);
        }
        Snapshot::Create(new) => {
            let of = Of { file: new.file.as_deref(), name: new.name.as_deref() };
            return change(Act::Create, of, new.format.as_deref(), (&new.allow, &new.output));
        }
        Snapshot::Apply(named) => (Act::Apply, named),
        Snapshot::Delete(named) => (Act::Delete, named),
    };
    let of = Of { file: Some(&named.file), name: Some(&named.name) };
    change(act, of, named.format.as_deref(), (&named.allow, &named.output))
}

/// Which snapshot of which image.
struct Of<'a> {
    file: Option<&'a str>,
    name: Option<&'a str>,
}

fn change(act: Act, of: Of<'_>, format: Option<&str>, more: (&Backing, &Output)) -> Result {
    let (allow, output) = more;
    let (file, name) = (of.file.unwrap_or_default(), of.name.unwrap_or_default());
    let opening = Opening::to_write(file, format, allow);
    if name.is_empty() {
        return Err(Usage("a snapshot needs a name".into()).into());
    }
    let format = opening.format()?;
    // From here on a signal waits for the end, which is not far.
    let _work = Work::new(false)?;
    formats::snapshot(&opening, format, act, name)?;
    if output.json {
        document(json!({"filename": file, "name": name}));
    }
    Ok(ExitCode::SUCCESS)
}

/// With qemu-img's keys.
pub fn value(snapshot: &SnapshotInfo) -> Value {
    let mut value = json!({
        "id": snapshot.id, "name": snapshot.name, "vm-state-size": snapshot.vm_state_size,
        "date-sec": snapshot.date.0, "date-nsec": snapshot.date.1,
        "vm-clock-sec": snapshot.vm_clock / 1_000_000_000,
        "vm-clock-nsec": snapshot.vm_clock % 1_000_000_000,
    });
    if let Some(icount) = snapshot.icount {
        value["icount"] = icount.into();
    }
    value
}

/// A heading and a line for each. Times are UTC.
pub fn table(snapshots: &[SnapshotInfo]) -> Vec<String> {
    let head = format!(
        "{:<9} {:<16} {:>8} {:>20} {:>13} {:>10}",
        "ID", "TAG", "VM SIZE", "DATE (UTC)", "VM CLOCK", "ICOUNT"
    );
    let line = |s: &SnapshotInfo| {
        let size = sizes::words(s.vm_state_size);
        let seconds = s.vm_clock / 1_000_000_000;
        let clock = format!(
            "{:02}:{:02}:{:02}.{:03}",
            seconds / 3600,
            seconds / 60 % 60,
            seconds % 60,
            s.vm_clock / 1_000_000 % 1000
        );
        let icount = s.icount.map(|n| n.to_string()).unwrap_or_default();
        let date = date(s.date.0);
        format!("{:<9} {:<16} {size:>8} {date:>20} {clock:>13} {icount:>10}", s.id, s.name)
    };
    std::iter::once(head).chain(snapshots.iter().map(line)).collect()
}

/// A moment since 1970 in UTC.
fn date(seconds: u64) -> String {
    let leap = |y: u64| y.is_multiple_of(4) && (!y.is_multiple_of(100) || y.is_multiple_of(400));
    let (mut days, second) = (seconds / 86_400, seconds % 86_400);
    // Whole cycles of the calendar first, so that no image makes this long.
    let mut year = 1970 + days / 146_097 * 400;
    days %= 146_097;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let months = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 1;
    for length in months {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    let (h, m, s) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{:02} {h:02}:{m:02}:{s:02}", days + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00"),
            (951_782_400, "2000-02-29 00:00:00"),
            (1_700_000_000, "2023-11-14 22:13:20"),
            (4_102_444_799, "2099-12-31 23:59:59"),
        ] {
            assert_eq!(date(seconds), text);
        }
        assert!(date(u64::MAX).len() > 19);
    }
}
