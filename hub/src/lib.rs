//! The control plane: what is backed up, where to, and how it went. It drives the chain, the NBD server and the agent;
//! it never touches the bytes of a disk itself, except to restore them.

pub mod db;
pub mod job;
pub mod model;
mod names;
