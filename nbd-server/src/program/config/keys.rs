//! The keys that configuration files may hold, with a sentence on each for the manual, and taking their values out of a
//! section. What follows from the values is decided in `read`.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use super::fault::{Fault, Finding, Place, Remark};
use super::ini::{Entry, Section};
use crate::program::spelling;

/// A key as the manual tells of it.
pub(crate) struct Key {
    pub(crate) name: &'static str,
    pub(crate) value: &'static str,
    pub(crate) text: &'static str,
}

const fn key(name: &'static str, value: &'static str, text: &'static str) -> Key {
    Key { name, value, text }
}

/// The keys of `[generic]`.
pub(crate) const GENERIC: &[Key] = &[
    key(
        "listen",
        "ADDRESS",
        "Where to listen, as --listen. Repeatable. With it alone, listenaddr, port and unixsock have no defaults",
    ),
    key(
        "listenaddr",
        "ADDRESS,...",
        "The addresses to listen on; a name is all that it has [default: ::, 0.0.0.0]",
    ),
    key(
        "port",
        "PORT",
        "The port of listenaddr, a number or a name of /etc/services [default: 10809]",
    ),
    key("unixsock", "PATH", "A Unix socket to listen on, and then on no address"),
    key("duallisten", "true|false", "Listen on unixsock and on addresses"),
    key("unixsock_mode", "OCTAL", "The mode of Unix sockets"),
    key("unixsock_owner", "USER[:GROUP]", "The owner of Unix sockets"),
    key("user", "USER", "Run as this user once the sockets are open, and before any image is"),
    key("group", "GROUP", "Run as this group"),
    key(
        "includedir",
        "DIR",
        "Also read the files *.conf in DIR, in the order of their names. They hold exports only",
    ),
    key("allowlist", "true|false", "Let clients list the exports [default: false]"),
    key(
        "allow",
        "CLIENT,...",
        "Who may connect: ADDRESS[/BITS], unix, uid:USER, cid:NUMBER. Everybody else may not",
    ),
    key("deny", "CLIENT,...", "Who may not connect, whatever allow says"),
    key("allow_references", "DIR|any", "Where backing files may lie, as --allow-references"),
    key("max_connections", "N", "Connections at once, as --max-connections"),
    key(
        "maxconnections",
        "N",
        "Connections at once to each export that does not say so itself; 0 for any number, which is the default",
    ),
    key(
        "max_connections_per_client",
        "N",
        "Connections at once of each client, as --max-connections-per-client; 0 for any number",
    ),
    key(
        "handshake_timeout",
        "SECONDS",
        "How long a client may take to choose an export, as --handshake-timeout",
    ),
    key(
        "timeout",
        "SECONDS",
        "How long a client may ask for nothing, as --idle-timeout; 0 for ever, which is the default",
    ),
    key(
        "payload_timeout",
        "SECONDS",
        "How long the data of a write may make no progress, as --payload-timeout",
    ),
    key(
        "peer_timeout",
        "SECONDS",
        "How long a client over TCP may acknowledge nothing, as --peer-timeout",
    ),
    key("max_options", "N", "Options that a client may send, as --max-options"),
    key("max_option_bytes", "BYTES", "The data of one option, as --max-option-bytes"),
    key("max_in_flight", "N", "Requests of a connection without an answer, as --max-in-flight"),
    key("max_in_flight_bytes", "BYTES", "What these read and write, as --max-in-flight-bytes"),
    key("metrics", "[HOST:]PORT", "Where to tell counters over HTTP, as --metrics"),
    key("memory_limit", "BYTES", "Memory for what is in flight, as --memory-limit"),
    key(
        "shutdown_timeout",
        "SECONDS",
        "How long clients may take to end after SIGTERM, as --shutdown-timeout",
    ),
    key(
        "max_threads",
        "N",
        "How many threads serve connections, at most 1024 [default: one for each processor]",
    ),
    key(
        "removal",
        "drain|cut",
        "What becomes of connections to an export that a reload removes: they go on, or are closed [default: drain]",
    ),
    key(
        "keyfile",
        "FILE",
        "The key of the server's certificate, as PEM. With it, clients may use TLS",
    ),
    key(
        "certfile",
        "FILE",
        "The server's certificate, followed by those between it and the authority's [default: keyfile]",
    ),
    key(
        "cacertfile",
        "FILE",
        "The authorities that issue clients' certificates. With it, clients with TLS need a valid one",
    ),
    key("force_tls", "true|false", "Answer nothing without TLS, as --tls require"),
    key(
        "tlsprio",
        "TEXT",
        "A priority string of GnuTLS. It can choose versions (-VERS-ALL:+VERS-TLS1.3) and the server's order of ciphers \
         (%SERVER_PRECEDENCE), and leave out what is never used here; any other word is refused",
    ),
    key("oldstyle", "true|false", "true is refused: nobody speaks the old handshake any more"),
    key(
        "splice",
        "true|false",
        "No effect: data is not copied through user memory needlessly anyhow",
    ),
];

/// The keys of exports.
pub(crate) const EXPORT: &[Key] = &[
    key(
        "exportname",
        "PATH",
        "The image or block device. A relative path begins at the folder of the configuration file",
    ),
    key(
        "format",
        "raw|qcow2",
        "Its format [default: raw, refused where the file begins as a qcow2 image does]",
    ),
    key("description", "TEXT", "A text for people who list exports"),
    key("default", "true|false", "Also serve it to clients that name no export"),
    key("readonly", "true|false", "Refuse every change"),
    key(
        "filesize",
        "BYTES",
        "Serve that much of the image. A raw image that does not exist is made, unless multifile or waitfile is on",
    ),
    key("size", "BYTES", "The same as filesize, but makes nothing"),
    key("offset", "BYTES", "Serve what lies behind this part of the image"),
    key(
        "partition",
        "N",
        "Serve this partition of an MBR or a GPT, counted from 1, logical ones from 5",
    ),
    key("snapshot", "NAME", "Serve this internal snapshot of a qcow2 image, read-only"),
    key(
        "bitmap",
        "NAME",
        "Offer this bitmap of a qcow2 image as qemu:dirty-bitmap:NAME. Repeatable",
    ),
    key(
        "allocation_depth",
        "true|false",
        "Offer which layer of the chain holds each part of the disk as qemu:allocation-depth",
    ),
    key(
        "passphrase_file",
        "FILE",
        "What opens an encrypted qcow2 image and those below it, without its last newline",
    ),
    key("allow_references", "DIR|any", "Where backing files of this image may lie"),
    key("allow", "CLIENT,...", "Who may use it, of those who may connect"),
    key("deny", "CLIENT,...", "Who may not use it"),
    key(
        "authfile",
        "FILE",
        "A regular file with a client or network on each line: who may use it. Where there is no such file, everybody",
    ),
    key(
        "blocksize",
        "BYTES",
        "The size of requests that clients are told to prefer: a power of two from 512 to 32 MiB",
    ),
    key("flush", "true|false", "false: clients are not told that they can flush [default: true]"),
    key(
        "fua",
        "true|false",
        "false: clients are not told of writes that are durable at once [default: true]",
    ),
    key("trim", "true|false", "false: clients are not told that they can discard [default: true]"),
    key("rotational", "true|false", "Tell clients to sort their requests"),
    key("sync", "true|false", "Make every write durable before it is answered"),
    key(
        "copyonwrite",
        "true|false",
        "Keep what a client writes in a file of its connection, gone when it leaves",
    ),
    key(
        "cowdir",
        "DIR",
        "Where copyonwrite and waitfile keep what is written [default: beside the image]",
    ),
    key(
        "temporary",
        "true|false",
        "Serve each client an empty disk of filesize bytes, gone when it leaves, in the folder of exportname",
    ),
    key(
        "prerun",
        "COMMAND",
        "Run by the shell when a client chooses the export, %s being the path; where it fails, the client is turned \
         away. Who hangs up meanwhile keeps the place until it has ended. Where the server ends before, it is killed with all \
         that it has started",
    ),
    key(
        "postrun",
        "COMMAND",
        "Run by the shell when the client has left; it may go on behind the end of the server",
    ),
    key(
        "virtstyle",
        "STYLE",
        "none: %s in exportname means itself. Other styles are refused where exportname holds %s",
    ),
    key(
        "multifile",
        "true|false",
        "Serve raw files as one disk: exportname with .0 behind it, .1 and so on, up to the first that is missing. They may \
         have any length, and filesize makes none of them. Files that are added later are served once the export was \
         removed, and added again",
    ),
    key("treefiles", "true|false", "true is refused: a qcow2 image grows as it is filled, too"),
    key(
        "waitfile",
        "true|false",
        "Take writes before the image is there, or whole, and keep them in NAME.waiting beside it, or in cowdir, until \
         SIGUSR1 merges them into it: a disk is moved while it is written. Until then reads of what was not written fail, \
         and so do writes of parts of its blocks of 4096 bytes. Needs filesize, which the image then has, a raw one. What \
         was flushed stays over a crash, and a server that starts again goes on waiting",
    ),
    key("sparse_cow", "true|false", "No effect: files of copyonwrite are sparse"),
    key("sdp", "true|false", "true is refused: the protocol left the kernel"),
    key("splice", "true|false", "No effect, as in [generic]"),
    key("listenaddr", "ADDRESS", "No effect: exports share the addresses of [generic]"),
    key("port", "PORT", "No effect, as listenaddr"),
    key("transactionlog", "FILE", "No effect: requests are told by RUST_LOG=nbd_server=debug"),
    key("datalog", "true|false", "No effect, as transactionlog"),
    key(
        "writers",
        "any|client|connection",
        "Who may have it at once, where it can be written: everybody, the connections of one client, or one connection; \
         others are refused with that reason. Of two exports that write to the same, the narrower counts [default: any]",
    ),
    key(
        "seal",
        "true|false",
        "Once its client has disconnected, and lost no connection, close the image and serve it read-only until all exports \
         of it are removed. One client at a time may have it, then",
    ),
    key(
        "maxconnections",
        "N",
        "Connections at once to this export; 0 for any number [default: as in [generic]]",
    ),
    key(
        "timeout",
        "SECONDS",
        "How long a client may ask for nothing before its connection is closed; 0 for ever [default: as in [generic]]",
    ),
    key(
        "force_tls",
        "true|false",
        "Keep the export from clients without TLS, who do not hear of it",
    ),
    key("tlsonly", "true|false", "The same as force_tls"),
    key(
        "client",
        "cn:NAME|dns:NAME",
        "Keep the export to clients whose certificate has this common or DNS name. Repeatable; needs cacertfile",
    ),
];

/// What reading collects beside the values.
#[derive(Debug, Default)]
pub(super) struct Log {
    pub(super) faults: Vec<Finding>,
    pub(super) remarks: Vec<Remark>,
}

impl Log {
    pub(super) fn fault(&mut self, file: &Arc<Path>, line: usize, what: Fault) {
        self.faults.push(Finding { place: Place { file: Arc::clone(file), line }, what });
    }

    pub(super) fn remark(&mut self, file: &Arc<Path>, line: usize, text: impl Into<String>) {
        let place = Place { file: Arc::clone(file), line };
        self.remarks.push(Remark { place, text: text.into(), unfinished: false });
    }
}

/// A section whose values are being taken.
pub(super) struct Keys<'a> {
    pub(super) file: &'a Arc<Path>,
    pub(super) section: &'a Section,
    pub(super) log: &'a mut Log,
    known: &'static [Key],
}

impl<'a> Keys<'a> {
    /// Refuses what is not `known` in such sections, and single keys that stand twice.
    pub(super) fn new(
        file: &'a Arc<Path>,
        section: &'a Section,
        (known, scope): (&'static [Key], &'static str),
        log: &'a mut Log,
    ) -> Self {
        for (index, entry) in section.entries.iter().enumerate() {
            let before = section.entries.iter().take(index).find(|other| other.key == entry.key);
            if !known.iter().any(|key| key.name == entry.key) {
                let (key, advice) = (entry.key.clone(), advice(&entry.key, known));
                log.fault(file, entry.line, Fault::Unknown { key, scope, advice });
            } else if let Some(first) = before
                && !matches!(entry.key.as_str(), "bitmap" | "client" | "listen" | "allow" | "deny")
            {
                let (key, first) = (entry.key.clone(), first.line);
                log.fault(file, entry.line, Fault::KeyTwice { key, first });
            }
        }
        Self { file, section, log, known }
    }

    /// Every value of a key, in their order.
    pub(super) fn entries(
        &mut self,
        name: &'static str,
    ) -> impl Iterator<Item = &'a Entry> + use<'a> {
        debug_assert!(self.known.iter().any(|key| key.name == name), "{name}");
        self.section.entries.iter().filter(move |entry| entry.key == name)
    }

    /// The one value of a key.
    pub(super) fn entry(&mut self, name: &'static str) -> Option<&'a Entry> {
        self.entries(name).next()
    }

    /// A text, which may not be empty.
    pub(super) fn text(&mut self, name: &'static str) -> Option<String> {
        let entry = self.entry(name)?;
        if entry.value.ends_with(|c: char| c.is_ascii_whitespace()) {
            let text = format!("the white space behind the value of {name} belongs to it");
            self.log.remark(self.file, entry.line, text);
        }
        if entry.value.is_empty() {
            self.wrong(name, entry, "it needs a value");
            return None;
        }
        Some(entry.value.clone())
    }

    /// A path; a relative one begins at the folder of the file.
    pub(super) fn path(&mut self, name: &'static str) -> Option<PathBuf> {
        let text = self.text(name)?;
        Some(self.file.parent().unwrap_or(Path::new("")).join(text))
    }

    /// `true` or `false`, also as the numbers that the reference takes.
    pub(super) fn flag(&mut self, name: &'static str) -> Option<bool> {
        let entry = self.entry(name)?;
        match entry.value.trim_end() {
            "true" | "1" => Some(true),
            "false" | "0" => Some(false),
            _ => {
                self.wrong(name, entry, "it is either true (1) or false (0)");
                None
            }
        }
    }

    /// Something that a text can be read as.
    pub(super) fn value<T: FromStr>(&mut self, name: &'static str, wants: &str) -> Option<T> {
        let entry = self.entry(name)?;
        let value = entry.value.trim_end().parse().ok();
        if value.is_none() {
            self.wrong(name, entry, wants);
        }
        value
    }

    /// A number of bytes, also with a unit.
    pub(super) fn bytes(&mut self, name: &'static str) -> Option<u64> {
        let entry = self.entry(name)?;
        match crate::program::options::bytes(entry.value.trim_end()) {
            Ok(bytes) => Some(bytes),
            Err(wants) => {
                self.wrong(name, entry, &wants);
                None
            }
        }
    }

    /// Says that a value will not do.
    pub(super) fn wrong(&mut self, key: &'static str, entry: &Entry, wants: &str) {
        let (value, wants) = (entry.value.clone(), wants.to_owned());
        self.log.fault(self.file, entry.line, Fault::Value { key, value, wants });
    }

    /// Refuses a key where it is there, or a switch where it is on.
    pub(super) fn refuse(&mut self, name: &'static str, why: &'static str) {
        let Some(entry) = self.entry(name) else { return };
        if entry.value.trim_end() != "false" {
            self.log.fault(self.file, entry.line, Fault::Refused { key: name, why });
        }
    }

    /// Says of a key that nothing follows from it.
    pub(super) fn without_effect(&mut self, name: &'static str, why: &str) {
        if let Some(entry) = self.entry(name) {
            self.log.remark(self.file, entry.line, format!("{name} has no effect: {why}"));
        }
    }
}

/// What options are called whose keys have other names, and these.
const KEYS_OF_OPTIONS: [(&str, &str); 6] = [
    ("idle_timeout", "timeout"),
    ("max_connections_per_export", "maxconnections"),
    ("unix_mode", "unixsock_mode"),
    ("unix_owner", "unixsock_owner"),
    ("tls_certificates", "certfile"),
    ("tls", "force_tls"),
];

/// What to do about a key that is not among the `known` ones.
fn advice(name: &str, known: &'static [Key]) -> String {
    let has = |keys: &'static [Key], name: &str| keys.iter().any(|key| key.name == name);
    let underscored = name.replace('-', "_");
    let synonym = KEYS_OF_OPTIONS.iter().find(|(option, _)| *option == underscored);
    if let Some((_, key)) = synonym.filter(|(_, key)| has(known, key)) {
        return format!("; its name is {key}");
    }
    if has(GENERIC, name) {
        return "; it belongs to [generic]".to_owned();
    }
    if has(EXPORT, name) {
        return "; it belongs to the sections of exports".to_owned();
    }
    let near = spelling::nearest(name, known.iter().map(|key| key.name));
    near.map(|near| format!("; is {near} meant?")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_keys_come_with_what_to_do() {
        for (name, known, expected) in [
            ("readonyl", EXPORT, "; is readonly meant?"),
            ("passphrase-file", EXPORT, "; is passphrase_file meant?"),
            ("idle_timeout", GENERIC, "; its name is timeout"),
            ("idle-timeout", EXPORT, "; its name is timeout"),
            ("max-connections-per-export", GENERIC, "; its name is maxconnections"),
            ("sync", GENERIC, "; it belongs to the sections of exports"),
            ("handshake_timeout", EXPORT, "; it belongs to [generic]"),
            ("colour", EXPORT, ""),
        ] {
            assert_eq!(advice(name, known), expected, "{name}");
        }
        for (_, key) in KEYS_OF_OPTIONS {
            assert!(GENERIC.iter().any(|known| known.name == key), "{key}");
        }
    }

    #[test]
    fn every_key_is_told_once() {
        for keys in [GENERIC, EXPORT] {
            let mut names: Vec<_> = keys.iter().map(|key| key.name).collect();
            names.sort_unstable();
            let all = names.len();
            names.dedup();
            assert_eq!(names.len(), all);
        }
    }
}
