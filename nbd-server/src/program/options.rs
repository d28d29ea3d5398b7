//! The command line: its options and the small languages of `--listen` and `--export`. Nothing is opened here.

use std::fmt;
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::PathBuf;
use std::str::FromStr;

use clap::Parser;

/// Serves disk images over NBD, each under a name.
#[derive(Debug, Parser)]
#[command(name = "nbd-server", version)]
pub(crate) struct Options {
    /// Where to listen: unix:PATH or HOST:PORT (port 0 takes a free one). Repeatable
    #[arg(long, value_name = "unix:PATH|HOST:PORT", required = true)]
    pub(crate) listen: Vec<Listen>,

    /// What to serve: NAME=PATH[,format=qcow2|raw][,read-only][,snapshot=NAME][,bitmap=NAME]...[,allocation-depth][,description=TEXT].
    /// Repeatable; the first is also what clients get that name none. A qcow2 image is recognised, raw must be said. A
    /// snapshot is served read-only. A bitmap is offered as the metadata context qemu:dirty-bitmap:NAME, the
    /// layer of the chain that holds each part of the disk as qemu:allocation-depth. A comma is written twice
    #[arg(long = "export", value_name = "NAME=PATH[,...]", required = true)]
    pub(crate) exports: Vec<ExportSpec>,

    /// Where backing files may lie: below DIR, or anywhere [default: below the directory of the image]
    #[arg(long, value_name = "DIR|any")]
    pub(crate) allow_references: Option<AllowReferences>,

    /// Connections at once over all listeners [default: 1024]
    #[arg(long, value_name = "N")]
    pub(crate) max_connections: Option<NonZeroUsize>,

    /// How long a client may take to choose an export [default: 30]
    #[arg(long, value_name = "SECONDS")]
    pub(crate) handshake_timeout: Option<NonZeroU32>,
}

/// An address to listen on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Listen {
    Unix(PathBuf),
    Tcp { host: String, port: u16 },
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            return if path.is_empty() {
                Err("unix: needs a path".to_owned())
            } else {
                Ok(Self::Unix(path.into()))
            };
        }
        let (host, port) = text.rsplit_once(':').ok_or("neither unix:PATH nor HOST:PORT")?;
        let port = port.parse().map_err(|_| format!("{port:?} is no port"))?;
        // An IPv6 address stands in brackets, so that its last colon can be found.
        let host = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
            Some(inner) => inner,
            None if host.contains(':') => {
                return Err("an IPv6 address is written in brackets".to_owned());
            }
            None => host,
        };
        if host.is_empty() {
            return Err("the host is empty; all interfaces are 0.0.0.0 or [::]".to_owned());
        }
        Ok(Self::Tcp { host: host.to_owned(), port })
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

/// An image format that was named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    Raw,
    Qcow2,
}

/// One image to serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ExportSpec {
    pub(crate) name: String,
    pub(crate) path: PathBuf,
    pub(crate) format: Option<Format>,
    pub(crate) read_only: bool,
    /// The internal snapshot to serve, by id or name.
    pub(crate) snapshot: Option<String>,
    /// The bitmaps to offer.
    pub(crate) bitmaps: Vec<String>,
    /// Whether to tell which layer holds what.
    pub(crate) allocation_depth: bool,
    pub(crate) description: Option<String>,
}

impl FromStr for ExportSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut fields = split(text).into_iter();
        let first = fields.next().unwrap_or_default();
        let (name, path) = first.split_once('=').ok_or("not NAME=PATH")?;
        if path.is_empty() {
            return Err("the path is empty".to_owned());
        }
        let mut spec = Self {
            name: name.to_owned(),
            path: path.into(),
            format: None,
            read_only: false,
            snapshot: None,
            bitmaps: Vec::new(),
            allocation_depth: false,
            description: None,
        };
        for field in fields {
            match field.split_once('=') {
                Some(("format", "raw")) => spec.format = Some(Format::Raw),
                Some(("format", "qcow2")) => spec.format = Some(Format::Qcow2),
                Some(("format", other)) => {
                    return Err(format!("format {other:?} is neither qcow2 nor raw"));
                }
                Some(("snapshot" | "bitmap", "")) => {
                    return Err(format!("{field:?} names nothing"));
                }
                Some(("snapshot", name)) => spec.snapshot = Some(name.to_owned()),
                Some(("bitmap", name)) if spec.bitmaps.iter().any(|known| known == name) => {
                    return Err(format!("bitmap {name:?} is named twice"));
                }
                Some(("bitmap", name)) => spec.bitmaps.push(name.to_owned()),
                Some(("description", text)) => spec.description = Some(text.to_owned()),
                None if field == "read-only" => spec.read_only = true,
                None if field == "allocation-depth" => spec.allocation_depth = true,
                _ => return Err(format!("{field:?} is not known for an export")),
            }
        }
        spec.check()?;
        Ok(spec)
    }
}

impl ExportSpec {
    /// What goes together.
    fn check(&self) -> Result<(), String> {
        let of_qcow2 = self.snapshot.is_some() || !self.bitmaps.is_empty() || self.allocation_depth;
        if of_qcow2 && self.format == Some(Format::Raw) {
            return Err("a raw image has neither snapshots nor bitmaps nor layers".to_owned());
        }
        if self.snapshot.is_some() && !self.bitmaps.is_empty() {
            return Err("bitmaps tell of the present disk, not of a snapshot".to_owned());
        }
        Ok(())
    }
}

/// Splits at commas; two of them are one that does not split.
fn split(text: &str) -> Vec<String> {
    let mut fields = vec![String::new()];
    let mut rest = text.chars().peekable();
    while let Some(next) = rest.next() {
        if next == ',' && rest.next_if_eq(&',').is_none() {
            fields.push(String::new());
        } else if let Some(last) = fields.last_mut() {
            last.push(next);
        }
    }
    fields
}

/// Where references of an image may lead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum AllowReferences {
    Any,
    Below(PathBuf),
}

impl FromStr for AllowReferences {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "" => Err("neither a directory nor `any`".to_owned()),
            "any" => Ok(Self::Any),
            directory => Ok(Self::Below(directory.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Options::command().debug_assert();
    }

    #[test]
    fn listen_addresses_are_read_and_written() {
        for text in ["unix:/run/x:y", "localhost:10809", "127.0.0.1:0", "[::1]:10809"] {
            assert_eq!(text.parse::<Listen>().unwrap().to_string(), text);
        }
        for text in ["", "unix:", "10809", ":10809", "::1:10809", "host:port", "host:70000"] {
            assert!(text.parse::<Listen>().is_err(), "{text}");
        }
    }

    #[test]
    fn exports_are_read_with_their_options() {
        let spec: ExportSpec =
            "a=/x/b=c,,d.img,format=raw,read-only,description=one,, two=2".parse().unwrap();
        let expected = ExportSpec {
            name: "a".into(),
            path: "/x/b=c,d.img".into(),
            format: Some(Format::Raw),
            read_only: true,
            snapshot: None,
            bitmaps: Vec::new(),
            allocation_depth: false,
            description: Some("one, two=2".into()),
        };
        assert_eq!(spec, expected);
        assert_eq!("=x".parse::<ExportSpec>().unwrap().name, "");
        let spec: ExportSpec = "a=b,bitmap=x,bitmap=y=z".parse().unwrap();
        assert_eq!(spec.bitmaps, ["x", "y=z"]);
        let spec: ExportSpec = "a=b,snapshot=one,format=qcow2".parse().unwrap();
        assert_eq!(spec.snapshot.as_deref(), Some("one"));
        assert!("a=b,allocation-depth".parse::<ExportSpec>().unwrap().allocation_depth);
        for text in [
            "",
            "a",
            "a=",
            "a=b,format=vmdk",
            "a=b,",
            "a=b,read-only=1",
            "a=b,bitmap=",
            "a=b,bitmap",
            "a=b,bitmap=x,bitmap=x",
            "a=b,bitmap=x,snapshot=y",
            "a=b,bitmap=x,format=raw",
            "a=b,allocation-depth,format=raw",
            "a=b,allocation-depth=1",
            "a=b,snapshot=x,format=raw",
        ] {
            assert!(text.parse::<ExportSpec>().is_err(), "{text}");
        }
    }

    #[test]
    fn options_of_later_days_are_refused() {
        let base = ["nbd-server", "--listen", "unix:/x", "--export", "a=b"];
        assert!(Options::try_parse_from(base).is_ok());
        for later in ["--tls=on", "--config=x", "--tls-certificates=x"] {
            assert!(Options::try_parse_from(base.into_iter().chain([later])).is_err());
        }
    }
}
