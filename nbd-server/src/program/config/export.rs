//! The section of an export. Whether the image is there is found out when it is opened.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use nbd_server::wire::{MAX_STRING_BYTES, transmission_flag as flag};
use nbd_server::{Admission, ClientName, Writers};
use rustix::fs::OFlags;

use super::fault::Fault;
use super::generic;
use super::ini::Section;
use super::keys::{EXPORT, Keys, Log};
use crate::program::identity;
use crate::program::options::{self, ExportSpec, Format, Writes};

/// Reads the section; `None` where it does not say what to serve.
pub(super) fn read(file: &Arc<Path>, section: &Section, log: &mut Log) -> Option<ExportSpec> {
    let mut keys = Keys::new(file, section, (EXPORT, "the section of an export"), log);
    refuse(&mut keys);
    without_effect(&mut keys);
    if keys.entry("exportname").is_none() {
        let missing = Fault::Missing { section: section.name.clone(), key: "exportname" };
        keys.log.fault(file, section.line, missing);
    }
    if section.name.len() > MAX_STRING_BYTES {
        let why = format!("the name of an export has at most {MAX_STRING_BYTES} bytes");
        keys.log.fault(file, section.line, Fault::Export(why));
    }
    let path = keys.path("exportname");
    styles(&mut keys);
    let mut spec = ExportSpec {
        name: section.name.clone(),
        path: path.clone().unwrap_or_default(),
        joins: keys.flag("multifile").unwrap_or(false),
        waits: keys.flag("waitfile").unwrap_or(false),
        raw_unless_said: true,
        read_only: keys.flag("readonly").unwrap_or(false),
        is_default: keys.flag("default").unwrap_or(false),
        description: description(&mut keys),
        references: generic::references(&mut keys),
        rotational: keys.flag("rotational").unwrap_or(false),
        durable: keys.flag("sync").unwrap_or(false),
        withheld: withheld(&mut keys),
        preferred_bytes: blocksize(&mut keys),
        before: keys.text("prerun"),
        after: keys.text("postrun"),
        ..ExportSpec::default()
    };
    if spec.read_only && spec.durable {
        keys.without_effect("sync", "the export is read-only, so that nothing is written");
    }
    image(&mut keys, &mut spec);
    tls(&mut keys, &mut spec);
    limits(&mut keys, &mut spec);
    writes(&mut keys, &mut spec);
    spec.admission = admission(&mut keys);
    path?;
    if let Err(why) = spec.check() {
        log.fault(file, section.line, Fault::Export(format!("[{}]: {why}", section.name)));
    }
    Some(spec)
}

/// Keys that would promise what is not kept.
fn refuse(keys: &mut Keys<'_>) {
    keys.refuse(
        "treefiles",
        "disks are not kept in trees of files here; a qcow2 image grows as it is filled, too",
    );
    keys.refuse("sdp", "the protocol left the kernel");
    #[cfg(not(feature = "tls"))]
    for key in ["force_tls", "tlsonly", "client"] {
        keys.refuse(key, "this program was built without TLS");
    }
}

fn without_effect(keys: &mut Keys<'_>) {
    keys.without_effect("sparse_cow", "files of copyonwrite are sparse");
    keys.without_effect("splice", "data is not copied needlessly anyhow");
    keys.without_effect("listenaddr", "exports share the addresses of [generic]");
    keys.without_effect("port", "exports share the port of [generic]");
    let log = "no such log is written; RUST_LOG=nbd_server=debug tells of requests";
    keys.without_effect("transactionlog", log);
    keys.without_effect("datalog", log);
}

/// `virtstyle`, which matters where the path holds `%s`.
fn styles(keys: &mut Keys<'_>) {
    let style = keys.text("virtstyle");
    let templated = keys.entry("exportname").is_some_and(|entry| entry.value.contains("%s"));
    let word = style.as_deref().and_then(|style| style.split_whitespace().next());
    if let (Some(entry), Some(word)) = (keys.entry("virtstyle"), word)
        && !matches!(word, "none" | "ipliteral" | "iphash" | "cidrhash")
    {
        keys.wrong("virtstyle", entry, "it is none, ipliteral, iphash or cidrhash BITS");
    } else if templated && word != Some("none") {
        let why = "%s would be another file for each client, which is not done here: write a section with `allow` for \
                   each, or virtstyle = none where %s is meant";
        let line = keys.entry("exportname").map_or(0, |entry| entry.line);
        keys.log.fault(keys.file, line, Fault::Refused { key: "exportname", why });
    } else if word.is_some_and(|word| word != "none") {
        keys.without_effect("virtstyle", "exportname holds no %s");
    }
}

fn description(keys: &mut Keys<'_>) -> Option<String> {
    let entry = keys.entry("description")?;
    if entry.value.len() > MAX_STRING_BYTES {
        keys.wrong("description", entry, "it is too long");
    }
    Some(entry.value.clone())
}

/// Which part of which image.
fn image(keys: &mut Keys<'_>, spec: &mut ExportSpec) {
    if let Some(entry) = keys.entry("format") {
        match entry.value.trim_end().parse::<Format>() {
            Ok(format) => spec.format = Some(format),
            Err(wants) => keys.wrong("format", entry, &wants),
        }
    }
    spec.snapshot = keys.text("snapshot");
    spec.allocation_depth = keys.flag("allocation_depth").unwrap_or(false);
    for entry in keys.entries("bitmap").collect::<Vec<_>>() {
        if entry.value.is_empty() || spec.bitmaps.contains(&entry.value) {
            keys.wrong("bitmap", entry, "each names another bitmap");
        } else {
            spec.bitmaps.push(entry.value.clone());
        }
    }
    spec.passphrase_files = keys.path("passphrase_file").into_iter().collect();
    spec.offset = keys.bytes("offset").unwrap_or(0);
    spec.partition = keys.value("partition", "it is a number from 1 on");
    // As with the reference server, 0 says nothing.
    let (filesize, size) = (keys.bytes("filesize").filter(|bytes| *bytes > 0), keys.bytes("size"));
    if let (Some(0), Some(entry)) = (size, keys.entry("size")) {
        keys.wrong("size", entry, "it is a number of bytes from 1 on");
    }
    // What is there in parts is not made.
    spec.makes_bytes = filesize.filter(|_| !spec.joins);
    spec.size = filesize.or(size);
    if let (Some(_), Some(_), Some(entry)) = (filesize, size, keys.entry("size")) {
        keys.wrong("size", entry, "filesize says it already");
    }
}

/// Which clients need TLS, or a certificate.
fn tls(keys: &mut Keys<'_>, spec: &mut ExportSpec) {
    let forced = [keys.flag("force_tls"), keys.flag("tlsonly")];
    spec.tls_only = forced.contains(&Some(true));
    for entry in keys.entries("client").collect::<Vec<_>>() {
        match entry.value.trim_end().parse::<ClientName>() {
            Ok(name) => spec.clients.push(name),
            Err(_) => keys.wrong("client", entry, "it is cn:NAME or dns:NAME"),
        }
    }
}

/// How many may use it, and for how long they may be idle; who may write, and until when.
fn limits(keys: &mut Keys<'_>, spec: &mut ExportSpec) {
    spec.seals = keys.flag("seal").unwrap_or(false);
    if let Some(entry) = keys.entry("writers") {
        match options::writers(entry.value.trim_end()) {
            Ok(writers) => spec.writers = writers,
            Err(wants) => keys.wrong("writers", entry, &wants),
        }
    }
    if spec.seals && spec.writers == Writers::Any {
        keys.without_effect("writers", "with seal, one client at a time may have it");
    }
    if let Some(entry) = keys.entry("maxconnections") {
        match options::most(entry.value.trim_end()) {
            Ok(connections) => spec.max_connections = Some(connections),
            Err(wants) => keys.wrong("maxconnections", entry, &wants),
        }
    }
    if let Some(entry) = keys.entry("timeout") {
        match options::idle(entry.value.trim_end()) {
            Ok(limit) => spec.idle_timeout = Some(limit),
            Err(wants) => keys.wrong("timeout", entry, &wants),
        }
    }
}

/// Where writes go.
fn writes(keys: &mut Keys<'_>, spec: &mut ExportSpec) {
    let apart = keys.flag("copyonwrite").unwrap_or(false);
    let temporary = keys.flag("temporary").unwrap_or(false);
    let folder = keys.path("cowdir");
    if folder.is_some() && !apart && !spec.waits {
        keys.without_effect("cowdir", "neither copyonwrite nor waitfile is on");
    }
    if apart && spec.read_only {
        let line = keys.entry("copyonwrite").map_or(0, |entry| entry.line);
        let text = "copyonwrite has no effect: the export is read-only, so that nothing is written";
        keys.log.remark(keys.file, line, text);
    }
    if !apart {
        spec.diff_folder.clone_from(&folder);
    }
    spec.writes = match (apart, temporary) {
        (false, false) => Writes::Image,
        (true, false) => Writes::Apart { folder },
        (false, true) => Writes::Temporary,
        (true, true) => {
            let line = keys.entry("temporary").map_or(0, |entry| entry.line);
            let why = "a temporary disk is nothing to keep copies apart from";
            keys.log.fault(keys.file, line, Fault::Refused { key: "temporary", why });
            Writes::Image
        }
    };
    if spec.writes == Writes::Temporary {
        spec.makes_bytes = None;
        if spec.read_only {
            let line = keys.entry("temporary").map_or(0, |entry| entry.line);
            let why = "the disk is empty, and with readonly it stays so";
            keys.log.fault(keys.file, line, Fault::Refused { key: "temporary", why });
        }
    }
}

/// What clients are not told of.
fn withheld(keys: &mut Keys<'_>) -> u16 {
    let switches =
        [("flush", flag::SEND_FLUSH), ("fua", flag::SEND_FUA), ("trim", flag::SEND_TRIM)];
    let mut withheld = 0;
    for (key, bit) in switches {
        if keys.flag(key) == Some(false) {
            withheld |= bit;
        }
    }
    withheld
}

fn blocksize(keys: &mut Keys<'_>) -> Option<u32> {
    let bytes = keys.bytes("blocksize")?;
    let fits = bytes.is_power_of_two() && (512..=32 << 20).contains(&bytes);
    match u32::try_from(bytes) {
        Ok(bytes) if fits => Some(bytes),
        _ => {
            if let Some(entry) = keys.entry("blocksize") {
                keys.wrong("blocksize", entry, "it is a power of two from 512 to 32M");
            }
            None
        }
    }
}

/// Who may use it: of `authfile`, `allow` and `deny`.
fn admission(keys: &mut Keys<'_>) -> Admission {
    let mut admission = Admission::default();
    let line = keys.entry("authfile").map_or(0, |entry| entry.line);
    if let Some(path) = keys.path("authfile") {
        match read_authorized(&path) {
            Ok(text) => admission = authorized(&path, &text, keys.log),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let text = format!("there is no {}: everybody may use the export", path.display());
                keys.log.remark(keys.file, line, text);
            }
            Err(error) => {
                keys.log.fault(keys.file, line, Fault::Unreadable { path, why: error.to_string() });
            }
        }
    }
    generic::admission(keys, admission)
}

/// The longest `authfile` that is read, in bytes.
const MAX_AUTHFILE_BYTES: u64 = 1 << 20;

/// What an `authfile` holds: a file, because nothing else is sure to end.
fn read_authorized(path: &Path) -> io::Result<String> {
    let refused = |why: String| Err(io::Error::new(io::ErrorKind::InvalidData, why));
    // A FIFO would wait for somebody to write.
    let nonblock = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or(0);
    let file = File::options().read(true).custom_flags(nonblock).open(path)?;
    if !file.metadata()?.is_file() {
        return refused("it is no regular file".to_owned());
    }
    let mut text = String::new();
    file.take(MAX_AUTHFILE_BYTES + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_AUTHFILE_BYTES {
        return refused(format!("it is longer than {MAX_AUTHFILE_BYTES} bytes"));
    }
    Ok(text)
}

/// The clients of an `authfile`: the first word of each line, up to a `#`.
fn authorized(path: &Path, text: &str, log: &mut Log) -> Admission {
    let file: Arc<Path> = path.into();
    let mut admission = Admission::nobody();
    for (number, line) in (1..).zip(text.lines()) {
        let content = line.split('#').next().unwrap_or_default();
        let Some(word) = content.split_whitespace().next() else { continue };
        match identity::client(word) {
            Ok(rule) => admission = admission.allow([rule]),
            Err(why) => log.fault(&file, number, Fault::Export(why)),
        }
    }
    admission
}
