//! What lies in a repository: every layer with its state, found by walking the three levels of the layout. Nothing is
//! changed, no link is followed, and no image is opened.

use std::collections::{BTreeSet, HashMap};

use crate::durable::Directory;
use crate::error::{Error, LayerRule};
use crate::layout::{LayerPath, MANIFEST_SUFFIX, is_context_name, is_disk_name, is_layer_name};
use crate::manifest::Manifest;
use crate::verify::{Look, check_file, check_link, read_manifest};
use crate::writing::Writing;

/// The most layers that one walk reports.
pub const MAX_LAYERS: usize = 1 << 20;

/// A layer that was found.
#[derive(Debug)]
pub struct Found {
    /// Where it lies, below the root.
    pub path: LayerPath,
    /// Whether it can be used.
    pub state: State,
    /// Whether this process is writing it now.
    pub writing: bool,
}

/// Whether a layer can be used.
#[derive(Debug)]
pub enum State {
    /// Sealed, with a file of the recorded length, on layers that are so too.
    Sealed(Box<Manifest>),
    /// Without a manifest: being written, or left behind. Nothing stands on it; it may be discarded.
    Unsealed,
    /// Sealed once, but it can no longer be used: it, or a layer below.
    Broken {
        /// The first thing that was found wrong.
        why: Error,
    },
}

/// Walks the repository.
pub(crate) fn walk(root: &Directory, writing: &Writing) -> Result<Vec<Found>, Error> {
    let mut found = Vec::new();
    for context_name in root.names()?.iter().filter(|name| is_context_name(name)) {
        let Some(context) = enter(root, context_name)? else { continue };
        for disk_name in context.names()?.iter().filter(|name| is_disk_name(name)) {
            let Some(disk) = enter(&context, disk_name)? else { continue };
            let place = |file: &str| {
                let relative = [context_name, disk_name.as_str(), file].join("/");
                LayerPath::parse(relative.as_ref())
                    .map_err(|rule| Error::Path { path: disk.path().join(file), rule })
            };
            for (file, state) in states(&disk)? {
                let path = place(&file)?;
                let writing = writing.contains(&path);
                found.push(Found { path, state, writing });
                if found.len() > MAX_LAYERS {
                    return Err(Error::TooMany {
                        path: root.path().to_path_buf(),
                        limit: MAX_LAYERS,
                    });
                }
            }
        }
    }
    Ok(found)
}

/// A directory below; what is none, or was removed meanwhile, is passed over.
fn enter(parent: &Directory, name: &str) -> Result<Option<Directory>, Error> {
    match parent.child(name) {
        Err(Error::Path { path, rule }) => {
            tracing::warn!(path = %path.display(), %rule, "passed over in the repository");
            Ok(None)
        }
        other => other,
    }
}

/// The layers of one disk directory, sorted by name.
fn states(disk: &Directory) -> Result<Vec<(String, State)>, Error> {
    let files: BTreeSet<String> = disk
        .names()?
        .into_iter()
        .filter_map(|name| {
            let layer = name.strip_suffix(MANIFEST_SUFFIX).unwrap_or(&name);
            is_layer_name(layer).then(|| layer.to_owned())
        })
        .collect();
    let mut manifests = Vec::new();
    let mut states = HashMap::new();
    for file in &files {
        match read_manifest(disk, file) {
            Ok(Some(manifest)) => manifests.push(manifest),
            Ok(None) => {
                states.insert(file.clone(), State::Unsealed);
            }
            Err(why) => {
                states.insert(file.clone(), State::Broken { why });
            }
        }
    }
    // A parent comes before its children: their states follow from its own.
    manifests.sort_by_key(|manifest| manifest.sequence);
    for manifest in manifests {
        let (file, parent) = (manifest.file.clone(), manifest.parent.clone());
        let state = match check_file(disk, &manifest, Look::Length)
            .and_then(|_| check_below(disk, &manifest, &states))
        {
            Ok(()) => State::Sealed(Box::new(manifest)),
            Err(why) => State::Broken { why },
        };
        states.insert(file.clone(), state);
        if let Some(parent) = parent {
            mark_bereft(disk, &mut states, &parent.file, &file);
        }
    }
    Ok(files.into_iter().filter_map(|file| states.remove_entry(&file)).collect())
}

/// Whether the layer below is usable and the right one.
fn check_below(
    disk: &Directory,
    manifest: &Manifest,
    states: &HashMap<String, State>,
) -> Result<(), Error> {
    let Some(link) = &manifest.parent else { return Ok(()) };
    let what = match states.get(&link.file) {
        Some(State::Sealed(parent)) => return check_link(disk, manifest, parent),
        Some(State::Unsealed) => "has no manifest",
        Some(State::Broken { .. }) => "cannot be used itself",
        None => "is missing, or does not come before it",
    };
    let rule = LayerRule::ParentMismatch { parent: link.file.clone(), what };
    Err(Error::Layer { file: disk.path().join(&manifest.file), rule })
}

/// A layer without a manifest on which a sealed one stands was sealed, too, and lost its manifest.
fn mark_bereft(disk: &Directory, states: &mut HashMap<String, State>, parent: &str, child: &str) {
    if let Some(state @ State::Unsealed) = states.get_mut(parent) {
        let why = Error::HasChild { file: disk.path().join(parent), child: child.to_owned() };
        *state = State::Broken { why };
    }
}
