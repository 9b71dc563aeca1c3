//! Counters and log2 histograms with one writer each, and the mapped stats page that another
//! process reads while they run.
//!
//! ```
//! perf::counters! {
//!     /// What one toy queue counts.
//!     pub struct ToyCounters {
//!         /// Requests taken.
//!         requests: Counter [requests],
//!         /// Time from taking a request to its answer.
//!         latency: Histogram [ns],
//!     }
//! }
//!
//! let counters = perf::Handle::<ToyCounters>::default();
//! counters.requests.add(3);
//! counters.latency.record(1500);
//! assert_eq!(counters.requests.get(), 3);
//! assert_eq!(counters.latency.snapshot().count, 1);
//! ```
#![cfg_attr(not(feature = "std"), no_std)]
extern crate alloc;

mod counter;
mod handle;
mod histogram;
#[cfg(feature = "std")]
pub mod page;
#[cfg(feature = "std")]
pub mod polling;
mod schema;
#[cfg(feature = "std")]
pub mod snapshot;
#[cfg(feature = "std")]
pub mod text;

#[cfg(all(doctest, feature = "std"))]
#[doc = include_str!("../README.md")]
pub struct Readme;

pub use counter::{Counter, Gauge};
pub use handle::{Block, Handle};
pub use histogram::{BUCKETS, Histogram, HistogramSnapshot, bucket_of, bucket_top};
pub use schema::{Field, Kind, Metric};
