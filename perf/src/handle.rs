//! A shared block of counters, on the heap or in a mapped stats page.
// A handle points into memory that its owner keeps alive; a block is read in place.
#![allow(unsafe_code)]

use alloc::sync::Arc;
use core::any::Any;
use core::fmt;
use core::ops::Deref;
use core::ptr::NonNull;

use crate::Field;

/// A struct of counters, gauges and histograms. Made by [`counters!`](crate::counters).
///
/// # Safety
/// The type is `repr(C)`, its fields are [`Metric`](crate::Metric)s only (so that every bit
/// pattern is valid, zeroes are `Default`, and its alignment is 8), and `FIELDS` names each of
/// them with its true kind and offset.
pub unsafe trait Block: Default + Send + Sync + 'static {
    /// Name of the type.
    const NAME: &'static str;
    /// The fields in the order of their offsets.
    const FIELDS: &'static [Field];
}

/// Declares a block: a struct of `Counter`, `Gauge` and `Histogram` fields, each with its help
/// as a doc comment and its unit in brackets, together with its [`Block`] schema.
#[macro_export]
macro_rules! counters {
    (
        $(#[$attribute:meta])*
        $vis:vis struct $name:ident {
            $( $(#[doc = $help:literal])+ $field:ident : $kind:ident [$unit:ident] ),+ $(,)?
        }
    ) => {
        $(#[$attribute])*
        #[derive(Debug, Default)]
        #[repr(C)]
        $vis struct $name {
            $( $(#[doc = $help])+ pub $field: $crate::$kind, )+
        }
        // SAFETY: repr(C), and each field's type implements Metric, which only this crate's own
        // three types do; offsets come from the compiler.
        #[allow(unsafe_code)]
        unsafe impl $crate::Block for $name {
            const NAME: &'static str = stringify!($name);
            const FIELDS: &'static [$crate::Field] = &[
                $( $crate::Field {
                    name: stringify!($field),
                    kind: <$crate::$kind as $crate::Metric>::KIND,
                    unit: stringify!($unit),
                    help: concat!($($help),+).trim_ascii(),
                    offset: ::core::mem::offset_of!($name, $field),
                }, )+
            ];
        }
    };
}

/// A shared, cheaply cloned reference to a block. Only one thread should write to any one
/// counter of it; the others read.
pub struct Handle<T: Block> {
    block: NonNull<T>,
    /// Keeps the block's memory; never looked into.
    owner: Arc<dyn Any + Send + Sync>,
}

// SAFETY: a handle gives out `&T` only, and `T: Block` is Sync and Send.
unsafe impl<T: Block> Send for Handle<T> {}
// SAFETY: as above.
unsafe impl<T: Block> Sync for Handle<T> {}

impl<T: Block> Handle<T> {
    /// A block inside memory that `owner` keeps.
    ///
    /// # Safety
    /// `block` is aligned, valid for reads and writes of a `T` and at a fixed address until
    /// `owner` is dropped, and nobody makes a Rust reference to those bytes but to atomics.
    #[cfg(feature = "std")]
    pub(crate) unsafe fn within(block: NonNull<T>, owner: Arc<dyn Any + Send + Sync>) -> Self {
        Handle { block, owner }
    }
}

impl<T: Block> Default for Handle<T> {
    /// A new block of zeroes on the heap.
    fn default() -> Self {
        let owner = Arc::new(T::default());
        Handle { block: NonNull::from(&*owner), owner }
    }
}

impl<T: Block> Clone for Handle<T> {
    fn clone(&self) -> Self {
        Handle { block: self.block, owner: Arc::clone(&self.owner) }
    }
}

impl<T: Block> Deref for Handle<T> {
    type Target = T;
    #[inline]
    fn deref(&self) -> &T {
        // SAFETY: valid while `owner` lives, by construction, and T consists of atomics.
        unsafe { self.block.as_ref() }
    }
}

impl<T: Block + fmt::Debug> fmt::Debug for Handle<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        T::fmt(self, f)
    }
}
