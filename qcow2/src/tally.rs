//! Counts every reference of an image to every cluster of its file, straight from the file, so that it works on images
//! that are broken. What the counts ought to be, and what to do about faults, is decided by those who ask.
//!
//! A table is read once, however many tables or snapshots point at it, and holes of the file are not read at all: the
//! work is bounded by what the file really holds.

mod counts;
mod finding;
mod roots;
mod sweep;
#[cfg(test)]
mod tests;
mod walk;

pub(crate) use counts::{Counts, MAX_COUNTS_BYTES, TooScattered};
pub use finding::{EntryPlace, Finding, Severity};
pub(crate) use roots::{Roots, TablePlace};
pub(crate) use sweep::sweep;
pub(crate) use walk::{TableUse, Tally, Visitor};
