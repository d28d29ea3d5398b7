//! Where an image is: a path of this host, or an export of an NBD server. What is there, and in which format, is
//! `open`'s to find out.

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use nbd_server::client::NbdUri;

/// The folder that a file is in, from which the relative names in an image start.
pub(crate) fn folder(file: &Path) -> &Path {
    match file.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// A place that an image is read from or written to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    File(PathBuf),
    Nbd { uri: NbdUri, text: String },
}

impl Place {
    /// Reads a name as it stands on the command line.
    ///
    /// # Errors
    /// A protocol other than NBD, or a URI that has a mistake. A path with a colon before its first slash is written
    /// `./path`, as for qemu.
    pub(crate) fn parse(name: &str) -> anyhow::Result<Self> {
        if let Some(path) = name.strip_prefix("file:") {
            // As it is told again, it has to be a path for everybody.
            let is_plain = !path.split('/').next().is_some_and(|first| first.contains(':'));
            return Ok(Self::File(if is_plain { path.into() } else { Path::new(".").join(path) }));
        }
        let Some((scheme, _)) = name.split_once(':').filter(|(scheme, _)| !scheme.contains('/'))
        else {
            return Ok(Self::File(name.into()));
        };
        if name.contains("://") && scheme.starts_with("nbd") {
            let uri = name.parse().with_context(|| format!("Could not open '{name}'"))?;
            return Ok(Self::Nbd { uri, text: name.to_owned() });
        }
        bail!(
            "Could not open '{name}': Unknown protocol '{scheme}'; images are paths (./{name} if it \
             is one), nbd://HOST/EXPORT, or nbd+unix:///EXPORT?socket=PATH"
        )
    }

    /// The path, where it is one.
    pub(crate) fn path(&self) -> Option<&Path> {
        match self {
            Self::File(path) => Some(path),
            Self::Nbd { .. } => None,
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Nbd { text, .. } => f.write_str(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_paths_unless_a_protocol_stands_before_them() {
        let file = |name: &str| Place::parse(name).unwrap();
        assert_eq!(file("a.img"), Place::File("a.img".into()));
        assert_eq!(file("./a:b"), Place::File("./a:b".into()));
        assert_eq!(file("/x/nbd://y"), Place::File("/x/nbd://y".into()));
        assert_eq!(file("file:/a:b"), Place::File("/a:b".into()));
        assert_eq!(file("file:a:b"), Place::File("./a:b".into()));
        assert!(matches!(file("nbd://h/e"), Place::Nbd { .. }));
        assert!(matches!(file("nbd+unix:///?socket=/x"), Place::Nbd { .. }));
        assert!(matches!(file("nbds://h"), Place::Nbd { .. }));
        for name in ["json:{}", "http://x/y", "nbd://", "a:b"] {
            assert!(Place::parse(name).is_err(), "{name}");
        }
    }
}
