//! Whether a layer, and every layer below it, is still what was sealed: manifests, links between them, and the cheap
//! marks of each file. Blocks; opens no image.

use std::fs::File;

use crate::durable::{Directory, Kind};
use crate::error::{Error, LayerRule, ManifestRule, PathRule};
use crate::fingerprint::measure;
use crate::layout::{LayerPath, manifest_name};
use crate::manifest::{MAX_MANIFEST_BYTES, Manifest};
use crate::plan::MAX_CHAIN_LAYERS;

/// How closely files are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Look {
    /// That it is there, with the recorded length.
    Length,
    /// Its fingerprint, too.
    Fingerprint,
}

/// A layer's manifest and where it lies.
#[derive(Clone, Debug)]
pub(crate) struct Sealed {
    pub(crate) path: LayerPath,
    pub(crate) manifest: Manifest,
}

/// The directory that `path` lies in; `None` where it, or the one above, is missing.
pub(crate) fn disk_directory(
    root: &Directory,
    path: &LayerPath,
) -> Result<Option<Directory>, Error> {
    match root.child(path.context_directory())? {
        Some(context) => context.child(path.disk_directory()),
        None => Ok(None),
    }
}

/// The manifest of the layer `file` in `directory`; `None` where there is none.
pub(crate) fn read_manifest(directory: &Directory, file: &str) -> Result<Option<Manifest>, Error> {
    let name = manifest_name(file);
    match directory.kind_of(&name)? {
        None => return Ok(None),
        Some(Kind::File) => {}
        Some(Kind::Directory | Kind::Other) => {
            return Err(Error::Path { path: directory.path().join(name), rule: PathRule::Link });
        }
    }
    let Some(bytes) = directory.read_small(&name, MAX_MANIFEST_BYTES)? else { return Ok(None) };
    Manifest::parse_beside(&bytes, &directory.path().join(name), file).map(Some)
}

/// Whether an error says that a manifest ends early, as one does that was never written to its end.
pub(crate) fn is_cut_short(error: &Error) -> bool {
    matches!(
        error,
        Error::Manifest { rule: ManifestRule::NotJson(json), .. } if json.is_eof()
    )
}

/// Compares a file with its manifest.
pub(crate) fn check_file(
    directory: &Directory,
    manifest: &Manifest,
    look: Look,
) -> Result<File, Error> {
    let path = directory.path().join(&manifest.file);
    let broken = |rule| Error::Layer { file: path.clone(), rule };
    match directory.kind_of(&manifest.file)? {
        None => return Err(broken(LayerRule::Missing)),
        Some(Kind::File) => {}
        Some(Kind::Directory | Kind::Other) => return Err(broken(LayerRule::NotAFile)),
    }
    let file = directory.open_file(&manifest.file)?.ok_or_else(|| broken(LayerRule::Missing))?;
    let found = measure(&file, &path)?.file_bytes;
    if found != manifest.file_bytes {
        return Err(broken(LayerRule::Length { recorded: manifest.file_bytes, found }));
    }
    if look == Look::Fingerprint {
        manifest.fingerprint.compare(&file, &path, found)?;
    }
    Ok(file)
}

/// Whether `child` was made on `parent`.
pub(crate) fn check_link(
    directory: &Directory,
    child: &Manifest,
    parent: &Manifest,
) -> Result<(), Error> {
    let Some(link) = &child.parent else { return Ok(()) };
    let broken = |rule| Err(Error::Layer { file: directory.path().join(&child.file), rule });
    if link.layer_uuid != parent.layer_uuid {
        return broken(LayerRule::ParentIdentity {
            parent: link.file.clone(),
            recorded: link.layer_uuid,
            found: parent.layer_uuid,
        });
    }
    let what = if parent.disk_index != child.disk_index || parent.vm_context != child.vm_context {
        "belongs to another disk"
    } else if parent.sequence >= child.sequence {
        "does not come before it"
    } else if parent.size_bytes > child.size_bytes {
        "is larger"
    } else {
        return Ok(());
    };
    broken(LayerRule::ParentMismatch { parent: link.file.clone(), what })
}

/// The layers from the full to `path`, each compared with its manifest and with the one below.
pub(crate) fn chain(root: &Directory, path: &LayerPath, look: Look) -> Result<Vec<Sealed>, Error> {
    let file = root.path().join(path);
    let Some(directory) = disk_directory(root, path)? else {
        return Err(Error::Layer { file, rule: LayerRule::Missing });
    };
    let mut layers: Vec<Sealed> = Vec::new();
    let mut next = Some(path.clone());
    while let Some(path) = next {
        let manifest = sealed_manifest(&directory, &path)?;
        if let Some(child) = layers.last() {
            check_link(&directory, &child.manifest, &manifest)?;
        }
        check_file(&directory, &manifest, look)?;
        next =
            match &manifest.parent {
                Some(link) => Some(path.sibling(&link.file).map_err(|rule| Error::Path {
                    path: directory.path().join(&link.file),
                    rule,
                })?),
                None => None,
            };
        layers.push(Sealed { path, manifest });
        // The sequence falls with every step, so that this ends in any case; a long way is refused early.
        if layers.len() > usize::try_from(MAX_CHAIN_LAYERS).unwrap_or(usize::MAX) {
            let limit = usize::try_from(MAX_CHAIN_LAYERS).unwrap_or(usize::MAX);
            return Err(Error::TooMany { path: directory.path().to_path_buf(), limit });
        }
    }
    layers.reverse();
    Ok(layers)
}

/// The manifest of a layer that must have one.
fn sealed_manifest(directory: &Directory, path: &LayerPath) -> Result<Manifest, Error> {
    let file = directory.path().join(path.file_name());
    match read_manifest(directory, path.file_name()) {
        Ok(Some(manifest)) => Ok(manifest),
        Ok(None) if directory.kind_of(path.file_name())?.is_none() => {
            Err(Error::Layer { file, rule: LayerRule::Missing })
        }
        Ok(None) => Err(Error::NotSealed { file }),
        Err(error) => Err(error),
    }
}
