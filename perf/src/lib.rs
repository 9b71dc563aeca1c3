//! Counters and log2 histograms with one writer each, and the mapped stats page that another
//! process reads while they run.
#![cfg_attr(not(feature = "std"), no_std)]
extern crate alloc;
