//! What `commit`, `rebase` and `merge` share: how they open and copy, and how they tell what they would do.

use std::fmt::Write;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use qcow2::{FoldError, FoldOptions, FoldPlan};

use crate::cache::Cache;
use crate::format::{self, Format, could_not_open};
use crate::making::beside;
use crate::open::{self, Access, How, Named};
use crate::output;
use crate::size::{Size, human};

/// How they copy.
///
/// # Errors
/// Passphrases that cannot be read, and secrets that the image names and nobody gave.
pub(crate) fn options(
    named: &Named,
    cache: Option<Cache>,
    access: &Access,
    rate: Option<Size>,
) -> anyhow::Result<FoldOptions> {
    let how = How { secrets: named.secrets.clone(), ..How::writing(cache) };
    let open = open::qcow2_options(&how, access);
    Ok(FoldOptions {
        open: open.with_context(|| format!("Could not open '{}'", named.place))?,
        bytes_per_sec: rate.and_then(|rate| NonZeroU64::new(rate.0)),
        ..FoldOptions::default()
    })
}

/// The path of an image that is to change: a qcow2 file, which its options do not call read-only.
///
/// # Errors
/// Everything else.
pub(crate) fn top(named: &Named) -> anyhow::Result<&Path> {
    let Some(path) = named.place.path() else {
        bail!("{}: an export has no backing file here", named.place);
    };
    named.how(&How::writing(None))?;
    match named.format.map_or_else(|| format::recognise(path), Ok)? {
        Format::Qcow2 => Ok(path),
        other => bail!("{}: images in {other} have no backing file", path.display()),
    }
}

/// A layer as people name it: seen from the image, as for qemu-img, or else from here.
pub(crate) fn layer(top: &Path, name: &str) -> PathBuf {
    let beside = beside(top, name);
    if beside.exists() { beside } else { name.into() }
}

/// An error about a chain, with what the command line offers against it.
pub(crate) fn explained(error: FoldError, path: &Path) -> anyhow::Error {
    match error {
        FoldError::NoBacking { .. } => {
            anyhow::anyhow!("{}: Image does not have a backing file", path.display())
        }
        FoldError::NotInChain { file, base } => anyhow::anyhow!(
            "Did not find '{}' in the backing chain of '{}'",
            base.display(),
            file.display()
        ),
        FoldError::NewBacking { file, source } => anyhow::anyhow!(
            "Could not open new backing file '{}': {} (a relative name is seen from the folder of the image)",
            file.display(),
            output::text_of(&source.into())
        ),
        error @ FoldError::NothingBetween { .. } => error.into(),
        FoldError::Image(error @ qcow2::Error::Path { .. }) => {
            let text = output::text_of(&error.into());
            anyhow::anyhow!(
                "{}: a backing file of its chain is not there: {text} (rebase -u records another one)",
                could_not_open(path)
            )
        }
        FoldError::Image(error) => {
            let about_opening =
                matches!(error, qcow2::Error::Reference { .. } | qcow2::Error::Host(_));
            let error = anyhow::Error::from(error);
            match about_opening {
                true => open::explained(error, path, &How::writing(None)),
                false => error,
            }
        }
        other => anyhow::Error::from(other).context(could_not_open(path).replace("open", "change")),
    }
}

/// A path as people read it: seen from here where it is below, whole otherwise.
pub(crate) fn shown(path: &Path) -> String {
    let whole = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let here = std::env::current_dir().and_then(std::fs::canonicalize).unwrap_or_default();
    whole.strip_prefix(here).unwrap_or(&whole).display().to_string()
}

/// What a plan says, for people.
pub(crate) fn describe(plan: &FoldPlan) -> String {
    let mut text = String::new();
    // Writing into a string does not fail.
    if !plan.layers.is_empty() {
        let _ = writeln!(text, "{} would be written:", shown(&plan.into));
    }
    if let Some(size) = plan.grows_to_bytes {
        let _ = writeln!(text, "  it would grow to {} ({size} bytes)", human(size));
    }
    for layer in &plan.layers {
        let _ = writeln!(
            text,
            "  {} of data ({} bytes) and {} of zeros from {}",
            human(layer.data_bytes),
            layer.data_bytes,
            human(layer.zero_bytes),
            shown(&layer.path)
        );
    }
    for path in &plan.relinked {
        let _ = writeln!(text, "{} would get another backing file", shown(path));
    }
    for path in &plan.removed {
        let _ = writeln!(text, "{} would be removed", shown(path));
    }
    if plan.snapshots > 0 {
        let _ = writeln!(
            text,
            "{} internal snapshot(s) would stay as they are: what they do not hold themselves would be read from what \
             lies below then",
            plan.snapshots
        );
    }
    text.push_str("Nothing has been changed.\n");
    text
}
