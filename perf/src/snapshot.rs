//! What a reader gets: values at one time, and rates between two times.

use std::collections::BTreeMap;
use std::time::Instant;

use serde::Serialize;

use crate::page::Device;
use crate::{HistogramSnapshot, Kind};

/// The `schema` number of the JSON documents made from these types.
pub const SCHEMA: u32 = 1;

/// Whether the process that wrote a page still runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Writer {
    /// It runs.
    Alive,
    /// It is gone (or its process id belongs to another process by now): the values are its last.
    Dead,
}

/// All values of one page at one time.
#[derive(Clone, Debug, Serialize)]
pub struct Snapshot {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Which device.
    pub device: Device,
    /// Process id of the writer.
    pub pid: u32,
    /// Whether the writer still runs.
    pub writer: Writer,
    /// Blocks that found no room in the page.
    pub unshown: u64,
    /// The blocks in the order of their making.
    pub blocks: Vec<BlockValues>,
    /// When it was read.
    #[serde(skip)]
    pub at: Instant,
}

/// One block's values.
#[derive(Clone, Debug, Serialize)]
pub struct BlockValues {
    /// Name of the block, `queue-0` say.
    pub name: String,
    /// Name of its type.
    #[serde(rename = "type")]
    pub kind: String,
    /// Values in the order of the schema.
    pub values: Vec<Value>,
}

/// One value with its description.
#[derive(Clone, Debug, Serialize)]
pub struct Value {
    /// Name of the field.
    pub name: String,
    /// What kind of number it is.
    pub kind: Kind,
    /// What is counted.
    pub unit: String,
    /// One sentence for a person.
    #[serde(skip)]
    pub help: String,
    /// The number or numbers.
    #[serde(flatten)]
    pub number: Number,
}

/// A value's number or numbers.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Number {
    /// A counter's total or a gauge's level.
    Value {
        /// The number.
        value: u64,
    },
    /// A distribution.
    Distribution(Box<Distribution>),
}

/// A histogram in a few numbers, in the unit of its field.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Distribution {
    /// Values recorded.
    pub count: u64,
    /// Their mean.
    pub mean: f64,
    /// Median, to the power of two, interpolated.
    pub p50: u64,
    /// 90th percentile.
    pub p90: u64,
    /// 99th percentile.
    pub p99: u64,
    /// 99.9th percentile.
    pub p999: u64,
    /// Occupied buckets: lowest value of each and how many are in it.
    pub buckets: BTreeMap<u64, u64>,
    /// The histogram itself, for [`Snapshot::rates`].
    #[serde(skip)]
    pub raw: HistogramSnapshot,
}

impl From<HistogramSnapshot> for Distribution {
    fn from(raw: HistogramSnapshot) -> Self {
        let low = |k: usize| if k == 0 { 0 } else { 1u64 << k };
        let occupied = raw.buckets.iter().enumerate().filter(|(_, n)| **n > 0);
        Distribution {
            count: raw.count,
            mean: raw.mean(),
            p50: raw.quantile(0.5),
            p90: raw.quantile(0.9),
            p99: raw.quantile(0.99),
            p999: raw.quantile(0.999),
            buckets: occupied.map(|(k, n)| (low(k), *n)).collect(),
            raw,
        }
    }
}

/// What happened between two snapshots of a page.
#[derive(Clone, Debug, Serialize)]
pub struct Rates {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Which device.
    pub device: Device,
    /// Whether the writer still runs.
    pub writer: Writer,
    /// Seconds between the two.
    pub interval_s: f64,
    /// The blocks of the later one.
    pub blocks: Vec<BlockRates>,
}

/// One block's rates.
#[derive(Clone, Debug, Serialize)]
pub struct BlockRates {
    /// Name of the block.
    pub name: String,
    /// Name of its type.
    #[serde(rename = "type")]
    pub kind: String,
    /// Rates in the order of the schema.
    pub values: Vec<Rate>,
}

/// One value's rate.
#[derive(Clone, Debug, Serialize)]
pub struct Rate {
    /// Name of the field.
    pub name: String,
    /// What kind of number it is.
    pub kind: Kind,
    /// What is counted; a counter's rate is in this unit a second.
    pub unit: String,
    /// The rate, or the level, or the interval's distribution.
    #[serde(flatten)]
    pub number: RateNumber,
}

/// A rate's number or numbers.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum RateNumber {
    /// A counter: how often a second.
    PerSecond {
        /// The number.
        per_s: f64,
    },
    /// A gauge: its level at the end.
    Level {
        /// The number.
        value: u64,
    },
    /// A histogram: what was recorded in between.
    Distribution(Box<Distribution>),
}

impl Snapshot {
    /// The rates since `old`, an earlier snapshot of the same device. A block that `old` lacks,
    /// and a counter that is lower than it was (its writer started anew), counts from zero.
    pub fn rates(&self, old: &Snapshot) -> Rates {
        let interval_s = self.at.saturating_duration_since(old.at).as_secs_f64();
        let blocks = self.blocks.iter().map(|new| {
            let before = old.blocks.iter().find(|b| b.name == new.name && b.kind == new.kind);
            let values = new.values.iter().map(|v| {
                let was = before.and_then(|b| b.values.iter().find(|o| o.name == v.name));
                rate(v, was, interval_s)
            });
            BlockRates { name: new.name.clone(), kind: new.kind.clone(), values: values.collect() }
        });
        Rates {
            schema: SCHEMA,
            device: self.device.clone(),
            writer: self.writer,
            interval_s,
            blocks: blocks.collect(),
        }
    }

    /// The value called `field` of the block called `block`; a histogram's is its count.
    pub fn value(&self, block: &str, field: &str) -> Option<u64> {
        let of_block = self.blocks.iter().filter(|b| b.name == block);
        let value = of_block.flat_map(|b| &b.values).find(|v| v.name == field)?;
        Some(match &value.number {
            Number::Value { value } => *value,
            Number::Distribution(d) => d.count,
        })
    }

    /// One description for each field of each type in the page.
    pub fn describe(&self) -> Vec<Description> {
        let mut all: Vec<Description> = Vec::new();
        for block in &self.blocks {
            if all.iter().any(|d| d.block == block.kind) {
                continue;
            }
            all.extend(block.values.iter().map(|v| Description {
                block: block.kind.clone(),
                name: v.name.clone(),
                kind: v.kind,
                unit: v.unit.clone(),
                help: v.help.clone(),
            }));
        }
        all
    }
}

/// What a field means.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Description {
    /// Type of the block that holds it.
    pub block: String,
    /// Name of the field.
    pub name: String,
    /// What kind of number it is.
    pub kind: Kind,
    /// What is counted.
    pub unit: String,
    /// One sentence for a person.
    pub help: String,
}

fn rate(new: &Value, old: Option<&Value>, interval_s: f64) -> Rate {
    let number = match (&new.number, old.map(|o| &o.number)) {
        (Number::Value { value }, _) if new.kind == Kind::Gauge => {
            RateNumber::Level { value: *value }
        }
        (Number::Value { value }, was) => {
            let was = match was {
                Some(Number::Value { value: was }) if was <= value => *was,
                _ => 0,
            };
            let per_s = if interval_s > 0.0 { (value - was) as f64 / interval_s } else { 0.0 };
            RateNumber::PerSecond { per_s }
        }
        (Number::Distribution(d), Some(Number::Distribution(was))) => {
            RateNumber::Distribution(Box::new(d.raw.since(&was.raw).into()))
        }
        (Number::Distribution(d), _) => RateNumber::Distribution(d.clone()),
    };
    Rate { name: new.name.clone(), kind: new.kind, unit: new.unit.clone(), number }
}
