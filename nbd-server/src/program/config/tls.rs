//! TLS as the section [generic] asks for it: which files hold certificates, who needs it, and what of a GnuTLS priority
//! string can be kept. The files are read by `program::tls`.

use nbd_server::TlsMode;
use nbd_server::tls::{ServerTlsFiles, TlsVersions};

use super::fault::Fault;
use super::keys::Keys;

/// What [generic] says on TLS.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tls {
    pub(crate) mode: TlsMode,
    /// There are some unless the mode is off.
    pub(crate) files: ServerTlsFiles,
    /// The line that switches it on.
    pub(crate) line: usize,
}

/// Reads the keys. Without `keyfile` there is no TLS, and then nothing else may speak of it.
pub(super) fn read(keys: &mut Keys<'_>) -> Tls {
    let (certificate, key) = (keys.path("certfile"), keys.path("keyfile"));
    let authorities = keys.path("cacertfile");
    let forced = keys.flag("force_tls").unwrap_or(false);
    let (versions, server_order) = priorities(keys);
    let line = keys.entry("keyfile").map_or(0, |entry| entry.line);
    let Some(key) = key else {
        for name in ["certfile", "cacertfile", "force_tls", "tlsprio"] {
            keys.refuse(name, "there is no TLS without keyfile");
        }
        return Tls::default();
    };
    let certificate = certificate.unwrap_or_else(|| key.clone());
    let mode = if forced { TlsMode::Required } else { TlsMode::Offered };
    let files = ServerTlsFiles { certificate, key, authorities, versions, server_order };
    Tls { mode, files, line }
}

/// What `tlsprio` says on versions, and on whose order of ciphers counts.
fn priorities(keys: &mut Keys<'_>) -> (TlsVersions, bool) {
    let Some(entry) = keys.entry("tlsprio") else { return Default::default() };
    match Priorities::parse(entry.value.trim_end()) {
        Ok(kept) => kept,
        Err(why) => {
            let text = format!("tlsprio: {why}");
            keys.log.fault(keys.file, entry.line, Fault::Export(text));
            Default::default()
        }
    }
}

/// A priority string that is being read. What TLS uses here is fixed: AEAD ciphers with 128 bits or more, over ephemeral
/// elliptic curves. So leaving out anything else goes without saying, and only versions are a choice.
struct Priorities {
    tls12: bool,
    tls13: bool,
    server_order: bool,
}

/// The beginnings of names of what is never used here.
const NEVER_USED: &[&str] = &[
    "VERS-SSL",
    "VERS-DTLS",
    "VERS-TLS1.0",
    "VERS-TLS1.1",
    "3DES",
    "ARCFOUR",
    "DES-",
    "RC2",
    "CAMELLIA",
    "NULL",
    "AES-128-CBC",
    "AES-256-CBC",
    "AES-128-CCM",
    "AES-256-CCM",
    "MD5",
    "SHA1",
    "DHE-",
    "PSK",
    "ECDHE-PSK",
    "SRP",
    "ANON",
    "COMP-",
    "CTYPE-OPENPGP",
    "SIGN-RSA-MD5",
    "SIGN-RSA-SHA1",
    "SIGN-DSA",
];

impl Priorities {
    fn parse(text: &str) -> Result<(TlsVersions, bool), String> {
        let mut words = text.split(':');
        let first = words.next().unwrap_or_default();
        if !matches!(first, "NORMAL" | "PERFORMANCE" | "PFS" | "SECURE128") {
            return Err(format!(
                "{first:?} cannot be kept; it begins with NORMAL, PERFORMANCE, PFS or SECURE128, all of which mean \
                 the same here"
            ));
        }
        let mut kept = Self { tls12: true, tls13: true, server_order: false };
        for word in words {
            kept.take(word)?;
        }
        let versions = match (kept.tls12, kept.tls13) {
            (true, true) => TlsVersions::Both,
            (true, false) => TlsVersions::Only12,
            (false, true) => TlsVersions::Only13,
            (false, false) => return Err("it leaves no version; 1.2 and 1.3 are spoken".to_owned()),
        };
        Ok((versions, kept.server_order))
    }

    fn take(&mut self, word: &str) -> Result<(), String> {
        let (adds, name) = match (word.strip_prefix('+'), word.strip_prefix(['-', '!'])) {
            (Some(name), _) => (true, name),
            (None, Some(name)) => (false, name),
            (None, None) => match word {
                "%SERVER_PRECEDENCE" => {
                    self.server_order = true;
                    return Ok(());
                }
                // Nothing else is done.
                "%SAFE_RENEGOTIATION" | "%NO_TICKETS" => return Ok(()),
                _ => return Err(format!("{word:?} cannot be kept")),
            },
        };
        match name {
            "VERS-ALL" | "VERS-TLS-ALL" => (self.tls12, self.tls13) = (adds, adds),
            "VERS-TLS1.2" => self.tls12 = adds,
            "VERS-TLS1.3" => self.tls13 = adds,
            "RSA" if !adds => {}
            _ if !adds && NEVER_USED.iter().any(|never| name.starts_with(never)) => {}
            _ => return Err(format!("{word:?} cannot be kept")),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn priorities_choose_versions_and_leave_out_what_is_not_used() {
        for (text, versions, server_order) in [
            // The reference's default.
            ("NORMAL:-VERS-TLS-ALL:+VERS-TLS1.2:%SERVER_PRECEDENCE", TlsVersions::Only12, true),
            ("NORMAL", TlsVersions::Both, false),
            ("SECURE128:-VERS-ALL:+VERS-TLS1.3", TlsVersions::Only13, false),
            ("PFS:-VERS-TLS1.0:-VERS-TLS1.1:!RSA:-3DES-CBC:-DHE-RSA", TlsVersions::Both, false),
            ("NORMAL:-VERS-ALL:+VERS-ALL:%NO_TICKETS", TlsVersions::Both, false),
        ] {
            assert_eq!(Priorities::parse(text), Ok((versions, server_order)), "{text}");
        }
    }

    #[test]
    fn priorities_that_cannot_be_kept_are_refused_by_word() {
        for (text, word) in [
            ("", "\"\""),
            ("SECURE256", "SECURE256"),
            ("LEGACY", "LEGACY"),
            ("NONE:+VERS-TLS1.2", "NONE"),
            ("NORMAL:+VERS-TLS1.1", "VERS-TLS1.1"),
            ("NORMAL:-VERS-ALL", "no version"),
            ("NORMAL:-AES-128-GCM", "AES-128-GCM"),
            ("NORMAL:+PSK", "PSK"),
            ("NORMAL:-ECDHE-RSA", "ECDHE-RSA"),
            ("NORMAL:%COMPAT", "COMPAT"),
            ("NORMAL::", "\"\""),
        ] {
            let why = Priorities::parse(text).unwrap_err();
            assert!(why.contains(word), "{text}: {why}");
        }
    }
}
