//! The command line: its options and the small languages of `--listen` and `--export`. Nothing is opened here.

use std::fmt;
#[cfg(feature = "metrics")]
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Parser, ValueEnum};
use clap_complete::Shell;
use nbd_server::{Admission, ClientName, ClientNameError, ClientRule, Writers};

use super::{identity, spelling};

/// Serves disk images and block devices over NBD, each under a name.
#[derive(Debug, Parser)]
#[command(name = "nbd-server", version)]
pub(crate) struct Options {
    /// Where to listen: unix:PATH, HOST:PORT or vsock:CID:PORT (port 0 takes a free one, CID `any` all). A name
    /// is all addresses that it has. Repeatable.
    /// Sockets that systemd hands over are listened on, too
    #[arg(long, value_name = "unix:PATH|HOST:PORT|vsock:CID:PORT")]
    pub(crate) listen: Vec<Listen>,

    /// What to serve:
    /// NAME=PATH[,format=qcow2|raw][,read-only][,snapshot=NAME][,bitmap=NAME]...[,allocation-depth][,passphrase-file=FILE]...[,multifile][,offset=BYTES][,size=BYTES][,partition=N][,max-connections=N][,idle-timeout=SECONDS][,writers=any|client|connection][,seal][,tls-only][,client=cn:NAME|dns:NAME]...[,description=TEXT].
    /// Repeatable; the first is also what clients get that name none. A qcow2 image is recognised, raw must be said. A
    /// snapshot is served read-only. A bitmap is offered as the metadata context qemu:dirty-bitmap:NAME, the
    /// layer of the chain that holds each part of the disk as qemu:allocation-depth. The passphrase of an
    /// encrypted image, and of those below it, is what the file holds without its last newline.
    /// With multifile, raw images PATH.0, PATH.1 and so on are one disk.
    /// One client at a time may have it with writers=client; with seal, the image is closed and read-only once that client
    /// has disconnected. With tls-only, clients need TLS; where clients are named, a certificate with such a common or DNS name. A comma is
    /// written twice, and so is an = in NAME
    #[arg(long = "export", value_name = "NAME=PATH[,...]")]
    pub(crate) exports: Vec<ExportSpec>,

    /// A configuration file in the format of the reference nbd-server, see CONFIGURATION FILES. SIGHUP reads it again.
    /// --listen replaces the addresses that it names
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,

    /// Tell by file and line all that would keep the configuration from being served, as the user who would serve it, and
    /// end. Nothing is changed, and neither ports nor images that other programs have count
    #[arg(long, requires = "config")]
    pub(crate) check_config: bool,

    /// Where backing files may lie: below DIR, or anywhere [default: below the directory of the image]
    #[arg(long, value_name = "DIR|any")]
    pub(crate) allow_references: Option<AllowReferences>,

    /// How long a processor may work to try a passphrase on one key slot of an encrypted image, also 0.5 [default: 15]
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub(crate) unlock_seconds: Option<Duration>,

    /// Who may connect: ADDRESS[/BITS], unix, uid:USER or cid:NUMBER. Repeatable; then nobody else may
    #[arg(long, value_name = "CLIENT", value_parser = identity::client)]
    pub(crate) allow: Vec<ClientRule>,

    /// Who may not connect, whatever --allow says. Repeatable
    #[arg(long, value_name = "CLIENT", value_parser = identity::client)]
    pub(crate) deny: Vec<ClientRule>,

    /// Where to tell counters over HTTP, for Prometheus: [HOST:]PORT, the host being 127.0.0.1. GET /metrics answers
    /// everybody who can connect
    #[cfg(feature = "metrics")]
    #[arg(long, value_name = "[HOST:]PORT", value_parser = metrics)]
    pub(crate) metrics: Option<SocketAddr>,

    /// How the log is written to standard error: lines for people, or a JSON object each. What is listened on is told on
    /// standard output, alike with both
    #[arg(long, value_enum, value_name = "text|json", default_value = "text")]
    #[arg(hide_possible_values = true)]
    pub(crate) log_format: LogFormat,

    /// Limits.
    #[command(flatten)]
    pub(crate) limits: super::limits::LimitOptions,

    /// TLS.
    #[cfg(feature = "tls")]
    #[command(flatten)]
    pub(crate) tls: super::tls::TlsOptions,

    /// The mode of Unix sockets [default: what the umask leaves]
    #[arg(long, value_name = "OCTAL", value_parser = mode)]
    pub(crate) unix_mode: Option<u32>,

    /// The owner of Unix sockets
    #[arg(long, value_name = "USER[:GROUP]")]
    pub(crate) unix_owner: Option<Owner>,

    /// End when the last client that used an export has left
    #[arg(long, conflicts_with = "persistent")]
    pub(crate) once: bool,

    /// Stay when the last client has left, which is the default
    #[arg(long)]
    pub(crate) persistent: bool,

    /// Print the manual as a page for man(1), and end
    #[arg(long, exclusive = true)]
    pub(crate) man: bool,

    /// Print a completion script for a shell, and end
    #[arg(long, value_name = "SHELL", exclusive = true)]
    pub(crate) completions: Option<Shell>,
}

impl Options {
    /// The options of this process; ends it where they are wrong, or where help was asked for.
    pub(crate) fn of_process() -> Self {
        let options = Self::try_parse().map_err(explained);
        let checked = options.and_then(|options| {
            options.check(identity::has_sockets())?;
            Ok(options)
        });
        checked.unwrap_or_else(|error| error.exit())
    }

    /// Whether there is something to serve, and somewhere to serve it; `handed_over` are sockets from systemd.
    fn check(&self, handed_over: bool) -> Result<(), clap::Error> {
        let missing = |text: &str| {
            <Self as clap::CommandFactory>::command()
                .error(ErrorKind::MissingRequiredArgument, text)
        };
        if self.man || self.completions.is_some() || self.config.is_some() {
            return Ok(());
        }
        if self.exports.is_empty() {
            return Err(missing("nothing to serve: say --export or --config"));
        }
        if self.listen.is_empty() && !handed_over {
            return Err(missing("nowhere to listen: say --listen or --config"));
        }
        Ok(())
    }
}

/// An error of the command line; where an option is one of exports, with how it is said.
fn explained(error: clap::Error) -> clap::Error {
    let Some(ContextValue::String(option)) = error.get(ContextKind::InvalidArg) else {
        return error;
    };
    let name = option.trim_start_matches('-').replace('_', "-");
    let field = FIELDS.iter().find(|field| field.name == name);
    match field.filter(|_| error.kind() == ErrorKind::UnknownArgument) {
        Some(field) => {
            let text =
                format!("{option} is said of an export: --export NAME=PATH,{}", field.spelled());
            <Options as clap::CommandFactory>::command().error(ErrorKind::UnknownArgument, text)
        }
        None => error,
    }
}

/// How the log looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    Text,
    Json,
}

/// An address for counters; without a host, of this machine alone.
#[cfg(feature = "metrics")]
pub(crate) fn metrics(text: &str) -> Result<SocketAddr, String> {
    let local = |port: u16| SocketAddr::from(([127, 0, 0, 1], port));
    let address = text.parse().or_else(|_| text.parse().map(local));
    address.map_err(|_| "it is a port, or ADDRESS:PORT".to_owned())
}

/// A number of bytes, with a unit of 1024 where one is said.
pub(crate) fn bytes(text: &str) -> Result<u64, String> {
    let wants = || "it is a number of bytes, or of K, M, G or T".to_owned();
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text.get(digits.len()..) {
        Some("") => 0,
        Some("k" | "K") => 10,
        Some("m" | "M") => 20,
        Some("g" | "G") => 30,
        Some("t" | "T") => 40,
        _ => return Err(wants()),
    };
    let number: u64 = digits.parse().map_err(|_| wants())?;
    number.checked_mul(1 << shift).filter(|bytes| i64::try_from(*bytes).is_ok()).ok_or_else(wants)
}

/// A time in seconds, whole or not.
pub(crate) fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    seconds.ok_or_else(|| "it is a number of seconds, like 20 or 0.5".to_owned())
}

/// A number of connections, 0 for any.
pub(crate) fn most(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Ok(usize::MAX),
        Ok(number) => Ok(number),
        Err(_) => Err("it is a number, 0 for no limit".to_owned()),
    }
}

/// Who may have an export at once.
pub(crate) fn writers(text: &str) -> Result<Writers, String> {
    match text {
        "any" => Ok(Writers::Any),
        "client" => Ok(Writers::OneClient),
        "connection" => Ok(Writers::OneConnection),
        _ => Err("it is any, client or connection".to_owned()),
    }
}

/// How long a client may be idle, 0 for ever.
pub(crate) fn idle(text: &str) -> Result<Duration, String> {
    match text.parse::<u32>() {
        Ok(0) => Ok(Duration::MAX),
        Ok(number) => Ok(Duration::from_secs(number.into())),
        Err(_) => Err("it is a whole number of seconds without a unit, 0 for no limit".to_owned()),
    }
}

/// The mode of a socket.
pub(crate) fn mode(text: &str) -> Result<u32, String> {
    let wants = || "it is an octal number up to 777".to_owned();
    u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o777).ok_or_else(wants)
}

/// Who owns a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Owner {
    pub(crate) uid: Option<u32>,
    pub(crate) gid: Option<u32>,
}

impl FromStr for Owner {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (user, group) = text.split_once(':').unwrap_or((text, ""));
        let known = |name: &str, found: Option<u32>, what| match found {
            _ if name.is_empty() => Ok(None),
            Some(id) => Ok(Some(id)),
            None => Err(format!("there is no {what} {name:?}")),
        };
        let owner = Self {
            uid: known(user, identity::user(user).map(|user| user.uid), "user")?,
            gid: known(group, identity::group(group), "group")?,
        };
        if owner.uid.or(owner.gid).is_none() {
            return Err("it names nobody".to_owned());
        }
        Ok(owner)
    }
}

/// An address to listen on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Listen {
    Unix(PathBuf),
    Tcp {
        host: String,
        port: u16,
        /// Whether a machine that has no such address goes on without.
        optional: bool,
        /// Whether an IPv6 address leaves IPv4 alone.
        only_v6: bool,
    },
    Vsock {
        /// `None` for all.
        cid: Option<u32>,
        /// 0 for a free one.
        port: u32,
    },
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
        if let Some(address) = text.strip_prefix("vsock:") {
            let (cid, port) = address.split_once(':').ok_or("vsock: needs CID:PORT")?;
            let number = |text: &str| text.parse().map_err(|_| format!("{text:?} is no number"));
            let cid = if cid == "any" { None } else { Some(number(cid)?) };
            return Ok(Self::Vsock { cid, port: number(port)? });
        }
        let (host, port) = text.rsplit_once(':').ok_or_else(|| no_address(text))?;
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
        Ok(Self::Tcp { host: host.to_owned(), port, optional: false, only_v6: false })
    }
}

/// What is missing of an address without a colon.
fn no_address(text: &str) -> String {
    if text.parse::<u16>().is_ok() {
        format!("a port needs a host: 127.0.0.1:{text} for this machine, 0.0.0.0:{text} for all")
    } else if text.contains('/') {
        format!("neither HOST:PORT nor vsock:CID:PORT; a socket file is unix:{text}")
    } else {
        "neither unix:PATH, HOST:PORT nor vsock:CID:PORT".to_owned()
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp { host, port, .. } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port, .. } => write!(f, "{host}:{port}"),
            Self::Vsock { cid: Some(cid), port } => write!(f, "vsock:{cid}:{port}"),
            Self::Vsock { cid: None, port } => write!(f, "vsock:any:{port}"),
        }
    }
}

/// An image format that was named.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Format {
    Raw,
    Qcow2,
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "raw" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            other => Err(format!(
                "format {other:?} is neither qcow2 nor raw; others are converted first"
            )),
        }
    }
}

/// Where what clients write goes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Writes {
    /// Into the image.
    #[default]
    Image,
    /// Into a file of the connection, beside the image or in this folder.
    Apart { folder: Option<PathBuf> },
    /// The same, over an empty disk.
    Temporary,
}

/// What `--export` takes beside name and path.
struct Field {
    name: &'static str,
    /// What stands behind the `=`, if there is one.
    value: Option<&'static str>,
}

const fn field(name: &'static str, value: &'static str) -> Field {
    Field { name, value: Some(value) }
}

const fn switch(name: &'static str) -> Field {
    Field { name, value: None }
}

const FIELDS: [Field; 17] = [
    field("format", "qcow2|raw"),
    switch("read-only"),
    field("snapshot", "NAME"),
    field("bitmap", "NAME"),
    switch("allocation-depth"),
    field("passphrase-file", "FILE"),
    switch("multifile"),
    field("offset", "BYTES"),
    field("size", "BYTES"),
    field("partition", "N"),
    field("max-connections", "N"),
    field("idle-timeout", "SECONDS"),
    field("writers", "any|client|connection"),
    switch("seal"),
    switch("tls-only"),
    field("client", "cn:NAME|dns:NAME"),
    field("description", "TEXT"),
];

impl Field {
    fn spelled(&self) -> String {
        match self.value {
            Some(value) => format!("{}={value}", self.name),
            None => self.name.to_owned(),
        }
    }
}

/// Why something that `--export` does not take is not taken.
fn not_a_field(text: &str) -> String {
    let name = text.split('=').next().unwrap_or_default();
    let near = spelling::nearest(name, FIELDS.iter().map(|field| field.name));
    let advice = match FIELDS.iter().find(|field| Some(field.name) == near) {
        Some(field) if field.name == name => format!("; it is {}", field.spelled()),
        Some(field) => format!("; is {} meant?", field.spelled()),
        None if text.is_empty() => "; a comma in a path or text is written twice".to_owned(),
        None => String::new(),
    };
    format!("{text:?} is not known for an export{advice}")
}

/// One export: which image, what of it, for whom.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ExportSpec {
    pub(crate) name: String,
    pub(crate) path: PathBuf,
    /// Whether the path is that of several files without their numbers, of which one comes behind the other.
    pub(crate) joins: bool,
    /// Whether it takes writes before its image is there.
    pub(crate) waits: bool,
    /// The folder that keeps them; `None` for that of the image.
    pub(crate) diff_folder: Option<PathBuf>,
    pub(crate) format: Option<Format>,
    /// Whether an image whose format is not said is a raw one; otherwise it has to be a qcow2 image.
    pub(crate) raw_unless_said: bool,
    pub(crate) read_only: bool,
    /// The internal snapshot to serve, by id or name.
    pub(crate) snapshot: Option<String>,
    /// The bitmaps to offer.
    pub(crate) bitmaps: Vec<String>,
    /// The files with passphrases: an encrypted layer takes the one that fits.
    pub(crate) passphrase_files: Vec<PathBuf>,
    /// Whether to tell which layer holds what.
    pub(crate) allocation_depth: bool,
    pub(crate) description: Option<String>,
    /// Whether clients without TLS are kept out.
    pub(crate) tls_only: bool,
    /// Who may have it at once, where it is written.
    pub(crate) writers: Writers,
    /// Whether it is read-only once its writer is done.
    pub(crate) seals: bool,
    /// How many connections it may have; `usize::MAX` for any number.
    pub(crate) max_connections: Option<usize>,
    /// How long a connection may be idle; [`Duration::MAX`] for ever.
    pub(crate) idle_timeout: Option<Duration>,
    /// The names in certificates of clients that may have it; where there is none, everybody.
    pub(crate) clients: Vec<ClientName>,
    pub(crate) is_default: bool,
    /// Where what is served begins, in bytes.
    pub(crate) offset: u64,
    /// How much is served, in bytes.
    pub(crate) size: Option<u64>,
    /// The length, in bytes, of a raw image that is to be made where there is none.
    pub(crate) makes_bytes: Option<u64>,
    pub(crate) partition: Option<u32>,
    pub(crate) references: Option<AllowReferences>,
    pub(crate) admission: Admission,
    pub(crate) rotational: bool,
    pub(crate) durable: bool,
    /// Transmission flags.
    pub(crate) withheld: u16,
    pub(crate) preferred_bytes: Option<u32>,
    pub(crate) writes: Writes,
    /// Commands for the shell, around each connection.
    pub(crate) before: Option<String>,
    pub(crate) after: Option<String>,
}

impl FromStr for ExportSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut fields = split(text).into_iter();
        let first = fields.next().unwrap_or_default();
        let (name, path) = named(&first).ok_or("not NAME=PATH")?;
        if path.is_empty() {
            return Err("the path is empty".to_owned());
        }
        let mut spec = Self { name, path: path.into(), ..Self::default() };
        for field in fields {
            spec.take(&field)?;
        }
        spec.check()?;
        Ok(spec)
    }
}

impl ExportSpec {
    fn take(&mut self, field: &str) -> Result<(), String> {
        let with = |why: String| format!("{field}: {why}");
        match field.split_once('=') {
            Some(("format", format)) => self.format = Some(format.parse()?),
            Some(("snapshot" | "bitmap" | "passphrase-file", "")) => {
                return Err(format!("{field:?} names nothing"));
            }
            Some(("snapshot", name)) => self.snapshot = Some(name.to_owned()),
            Some(("bitmap", name)) if self.bitmaps.iter().any(|known| known == name) => {
                return Err(format!("bitmap {name:?} is named twice"));
            }
            Some(("bitmap", name)) => self.bitmaps.push(name.to_owned()),
            Some(("passphrase-file", file)) => self.passphrase_files.push(file.into()),
            Some(("description", text)) => self.description = Some(text.to_owned()),
            Some(("offset", text)) => self.offset = bytes(text).map_err(with)?,
            Some(("size", text)) => {
                let none = || with("it is a number of bytes from 1 on".to_owned());
                let size = bytes(text).map_err(with)?;
                self.size = Some(Some(size).filter(|size| *size > 0).ok_or_else(none)?);
            }
            Some(("partition", text)) => {
                let number = text.parse().map_err(|_| with("it is a number from 1 on".to_owned()));
                self.partition = Some(number?);
            }
            Some(("max-connections", text)) => {
                self.max_connections = Some(most(text).map_err(with)?)
            }
            Some(("idle-timeout", text)) => self.idle_timeout = Some(idle(text).map_err(with)?),
            Some(("writers", text)) => self.writers = writers(text).map_err(with)?,
            Some(("client", name)) => {
                let name = name.parse().map_err(|error: ClientNameError| error.to_string());
                self.clients.push(name?);
            }
            None if field == "read-only" => self.read_only = true,
            None if field == "seal" => self.seals = true,
            None if field == "tls-only" => self.tls_only = true,
            None if field == "multifile" => (self.joins, self.raw_unless_said) = (true, true),
            None if field == "allocation-depth" => self.allocation_depth = true,
            _ => return Err(not_a_field(field)),
        }
        Ok(())
    }

    /// Whether it takes no writes at all: a snapshot stays what it is.
    pub(crate) fn is_read_only(&self) -> bool {
        self.read_only || (self.snapshot.is_some() && self.writes == Writes::Image)
    }

    /// Whether the image is raw, by what is said.
    pub(crate) fn is_raw(&self) -> bool {
        self.format == Some(Format::Raw) || (self.raw_unless_said && self.format.is_none())
    }

    /// What only a qcow2 image has.
    fn check_format(&self) -> Result<(), String> {
        let what = if self.snapshot.is_some() {
            "has no snapshots"
        } else if !self.bitmaps.is_empty() {
            "has no bitmaps"
        } else if self.allocation_depth {
            "has no layers"
        } else if !self.passphrase_files.is_empty() {
            "takes no passphrase"
        } else {
            return Ok(());
        };
        match (self.is_raw(), self.format) {
            (false, _) => Ok(()),
            (true, Some(_)) => {
                Err(format!("a raw image {what}: leave out either that or format=raw"))
            }
            (true, None) => Err(format!(
                "a raw image {what}, and without format it is taken for one; say format = qcow2"
            )),
        }
    }

    /// What goes with an image that is waited for.
    fn check_waits(&self) -> Result<(), String> {
        if !self.waits {
            return Ok(());
        }
        let wrong = if self.writes == Writes::Temporary {
            "a temporary disk has no image to wait for"
        } else if self.writes != Writes::Image {
            "with waitfile, writes are kept until the image is there and then are in it, and so cannot be the client's own \
             (copyonwrite)"
        } else if self.joins {
            "one image is waited for, and not several that multifile joins"
        } else if self.makes_bytes.is_none() {
            "waitfile needs filesize: the size of the disk is told to clients before the image is there"
        } else if self.read_only {
            "waitfile keeps writes, and with readonly there are none"
        } else if self.seals {
            "an image that is waited for is not sealed: seal it under an export of its own once it is there"
        } else if !self.is_raw() || self.check_format().is_err() {
            "an image that is waited for is a raw one"
        } else if self.offset != 0 || self.partition.is_some() {
            "an image that is waited for is served as a whole, neither from an offset on nor by its partitions"
        } else {
            return Ok(());
        };
        Err(wrong.to_owned())
    }

    /// What goes with files that are joined.
    fn check_files(&self) -> Result<(), String> {
        let of_qcow2 = self.snapshot.is_some()
            || !self.bitmaps.is_empty()
            || self.allocation_depth
            || !self.passphrase_files.is_empty();
        let wrong = if self.joins && (of_qcow2 || !self.is_raw()) {
            "multifile joins raw images alone; convert a qcow2 image to one file"
        } else if self.joins && self.seals {
            "one image is sealed, and not several that multifile joins"
        } else if self.joins && self.writes == Writes::Temporary {
            "a temporary disk is empty: there are no files to join"
        } else {
            return Ok(());
        };
        Err(wrong.to_owned())
    }

    /// What goes together.
    pub(crate) fn check(&self) -> Result<(), String> {
        self.check_waits()?;
        self.check_files()?;
        self.check_format()?;
        let told = !self.bitmaps.is_empty() || self.allocation_depth;
        let is_part = self.offset != 0 || self.size.is_some() || self.partition.is_some();
        let wrong = if self.snapshot.is_some() && !self.bitmaps.is_empty() {
            "bitmaps tell of the present disk, not of a snapshot"
        } else if told && (is_part || self.writes != Writes::Image) {
            "bitmaps and layers tell of the whole image as it is written"
        } else if self.seals && (self.read_only || self.snapshot.is_some()) {
            "what is read-only has no writer whose end could seal it"
        } else if self.writers != Writers::Any && self.snapshot.is_some() && self.is_read_only() {
            "what is read-only has no writers"
        } else if self.seals && (told || self.writes != Writes::Image) {
            "what is sealed is the image alone: neither bitmaps and layers, nor copies of clients"
        } else if self.partition == Some(0) {
            "partitions are counted from 1 on"
        } else if self.partition.is_some() && (self.offset != 0 || self.size.is_some()) {
            "a partition has its place and size"
        } else if self.makes_bytes.is_some() && self.format == Some(Format::Qcow2) {
            "filesize makes raw images; size says how much of another one is served"
        } else if self.writes == Writes::Temporary
            && (self.size.is_none() || self.offset != 0 || self.read_only || !self.is_raw())
        {
            "a temporary disk is a raw one with filesize alone"
        } else {
            return Ok(());
        };
        Err(wrong.to_owned())
    }
}

/// Splits at the first `=`; two of them are one of the name.
fn named(text: &str) -> Option<(String, &str)> {
    let mut name = String::new();
    let mut rest = text;
    loop {
        let (part, behind) = rest.split_once('=')?;
        name.push_str(part);
        match behind.strip_prefix('=') {
            Some(behind) => {
                name.push('=');
                rest = behind;
            }
            None => return Some((name, behind)),
        }
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
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
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
    fn raw_images_are_joined() {
        let spec: ExportSpec = "a=b,multifile".parse().unwrap();
        assert!(spec.joins && spec.raw_unless_said);
        for wrong in
            ["format=qcow2", "snapshot=s", "bitmap=b", "allocation-depth", "passphrase-file=p"]
        {
            let error = format!("a=b,multifile,{wrong}").parse::<ExportSpec>().unwrap_err();
            assert!(error.contains("multifile joins raw images alone"), "{wrong}: {error}");
        }
    }

    #[test]
    fn listen_addresses_are_read_and_written() {
        for text in [
            "unix:/run/x:y",
            "localhost:10809",
            "127.0.0.1:0",
            "[::1]:10809",
            "vsock:2:10809",
            "vsock:any:0",
        ] {
            assert_eq!(text.parse::<Listen>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "unix:",
            "vsock:",
            "vsock:1",
            "vsock:x:1",
            "vsock:1:-1",
            "10809",
            ":10809",
            "::1:10809",
            "host:port",
            "host:70000",
        ] {
            assert!(text.parse::<Listen>().is_err(), "{text}");
        }
    }

    #[test]
    fn an_equals_sign_of_a_name_is_written_twice() {
        for (text, name, path) in [
            ("a=b", "a", "b"),
            ("a==b=c", "a=b", "c"),
            ("a==,,b====c=d=e==", "a=,b==c", "d=e=="),
            ("===x", "=", "x"),
            ("=x", "", "x"),
        ] {
            let spec: ExportSpec = text.parse().unwrap();
            assert_eq!((&*spec.name, spec.path.to_str().unwrap()), (name, path), "{text}");
        }
        for text in ["a", "a==b", "==", "a="] {
            assert!(text.parse::<ExportSpec>().is_err(), "{text}");
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
            description: Some("one, two=2".into()),
            ..ExportSpec::default()
        };
        assert_eq!(spec, expected);
        assert_eq!("=x".parse::<ExportSpec>().unwrap().name, "");
        let spec: ExportSpec = "a=b,bitmap=x,bitmap=y=z".parse().unwrap();
        assert_eq!(spec.bitmaps, ["x", "y=z"]);
        let spec: ExportSpec = "a=b,snapshot=one,format=qcow2".parse().unwrap();
        assert_eq!(spec.snapshot.as_deref(), Some("one"));
        let spec: ExportSpec = "a=b,offset=1M,size=512,format=raw".parse().unwrap();
        assert_eq!((spec.offset, spec.size), (1 << 20, Some(512)));
        assert!("a=b,allocation-depth".parse::<ExportSpec>().unwrap().allocation_depth);
        let spec: ExportSpec = "a=b,passphrase-file=x,passphrase-file=y,,z".parse().unwrap();
        assert_eq!(spec.passphrase_files, [PathBuf::from("x"), "y,z".into()]);
        let spec: ExportSpec = "a=b,max-connections=3,idle-timeout=60".parse().unwrap();
        let limits = (spec.max_connections, spec.idle_timeout);
        assert_eq!(limits, (Some(3), Some(Duration::from_secs(60))));
        let spec: ExportSpec = "a=b,writers=connection,seal".parse().unwrap();
        assert_eq!((spec.writers, spec.seals), (Writers::OneConnection, true));
        let spec: ExportSpec = "a=b,max-connections=0,idle-timeout=0".parse().unwrap();
        let limits = (spec.max_connections, spec.idle_timeout);
        assert_eq!(limits, (Some(usize::MAX), Some(Duration::MAX)));
        for text in [
            "",
            "a",
            "a=",
            "a=b,allocation-depth,format=raw",
            "a=b,allocation-depth=1",
            "a=b,format=vmdk",
            "a=b,",
            "a=b,read-only=1",
            "a=b,bitmap=",
            "a=b,bitmap",
            "a=b,bitmap=x,bitmap=x",
            "a=b,bitmap=x,snapshot=y",
            "a=b,bitmap=x,format=raw",
            "a=b,snapshot=x,format=raw",
            "a=b,passphrase-file=",
            "a=b,passphrase-file=x,format=raw",
            "a=b,partition=0",
            "a=b,partition=1,offset=512",
            "a=b,bitmap=x,size=1",
            "a=b,size=16E",
            "a=b,size=8388608T",
            "a=b,offset=-1",
            "a=b,max-connections=x",
            "a=b,writers=two",
            "a=b,seal,read-only",
            "a=b,seal,snapshot=x",
            "a=b,writers=client,snapshot=x",
            "a=b,seal,bitmap=x",
            "a=b,seal=1",
            "a=b,idle-timeout=-1",
        ] {
            assert!(text.parse::<ExportSpec>().is_err(), "{text}");
        }
    }

    #[test]
    fn what_exports_do_not_take_comes_with_what_is_meant() {
        for (text, expected) in [
            ("a=b,passphrase_file=x", "; is passphrase-file=FILE meant?"),
            ("a=b,readonly", "; is read-only meant?"),
            ("a=b,read-only=1", "; it is read-only"),
            ("a=b,bitmap", "; it is bitmap=NAME"),
            ("a=b,,c,", "a comma in a path or text is written twice"),
            ("a=b,colour=x", "\"colour=x\" is not known for an export"),
            ("a=b,idle-timeout=1m", "a whole number of seconds without a unit, 0 for no limit"),
            (
                "a=b,format=raw,bitmap=x",
                "a raw image has no bitmaps: leave out either that or format=raw",
            ),
            ("a=b,format=raw,passphrase-file=x", "a raw image takes no passphrase: leave out"),
            ("a=b,format=vmdk", "neither qcow2 nor raw; others are converted first"),
        ] {
            let told = text.parse::<ExportSpec>().unwrap_err();
            assert!(told.ends_with(expected) || told.contains(expected), "{text}: {told}");
        }
    }

    #[test]
    fn fields_of_exports_are_those_that_the_help_tells_of() {
        let help = Options::command().render_long_help().to_string();
        let start = help.find("NAME=PATH[,format").unwrap();
        let told: String = help[start..].split_whitespace().next().unwrap().chars().collect();
        let told = told.replace("...", "");
        let spelled: String =
            FIELDS.iter().map(|field| format!("[,{}]", field.spelled())).collect();
        assert_eq!(told, format!("NAME=PATH{spelled}."));
    }

    #[test]
    fn options_that_belong_to_exports_are_told_as_that() {
        let told = |arguments: &[&str]| {
            let base = ["nbd-server", "--listen=unix:/x", "--export=a=b"];
            let parsed = Options::try_parse_from(base.iter().chain(arguments));
            explained(parsed.unwrap_err()).to_string()
        };
        for (option, expected) in [
            ("--read-only", "--read-only is said of an export: --export NAME=PATH,read-only"),
            ("--format=raw", "--export NAME=PATH,format=qcow2|raw"),
            ("--passphrase_file=x", "--export NAME=PATH,passphrase-file=FILE"),
            ("--colour", "unexpected argument '--colour'"),
            ("--max-connections=0", "it is a number from 1 on"),
            ("--idle-timeout=1m", "it is a whole number of seconds from 1 on, without a unit"),
            ("--listen=10809", "a port needs a host: 127.0.0.1:10809 for this machine"),
            ("--listen=/run/x", "a socket file is unix:/run/x"),
        ] {
            assert!(told(&[option]).contains(expected), "{option}: {}", told(&[option]));
        }
    }

    #[test]
    fn there_is_something_to_serve_and_somewhere_to_serve_it() {
        let parse = |arguments: &[&str]| {
            Options::try_parse_from(["nbd-server"].iter().chain(arguments)).unwrap()
        };
        let listen = "--listen=unix:/x";
        for fine in [&[listen, "--export=a=b"][..], &["--config=x"], &["--man"]] {
            assert!(parse(fine).check(false).is_ok(), "{fine:?}");
        }
        for missing in [&[listen][..], &["--export=a=b"], &[]] {
            assert!(parse(missing).check(false).is_err(), "{missing:?}");
        }
        assert!(parse(&["--export=a=b"]).check(true).is_ok());
        for wrong in [&["--once", "--persistent"][..], &["--check-config"], &["--unix-mode=9"]] {
            let base = ["nbd-server", listen, "--export=a=b"];
            let arguments = base.iter().chain(wrong);
            assert!(Options::try_parse_from(arguments).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn exports_may_need_tls_or_name_their_clients() {
        let spec: ExportSpec = "a=b,tls-only,client=cn:x,,y,client=dns:z".parse().unwrap();
        assert!(spec.tls_only);
        assert_eq!(spec.clients, ["cn:x,y".parse().unwrap(), "dns:z".parse().unwrap()]);
        for text in ["a=b,client=x", "a=b,client=", "a=b,client", "a=b,tls-only=1"] {
            assert!(text.parse::<ExportSpec>().is_err(), "{text}");
        }
    }

    #[cfg(feature = "metrics")]
    #[test]
    fn counters_are_told_to_this_machine_unless_it_is_said_otherwise() {
        for (text, address) in [
            ("9110", "127.0.0.1:9110"),
            ("0", "127.0.0.1:0"),
            ("0.0.0.0:1", "0.0.0.0:1"),
            ("[::1]:5", "[::1]:5"),
        ] {
            assert_eq!(metrics(text).unwrap(), address.parse().unwrap());
        }
        for text in ["", "x", "70000", "127.0.0.1", "unix:x"] {
            assert!(metrics(text).is_err(), "{text}");
        }
    }

    #[cfg(feature = "tls")]
    #[test]
    fn tls_needs_certificates_and_verifying_needs_tls() {
        let base = ["nbd-server", "--listen", "unix:/x", "--export", "a=b"];
        let parses = |more: &[&str]| Options::try_parse_from(base.iter().chain(more)).is_ok();
        assert!(parses(&[]));
        assert!(parses(&["--tls=off"]));
        for mode in ["--tls=on", "--tls=require"] {
            assert!(!parses(&[mode]));
            assert!(parses(&[mode, "--tls-certificates=x"]));
            assert!(parses(&[mode, "--tls-certificates=x", "--tls-verify-peer"]));
        }
        assert!(!parses(&["--tls-certificates=x"]), "which would serve without TLS");
        assert!(!parses(&["--tls-verify-peer"]));
        assert!(!parses(&["--tls=yes", "--tls-certificates=x"]));
    }
}
