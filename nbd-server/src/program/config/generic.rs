//! The section [generic]. Exports have their own file beside this one.

use std::num::NonZeroU32;
use std::path::PathBuf;
use std::str::FromStr;

use nbd_server::{Admission, ClientRule, Removal};

use super::keys::Keys;
use crate::program::identity;
use crate::program::limits::{self, LimitOptions};
use crate::program::options::{self, AllowReferences, Listen, Owner};

/// The port that IANA gave to NBD.
const PORT: u16 = 10809;

/// The most threads that serve connections.
const MAX_THREADS: usize = 1024;

/// What holds for all exports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Generic {
    /// Each with the line that says it.
    pub(crate) listen: Vec<(usize, Listen)>,
    pub(crate) socket_mode: Option<u32>,
    pub(crate) socket_owner: Option<Owner>,
    pub(crate) user: Option<String>,
    pub(crate) group: Option<String>,
    pub(crate) include: Option<(PathBuf, usize)>,
    pub(crate) listing: bool,
    pub(crate) admission: Admission,
    pub(crate) references: Option<AllowReferences>,
    pub(crate) limits: LimitOptions,
    pub(crate) threads: Option<usize>,
    pub(crate) removal: Removal,
    #[cfg(feature = "metrics")]
    pub(crate) metrics: Option<std::net::SocketAddr>,
    #[cfg(feature = "tls")]
    pub(crate) tls: super::Tls,
}

impl Generic {
    /// Whether what takes effect only at the start is equal. The rest follows a reload.
    pub(crate) fn starts_like(&self, other: &Self) -> bool {
        let fixed = |generic: &Self| Self {
            include: None,
            // An address is the same on another line.
            listen: generic.listen.iter().map(|(_, listen)| (0, listen.clone())).collect(),
            listing: false,
            admission: Admission::default(),
            references: None,
            removal: Removal::Drain,
            // Certificates are read again, but whether there is TLS does not change.
            #[cfg(feature = "tls")]
            tls: super::Tls { mode: generic.tls.mode, ..super::Tls::default() },
            ..generic.clone()
        };
        fixed(self) == fixed(other)
    }
}

/// Reads the section.
pub(super) fn read(keys: &mut Keys<'_>) -> Generic {
    refuse(keys);
    let include_line = keys.entry("includedir").map_or(0, |entry| entry.line);
    Generic {
        listen: listen(keys),
        socket_mode: read_as(keys, "unixsock_mode", options::mode),
        socket_owner: keys
            .value("unixsock_owner", "it is USER or USER:GROUP, known on this machine"),
        user: user(keys),
        group: group(keys),
        include: keys.path("includedir").map(|path| (path, include_line)),
        listing: keys.flag("allowlist").unwrap_or(false),
        admission: admission(keys, Admission::default()),
        references: references(keys),
        limits: limits_of(keys),
        threads: threads(keys),
        removal: removal(keys),
        #[cfg(feature = "metrics")]
        metrics: read_as(keys, "metrics", options::metrics),
        #[cfg(feature = "tls")]
        tls: super::tls::read(keys),
    }
}

fn refuse(keys: &mut Keys<'_>) {
    #[cfg(not(feature = "tls"))]
    for key in ["certfile", "keyfile", "cacertfile", "force_tls", "tlsprio"] {
        keys.refuse(key, "this program was built without TLS");
    }
    #[cfg(not(feature = "metrics"))]
    keys.refuse("metrics", "this program was built without the listener for it");
    keys.refuse("oldstyle", "nobody speaks the old handshake any more");
    keys.without_effect("splice", "data is not copied needlessly anyhow");
}

/// The user to become, who has to have a group, then.
fn user(keys: &mut Keys<'_>) -> Option<String> {
    let name = keys.text("user")?;
    let has_group = keys.entry("group").is_some();
    let wants = match identity::user(&name) {
        None => "there is no such user",
        Some(user) if user.gid.is_none() && !has_group => {
            "the group of the user is not known; say group, too"
        }
        Some(_) => return Some(name),
    };
    if let Some(entry) = keys.entry("user") {
        keys.wrong("user", entry, wants);
    }
    None
}

fn group(keys: &mut Keys<'_>) -> Option<String> {
    let name = keys.text("group")?;
    if identity::group(&name).is_none()
        && let Some(entry) = keys.entry("group")
    {
        keys.wrong("group", entry, "there is no such group");
    }
    Some(name)
}

/// A time in seconds from 1 on.
fn seconds(keys: &mut Keys<'_>, name: &'static str) -> Option<NonZeroU32> {
    read_as(keys, name, limits::whole_seconds)
}

/// A number from 1 on.
fn number<T: FromStr>(keys: &mut Keys<'_>, name: &'static str) -> Option<T> {
    keys.value(name, "it is a number from 1 on")
}

fn threads(keys: &mut Keys<'_>) -> Option<usize> {
    let entry = keys.entry("max_threads")?;
    let threads = entry.value.trim_end().parse().ok();
    let threads = threads.filter(|threads| (1..=MAX_THREADS).contains(threads));
    if threads.is_none() {
        keys.wrong("max_threads", entry, &format!("it is a number from 1 to {MAX_THREADS}"));
    }
    threads
}

/// A number from 1 on, or 0 for what there is without it.
fn unless_zero<T: FromStr>(keys: &mut Keys<'_>, name: &'static str) -> Option<T> {
    if keys.entry(name).is_some_and(|entry| entry.value.trim_end() == "0") {
        return None;
    }
    let wants = if name == "timeout" {
        "it is a whole number of seconds, 0 for no limit"
    } else {
        "it is a number, 0 for no limit"
    };
    keys.value(name, wants)
}

fn limits_of(keys: &mut Keys<'_>) -> LimitOptions {
    LimitOptions {
        connections: number(keys, "max_connections"),
        connections_per_export: unless_zero(keys, "maxconnections"),
        connections_per_client: unless_zero(keys, "max_connections_per_client"),
        handshake_secs: seconds(keys, "handshake_timeout"),
        idle_secs: unless_zero(keys, "timeout"),
        payload_secs: seconds(keys, "payload_timeout"),
        peer_secs: seconds(keys, "peer_timeout"),
        options: number(keys, "max_options"),
        option_bytes: read_as(keys, "max_option_bytes", limits::option_length),
        in_flight: number(keys, "max_in_flight"),
        in_flight_bytes: read_as(keys, "max_in_flight_bytes", limits::length),
        memory_bytes: read_as(keys, "memory_limit", limits::memory),
        shutdown_secs: seconds(keys, "shutdown_timeout"),
    }
}

/// A value as the command line reads it.
fn read_as<T>(
    keys: &mut Keys<'_>,
    name: &'static str,
    read: impl FnOnce(&str) -> Result<T, String>,
) -> Option<T> {
    let entry = keys.entry(name)?;
    match read(entry.value.trim_end()) {
        Ok(value) => Some(value),
        Err(wants) => {
            keys.wrong(name, entry, &wants);
            None
        }
    }
}

fn removal(keys: &mut Keys<'_>) -> Removal {
    let Some(entry) = keys.entry("removal") else { return Removal::Drain };
    match entry.value.trim_end() {
        "drain" => Removal::Drain,
        "cut" => Removal::Cut,
        _ => {
            keys.wrong("removal", entry, "it is either drain or cut");
            Removal::Drain
        }
    }
}

pub(super) fn references(keys: &mut Keys<'_>) -> Option<AllowReferences> {
    let path = keys.path("allow_references")?;
    let anywhere = keys.entry("allow_references").is_some_and(|entry| entry.value == "any");
    Some(if anywhere { AllowReferences::Any } else { AllowReferences::Below(path) })
}

/// Adds what `allow` and `deny` say.
pub(super) fn admission(keys: &mut Keys<'_>, mut admission: Admission) -> Admission {
    if keys.entry("allow").is_some() {
        admission = admission.allow(clients(keys, "allow"));
    }
    let denied = clients(keys, "deny");
    admission.deny(denied)
}

fn clients(keys: &mut Keys<'_>, name: &'static str) -> Vec<ClientRule> {
    let mut rules = Vec::new();
    let entries: Vec<_> = keys.entries(name).collect();
    for entry in entries {
        let words = entry.value.split([',', ' ', '\t']).filter(|word| !word.is_empty());
        for word in words {
            match identity::client(word) {
                Ok(rule) => rules.push(rule),
                Err(why) => keys.wrong(name, entry, &why),
            }
        }
    }
    rules
}

/// Where to listen. Without a word on it, on all addresses, as the reference server does.
fn listen(keys: &mut Keys<'_>) -> Vec<(usize, Listen)> {
    let mut listen = Vec::new();
    let own: Vec<_> = keys.entries("listen").collect();
    for entry in &own {
        match entry.value.trim_end().parse() {
            Ok(address) => listen.push((entry.line, address)),
            Err(wants) => {
                let wants: String = wants;
                keys.wrong("listen", entry, &wants);
            }
        }
    }
    let unix = keys.path("unixsock");
    let unix_line = keys.entry("unixsock").map_or(0, |entry| entry.line);
    let both = keys.flag("duallisten");
    let has_address = keys.entry("listenaddr").is_some() || keys.entry("port").is_some();
    let port = port(keys);
    if let Some(path) = &unix {
        listen.push((unix_line, Listen::Unix(path.clone())));
    }
    let on_addresses = match (&unix, both) {
        (Some(_), both) => both == Some(true),
        (None, _) => own.is_empty() || has_address,
    };
    if unix.is_none() && both.is_some() {
        keys.without_effect("duallisten", "there is no unixsock");
    }
    if !on_addresses {
        if unix.is_some() && has_address {
            let why = "unixsock is set and duallisten is not";
            keys.without_effect("listenaddr", why);
            keys.without_effect("port", why);
        }
        return listen;
    }
    let addresses = keys.text("listenaddr");
    let said = keys.entry("listenaddr").or(keys.entry("port"));
    let line = said.map_or(keys.section.line, |entry| entry.line);
    let named = addresses.as_deref().unwrap_or("::,0.0.0.0");
    let hosts = named.split(',').map(str::trim).filter(|host| !host.is_empty());
    listen.extend(hosts.map(|host| {
        let tcp = Listen::Tcp {
            host: host.trim_start_matches('[').trim_end_matches(']').to_owned(),
            port,
            // The default of a machine without IPv6, too.
            optional: addresses.is_none() && host == "::",
            only_v6: true,
        };
        (line, tcp)
    }));
    listen
}

fn port(keys: &mut Keys<'_>) -> u16 {
    let Some(entry) = keys.entry("port") else { return PORT };
    let text = entry.value.trim_end();
    if text == "0" {
        let text = "port 0 takes any free port; standard input is not served";
        keys.log.remark(keys.file, entry.line, text);
    }
    match text.parse().ok().or_else(|| identity::service(text)) {
        Some(port) => port,
        None => {
            keys.wrong(
                "port",
                entry,
                "it is neither a number up to 65535 nor a TCP service in /etc/services",
            );
            PORT
        }
    }
}
