//! What a block of counters holds: names, kinds, units, help and offsets, known at compile time.

use crate::{Counter, Gauge, Histogram};

/// What kind of number a field is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "std", derive(serde::Serialize))]
#[cfg_attr(feature = "std", serde(rename_all = "lowercase"))]
pub enum Kind {
    /// Only grows; a reader shows its rate.
    Counter,
    /// A level; a reader shows it as it is.
    Gauge,
    /// A distribution by powers of two.
    Histogram,
}

impl Kind {
    /// Bytes that a value of this kind takes.
    pub const fn size(self) -> usize {
        match self {
            Kind::Counter | Kind::Gauge => 8,
            Kind::Histogram => size_of::<Histogram>(),
        }
    }
    /// The name in a schema and in JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        }
    }
    /// The kind of that name.
    pub fn by_name(name: &str) -> Option<Kind> {
        [Kind::Counter, Kind::Gauge, Kind::Histogram].into_iter().find(|k| k.name() == name)
    }
}

/// One field of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// The field's name.
    pub name: &'static str,
    /// What kind of number it is.
    pub kind: Kind,
    /// What is counted: `requests`, `ns`, `bytes` ...
    pub unit: &'static str,
    /// One sentence for a person.
    pub help: &'static str,
    /// Where it lies in its block, in bytes.
    pub offset: usize,
}

/// A type that may be a field of a block.
pub trait Metric: sealed::Sealed {
    /// The kind of its values.
    const KIND: Kind;
}
impl Metric for Counter {
    const KIND: Kind = Kind::Counter;
}
impl Metric for Gauge {
    const KIND: Kind = Kind::Gauge;
}
impl Metric for Histogram {
    const KIND: Kind = Kind::Histogram;
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for crate::Counter {}
    impl Sealed for crate::Gauge {}
    impl Sealed for crate::Histogram {}
}
