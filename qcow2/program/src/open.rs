//! Opening what the command line names: a place, a format, and what its references may lead to. What is done with an
//! open image is the commands' business.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow, bail, ensure};
use block::{BlockDevice, HostFile, ImageLocked, RawDevice};
use nbd_server::client::{Address, ClientOptions, NbdDevice, NbdUri};
use qcow2::{Image, References, Vmdk};

use crate::cache::Cache;
use crate::format::{self, Format, could_not_open};
use crate::options::{OptionList, switch};
use crate::output;
use crate::place::Place;
use crate::secret::Secrets;
use crate::tuning::is_tuning;

/// What all images of a command line may do.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct Access {
    #[command(flatten)]
    pub(crate) secrets: Secrets,

    /// Where backing and data files may lie: below DIR, or anywhere [default: below the directory of the image]
    #[arg(long, value_name = "DIR|any")]
    pub(crate) allow_references: Option<AllowReferences>,

    /// How long a processor may work to try a passphrase on one key slot of an encrypted image, also 0.5 [default: 15]
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub(crate) unlock_seconds: Option<Duration>,
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

/// A time in seconds, whole or not.
fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    seconds.ok_or_else(|| "not a number of seconds, like 20 or 0.5".to_owned())
}

impl Access {
    /// How long may be worked on a passphrase.
    fn unlock_time(&self) -> Duration {
        self.unlock_seconds.unwrap_or(qcow2::DEFAULT_UNLOCK_TIME)
    }

    /// What references may lead to.
    pub(crate) fn references(&self) -> References {
        match &self.allow_references {
            None => References::Confined,
            Some(AllowReferences::Any) => References::Any,
            Some(AllowReferences::Below(directory)) => References::Under(directory.clone()),
        }
    }
}

/// One image as the command line names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Named {
    pub(crate) place: Place,
    /// Recognised where it is not said.
    pub(crate) format: Option<Format>,
    /// Whether QEMU's locks are taken.
    pub(crate) locking: bool,
    /// Whether it is read although others may be changing it.
    pub(crate) shared: bool,
    /// Whether it must not be changed.
    pub(crate) read_only: bool,
    /// The external data file, where it is not to be the one that the image names.
    pub(crate) data_file: Option<PathBuf>,
    /// The ids of the secrets that open it and what lies below it; any secret may where there are none.
    pub(crate) secrets: Vec<String>,
}

impl Named {
    /// A file by its path.
    pub(crate) fn file(path: &Path, format: Option<Format>) -> Self {
        Self::of(Place::File(path.to_owned()), format)
    }

    fn of(place: Place, format: Option<Format>) -> Self {
        Self {
            place,
            format,
            locking: true,
            shared: false,
            read_only: false,
            data_file: None,
            secrets: Vec::new(),
        }
    }

    /// A plain name, or with `image_opts` a list of options.
    ///
    /// # Errors
    /// Names and options that mean nothing here.
    pub(crate) fn parse(
        name: &str,
        format: Option<Format>,
        image_opts: bool,
    ) -> anyhow::Result<Self> {
        if !image_opts {
            return Ok(Self::of(Place::parse(name)?, format));
        }
        ensure!(format.is_none(), "--image-opts and --format are mutually exclusive");
        let list = OptionList::parse_implied(name, "file")?;
        from_options(&list).with_context(|| format!("Could not open '{name}'"))
    }

    /// How it is opened where `how` is asked for.
    ///
    /// # Errors
    /// For writing, what its options allow to be read only.
    pub(crate) fn how(&self, how: &How) -> anyhow::Result<How> {
        for (is, option) in [(self.read_only, "read-only=on"), (self.shared, "force-share=on")] {
            let place = &self.place;
            ensure!(!(is && how.writing), "Could not open '{place}': {option}, and this writes");
        }
        Ok(How {
            shared: how.shared || self.shared || !self.locking,
            data_file: self.data_file.clone(),
            secrets: self.secrets.clone(),
            ..how.clone()
        })
    }
}

fn from_options(list: &OptionList) -> anyhow::Result<Named> {
    let mut format = None;
    let mut path = None;
    let mut protocol = "file";
    let mut nbd = Vec::new();
    let mut locking = true;
    let (mut shared, mut read_only, mut data_file) = (false, false, None);
    let mut secrets = Vec::new();
    for (name, value) in list.iter() {
        match name {
            "driver" if matches!(value, "file" | "host_device" | "nbd") => {
                format = Some(Format::Raw);
                protocol = value;
            }
            "driver" => format = Some(value.parse().map_err(anyhow::Error::msg)?),
            "file.driver" => protocol = value,
            "file" | "filename" | "file.filename" => path = Some(value),
            "locking" | "file.locking" if value == "auto" => {}
            "locking" | "file.locking" => locking = switch(name, value)?,
            "force-share" => shared = switch(name, value)?,
            "read-only" => read_only = switch(name, value)?,
            "data-file" | "data-file.filename" | "data-file.file.filename" => {
                match Place::parse(value)? {
                    Place::File(path) => data_file = Some(path),
                    Place::Nbd { .. } => bail!("Option '{name}': a data file is a path"),
                }
            }
            "data-file.driver" | "data-file.file.driver" => {
                let plain = matches!(value, "raw" | "file" | "host_device");
                ensure!(plain, "Option '{name}': a data file is a raw file, not '{value}'");
            }
            _ if names_a_secret(name) => secrets.push(value.to_owned()),
            _ if is_tuning(name, value)? => {}
            _ => match name.strip_prefix("file.").unwrap_or(name) {
                key @ ("host" | "port" | "path" | "export" | "uri") => nbd.push((key, value)),
                key if key.starts_with("server.") => nbd.push((key, value)),
                _ => bail!("Option '{name}' is not known here"),
            },
        }
    }
    let place = match protocol {
        "nbd" => nbd_place(&nbd)?,
        "file" | "host_device" if nbd.is_empty() => {
            Place::parse(path.context("A path is needed: file.filename=PATH")?)?
        }
        other => bail!("Unknown protocol '{other}', or options of another one"),
    };
    let encrypted = secrets.is_empty() || format != Some(Format::Raw);
    ensure!(encrypted, "Block format 'raw' does not support the option 'encrypt.key-secret'");
    Ok(Named { place, format, locking, shared, read_only, data_file, secrets })
}

/// Whether an option names the secret of an image, or of one below it.
fn names_a_secret(name: &str) -> bool {
    let below = name.strip_suffix("encrypt.key-secret");
    below.is_some_and(|below| below.replace("backing.", "").is_empty())
}

/// How `-l` names a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
enum SnapshotName {
    /// Its id, or else its name.
    Either(String),
    /// `snapshot.id=ID`
    Id(String),
    /// `snapshot.name=NAME`
    Name(String),
    /// Both: a snapshot that has this id and this name
    Both { id: String, name: String },
}

impl FromStr for SnapshotName {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if !text.starts_with("snapshot.") {
            return Ok(Self::Either(text.to_owned()));
        }
        let list = OptionList::parse(&[text.to_owned()])?;
        let named: Vec<_> = list.iter().collect();
        match named.as_slice() {
            [("snapshot.id", id)] => Ok(Self::Id((*id).to_owned())),
            [("snapshot.name", name)] => Ok(Self::Name((*name).to_owned())),
            [("snapshot.id", id), ("snapshot.name", name)]
            | [("snapshot.name", name), ("snapshot.id", id)] => {
                Ok(Self::Both { id: (*id).to_owned(), name: (*name).to_owned() })
            }
            _ => bail!(
                "Failed in parsing snapshot param '{text}': snapshot.id=ID, snapshot.name=NAME, or both"
            ),
        }
    }
}

/// What the library is told of a snapshot: where an id is meant, a name does not do, and the other way round.
async fn snapshot_id(path: &Path, text: &str) -> anyhow::Result<String> {
    let name: SnapshotName = text.parse()?;
    if let SnapshotName::Either(name) = name {
        return Ok(name);
    }
    let seen = Image::inspect(path).await.with_context(|| could_not_open(path))?;
    let found = seen.snapshots.into_iter().find(|snapshot| match &name {
        SnapshotName::Id(id) | SnapshotName::Either(id) => snapshot.id == *id,
        SnapshotName::Name(name) => snapshot.name == *name,
        SnapshotName::Both { id, name } => snapshot.id == *id && snapshot.name == *name,
    });
    let found = found.with_context(|| format!("Failed to load snapshot: there is no '{text}'"))?;
    Ok(found.id)
}

fn nbd_place(options: &[(&str, &str)]) -> anyhow::Result<Place> {
    let get = |names: &[&str]| {
        options.iter().rev().find(|(name, _)| names.contains(name)).map(|(_, value)| *value)
    };
    if let Some(uri) = get(&["uri"]) {
        return Place::parse(uri);
    }
    let export = get(&["export"]).unwrap_or_default().to_owned();
    let address = match (get(&["path", "server.path"]), get(&["host", "server.host"])) {
        (Some(path), None) => Address::Unix(path.into()),
        (None, Some(host)) => {
            let port = get(&["port", "server.port"]).map(str::parse).transpose();
            let port = port.context("The port is no number")?;
            let port = port.unwrap_or(Address::PORT);
            Address::Tcp { host: host.to_owned(), port }
        }
        _ => bail!("An NBD server needs either a path or a host"),
    };
    let name = in_uri(&export);
    let text = match &address {
        Address::Tcp { host, port } if host.contains(':') => {
            format!("nbd://[{host}]:{port}/{name}")
        }
        Address::Tcp { host, port } => format!("nbd://{host}:{port}/{name}"),
        Address::Unix(path) => {
            format!("nbd+unix:///{name}?socket={}", in_uri(&path.to_string_lossy()))
        }
    };
    Ok(Place::Nbd { uri: NbdUri::new(address, export), text })
}

/// A name as it stands in a URI.
fn in_uri(name: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/-._~".contains(&byte);
    let bytes = name.bytes().map(|byte| match plain(byte) {
        true => char::from(byte).to_string(),
        false => format!("%{byte:02X}"),
    });
    bytes.collect()
}

/// How an image is to be opened.
#[derive(Clone, Debug)]
pub(crate) struct How {
    /// To change it.
    pub(crate) writing: bool,
    /// Although others may be changing it.
    pub(crate) shared: bool,
    /// The command line has an option for that.
    pub(crate) offers_sharing: bool,
    pub(crate) cache: Cache,
    /// Show an internal snapshot, by its id or else its name.
    pub(crate) snapshot: Option<String>,
    /// The external data file, where it is not to be the one that the image names.
    pub(crate) data_file: Option<PathBuf>,
    /// The ids of the secrets that may open it; all may where there are none.
    pub(crate) secrets: Vec<String>,
}

impl How {
    /// For reading, with others kept from changing it unless `shared`.
    pub(crate) fn reading(cache: Option<Cache>, shared: bool) -> Self {
        let cache = cache.unwrap_or(Cache::PAGES);
        Self {
            writing: false,
            shared,
            offers_sharing: true,
            cache,
            snapshot: None,
            data_file: None,
            secrets: Vec::new(),
        }
    }

    /// For reading and writing, alone.
    pub(crate) fn writing(cache: Option<Cache>) -> Self {
        Self { writing: true, offers_sharing: false, ..Self::reading(cache, false) }
    }

    /// The same, showing an internal snapshot.
    pub(crate) fn snapshot(self, snapshot: Option<String>) -> Self {
        Self { snapshot, ..self }
    }
}

/// An image that is open.
pub(crate) struct Opened {
    pub(crate) place: Place,
    pub(crate) format: Format,
    device: Arc<dyn BlockDevice>,
    image: Option<Image>,
}

impl Opened {
    /// The disk.
    pub(crate) fn device(&self) -> Arc<dyn BlockDevice> {
        Arc::clone(&self.device)
    }

    /// The image, where it is a qcow2 one.
    pub(crate) fn image(&self) -> Option<&Image> {
        self.image.as_ref()
    }

    /// The size of the disk in bytes.
    pub(crate) fn size_bytes(&self) -> u64 {
        self.device.limits().size_bytes
    }

    /// Flushes and closes.
    ///
    /// # Errors
    /// What the host or the server failed at: then the last changes may be lost.
    pub(crate) async fn close(self) -> anyhow::Result<()> {
        let closed = self.device.close().await;
        closed.with_context(|| format!("Error while closing '{}'", self.place))
    }
}

/// Opens an image with everything below it.
///
/// # Errors
/// Everything that keeps it from being opened; the message names the place first.
pub(crate) async fn open(named: &Named, how: &How, access: &Access) -> anyhow::Result<Opened> {
    let place = named.place.clone();
    let no_snapshots = || match &how.snapshot {
        None => Ok(()),
        Some(name) => Err(anyhow!("Could not open '{place}': a raw disk has no snapshot '{name}'")),
    };
    let path = match &place {
        Place::Nbd { uri, .. } => {
            no_snapshots()?;
            let plain = matches!(named.format, None | Some(Format::Raw));
            ensure!(plain, "Could not open '{place}': an NBD export is a disk, and so -f raw");
            let device = connect(uri).await.with_context(|| format!("Could not open '{place}'"))?;
            return Ok(Opened { place, format: Format::Raw, device, image: None });
        }
        Place::File(path) => path,
    };
    let format = match named.format {
        Some(format) => format,
        None => format::recognise(path)?,
    };
    let how = &named.how(how)?;
    if format == Format::Vmdk && how.writing {
        bail!("Could not open '{place}': vmdk images are only read");
    }
    let (device, image): (Arc<dyn BlockDevice>, _) = match format {
        Format::Raw => {
            no_snapshots()?;
            (open_raw(path, how).await?, None)
        }
        Format::Vmdk => {
            no_snapshots()?;
            let options = qcow2_options(how, access).with_context(|| could_not_open(path))?;
            let vmdk = Vmdk::open(path, &options).await;
            (Arc::new(vmdk.map_err(|error| explained(error, path, how))?), None)
        }
        Format::Qcow2 => {
            let how = &match &how.snapshot {
                Some(name) => how.clone().snapshot(Some(snapshot_id(path, name).await?)),
                None => how.clone(),
            };
            let image = open_qcow2(path, how, access).await?;
            (Arc::new(image.clone()), Some(image))
        }
    };
    Ok(Opened { place, format, device, image })
}

/// Connects to an export.
///
/// # Errors
/// What the server refuses or the network fails at.
pub(crate) async fn connect(uri: &NbdUri) -> anyhow::Result<Arc<dyn BlockDevice>> {
    Ok(NbdDevice::open(uri, ClientOptions::default()).await?)
}

async fn open_raw(path: &Path, how: &How) -> anyhow::Result<Arc<dyn BlockDevice>> {
    Ok(RawDevice::new(open_file(path, how).await?))
}

/// Opens a file that the command line names, whatever is in it.
///
/// # Errors
/// As [`open`].
pub(crate) async fn open_file(path: &Path, how: &How) -> anyhow::Result<HostFile> {
    let facts = std::fs::metadata(path).with_context(|| could_not_open(path))?;
    ensure!(!facts.is_dir(), "{}: it is a directory", could_not_open(path));
    let options = block::OpenOptions {
        read_only: !how.writing,
        direct: how.cache.direct,
        lock: !how.shared,
        ..block::OpenOptions::default()
    };
    HostFile::open(path, options).await.map_err(|error| explained(error, path, how))
}

/// Opens a qcow2 image with everything below it.
///
/// # Errors
/// As [`open`].
pub(crate) async fn open_qcow2(path: &Path, how: &How, access: &Access) -> anyhow::Result<Image> {
    let options = qcow2_options(how, access).with_context(|| could_not_open(path))?;
    Image::open(path, options).await.map_err(|error| explained(error, path, how))
}

/// How a qcow2 image is opened.
pub(crate) fn qcow2_options(how: &How, access: &Access) -> anyhow::Result<qcow2::OpenOptions> {
    Ok(qcow2::OpenOptions {
        read_only: !how.writing,
        references: access.references(),
        lock: !how.shared,
        direct: how.cache.direct,
        passphrases: access.secrets.named(&how.secrets)?,
        snapshot: how.snapshot.clone(),
        unlock_time: access.unlock_time(),
        data_file: how.data_file.clone(),
        ..qcow2::OpenOptions::reading()
    })
}

/// An error about opening, with what the command line offers against it.
pub(crate) fn explained(error: impl Into<anyhow::Error>, path: &Path, how: &How) -> anyhow::Error {
    let error = error.into();
    let is_locked = error.chain().any(|cause| {
        let inner = cause.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        inner.is_some_and(|inner| inner.is::<ImageLocked>())
    });
    let leads_away = error.chain().any(|cause| {
        matches!(
            cause.downcast_ref(),
            Some(qcow2::Error::Reference { reason: qcow2::ReferenceError::Outside { .. }, .. })
        )
    });
    for cause in error.chain() {
        use qcow2::{Corruption, Error};
        if let Some(Error::Corrupt { file, what: Corruption::NoMagic, .. }) = cause.downcast_ref() {
            return anyhow!(
                "{}: {} is not in qcow2 format (no magic number); is it raw?",
                could_not_open(path),
                file.display()
            );
        }
    }
    let is_slow = error.chain().any(|cause| {
        use qcow2::{Error, UnlockError};
        let cause = cause.downcast_ref();
        matches!(cause, Some(Error::Locked { reason: UnlockError::TooMuchWork { .. }, .. }))
    });
    let is_special = error.chain().any(|cause| {
        use qcow2::{Error, ReferenceError};
        let cause = cause.downcast_ref();
        matches!(cause, Some(Error::Reference { reason: ReferenceError::NotRegular, .. }))
    });
    let hint = if is_slow {
        " (--unlock-seconds allows more)"
    } else if is_locked && how.offers_sharing {
        " (-U reads it all the same, and may see it half changed)"
    } else if is_special {
        " (--allow-references any opens block devices, too, for images that you trust)"
    } else if leads_away {
        " (--allow-references DIR, or any, allows it for images that you trust)"
    } else {
        ""
    };
    // As text, so that the hint stands last.
    anyhow!("{}: {}{hint}", could_not_open(path), output::text_of(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(text: &str) -> anyhow::Result<Named> {
        Named::parse(text, None, true)
    }

    #[test]
    fn image_options_name_files_and_servers() {
        let file =
            named("driver=qcow2,file.driver=file,file.filename=/x/a,,b,file.locking=off").unwrap();
        assert_eq!(file.place, Place::File("/x/a,b".into()));
        assert_eq!((file.format, file.locking), (Some(Format::Qcow2), false));
        let nbd =
            named("driver=raw,file.driver=nbd,file.host=h,file.port=7,file.export=e").unwrap();
        assert!(matches!(&nbd.place, Place::Nbd { uri, .. } if uri.export == "e"));
        assert_eq!(nbd.place.to_string(), "nbd://h:7/e");
        let odd = named("driver=nbd,server.type=unix,server.path=/s,export=a b?").unwrap().place;
        assert_eq!(odd.to_string(), "nbd+unix:///a%20b%3F?socket=/s");
        let again = Place::parse(&odd.to_string()).unwrap();
        assert!(matches!(again, Place::Nbd { uri, .. } if uri.export == "a b?"));
        let nbd = named("driver=nbd,server.type=unix,server.path=/s").unwrap();
        assert!(
            matches!(nbd.place, Place::Nbd { uri, .. } if uri.address.to_string().contains("/s"))
        );
        assert_eq!(named("/x/a,driver=raw").unwrap().place, Place::File("/x/a".into()));
        for text in [
            "driver=qcow2",
            "driver=bochs,file=x",
            "file=x,cache=none",
            "driver=nbd",
            "file=x,data-file=nbd://h/e",
            "file=x,discard=often",
        ] {
            assert!(named(text).is_err(), "{text}");
        }
        assert!(Named::parse("file=x", Some(Format::Raw), true).is_err());
    }

    #[test]
    fn image_options_say_what_is_written_and_tune_nothing() {
        let image = named(
            "driver=qcow2,file.filename=a,read-only=on,file.read-only=off,data-file.filename=b,\
             l2-cache-size=1M,cache.direct=on,overlap-check.main-header=on,file.aio=native",
        );
        let image = image.unwrap();
        assert_eq!((image.read_only, image.data_file), (true, Some("b".into())));
    }

    #[test]
    fn what_is_shared_or_read_only_is_not_opened_for_writing() {
        let (reading, writing) = (How::reading(None, false), How::writing(None));
        for option in ["read-only=on", "force-share=on"] {
            let named = named(&format!("file=x,{option}")).unwrap();
            assert!(named.how(&reading).is_ok());
            assert!(named.how(&writing).unwrap_err().to_string().contains(option));
        }
        let unlocked = named("file=x,file.locking=off").unwrap();
        assert!(unlocked.how(&writing).unwrap().shared);
        assert!(named("file=x,force-share=on").unwrap().how(&reading).unwrap().shared);
        assert!(!named("file=x").unwrap().how(&reading).unwrap().shared);
    }

    #[test]
    fn image_options_name_the_secrets_of_the_image_and_of_those_below_it() {
        let image = named(
            "driver=qcow2,file.filename=a,encrypt.format=luks,encrypt.key-secret=x,\
             backing.encrypt.key-secret=y,backing.backing.encrypt.key-secret=z",
        );
        let image = image.unwrap();
        assert_eq!(image.secrets, ["x", "y", "z"]);
        assert_eq!(image.how(&How::reading(None, false)).unwrap().secrets, ["x", "y", "z"]);
        for text in [
            "driver=raw,file.filename=a,encrypt.key-secret=x",
            "driver=qcow2,file.filename=a,file.encrypt.key-secret=x",
            "driver=qcow2,file.filename=a,encrypt.old-secret=x",
        ] {
            assert!(named(text).is_err(), "{text}");
        }
    }

    #[test]
    fn times_are_seconds_and_parts_of_them() {
        assert_eq!(seconds("20"), Ok(Duration::from_secs(20)));
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        for text in ["", "x", "-1", "inf", "NaN", "1s", "1e300"] {
            assert!(seconds(text).is_err(), "{text}");
        }
    }

    #[test]
    fn snapshots_are_named_with_and_without_saying_how() {
        let name = |text: &str| text.parse::<SnapshotName>();
        assert_eq!(name("a").unwrap(), SnapshotName::Either("a".to_owned()));
        assert_eq!(name("snapshot.id=1").unwrap(), SnapshotName::Id("1".to_owned()));
        assert_eq!(name("snapshot.name=a,,b").unwrap(), SnapshotName::Name("a,b".to_owned()));
        let both = SnapshotName::Both { id: "1".to_owned(), name: "a".to_owned() };
        for text in ["snapshot.id=1,snapshot.name=a", "snapshot.name=a,snapshot.id=1"] {
            assert_eq!(name(text).unwrap(), both);
        }
        for text in ["snapshot.x=1", "snapshot.id=1,x=2"] {
            assert!(name(text).is_err(), "{text}");
        }
    }
}
