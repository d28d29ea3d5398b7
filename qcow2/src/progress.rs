//! How far long work is. Who shows it, and how often, is the caller's affair.

/// How far long work is, in bytes of the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// What is done, including what could be left out. Never goes back, and ends at `total_bytes`.
    pub done_bytes: u64,
    /// All there is.
    pub total_bytes: u64,
}
