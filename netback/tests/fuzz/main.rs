//! Fuzz targets against models that share no code with what they judge: slots from the guest, and
//! requests over the control ring (hashes, and lists of pages to be kept mapped). A model says for each input what must come of it: which packets
//! leave, which answers the slots get, whether the vif goes on.
//!
//! `cargo test` does a run that is the same each time and a short random one. Longer:
//! `BOLERO_RANDOM_TEST_TIME_MS=600000 BOLERO_RANDOM_ITERATIONS=1000000000 cargo test --release -p ringback-netback --test fuzz`, or
//! guided by coverage: `cargo bolero test -p ringback-netback slots --sanitizer NONE`.

mod control;
mod lists;
mod slots;

/// Bytes that are the same each time.
fn bytes(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..len).map(|_| next()).collect()
}

/// Takes an input apart.
struct Source<'a>(&'a [u8]);

impl Source<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }
    fn half(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }
    fn word(&mut self) -> u32 {
        u32::from_le_bytes([self.byte(), self.byte(), self.byte(), self.byte()])
    }
    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[usize::from(self.byte()) % from.len()]
    }
}
