//! How a source is spelled on a command line and in a job: `file:PATH` or an NBD URI. Opens nothing.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use nbd_server::client::{NbdUri, UriError};
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};
use serde::{Deserialize, Serialize};

use crate::Address;
use crate::tls::Tls;

/// What may not stand in the path or the query of an NBD URI as it is.
pub(crate) const RESERVED: &AsciiSet = &CONTROLS
    .add(b' ')
    .add(b'"')
    .add(b'#')
    .add(b'%')
    .add(b'&')
    .add(b'+')
    .add(b';')
    .add(b'<')
    .add(b'=')
    .add(b'>')
    .add(b'?')
    .add(b'`');

/// Where a disk is read from.
///
/// Spelled `file:PATH`, `nbd://HOST:PORT/EXPORT` or `nbd+unix:///EXPORT?socket=PATH`; the NBD forms take
/// `bitmap=NAME` in their query. With `nbds` for `nbd` they demand [`Tls`], and take its parameters, too. Names in a URI are percent-encoded, a path behind `file:` is taken as it is.
///
/// **Bitmaps are believed.** NBD tells the name of a dirty bitmap, not which one it is or since when it records. A
/// bitmap must have been recording without interruption since the backup that the next incremental builds on: one
/// that was removed and added again under its old name, or cleared at another time, hides changes, and nothing notices.
/// Give each chain of backups a bitmap of its own, and send everything once ([`crate::DiskJob::full`]) after making one anew.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum SourceSpec {
    /// A raw image in a regular file, or a block device.
    ///
    /// The bytes are always the disk itself, whatever they look like: a guest can write the header of an image
    /// format onto its own disk, and must not be able to choose by that what is read.
    File(PathBuf),
    /// An export of an NBD server.
    Nbd {
        /// Where the server listens.
        address: Address,
        /// The export's name; empty for the default export.
        export: String,
        /// TLS, where the URI demands it.
        tls: Option<Tls>,
        /// The dirty bitmap (`qemu:dirty-bitmap:NAME`) that knows what changed since the last backup, all of it: see
        /// [`SourceSpec`].
        bitmap: Option<String>,
    },
}

/// Why a text is no source.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SpecError {
    /// No known scheme in front.
    #[error(
        "'{text}' is no source: it must begin with file:, nbd:// or nbd+unix:// (nbds:// or nbds+unix:// for TLS)"
    )]
    Scheme {
        /// What was given.
        text: String,
    },
    /// `file:` without a path.
    #[error("a file source needs a path: file:PATH")]
    EmptyPath,
    /// An NBD URI that lacks or garbles something.
    #[error("'{text}': {cause}")]
    Uri {
        /// What was given.
        text: String,
        /// What is wrong with it.
        #[source]
        cause: UriError,
    },
    /// A query parameter that means nothing here.
    #[error("'{text}': there is no parameter '{key}' here")]
    Parameter {
        /// What was given.
        text: String,
        /// The parameter's name.
        key: String,
    },
    /// `bitmap=` without a name, or twice.
    #[error("'{text}': bitmap= takes one name")]
    Bitmap {
        /// What was given.
        text: String,
    },
}

impl FromStr for SourceSpec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        if let Some(path) = text.strip_prefix("file:") {
            return match path {
                "" => Err(SpecError::EmptyPath),
                path => Ok(Self::File(PathBuf::from(path))),
            };
        }
        let mut uri = parse_nbd_uri(text)?;
        let tls = Tls::of(&mut uri);
        let mut bitmap = None;
        for (key, value) in uri.query {
            match key.as_str() {
                "bitmap" if bitmap.is_none() && !value.is_empty() => bitmap = Some(value),
                "bitmap" => return Err(SpecError::Bitmap { text: text.to_owned() }),
                _ => return Err(SpecError::Parameter { text: text.to_owned(), key }),
            }
        }
        Ok(Self::Nbd { address: uri.address, export: uri.export, tls, bitmap })
    }
}

impl fmt::Display for SourceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "file:{}", path.display()),
            Self::Nbd { address, export, tls, bitmap } => {
                let separator = write_nbd_uri(f, address, export, tls.as_ref())?;
                match bitmap {
                    Some(name) => write!(f, "{separator}bitmap={}", encode(name)),
                    None => Ok(()),
                }
            }
        }
    }
}

impl TryFrom<String> for SourceSpec {
    type Error = SpecError;

    fn try_from(text: String) -> Result<Self, SpecError> {
        text.parse()
    }
}

impl From<SourceSpec> for String {
    fn from(spec: SourceSpec) -> Self {
        spec.to_string()
    }
}

/// Takes an NBD URI apart.
pub(crate) fn parse_nbd_uri(text: &str) -> Result<NbdUri, SpecError> {
    let refused = |cause| SpecError::Uri { text: text.to_owned(), cause };
    match text.parse::<NbdUri>() {
        Ok(uri) => Ok(uri),
        Err(UriError::Scheme) => Err(SpecError::Scheme { text: text.to_owned() }),
        Err(cause) => Err(refused(cause)),
    }
}

/// Writes the URI and returns the character that introduces the next query parameter.
pub(crate) fn write_nbd_uri(
    f: &mut fmt::Formatter<'_>,
    address: &Address,
    export: &str,
    tls: Option<&Tls>,
) -> Result<char, fmt::Error> {
    let export = encode(export);
    let s = if tls.is_some() { "s" } else { "" };
    let separator = match address {
        Address::Tcp { host, port } if host.contains(':') => {
            write!(f, "nbd{s}://[{host}]:{port}/{export}").map(|()| '?')
        }
        Address::Tcp { host, port } => write!(f, "nbd{s}://{host}:{port}/{export}").map(|()| '?'),
        Address::Unix(path) => {
            let path = path.to_string_lossy();
            write!(f, "nbd{s}+unix:///{export}?socket={}", encode(&path)).map(|()| '&')
        }
    }?;
    tls.map_or(Ok(separator), |tls| tls.write(f, separator))
}

fn encode(text: &str) -> String {
    utf8_percent_encode(text, RESERVED).to_string()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_documented_spelling_is_understood() {
        assert_eq!("file:/a b?c".parse(), Ok(SourceSpec::File(PathBuf::from("/a b?c"))));
        let tcp = |host: &str, port, export: &str, bitmap: Option<&str>| SourceSpec::Nbd {
            address: Address::Tcp { host: host.into(), port },
            export: export.into(),
            tls: None,
            bitmap: bitmap.map(Into::into),
        };
        assert_eq!("nbd://h:1/e?bitmap=b%200".parse(), Ok(tcp("h", 1, "e", Some("b 0"))));
        assert_eq!("nbd://h".parse(), Ok(tcp("h", Address::PORT, "", None)));
        assert_eq!("nbd://[::1]:7/x/y".parse(), Ok(tcp("::1", 7, "x/y", None)));
        assert_eq!(
            "nbd+unix:///e?socket=/run/s&bitmap=b".parse(),
            Ok(SourceSpec::Nbd {
                address: Address::Unix("/run/s".into()),
                export: "e".into(),
                tls: None,
                bitmap: Some("b".into()),
            })
        );
    }

    #[test]
    fn what_is_garbled_is_refused() {
        for text in [
            "",
            "/dev/sda",
            "file:",
            "http://h/",
            "nbd://",
            "nbd://:1/e",
            "nbd://h:x/e",
            "nbd://[::1",
            "nbd://[::1]x",
            "nbd+unix:///e",
            "nbd+unix://h/e?socket=/s",
            "nbd://h/e?socket=/s",
            "nbd://h/e?bitmap=",
            "nbd://h/e?bitmap=a&bitmap=b",
            "nbd://h/e?color=red",
            "nbd://h/%ff",
            "nbd://h/e?tls-hostname=x",
            "nbds://h/e?tls-verify-peer=perhaps",
            "nbds://h/e?tls-psk-file=/k",
            "nbds://h/e?color=red",
        ] {
            assert!(text.parse::<SourceSpec>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn a_spec_is_parsed_back_from_how_it_is_shown(
            unix in any::<bool>(), tls in proptest::option::of("/\\PC*"), name in "\\PC*", bitmap in proptest::option::of("\\PC+"), path in "/\\PC+",
            port in 1u16..,
        ) {
            let address = match unix {
                true => Address::Unix(PathBuf::from(path)),
                false => Address::Tcp { host: "host.example".into(), port },
            };
            let parameters = |directory| {
                format!("nbds://h/e?tls-certificates={}", encode(directory)).parse()
            };
            let tls = tls.as_deref().map(|directory| match parameters(directory) {
                Ok(SourceSpec::Nbd { tls: Some(tls), .. }) => tls,
                other => panic!("{other:?}"),
            });
            let spec = SourceSpec::Nbd { address, export: name, tls, bitmap };
            prop_assert_eq!(spec.to_string().parse(), Ok(spec));
        }
    }
}
