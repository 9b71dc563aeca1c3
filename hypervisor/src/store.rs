//! xenstore.
/// A connection to xenstore.
pub struct Client {}
