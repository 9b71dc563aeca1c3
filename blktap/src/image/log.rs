//! Log lines about errors that a guest can cause again and again.
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use super::chain::Chain;
use crate::formats::ImageError;

/// At most one line a second.
pub(super) struct ErrorLog {
    start: Instant,
    /// The second (from 1) of the last line, 0 before the first.
    last: AtomicU64,
    unsaid: AtomicU64,
}

impl Default for ErrorLog {
    fn default() -> Self {
        ErrorLog { start: Instant::now(), last: AtomicU64::new(0), unsaid: AtomicU64::new(0) }
    }
}

impl ErrorLog {
    pub(super) fn say(&self, chain: &Chain, error: &ImageError) {
        let now = self.start.elapsed().as_secs() + 1;
        if self.last.swap(now, Ordering::Relaxed) == now {
            self.unsaid.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let name = chain.files().first().map(|f| f.name()).unwrap_or_default();
        match self.unsaid.swap(0, Ordering::Relaxed) {
            0 => tracing::error!("{name}: {error}"),
            n => tracing::error!("{name}: {error} (and {n} errors more before)"),
        }
    }
}
