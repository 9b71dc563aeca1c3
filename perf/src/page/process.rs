//! Who a process is: its id alone can be used again, its start time tells two apart.

use crate::snapshot::Writer;

/// Start time of a process in clock ticks since boot (field 22 of `/proc/PID/stat`); `None`
/// where there is no such process.
pub(super) fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    parse(&stat)
}

/// Field 2 is the command in parentheses, and may itself hold spaces and parentheses; a zombie
/// (field 3 is Z or X) writes nothing any more.
fn parse(stat: &str) -> Option<u64> {
    let mut fields = stat.get(stat.rfind(')')? + 1..)?.split_ascii_whitespace();
    match fields.next()? {
        "Z" | "X" | "x" => None,
        _ => fields.nth(18)?.parse().ok(),
    }
}

/// Whether the process that wrote a page still runs.
pub(super) fn state(pid: u32, started: u64) -> Writer {
    match start_time(pid) {
        Some(t) if t == started => Writer::Alive,
        _ => Writer::Dead,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAT: &str = "7 (a) b (c) S 1 7 7 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 4242 1 2 3";

    #[test]
    fn the_start_time_is_found_behind_any_command_name() {
        assert_eq!(parse(STAT), Some(4242));
        assert_eq!(parse(&STAT.replace(" S ", " Z ")), None);
        assert_eq!(parse("7 (a"), None);
        assert_eq!(parse("7 (a) S 1"), None);
    }

    #[test]
    fn this_process_lives_and_one_with_another_start_time_does_not() {
        let me = std::process::id();
        let t = start_time(me).expect("own start time");
        assert_eq!(state(me, t), Writer::Alive);
        assert_eq!(state(me, t + 1), Writer::Dead);
    }
}
