//! Sizes as people write them.

use super::{Result, Usage};

const UNITS: [char; 6] = ['k', 'm', 'g', 't', 'p', 'e'];

/// Bytes: a number with an optional unit, as qemu-img has it. `1.5G` is fine.
pub fn parse(text: &str) -> Result<u64> {
    let wrong = || Usage(format!("{text}: not a size; write one like 512, 64k, 1.5G"));
    let trimmed = text.trim();
    let (digits, power) = match trimmed.chars().last().map(|c| c.to_ascii_lowercase()) {
        Some('b') => (&trimmed[..trimmed.len() - 1], 0),
        Some(unit) if UNITS.contains(&unit) => {
            let power = 1 + UNITS.iter().position(|u| *u == unit).unwrap_or(0) as u32;
            (&trimmed[..trimmed.len() - 1], power)
        }
        _ => (trimmed, 0),
    };
    let scale = 1024u64.pow(power);
    let bytes = match digits.split_once('.') {
        None => digits.parse::<u64>().ok().and_then(|n| n.checked_mul(scale)),
        Some((whole, part)) if power > 0 && !part.is_empty() && part.len() <= 9 => {
            let tenths = 10u64.pow(part.len() as u32);
            let part = part.parse::<u64>().ok().map(|p| u128::from(p) * u128::from(scale));
            let part = part.map(|p| (p / u128::from(tenths)) as u64);
            let whole = whole.parse::<u64>().ok().and_then(|n| n.checked_mul(scale));
            whole.zip(part).and_then(|(whole, part)| whole.checked_add(part))
        }
        Some(_) => None,
    };
    Ok(bytes.filter(|b| i64::try_from(*b).is_ok()).ok_or_else(wrong)?)
}

/// Bytes in words: three digits and a unit, as qemu-img has it.
pub fn words(bytes: u64) -> String {
    let names = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let (mut value, mut unit) = (bytes as f64, 0);
    while value >= 1000.0 && unit + 1 < names.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = match value {
        v if v >= 100.0 => 0,
        v if v >= 10.0 => 1,
        v if v >= 1.0 => 2,
        _ => 3,
    };
    let text = format!("{value:.digits$}");
    let text =
        if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    format!("{text} {}", names[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_qemu_img_does() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("512b", 512),
            ("64k", 65536),
            ("1.5G", 3 << 29),
            ("2T", 2 << 40),
            ("1E", 1 << 60),
        ] {
            assert_eq!(parse(text).expect(text), bytes);
        }
        for wrong in ["", "k", "1.5", "-1", "1.G", "9E", "10 M", "0x10", "1.0.0k"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn sizes_are_written_as_qemu_img_does() {
        for (bytes, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (200_704, "196 KiB"),
            (64 << 20, "64 MiB"),
            (3 << 29, "1.5 GiB"),
            (1023 << 20, "0.999 GiB"),
        ] {
            assert_eq!(words(bytes), text);
        }
    }
}
