//! Virtual device numbers and their names: vbd-interface(7).

use std::fmt;

/// A virtual device number, the name of a vbd's node in xenstore.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Vdev(pub u32);

/// Bit that marks the extended encoding of `xvd`.
const EXTENDED: u32 = 1 << 28;
const XVD: u32 = 202;
const SD: u32 = 8;
const HD: [u32; 2] = [3, 22];

impl Vdev {
    /// Reads a name (`xvda`, `xvdb1`, `sda`, `hdc2`, `d1p2`, `d3`) or a plain number up to
    /// 2^31 - 1, as libxl does.
    pub fn parse(name: &str) -> Option<Vdev> {
        if let Some(rest) = name.strip_prefix("xvd") {
            let (disk, partition) = letters(rest)?;
            return xvd(disk, partition);
        }
        if let Some(rest) = name.strip_prefix("hd") {
            let (disk, partition) = letters(rest)?;
            let fits = disk < 4 && partition < 64;
            let major = HD[usize::from(disk > 1)];
            return fits.then_some(Vdev(major << 8 | (disk & 1) << 6 | partition));
        }
        if let Some(rest) = name.strip_prefix("sd") {
            let (disk, partition) = letters(rest)?;
            let fits = disk < 16 && partition < 16;
            return fits.then_some(Vdev(SD << 8 | (disk & 15) << 4 | partition));
        }
        if let Some(rest) = name.strip_prefix('d') {
            let (disk, partition) = rest.split_once('p').unwrap_or((rest, "0"));
            return xvd(number(disk)?, number(partition)?);
        }
        number(name).filter(|n| *n <= i32::MAX as u32).map(Vdev)
    }

    /// Its name; `None` for a number outside vbd-interface(7).
    pub fn name(self) -> Option<String> {
        let n = self.0;
        let (prefix, disk, partition) = if n >> 28 == 1 {
            ("xvd", (n & !EXTENDED) >> 8, n & 255)
        } else {
            match n >> 8 {
                XVD => ("xvd", n >> 4 & 15, n & 15),
                SD => ("sd", n >> 4 & 15, n & 15),
                3 => ("hd", n >> 6 & 3, n & 63),
                22 => ("hd", (n >> 6 & 3) + 2, n & 63),
                _ => return None,
            }
        };
        // Only two disks a major are in the table, though there is room for four.
        if matches!(n >> 8, 3 | 22) && n >> 6 & 3 > 1 {
            return None;
        }
        let partition = if partition == 0 { String::new() } else { partition.to_string() };
        Some(format!("{prefix}{}{partition}", disk_letters(disk)))
    }
}

impl fmt::Display for Vdev {
    /// The name, or the number where there is no name.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(&name),
            None => write!(f, "{}", self.0),
        }
    }
}

fn xvd(disk: u32, partition: u32) -> Option<Vdev> {
    match (disk, partition) {
        (0..16, 0..16) => Some(Vdev(XVD << 8 | disk << 4 | partition)),
        (0..0x10_0000, 0..256) => Some(Vdev(EXTENDED | disk << 8 | partition)),
        _ => None,
    }
}

/// Decimal without sign, spaces or superfluous zeroes.
fn number(text: &str) -> Option<u32> {
    let canonical = text == "0" || !text.starts_with('0');
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    (canonical && digits).then(|| text.parse().ok()).flatten()
}

/// Disk letters (a is 0, z is 25, aa is 26) and the partition number behind them, if any.
fn letters(text: &str) -> Option<(u32, u32)> {
    let end = text.find(|c: char| !c.is_ascii_lowercase()).unwrap_or(text.len());
    let (disk, partition) = text.split_at(end);
    if disk.is_empty() {
        return None;
    }
    let mut n: u32 = 0;
    for b in disk.bytes() {
        n = n.checked_mul(26)?.checked_add(u32::from(b - b'a') + 1)?;
    }
    let partition = if partition.is_empty() { 0 } else { number(partition).filter(|p| *p > 0)? };
    Some((n - 1, partition))
}

fn disk_letters(disk: u32) -> String {
    let mut n = disk + 1;
    let mut name = Vec::new();
    while n > 0 {
        name.push(b'a' + ((n - 1) % 26) as u8);
        n = (n - 1) / 26;
    }
    name.iter().rev().map(|b| char::from(*b)).collect()
}

#[cfg(test)]
#[path = "vdev_tests.rs"]
mod tests;
