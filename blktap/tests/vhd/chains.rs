//! Chains of differencing images.
