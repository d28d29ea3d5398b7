//! What can be done against an error of an image, in the words of where its export is asked for. What went wrong is told
//! by the error.

use qcow2::{Error, ReferenceError, UnlockError};

/// What an export offers against `error`; `in_file` where it is asked for by a configuration file.
pub(super) fn against(error: &anyhow::Error, in_file: bool) -> Option<&'static str> {
    let spelled = |option, key| if in_file { key } else { option };
    let reason = match error.downcast_ref()? {
        Error::Locked { reason: UnlockError::NoPassphrase, .. } => {
            let option = "the export needs passphrase-file=FILE";
            return Some(spelled(option, "the export needs passphrase_file = FILE"));
        }
        Error::Locked { reason: UnlockError::TooMuchWork { .. }, .. } => {
            return Some("--unlock-seconds allows more");
        }
        Error::Reference { reason, .. } => reason,
        _ => return None,
    };
    match reason {
        ReferenceError::Outside { .. } => Some(spelled(
            "--allow-references DIR names the folder that they may lie in",
            "allow_references = DIR names the folder that they may lie in",
        )),
        ReferenceError::NotRegular => Some(spelled(
            "--allow-references any opens block devices, too, of images that you trust",
            "allow_references = any opens block devices, too, of images that you trust",
        )),
        _ => None,
    }
}
