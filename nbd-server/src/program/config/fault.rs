//! What can be wrong, or worth a word, in a configuration file, and where. Finding it is done in `ini` and `read`.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A line of a file, or with line 0 the file as a whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) file: Arc<Path>,
    pub(crate) line: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => write!(f, "{}", self.file.display()),
            line => write!(f, "{}:{line}", self.file.display()),
        }
    }
}

/// Something that keeps a configuration from being used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Fault {
    #[error("the line is not UTF-8")]
    Utf8,
    #[error("the line holds a NUL byte")]
    Nul,
    #[error("the line is neither a comment, a [section] nor KEY = VALUE")]
    NoEquals,
    #[error("a section is [NAME] on a line of its own, the name without brackets")]
    Header,
    #[error("{0:?} is no name of a key")]
    KeyName(String),
    #[error("a backslash stands before one of s, n, t, r or another backslash")]
    Escape,
    #[error("a key stands before the first section")]
    NoSection,
    #[error("the first section must be [generic]")]
    NotGeneric,
    #[error("[generic] stands in the main file, once, at its beginning")]
    GenericHere,
    #[error("the section [{name}] is at {first} already")]
    SectionTwice { name: String, first: Place },
    #[error("{key} is set in line {first} already")]
    KeyTwice { key: String, first: usize },
    #[error("there is no key {key:?} in {scope}{advice}")]
    Unknown { key: String, scope: &'static str, advice: String },
    #[error("{key} = {value:?}: {wants}")]
    Value { key: &'static str, value: String, wants: String },
    #[error("{key}: {why}")]
    Refused { key: &'static str, why: &'static str },
    #[error("[{section}] does not say {key}")]
    Missing { section: String, key: &'static str },
    #[error("no export is configured, and no includedir where one may come to be")]
    NoExports,
    #[error("the line has no end: is the file still being written?")]
    Unfinished,
    #[error("the file is empty: is it still being written? A comment makes it an intended one")]
    Empty,
    #[error("the file changed while it was read")]
    Changing,
    #[error("the file is longer than {0} bytes")]
    TooLong(u64),
    #[error("cannot read {}: {why}", path.display())]
    Unreadable { path: PathBuf, why: String },
    #[error("{0}")]
    Export(String),
}

/// A fault where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Finding {
    pub(crate) place: Place,
    pub(crate) what: Fault,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.what)
    }
}

/// Something that is used, but perhaps not as it was meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Remark {
    pub(crate) place: Place,
    pub(crate) text: String,
    /// Whether the file may be half-written: then a reload does not take it.
    pub(crate) unfinished: bool,
}

impl fmt::Display for Remark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.text)
    }
}

/// Everything that is wrong with a configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Faults(pub(crate) Vec<Finding>);

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, finding) in self.0.iter().enumerate() {
            let separator = if index == 0 { "" } else { "\n" };
            write!(f, "{separator}{finding}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Faults {}
