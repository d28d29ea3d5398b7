//! Configurations as people write them, the reference server's own, and broken ones.

use std::path::Path;

use nbd_server::wire::transmission_flag as flag;
use nbd_server::{Admission, Peer, Removal};

use super::keys::{EXPORT, GENERIC};
use super::{Config, Faults, read};
use crate::program::options::{Format, Listen, Writes};

/// A folder with files in it.
struct Files(tempfile::TempDir);

impl Files {
    fn new(files: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        Self(dir)
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.0.path().join(name)
    }

    fn read(&self) -> Result<Config, Faults> {
        read(&self.path("config"))
    }

    /// What is wrong, with the folder left out.
    fn faults(&self) -> Vec<String> {
        let folder = format!("{}/", self.0.path().display());
        let Faults(findings) = self.read().unwrap_err();
        findings.iter().map(|finding| finding.to_string().replace(&folder, "")).collect()
    }
}

fn config(text: &str) -> Config {
    Files::new(&[("config", text)]).read().unwrap()
}

fn addresses(config: &Config) -> Vec<Listen> {
    config.generic.listen.iter().map(|(_, listen)| listen.clone()).collect()
}

fn tcp(host: &str, port: u16, optional: bool) -> Listen {
    Listen::Tcp { host: host.into(), port, optional, only_v6: true }
}

#[test]
fn the_examples_of_the_reference_load() {
    // The forms of its manual and of its test suite.
    let simple = config("[generic]\n[export]\n    exportname = /export/blkdev\n");
    assert_eq!(addresses(&simple), [tcp("::", 10809, true), tcp("0.0.0.0", 10809, false)]);
    let (place, spec) = &simple.exports[0];
    assert_eq!((spec.name.as_str(), spec.path.as_path()), ("export", Path::new("/export/blkdev")));
    assert!(place.line == 2 && spec.raw_unless_said && !spec.read_only && !spec.is_default);
    assert!(!simple.generic.listing);

    let several = config(
        "[generic]\n[export1]\n\texportname = /tmp/x\n\tcopyonwrite = true\n\tlistenaddr = 127.0.0.1\n[export2]\n\t\
         exportname = /tmp/x\n\treadonly = true\n\tlistenaddr = 127.0.0.1\n",
    );
    assert_eq!(several.exports[0].1.writes, Writes::Apart { folder: None });
    assert!(several.exports[1].1.read_only);
    assert_eq!(several.remarks.len(), 2, "of listenaddr: {:?}", several.remarks);

    let flags = config(
        "[generic]\n[export1]\nexportname = /tmp/x\nflush = true\nfua = true\nrotational = true\nfilesize = 52428800\n\
         temporary = true\n",
    );
    let spec = &flags.exports[0].1;
    assert_eq!(
        (&spec.writes, spec.size, spec.makes_bytes),
        (&Writes::Temporary, Some(52_428_800), None)
    );
    assert!(spec.rotational && spec.withheld == 0);

    let unix =
        "[generic]\nunixsock = /tmp/s\nlistenaddr = 127.0.0.1\n[export1]\nexportname = /tmp/x\n";
    assert_eq!(addresses(&config(unix)), [Listen::Unix("/tmp/s".into())]);
    let both = unix.replace("unixsock", "duallisten = true\nunixsock");
    let listen = [Listen::Unix("/tmp/s".into()), tcp("127.0.0.1", 10809, false)];
    assert_eq!(addresses(&config(&both)), listen);
    let list = "[generic]\nlistenaddr = 127.0.0.1, ::1\nport=1234\nallowlist = true\n[export1]\nexportname = /tmp/x\n";
    let list = config(list);
    assert_eq!(addresses(&list), [tcp("127.0.0.1", 1234, false), tcp("::1", 1234, false)]);
    assert!(list.generic.listing);
}

#[test]
fn addresses_are_known_by_their_lines_which_may_change() {
    let lines = |config: &Config| -> Vec<usize> {
        config.generic.listen.iter().map(|(line, _)| *line).collect()
    };
    let one = config("[generic]\nlistenaddr = a, b\nlisten = unix:/s\nport = 1\n");
    assert_eq!(lines(&one), [3, 2, 2]);
    let moved = config("[generic]\n\nlistenaddr = a, b\nlisten = unix:/s\nport = 1\n");
    assert_eq!(lines(&moved), [4, 3, 3]);
    assert!(one.generic.starts_like(&moved.generic));
    assert_eq!(lines(&config("[generic]\nport = 1\n")), [2, 2]);
    assert_eq!(lines(&config("# nothing\n[generic]\n")), [2, 2]);
    let other = config("[generic]\nlistenaddr = a, c\nlisten = unix:/s\nport = 1\n");
    assert!(!one.generic.starts_like(&other.generic));
}

#[test]
fn an_authorization_file_says_who_may_use_an_export() {
    let text =
        "[generic]\n user = root\n group = root\n[export]\n exportname = /x\n authfile = allow\n";
    let list = "# of the manual\n127.0.0.1\n192.168.0.0/8\n192.168.1.1 # a word\n\n";
    let files = Files::new(&[("config", text), ("allow", list)]);
    let config = files.read().unwrap();
    let admission = &config.exports[0].1.admission;
    let peer = |address: &str| Peer::Tcp(address.parse().unwrap());
    assert!(admission.permits(&peer("127.0.0.1:1")) && admission.permits(&peer("192.9.9.9:1")));
    assert!(!admission.permits(&peer("10.0.0.1:1")) && !admission.permits(&Peer::Unix { uid: 0 }));
    std::fs::write(files.path("allow"), "").unwrap();
    assert_eq!(files.read().unwrap().exports[0].1.admission, Admission::nobody());
    std::fs::write(files.path("allow"), "# one\nlocalhost\n").unwrap();
    assert!(files.faults()[0].starts_with("allow:2: "));
    std::fs::remove_file(files.path("allow")).unwrap();
    let config = files.read().unwrap();
    assert_eq!(config.exports[0].1.admission, Admission::default());
    assert!(config.remarks[0].text.contains("everybody"));
}

#[test]
fn included_files_are_read_in_the_order_of_their_names() {
    let files = Files::new(&[
        ("config", "[generic]\nincludedir = conf.d\n[main]\nexportname = m\n"),
        ("conf.d/20-b.conf", "[b]\nexportname = /b\n"),
        ("conf.d/10-a.conf", "# a comment first\n[a]\nexportname = a.img\n[z]\nexportname=/z\n"),
        ("conf.d/30-nothing.conf", "# switched off\n"),
        ("conf.d/README", "[generic]\n"),
        ("conf.d/old.conf.bak", "broken"),
        ("conf.d/folder.conf/x", "broken"),
    ]);
    let config = files.read().unwrap();
    let names: Vec<_> = config.exports.iter().map(|(_, spec)| spec.name.as_str()).collect();
    assert_eq!(names, ["main", "a", "z", "b"]);
    assert_eq!(config.exports[0].1.path, files.path("m"));
    assert_eq!(config.exports[1].1.path, files.path("conf.d/a.img"));
    assert_eq!(config.exports[1].0.line, 2);
    assert_eq!(config.files.len(), 4);
    std::fs::write(files.path("conf.d/40.conf"), "[generic]\n[a]\nexportname=/a\n[c]\n").unwrap();
    let faults = files.faults();
    assert!(
        faults[0].starts_with("conf.d/40.conf:1: [generic] stands in the main file"),
        "{faults:?}"
    );
    assert!(faults[1].starts_with("conf.d/40.conf:2: the section [a] is at "), "{faults:?}");
    assert!(faults[1].ends_with("conf.d/10-a.conf:2 already"), "{faults:?}");
    assert_eq!(faults[2], "conf.d/40.conf:4: [c] does not say exportname");
    std::fs::write(files.path("conf.d/40.conf"), "").unwrap();
    assert!(files.faults()[0].starts_with("conf.d/40.conf:1: the file is empty"));
    std::fs::remove_dir_all(files.path("conf.d")).unwrap();
    assert!(files.faults()[0].starts_with("config:2: cannot read"));
}

#[test]
fn our_own_keys_are_read() {
    let config = config(
        "[generic]\nlisten = unix:/s\nlisten = vsock:any:10809\nunixsock_mode = 0660\nunixsock_owner = root:root\n\
         handshake_timeout = 7\nmax_connections = 9\nmax_threads = 2\nremoval = cut\n\
         maxconnections = 3\nmax_connections_per_client = 4\ntimeout = 60\npayload_timeout = 8\nmemory_limit = 64M\n\
         peer_timeout = 9\nmax_options = 10\nmax_option_bytes = 11K\nmax_in_flight = 12\nmax_in_flight_bytes = 13M\n\
         shutdown_timeout = 5\nallow = 10.0.0.0/8, uid:root\n\
         deny = 10.0.0.1\nallow_references = any\n\
         [a]\nexportname = /a\nformat = qcow2\ndescription = one, two\ndefault = true\nbitmap = x\nbitmap = y\n\
         blocksize = 64K\nsync = true\ntrim = false\nflush = false\nallow_references = sub\nprerun = true\n\
         [b]\nexportname = /b\noffset = 1M\nsize = 2M\nreadonly = true\ndeny = unix\n\
         maxconnections = 2\ntimeout = 0\n\
         [c]\nexportname = /c\npartition = 2\nwriters = client\nseal = true\n[d]\nexportname = /d\nsnapshot = s\nformat = qcow2\npassphrase_file = /key\n",
    );
    let generic = &config.generic;
    let vsock = Listen::Vsock { cid: None, port: 10809 };
    assert_eq!(addresses(&config), [Listen::Unix("/s".into()), vsock]);
    assert_eq!((generic.socket_mode, generic.threads), (Some(0o660), Some(2)));
    let limits = generic.limits.of_server();
    let seconds = std::time::Duration::from_secs;
    assert_eq!((limits.handshake_timeout, limits.connections), (seconds(7), 9));
    assert_eq!((limits.connections_per_export, limits.connections_per_client), (Some(3), Some(4)));
    assert_eq!((limits.idle_timeout, limits.payload_timeout), (Some(seconds(60)), seconds(8)));
    assert_eq!((limits.options, limits.option_bytes), (10, 11 << 10));
    assert_eq!((limits.in_flight_requests, limits.in_flight_bytes), (12, 13 << 20));
    assert_eq!(limits.peer_timeout, seconds(9));
    assert_eq!((limits.memory_bytes, generic.limits.shutdown_grace()), (64 << 20, seconds(5)));
    assert_eq!(generic.removal, Removal::Cut);
    assert!(generic.admission.permits(&Peer::Unix { uid: 0 }));
    assert!(!generic.admission.permits(&Peer::Tcp("10.0.0.1:5".parse().unwrap())));
    let [a, b, c, d] = &config.exports[..] else { panic!("{:?}", config.exports) };
    let a = &a.1;
    assert_eq!((a.format, a.description.as_deref()), (Some(Format::Qcow2), Some("one, two")));
    assert_eq!((a.bitmaps.len(), a.preferred_bytes), (2, Some(65_536)));
    assert_eq!(d.1.passphrase_files, [std::path::PathBuf::from("/key")]);
    assert!(a.is_default && a.durable && a.before.as_deref() == Some("true"));
    assert_eq!(a.withheld, flag::SEND_TRIM | flag::SEND_FLUSH);
    assert_eq!((b.1.offset, b.1.size, b.1.makes_bytes), (1 << 20, Some(2 << 20), None));
    assert_eq!((b.1.max_connections, b.1.idle_timeout), (Some(2), Some(std::time::Duration::MAX)));
    assert!(!b.1.admission.permits(&Peer::Unix { uid: 0 }));
    assert_eq!((c.1.writers, c.1.seals), (nbd_server::Writers::OneClient, true));
    assert_eq!((c.1.partition, d.1.snapshot.as_deref()), (Some(2), Some("s")));
}

#[test]
fn what_cannot_be_is_refused_with_file_and_line() {
    let export = "[generic]\n[a]\nexportname = /a\n";
    let waits = format!("{export}waitfile = true\nfilesize = 1M\n");
    for (text, expected) in [
        ("", "config:1: the file is empty"),
        ("# nothing\n", "config:1: the first section must be [generic]"),
        ("[a]\nexportname = /a\n", "config:1: the first section must be [generic]"),
        (
            "[generic]\nreadonly = true\n",
            "config:2: there is no key \"readonly\" in [generic]; it belongs to the sections of exports",
        ),
        (
            "[generic]\nidle_timeout = 5\n",
            "config:2: there is no key \"idle_timeout\" in [generic]; its name is timeout",
        ),
        (
            "[generic]\nhandshake_timeout = 1m\n",
            "config:2: handshake_timeout = \"1m\": it is a whole number of seconds",
        ),
        (
            "[generic]\ntimeout = 1m\n",
            "config:2: timeout = \"1m\": it is a whole number of seconds",
        ),
        (
            "[generic]\nmax_option_bytes = 5\n",
            "config:2: max_option_bytes = \"5\": it is at least 4K",
        ),
        ("[generic]\nport = 70000\n", "config:2: port = \"70000\""),
        ("[generic]\nport\n", "config:2: the line is neither"),
        ("[generic]\nuser =\n", "config:2: user = \"\": it needs a value"),
        ("[generic]\nmax_threads = 0\n", "config:2: max_threads = \"0\""),
        (
            "[generic]\nmax_threads = 1025\n",
            "config:2: max_threads = \"1025\": it is a number from 1 to 1024",
        ),
        ("[generic]\noldstyle = true\n", "config:2: oldstyle: "),
        ("[generic]\n[generic]\n", "config:2: [generic] stands"),
        ("[generic]\n[a]\n", "config:2: [a] does not say exportname"),
        (
            &format!("{export}readonyl = true\n"),
            "config:4: there is no key \"readonyl\" in the section of an export; is readonly meant?",
        ),
        (&format!("{export}readonly = yes\n"), "config:4: readonly = \"yes\": it is either"),
        (&format!("{export}exportname = /b\n"), "config:4: exportname is set in line 3 already"),
        (
            &format!("{export}[a]\nexportname = /b\n"),
            "config:4: the section [a] is at config:2 already",
        ),
        (&format!("{export}treefiles = true\n"), "config:4: treefiles: "),
        (&format!("{export}multifile = maybe\n"), "config:4: multifile = \"maybe\""),
        (
            &format!("{export}multifile = true\nformat = qcow2\n"),
            "config:2: [a]: multifile joins raw images alone",
        ),
        (
            &format!("{export}multifile = true\npassphrase_file = /p\n"),
            "config:2: [a]: multifile joins raw images alone",
        ),
        (&format!("{export}multifile = true\nseal = true\n"), "config:2: [a]: one image is sealed"),
        (
            &format!("{export}filesize = 1M\ntemporary = true\nmultifile = true\n"),
            "config:2: [a]: a temporary disk is empty",
        ),
        (&format!("{export}waitfile = true\n"), "config:2: [a]: waitfile needs filesize"),
        (
            &format!("{export}waitfile = true\nsize = 1M\n"),
            "config:2: [a]: waitfile needs filesize",
        ),
        (&format!("{waits}temporary = true\n"), "config:2: [a]: a temporary disk has no image"),
        (&format!("{waits}copyonwrite = true\n"), "config:2: [a]: with waitfile, writes are kept"),
        (&format!("{waits}readonly = true\n"), "config:2: [a]: waitfile keeps writes, and"),
        (
            &format!("{waits}seal = true\n"),
            "config:2: [a]: an image that is waited for is not sealed",
        ),
        (&format!("{waits}multifile = true\n"), "config:2: [a]: one image is waited for"),
        (
            &format!("{waits}format = qcow2\n"),
            "config:2: [a]: an image that is waited for is a raw one",
        ),
        (
            &format!("{waits}passphrase_file = /p\n"),
            "config:2: [a]: an image that is waited for is a raw one",
        ),
        (
            &format!("{waits}offset = 4K\n"),
            "config:2: [a]: an image that is waited for is served as a whole",
        ),
        (
            &format!("{waits}partition = 1\n"),
            "config:2: [a]: an image that is waited for is served as a whole",
        ),
        (&format!("{export}maxconnections = -3\n"), "config:4: maxconnections = \"-3\""),
        (&format!("{export}writers = two\n"), "config:4: writers = \"two\""),
        (&format!("{export}seal = true\nreadonly = true\n"), "config:2: [a]: what is read-only"),
        (&format!("{export}timeout = soon\n"), "config:4: timeout = \"soon\""),
        ("[generic]\ntimeout = soon\n", "config:2: timeout = \"soon\""),
        ("[generic]\nmemory_limit = 31M\n", "config:2: memory_limit = \"31M\": it is at least 32M"),
        ("[generic]\nmemory_limit = much\n", "config:2: memory_limit = \"much\""),
        ("[generic]\nmax_in_flight_bytes = 4G\n", "config:2: max_in_flight_bytes = \"4G\""),
        ("[generic]\nmax_options = 0\n", "config:2: max_options = \"0\""),
        (&format!("{export}virtstyle = moon\n"), "config:4: virtstyle = \"moon\""),
        (
            &format!("{export}bitmap = x\n"),
            "config:2: [a]: a raw image has no bitmaps, and without format",
        ),
        (&format!("{export}temporary = true\n"), "config:2: [a]: a temporary disk"),
        (
            &format!("{export}filesize = 1M\ntemporary = true\nreadonly = true\n"),
            "config:5: temporary: the disk is empty",
        ),
        ("[generic]\nuser = no such user\n", "config:2: user = \"no such user\": there is no"),
        ("[generic]\ngroup = no such group\n", "config:2: group = \"no such group\": there is no"),
        ("[generic]\nuser = 4000000000\n", "config:2: user = \"4000000000\": the group of"),
        (&format!("[generic]\n[{}]\nexportname = /x\n", "n".repeat(4097)), "config:2: the name of"),
        (&format!("{export}blocksize = 1000\n"), "config:4: blocksize = \"1000\""),
        (&format!("{export}allow = 10.0.0.0/40\n"), "config:4: allow = "),
        ("[generic]\n[a]\nexportname = /x/%s\n", "config:3: exportname: %s"),
    ] {
        let faults = Files::new(&[("config", text)]).faults();
        assert!(faults.iter().any(|fault| fault.starts_with(expected)), "{text}: {faults:?}");
    }
    let faults = Files::new(&[]).faults();
    assert!(faults[0].contains("cannot read"), "{faults:?}");
}

#[test]
fn files_that_are_joined_are_not_made() {
    let read = config("[generic]\n[a]\nexportname = /a\nfilesize = 4K\nmultifile = true\n");
    let (_, spec) = &read.exports[0];
    assert!(spec.joins);
    assert_eq!((spec.makes_bytes, spec.size), (None, Some(4096)), "it is how much is served");
}

#[test]
fn what_is_waited_for_keeps_writes_in_a_folder_that_may_be_named() {
    for (key, folder) in [("", None), ("cowdir = /c\n", Some("/c"))] {
        let text = format!("[generic]\n[a]\nexportname = /a\nfilesize = 4K\nwaitfile = 1\n{key}");
        let read = config(&text);
        let (_, spec) = &read.exports[0];
        assert!(spec.waits && read.remarks.is_empty(), "{:?}", read.remarks);
        assert_eq!((spec.size, spec.diff_folder.as_deref()), (Some(4096), folder.map(Path::new)));
    }
}

#[test]
fn every_fault_is_told_at_once() {
    let text = "[generic]\nport = x\nnonsense\n[a]\nreadonly = 2\nsize = x\n";
    let lines: Vec<_> = Files::new(&[("config", text)]).faults();
    assert_eq!(lines.len(), 5, "{lines:?}");
}

#[test]
fn what_has_no_effect_is_remarked() {
    let config = config(
        "[generic]\nsplice = true\nduallisten = false\nport = 0\n[a]\nexportname = /a\nport = 9\ntransactionlog = /l\n\
         datalog = false\nsparse_cow = true\ncowdir = /c\nvirtstyle = cidrhash 16\nlistenaddr = ::\ndescription = x \n",
    );
    let lines: Vec<_> = config.remarks.iter().map(|remark| remark.place.line).collect();
    assert!(
        [2, 3, 4, 7, 8, 9, 10, 11, 12, 13].iter().all(|line| lines.contains(line)),
        "{lines:?}"
    );
    let unfinished = Files::new(&[("config", "[generic]\n[a]\nexportname = /a")]).read().unwrap();
    assert!(unfinished.remarks[0].unfinished && unfinished.remarks[0].place.line == 3);
}

#[test]
fn what_says_less_than_it_seems_to_is_remarked_with_its_line() {
    let files = Files::new(&[
        (
            "config",
            "\u{feff}[generic]\nincludedir = more\n[a]\nexportname = /a\nseal = true\nwriters = any\n[b]\nexportname = /b\n\
             readonly = true\nsync = true\n[c]\nexportname = /c\nseal = true\nwriters = client\nsync = true\n",
        ),
        ("more/x.conf/file", ""),
        ("more/y.conf", "\u{feff}[d]\nexportname = /d\n"),
    ]);
    let config = files.read().unwrap();
    let mut lines: Vec<_> = config.remarks.iter().map(|remark| remark.place.line).collect();
    lines.sort_unstable();
    assert_eq!(lines, [2, 6, 10], "{:?}", config.remarks);
    assert!(config.remarks.iter().any(|remark| remark.text.contains("x.conf is no file")));
    assert_eq!(config.exports.len(), 4);
}

#[test]
fn every_key_of_the_manual_is_meant_refused_or_remarked() {
    for (keys, is_generic) in [(GENERIC, true), (EXPORT, false)] {
        for key in keys {
            let line = format!("{} = %\n", key.name);
            let own = if is_generic { &line } else { "" };
            let export = match (is_generic, key.name) {
                (false, "exportname") => line.clone(),
                (false, _) => format!("exportname = /a\n{line}"),
                (true, _) => "exportname = /a\n".to_owned(),
            };
            let text = format!("[generic]\n{own}[a]\n{export}");
            match Files::new(&[("config", &text)]).read() {
                Err(Faults(findings)) => {
                    assert!(
                        !findings.iter().any(|found| found.to_string().contains("no key")),
                        "{}",
                        key.name
                    );
                }
                Ok(with) => {
                    let without = config("[generic]\n[a]\nexportname = /a\n");
                    let same = with.generic == without.generic
                        && with.exports[0].1 == without.exports[0].1;
                    assert!(!same || !with.remarks.is_empty(), "{} is silently ignored", key.name);
                }
            }
        }
    }
}

#[cfg(not(feature = "tls"))]
#[test]
fn without_tls_in_the_program_what_asks_for_it_is_refused() {
    let export = "[generic]\n[a]\nexportname = /a\n";
    for (text, line) in [
        ("[generic]\nkeyfile = /k\n[a]\nexportname = /a\n", "config:2: keyfile: "),
        ("[generic]\nforce_tls = true\n[a]\nexportname = /a\n", "config:2: force_tls: "),
        (&format!("{export}force_tls = true\n"), "config:4: force_tls: "),
        (&format!("{export}client = cn:x\n"), "config:4: client: "),
    ] {
        let faults = Files::new(&[("config", text)]).faults();
        assert_eq!(faults, [format!("{line}this program was built without TLS")]);
    }
    config("[generic]\nforce_tls = false\n[a]\nexportname = /a\ntlsonly = false\n");
}

#[cfg(feature = "tls")]
#[test]
fn tls_begins_with_a_key_and_is_forced_on_all_or_on_exports() {
    use nbd_server::TlsMode;
    use nbd_server::tls::TlsVersions;

    let rest = "[a]\nexportname = /a\nforce_tls = true\n[b]\nexportname = /b\ntlsonly = true\nclient = cn:one, two\n\
                client = dns:x\n[c]\nexportname = /c\nforce_tls = false\n";
    let files = Files::new(&[("config", &format!("[generic]\nkeyfile = both.pem\n{rest}"))]);
    let offered = files.read().unwrap();
    let tls = &offered.generic.tls;
    assert_eq!((tls.mode, tls.line), (TlsMode::Offered, 2));
    let both = files.path("both.pem");
    assert_eq!((&tls.files.key, &tls.files.certificate), (&both, &both));
    assert_eq!((&tls.files.authorities, tls.files.versions), (&None, TlsVersions::Both));
    let only: Vec<_> = offered.exports.iter().map(|(_, spec)| spec.tls_only).collect();
    assert_eq!(only, [true, true, false]);
    let clients = &offered.exports[1].1.clients;
    assert_eq!(clients[..], ["cn:one, two".parse().unwrap(), "dns:x".parse().unwrap()]);

    let forced = config(
        "[generic]\nforce_tls = true\ncertfile = /c\nkeyfile = /k\ncacertfile = /ca\n\
         tlsprio = NORMAL:-VERS-TLS-ALL:+VERS-TLS1.2:%SERVER_PRECEDENCE\n[a]\nexportname = /a\n",
    );
    let tls = &forced.generic.tls;
    assert_eq!(tls.mode, TlsMode::Required);
    assert_eq!(tls.files.certificate, Path::new("/c"));
    assert_eq!(tls.files.authorities.as_deref(), Some(Path::new("/ca")));
    assert_eq!((tls.files.versions, tls.files.server_order), (TlsVersions::Only12, true));

    for (text, expected) in [
        ("certfile = /c", "config:2: certfile: there is no TLS without keyfile"),
        ("cacertfile = /c", "config:2: cacertfile: there is no TLS without keyfile"),
        ("force_tls = true", "config:2: force_tls: there is no TLS without keyfile"),
        ("tlsprio = NORMAL", "config:2: tlsprio: there is no TLS without keyfile"),
        ("tlsprio = SUITEB128", "config:2: tlsprio: \"SUITEB128\" cannot be kept"),
        ("force_tls = maybe", "config:2: force_tls = \"maybe\""),
    ] {
        let text = format!("[generic]\n{text}\n[a]\nexportname = /a\nclient = x\n");
        let faults = Files::new(&[("config", &text)]).faults();
        assert!(faults[0].starts_with(expected), "{faults:?}");
        assert!(faults.iter().any(|fault| fault.starts_with("config:5: client = \"x\"")));
    }
}

#[test]
fn a_flag_is_said_in_words_or_numbers() {
    for (text, expected) in [("true", true), ("1", true), ("false", false), ("0 ", false)] {
        let text = format!("[generic]\n[a]\nexportname = /a\nreadonly = {text}\n");
        assert_eq!(config(&text).exports[0].1.read_only, expected, "{text}");
    }
}

#[test]
fn copies_apart_of_what_is_read_only_are_remarked_with_their_line() {
    let remarked = |read_only: bool| -> Vec<usize> {
        let export = "[generic]\n[one]\nexportname = a\ncopyonwrite = true\n";
        let remarks = config(&format!("{export}readonly = {read_only}\n")).remarks;
        remarks.iter().map(|remark| remark.place.line).collect()
    };
    assert_eq!(remarked(true), [4]);
    assert!(remarked(false).is_empty());
}
