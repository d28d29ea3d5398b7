//! The control plane: what is backed up, where to, and how it went. It drives the chain, the NBD server and the agent;
//! it never touches the bytes of a disk itself, except to restore them.

pub mod api;
pub mod ctl;
pub mod db;
mod demo;
mod error;
mod fault;
pub mod http;
mod hub;
pub mod job;
pub mod model;
mod names;
mod outlet;
pub mod program;
mod progress;
mod restore;
mod runner;
mod stores;

pub use error::HubError;
pub use hub::{
    AGENT_TIMEOUT, CONNECT_TIMEOUT, Config, Hub, MAX_ACTIVE_JOBS, MAX_DISKS, MAX_EXTERNAL_JOBS,
    MAX_NAME_BYTES, MAX_RUNNING_JOBS, STALL_TIMEOUT, StartError,
};
pub use restore::MAX_RUNNING_RESTORES;
