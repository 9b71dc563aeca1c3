//! What a throttle holds to, by the names that users know from QEMU's throttle groups.

use std::fmt;

/// A larger number is none that a disk could reach.
const LARGEST: u64 = 1_000_000_000_000_000;
/// Longest burst, in seconds.
const LONGEST: u32 = 86_400;

/// One limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// Units a second in the long run; 0: no limit.
    pub rate: u64,
    /// Units a second in a burst; 0: no bursts, but for what a tenth of a second brings.
    pub burst: u64,
    /// How long a burst may last, in seconds.
    pub burst_s: u32,
}

impl Default for Limit {
    fn default() -> Self {
        Limit { rate: 0, burst: 0, burst_s: 1 }
    }
}

impl Limit {
    /// A rate without bursts.
    pub fn of(rate: u64) -> Limit {
        Limit { rate, ..Limit::default() }
    }
}

/// Limits of reads and writes together, and of each apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Requests a second: all, reads, writes.
    pub iops: [Limit; 3],
    /// Bytes a second: all, reads, writes.
    pub bps: [Limit; 3],
    /// A request of more bytes counts as several of so many; 0: as one.
    pub iops_size: u64,
}

/// The second part of a name, in the order of the arrays above.
const KINDS: [&str; 3] = ["total", "read", "write"];

impl Limits {
    /// Whether nothing is limited.
    pub fn are_none(&self) -> bool {
        self.iops.iter().chain(&self.bps).all(|limit| limit.rate == 0)
    }

    /// Sets one by its name, as `iops_total` or `bps_read_max_length`. `None`: there is no such
    /// name, or the value is out of range.
    pub fn set(&mut self, name: &str, value: &str) -> Option<()> {
        if name == "iops_size" {
            self.iops_size = amount(value)?;
            return Some(());
        }
        let (unit, rest) = name.split_once('_')?;
        let limits = match unit {
            "iops" => &mut self.iops,
            "bps" => &mut self.bps,
            _ => return None,
        };
        let (kind, part) = rest.split_once('_').unwrap_or((rest, ""));
        let limit = &mut limits[KINDS.iter().position(|k| *k == kind)?];
        match part {
            "" => limit.rate = amount(value)?,
            "max" => limit.burst = amount(value)?,
            "max_length" => {
                limit.burst_s = value.parse().ok().filter(|n| (1..=LONGEST).contains(n))?;
            }
            _ => return None,
        }
        Some(())
    }

    /// Whether they agree with each other: what is wrong.
    pub fn agree(&self) -> Result<(), String> {
        for (unit, limits) in [("iops", &self.iops), ("bps", &self.bps)] {
            for (kind, limit) in KINDS.iter().zip(limits) {
                if limit.burst != 0 && limit.burst < limit.rate {
                    return Err(format!(
                        "{unit}_{kind}_max={}: less than {unit}_{kind}={}",
                        limit.burst, limit.rate
                    ));
                }
                if limit.burst != 0 && limit.rate == 0 {
                    return Err(format!("{unit}_{kind}_max: without {unit}_{kind} there is none"));
                }
            }
        }
        Ok(())
    }
}

/// A number that a disk could reach.
fn amount(value: &str) -> Option<u64> {
    super::super::amount(value).filter(|n| *n <= LARGEST)
}

impl fmt::Display for Limits {
    /// Those that are set, as `iops_total=1000,bps_read=1048576`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut comma = "";
        for (unit, limits) in [("iops", &self.iops), ("bps", &self.bps)] {
            for (kind, limit) in KINDS.iter().zip(limits).filter(|(_, l)| l.rate != 0) {
                write!(f, "{comma}{unit}_{kind}={}", limit.rate)?;
                comma = ",";
                if limit.burst != 0 {
                    write!(f, ",{unit}_{kind}_max={}", limit.burst)?;
                    write!(f, ",{unit}_{kind}_max_length={}", limit.burst_s)?;
                }
            }
        }
        match self.iops_size {
            0 => Ok(()),
            size => write!(f, "{comma}iops_size={size}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_values() {
        let mut limits = Limits::default();
        assert!(limits.are_none());
        for (name, value) in [
            ("iops_total", "1000"),
            ("bps_read", "10M"),
            ("bps_read_max", "1g"),
            ("bps_read_max_length", "5"),
            ("iops_size", "4k"),
        ] {
            assert_eq!(limits.set(name, value), Some(()), "{name}");
        }
        let text = "iops_total=1000,bps_read=10485760,bps_read_max=1073741824,\
                    bps_read_max_length=5,iops_size=4096";
        assert_eq!(limits.to_string(), text);
        assert_eq!(limits.agree(), Ok(()));
        for (name, value) in [
            ("iops_all", "1"),
            ("iops", "1"),
            ("ops_total", "1"),
            ("iops_total_min", "1"),
            ("iops_total", ""),
            ("iops_total", "-1"),
            ("iops_total", "M"),
            ("iops_total", "1\u{e4}"),
            ("bps_total", "18446744073709551615G"),
            ("iops_read_max_length", "0"),
        ] {
            assert_eq!(limits.set(name, value), None, "{name}={value}");
        }
        limits.set("iops_total_max", "999").expect("a number");
        assert_eq!(limits.agree(), Err("iops_total_max=999: less than iops_total=1000".into()));
        limits.set("iops_total", "0").expect("a number");
        assert!(limits.agree().is_err_and(|e| e.contains("without iops_total")));
    }
}
