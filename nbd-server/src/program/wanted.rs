//! What is asked for: exports, where that is said, and what they demand of each other. Serving them is the catalogue's.

use std::collections::{HashMap, HashSet};
use std::fmt;

use anyhow::anyhow;
use nbd_server::ExportError;

use super::config::Place;
use super::errors::text_of;
use super::hint;
use super::images::{FileId, ImageKey};
use super::options::{ExportSpec, Writes};
use super::waiting::diff;

/// An export that is asked for, and where.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    pub(super) spec: ExportSpec,
    /// `None` for the command line.
    pub(super) place: Option<Place>,
}

impl Wanted {
    /// An error with what it keeps from being served, and where that was said.
    pub(super) fn blame(&self, error: anyhow::Error) -> anyhow::Error {
        let path = self.spec.path.display();
        let hint = hint::against(&error, self.place.is_some());
        let error = error.context(format!("cannot open {path} for export {:?}", self.spec.name));
        self.locate(match hint {
            Some(hint) => anyhow!("{}; {hint}", text_of(&error)),
            None => error,
        })
    }

    /// The same where it is not the image that keeps it.
    fn refuse(&self, error: anyhow::Error) -> anyhow::Error {
        self.locate(error.context(format!("cannot serve the export {:?}", self.spec.name)))
    }

    fn locate(&self, error: anyhow::Error) -> anyhow::Error {
        match &self.place {
            Some(place) => anyhow!("{place}: {}", text_of(&error)),
            None => error,
        }
    }

    /// Whether it changes its image.
    fn is_written(&self) -> bool {
        !self.spec.is_read_only() && self.spec.writes == Writes::Image
    }
}

/// All that keeps exports from being served.
#[derive(Debug, Default)]
pub(super) struct Refused(pub(super) Vec<anyhow::Error>);

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, error) in self.0.iter().enumerate() {
            let separator = if index == 0 { "" } else { "\n" };
            write!(f, "{separator}{}", text_of(error))?;
        }
        Ok(())
    }
}

impl std::error::Error for Refused {}

impl Refused {
    /// What the server says of a table, with where the export stands that it names.
    pub(super) fn by_server(wanted: &[Wanted], error: ExportError) -> Self {
        let name = match &error {
            ExportError::NeedsTls(name) | ExportError::NeedsClientCertificates(name) => Some(name),
            _ => None,
        };
        let one = wanted.iter().find(|one| Some(&one.spec.name) == name);
        let error = anyhow::Error::from(error);
        Self(vec![match one {
            Some(one) => one.locate(error),
            None => error,
        }])
    }
}

/// What all exports together do with a file.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Use {
    pub(super) writable: bool,
    pub(super) seals: bool,
}

/// What becomes of each file.
pub(super) fn uses(found: &[(&Wanted, Option<ImageKey>)]) -> HashMap<FileId, Use> {
    let mut uses: HashMap<FileId, Use> = HashMap::new();
    for (one, key) in found.iter().filter(|(one, _)| one.is_written()) {
        let Some(key) = key else { continue };
        let used = uses.entry(key.file().clone()).or_default();
        used.writable = true;
        used.seals |= one.spec.seals;
    }
    uses
}

/// Exports that cannot be served beside others: those whose name another has, a second default one, and those that seal
/// an image to which another writes.
pub(super) fn clashes(found: &[(&Wanted, Option<ImageKey>)]) -> Vec<anyhow::Error> {
    let mut clashes = Vec::new();
    let mut names = HashSet::new();
    let mut default: Option<&Wanted> = None;
    for (one, key) in found {
        let name = &one.spec.name;
        if !names.insert(name) {
            clashes.push(one.refuse(anyhow!("there is already an export named {name:?}")));
            continue;
        }
        if one.spec.is_default || name.is_empty() {
            if let Some(first) = default {
                let first = &first.spec.name;
                clashes
                    .push(one.refuse(anyhow!("the export {first:?} is already the default one")));
            }
            default = default.or(Some(one));
        }
        if let Some(key) = key
            && one.spec.seals
            && let Some(other) = other_writer(one, key, found)
        {
            let place = other.place.as_ref().map(|place| format!(" ({place})")).unwrap_or_default();
            clashes.push(one.refuse(anyhow!(
                "the export {:?}{place} writes to the image, too, which is to be sealed when one writer is done",
                other.spec.name
            )));
        }
    }
    clashes
}

/// Refuses what waits for an image that another export has: before it is made, so that the other one does not find it.
pub(super) fn refuse_meeting(one: &Wanted, all: &[Wanted]) -> anyhow::Result<()> {
    match all.iter().find(|other| meets(one, other)) {
        Some(other) => Err(one.refuse(anyhow!(
            "it waits for an image that the export {:?} shows, too, or would keep writes in the same file",
            other.spec.name
        ))),
        None => Ok(()),
    }
}

/// Whether one waits for an image that another export has, or that has the same name and the same folder for writes.
fn meets(one: &Wanted, other: &Wanted) -> bool {
    let (one, other) = (&one.spec, &other.spec);
    let same_diff = || other.waits && diff::path_of(one) == diff::path_of(other);
    one.waits && one.name != other.name && (one.path == other.path || same_diff())
}

/// Another export that writes to the same file.
fn other_writer<'a>(
    one: &Wanted,
    key: &ImageKey,
    found: &[(&'a Wanted, Option<ImageKey>)],
) -> Option<&'a Wanted> {
    let mut writers = found.iter().filter(|(other, of)| {
        other.is_written()
            && other.spec.name != one.spec.name
            && of.as_ref().is_some_and(|of| of.file() == key.file())
    });
    writers.next().map(|(other, _)| *other)
}
