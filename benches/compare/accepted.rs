//! The ratios of the last run that was accepted: committed, so that a change for the worse is seen.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// From where on a ratio is said to be another one: less differs from run to run.
const NOTICED: f64 = 0.1;

/// What our server makes of a case.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Ratios {
    /// Of the lower of wire and host file.
    pub(crate) limit: f64,
    /// Of the best qemu-nbd.
    pub(crate) qemu: f64,
    /// Of the same data in one layer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) flat: Option<f64>,
}

/// Ratios by file system and case.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct Accepted(BTreeMap<String, Ratios>);

impl Accepted {
    /// Those in a file; none where there is no file.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        match std::fs::read(path) {
            Ok(bytes) => serde_json::from_slice(&bytes).with_context(|| path.display().to_string()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(error).with_context(|| path.display().to_string()),
        }
    }

    /// Takes the ratios of a run in the place of those that were accepted; others stay.
    pub(crate) fn accept(&mut self, name: String, ratios: Ratios) {
        let round = |ratio: f64| (ratio * 100.0).round() / 100.0;
        let Ratios { limit, qemu, flat } = ratios;
        let rounded = Ratios { limit: round(limit), qemu: round(qemu), flat: flat.map(round) };
        self.0.insert(name, rounded);
    }

    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)? + "\n";
        std::fs::write(path, text).with_context(|| path.display().to_string())
    }

    /// Ratios in words, with those that were accepted.
    pub(crate) fn beside(&self, name: &str, now: &Ratios) -> String {
        let before = self.0.get(name);
        let mut text = String::new();
        let mut tell = |what: &str, now: f64, before: Option<f64>| {
            let _ = write!(text, "{}{now:.2} {what}", if text.is_empty() { "" } else { ", " });
            let Some(before) = before else { return };
            let _ = match now / before {
                change if change < 1.0 - NOTICED => write!(text, " (WORSE than {before:.2})"),
                change if change > 1.0 + NOTICED => write!(text, " (better than {before:.2})"),
                _ => write!(text, " (as accepted, {before:.2})"),
            };
        };
        tell("of the limit", now.limit, before.map(|before| before.limit));
        tell("x best qemu-nbd", now.qemu, before.map(|before| before.qemu));
        if let Some(flat) = now.flat {
            tell("of one layer", flat, before.and_then(|before| before.flat));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_for_the_worse_is_seen_and_what_is_new_is_not_judged() {
        let ratios = |limit, qemu| Ratios { limit, qemu, flat: None };
        let mut accepted = Accepted::default();
        assert_eq!(
            accepted.beside("a", &ratios(0.5, 2.0)),
            "0.50 of the limit, 2.00 x best qemu-nbd"
        );
        accepted.accept("a".into(), ratios(0.501, 2.0));
        let file = tempfile::NamedTempFile::new().unwrap();
        accepted.write(file.path()).unwrap();
        let accepted = Accepted::read(file.path()).unwrap();
        assert_eq!(
            accepted.beside("a", &ratios(0.44, 2.3)),
            "0.44 of the limit (WORSE than 0.50), 2.30 x best qemu-nbd (better than 2.00)"
        );
        assert_eq!(
            accepted.beside("a", &ratios(0.46, 1.9)),
            "0.46 of the limit (as accepted, 0.50), 1.90 x best qemu-nbd (as accepted, 2.00)"
        );
    }
}
