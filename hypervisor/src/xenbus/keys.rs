//! What the other end of a device has written: read, and refused where it makes no sense.

use std::fmt::Display;
use std::str::FromStr;

use super::Key;

/// A key with its value, to be written.
pub fn key(name: &str, value: impl ToString) -> Key {
    (name.to_owned(), value.to_string())
}

/// Why the other end's keys are refused. A backend's text reaches `error/backend/...`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Refused(pub String);

/// Longest piece of the other end's value that is repeated in an error.
const SHOWN: usize = 40;

/// A value of the other end's, in quotation marks and no longer than a line has room for.
pub fn shown(value: &str) -> String {
    format!("{:?}", value.chars().take(SHOWN).collect::<String>())
}

/// The keys of one end, as `read` gives them.
pub struct Keys<F> {
    whose: &'static str,
    /// What a range is, in words.
    range: &'static str,
    read: F,
}

impl<F: Fn(&str) -> Option<String>> Keys<F> {
    /// A frontend's, which may choose within what it was offered.
    pub fn of_frontend(read: F) -> Keys<F> {
        Keys { whose: "frontend", range: "were offered", read }
    }
    /// A backend's.
    pub fn of_backend(read: F) -> Keys<F> {
        Keys { whose: "backend", range: "make sense", read }
    }

    /// The value as it was written.
    pub fn get(&self, name: &str) -> Option<String> {
        (self.read)(name)
    }
    /// The error that says `why` of the key.
    pub fn refuse(&self, name: &str, why: impl Display) -> Refused {
        Refused(format!("{} key {name} {why}", self.whose))
    }

    fn parse<N: FromStr>(&self, name: &str) -> Result<Option<N>, Refused> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let digits = value.trim();
        // `parse` alone would take a sign.
        let plain = digits.bytes().all(|b| b.is_ascii_digit());
        let number = digits.parse().ok().filter(|_| plain);
        let refused = || self.refuse(name, format!("is {}, which is not a number", shown(&value)));
        number.map(Some).ok_or_else(refused)
    }
    /// A number; none where there is no such key.
    pub fn number(&self, name: &str) -> Result<Option<u32>, Refused> {
        self.parse(name)
    }
    /// A number that must be there.
    pub fn required(&self, name: &str) -> Result<u32, Refused> {
        self.number(name)?.ok_or_else(|| self.refuse(name, "is missing"))
    }
    /// Whether a feature is there.
    pub fn flag(&self, name: &str) -> Result<bool, Refused> {
        Ok(self.number(name)?.unwrap_or(0) != 0)
    }
    /// A number from `low` to `high`; none where there is no such key.
    pub fn optional<N>(&self, name: &str, low: N, high: N) -> Result<Option<N>, Refused>
    where
        N: FromStr + PartialOrd + Display,
    {
        match self.parse(name)? {
            Some(n) if n < low || n > high => {
                Err(self.refuse(name, format!("is {n}; {low} to {high} {}", self.range)))
            }
            found => Ok(found),
        }
    }
    /// The same with what holds where there is no such key.
    pub fn within<N>(&self, name: &str, default: N, low: N, high: N) -> Result<N, Refused>
    where
        N: FromStr + PartialOrd + Display,
    {
        Ok(self.optional(name, low, high)?.unwrap_or(default))
    }
    /// An event channel, which must be there.
    pub fn port(&self, name: &str) -> Result<u32, Refused> {
        match self.required(name)? {
            // Xen never gives out port 0.
            0 => Err(self.refuse(name, "is 0, which is no port")),
            port => Ok(port),
        }
    }
}
