//! Configuration files in the format of the reference nbd-server. What is asked for is carried out by `reload` and
//! `start`; nothing is opened here but these files.

mod export;
mod fault;
mod generic;
mod ini;
mod keys;
mod read;
#[cfg(test)]
mod tests;
#[cfg(feature = "tls")]
mod tls;

use std::path::PathBuf;

pub(crate) use self::fault::{Fault, Faults, Finding, Place, Remark};
pub(crate) use self::generic::Generic;
pub(crate) use self::keys::{EXPORT, GENERIC, Key};
pub(crate) use self::read::read;
#[cfg(feature = "tls")]
pub(crate) use self::tls::Tls;
use crate::program::options::ExportSpec;

/// What a configuration asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Config {
    pub(crate) generic: Generic,
    /// In the order of the files, and of the sections in them.
    pub(crate) exports: Vec<(Place, ExportSpec)>,
    /// The files that were read.
    pub(crate) files: Vec<PathBuf>,
    pub(crate) remarks: Vec<Remark>,
}

impl Config {
    /// A line of the main file.
    pub(crate) fn place(&self, line: usize) -> Place {
        let file = self.files.first().cloned().unwrap_or_default();
        Place { file: file.into(), line }
    }
}
