//! TLS as the command line asks for it: who gets what, what the log says of those who do not, and certificates that
//! cannot be used.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

use crate::certificates::{Authority, Subject};
use crate::{Running, image, run};

/// The URI of an export on the socket `socket`, with certificates in a directory.
fn uri(export: &str, certificates: &Path) -> String {
    format!("nbds+unix:///{export}?socket=socket&tls-certificates={}", certificates.display())
}

/// A configuration with the certificates in a directory, and more lines of [generic] and on exports.
fn configure(dir: &Path, certificates: &Path, generic: &str, exports: &str) {
    let folder = certificates.display();
    let files = format!("keyfile = {folder}/server-key.pem\ncertfile = {folder}/server-cert.pem\n");
    let text = format!("[generic]\nunixsock = socket\nallowlist = true\n{files}{generic}{exports}");
    std::fs::write(dir.join("config"), text).unwrap();
}

fn fails(dir: &Path, uri: &str) -> bool {
    let output = Command::new("timeout").args(["40", "nbdinfo", uri]).current_dir(dir).output();
    output.unwrap().status.code() == Some(1)
}

#[test]
fn required_tls_with_client_certificates_serves_each_client_its_exports() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = image(dir.path());
    let authority = Authority::new();
    let certificates = authority.both_sides();
    let arguments = [
        "--listen=unix:socket",
        "--tls=require",
        &format!("--tls-certificates={}", certificates.path().display()),
        "--tls-verify-peer",
        "--export=open=disk.img,format=raw,read-only",
        "--export=ours=disk.img,format=raw,read-only,client=cn:client of a test",
        "--export=theirs=disk.img,format=raw,read-only,client=cn:somebody else",
    ];
    let mut server = Running::start(dir.path(), &arguments);
    server.address();
    for export in ["", "open", "ours"] {
        let copy = format!("copy-{export}.img");
        run(dir.path(), "nbdcopy", &[&uri(export, certificates.path()), &copy]);
        assert!(std::fs::read(dir.path().join(copy)).unwrap() == bytes);
    }
    assert!(fails(dir.path(), &uri("theirs", certificates.path())));
    assert!(fails(dir.path(), "nbd+unix:///open?socket=socket"));
    let anonymous = authority.directory();
    assert!(fails(dir.path(), &uri("open", anonymous.path())));
    let stranger = authority.directory();
    Authority::new().add(stranger.path(), &Subject::client("client of a test"));
    assert!(fails(dir.path(), &uri("open", stranger.path())));
    run(dir.path(), "nbdinfo", &[&uri("open", certificates.path())]);
    let pid = server.child.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    assert!(server.status().success());
    let log = server.errors();
    assert_eq!(log.matches("TLS with a client failed").count(), 2, "{log}");
    assert!(log.contains("cn:client of a test"), "{log}");
}

#[test]
fn offered_tls_is_a_choice_but_for_exports_that_demand_it() {
    let dir = tempfile::tempdir().unwrap();
    image(dir.path());
    let certificates = Authority::new().both_sides();
    let arguments = [
        "--listen=unix:socket",
        "--tls=on",
        &format!("--tls-certificates={}", certificates.path().display()),
        "--export=open=disk.img,format=raw,read-only",
        "--export=secret=disk.img,format=raw,read-only,tls-only",
    ];
    let mut server = Running::start(dir.path(), &arguments);
    server.address();
    run(dir.path(), "nbdinfo", &["nbd+unix:///open?socket=socket"]);
    assert!(fails(dir.path(), "nbd+unix:///secret?socket=socket"));
    let listed = run(dir.path(), "nbdinfo", &["--list", "nbd+unix:///?socket=socket"]);
    assert!(listed.contains("open") && !listed.contains("secret"), "{listed}");
    for export in ["open", "secret"] {
        run(dir.path(), "nbdinfo", &[&uri(export, certificates.path())]);
    }
    assert!(server.stop());
}

#[test]
fn certificates_that_cannot_be_used_keep_it_from_starting_and_are_named() {
    let dir = tempfile::tempdir().unwrap();
    image(dir.path());
    let (authority, other) = (Authority::new(), Authority::new());
    let empty = authority.directory();
    let broken = authority.both_sides();
    std::fs::write(broken.path().join("server-cert.pem"), "no PEM").unwrap();
    let mixed = authority.both_sides();
    let (certificate, _) = other.issue(&Subject::server());
    std::fs::write(mixed.path().join("server-cert.pem"), certificate).unwrap();
    let bare = authority.both_sides();
    std::fs::remove_file(bare.path().join("ca-cert.pem")).unwrap();
    for (directory, reason) in [
        (&empty, "server-cert.pem"),
        (&broken, "server-cert.pem"),
        (&mixed, "server-cert.pem"),
        (&bare, "ca-cert.pem"),
    ] {
        let arguments = [
            "--listen=unix:socket",
            "--export=one=disk.img,format=raw",
            "--tls=require",
            "--tls-verify-peer",
            &format!("--tls-certificates={}", directory.path().display()),
        ];
        let mut server = Running::start(dir.path(), &arguments);
        assert!(!server.status().success());
        let errors = server.errors();
        assert!(errors.contains(reason), "{errors}");
        assert!(!dir.path().join("socket").exists());
    }
}

#[test]
fn an_export_that_names_its_clients_needs_certificates_of_clients() {
    let dir = tempfile::tempdir().unwrap();
    image(dir.path());
    let certificates = Authority::new().both_sides();
    let certificates = format!("--tls-certificates={}", certificates.path().display());
    for (more, reason) in [
        (&["--export=one=disk.img,format=raw,client=cn:x"][..], "needs TLS"),
        (&["--export=one=disk.img,format=raw,tls-only"], "needs TLS"),
        (
            &["--export=one=disk.img,format=raw,client=cn:x", "--tls=require", &certificates],
            "certificates are ignored",
        ),
    ] {
        let arguments = [&["--listen=unix:socket"], more].concat();
        let mut server = Running::start(dir.path(), &arguments);
        assert!(!server.status().success());
        let errors = server.errors();
        assert!(errors.contains(reason), "{errors}");
    }
}

#[test]
fn a_hangup_brings_new_certificates_and_bad_ones_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    image(dir.path());
    let (old, new) = (Authority::new(), Authority::new());
    let certificates = old.both_sides();
    let arguments = [
        "--listen=127.0.0.1:0",
        "--tls=require",
        &format!("--tls-certificates={}", certificates.path().display()),
        "--export=open=disk.img,format=raw,read-only",
    ];
    let mut server = Running::start(dir.path(), &arguments);
    let address = server.address();
    // Over a Unix socket libnbd has no name to expect, and takes every certificate.
    let port = address.rsplit(':').next().unwrap();
    let trusting = |certificates: &TempDir| {
        let directory = certificates.path().display();
        format!("nbds://localhost:{port}/open?tls-certificates={directory}")
    };
    let (trusts_old, trusts_new) = (old.directory(), new.directory());
    run(dir.path(), "nbdinfo", &[&trusting(&trusts_old)]);
    new.add(certificates.path(), &Subject::server());
    hang_up(&server);
    wait_for(|| !fails(dir.path(), &trusting(&trusts_new)));
    assert!(fails(dir.path(), &trusting(&trusts_old)));
    std::fs::write(certificates.path().join("server-key.pem"), "no PEM").unwrap();
    hang_up(&server);
    let mut told = BufReader::new(&mut server.err).lines().map(Result::unwrap);
    let refusal = told.find(|line| line.contains("the old certificates stay")).unwrap();
    assert!(refusal.contains("server-key.pem"), "{refusal}");
    run(dir.path(), "nbdinfo", &[&trusting(&trusts_new)]);
    assert!(server.stop());
}

fn hang_up(server: &Running) {
    let pid = server.child.id().to_string();
    assert!(Command::new("kill").args(["-HUP", &pid]).status().unwrap().success());
}

/// Asks again until it is so; a process is started for each question, which takes its time.
fn wait_for(is_so: impl Fn() -> bool) {
    assert!((0..500).any(|_| is_so()), "it never came");
}

const EXPORTS: &str = "[open]\nexportname = disk.img\nreadonly = true\n[secret]\nexportname = disk.img\n\
                       readonly = true\nforce_tls = true\n";

#[test]
fn a_configuration_offers_tls_and_forces_it_on_exports() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = image(dir.path());
    let certificates = Authority::new().both_sides();
    configure(dir.path(), certificates.path(), "", EXPORTS);
    let mut server = Running::start(dir.path(), &["--config=config"]);
    server.address();
    run(dir.path(), "nbdinfo", &["nbd+unix:///open?socket=socket"]);
    assert!(fails(dir.path(), "nbd+unix:///secret?socket=socket"));
    run(dir.path(), "nbdcopy", &[&uri("secret", certificates.path()), "copy.img"]);
    assert!(std::fs::read(dir.path().join("copy.img")).unwrap() == bytes);
    assert!(server.stop());
}

#[test]
fn a_configuration_forces_tls_on_all_and_knows_clients_by_their_certificates() {
    let dir = tempfile::tempdir().unwrap();
    image(dir.path());
    let authority = Authority::new();
    let certificates = authority.both_sides();
    let generic = format!(
        "force_tls = true\ncacertfile = {}/ca-cert.pem\ntlsprio = NORMAL:-VERS-ALL:+VERS-TLS1.3\n",
        certificates.path().display()
    );
    let exports = format!(
        "{EXPORTS}client = cn:client of a test\n[theirs]\nexportname = disk.img\nreadonly = true\nclient = cn:x\n\
         [empty]\nexportname = x\ntemporary = true\nfilesize = 1M\nclient = cn:x\n"
    );
    configure(dir.path(), certificates.path(), &generic, &exports);
    let mut server = Running::start(dir.path(), &["--config=config"]);
    server.address();
    assert!(fails(dir.path(), "nbd+unix:///open?socket=socket"));
    for export in ["open", "secret"] {
        run(dir.path(), "nbdinfo", &[&uri(export, certificates.path())]);
    }
    for export in ["theirs", "empty"] {
        assert!(fails(dir.path(), &uri(export, certificates.path())), "{export}");
    }
    assert!(fails(dir.path(), &uri("open", authority.directory().path())), "no certificate");
    assert!(server.stop());
}

#[test]
fn a_reload_takes_new_certificates_and_exports_together_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    image(dir);
    let (first, second) = (Authority::new().both_sides(), Authority::new().both_sides());
    configure(dir, first.path(), "", EXPORTS);
    let mut server = Running::start(dir, &["--config=config"]);
    server.address();
    // Certificates that cannot be used keep the exports as they were, too.
    let more = format!("{EXPORTS}[late]\nexportname = disk.img\nreadonly = true\n");
    std::fs::write(first.path().join("broken.pem"), "no PEM").unwrap();
    let broken = format!("cacertfile = {}/broken.pem\n", first.path().display());
    configure(dir, first.path(), &broken, &more);
    server.signal("-HUP");
    let log = server.log_until("not reloaded").concat();
    assert!(
        log.contains("config:4: cannot set up TLS: cacertfile: ") && log.contains("broken.pem"),
        "{log}"
    );
    assert!(!run(dir, "nbdinfo", &["--list", "nbd+unix:///?socket=socket"]).contains("late"));
    run(dir, "nbdinfo", &[&uri("secret", first.path())]);
    // An export that names its clients comes with the authority that identifies them.
    let ca = format!("cacertfile = {}/ca-cert.pem\n", second.path().display());
    configure(dir, second.path(), &ca, &format!("{more}client = cn:client of a test\n"));
    server.signal("-HUP");
    server.log_until("reloaded");
    assert!(fails(dir, &uri("secret", first.path())), "the old authority");
    run(dir, "nbdinfo", &[&uri("late", second.path())]);
    // Without TLS, nothing is given up: that takes a new start.
    std::fs::write(
        dir.join("config"),
        "[generic]\nunixsock = socket\n[open]\nexportname = disk.img\nreadonly = true\n",
    )
    .unwrap();
    server.signal("-HUP");
    let log = server.log_until("reloaded").concat();
    assert!(log.contains("change with the next start"), "{log}");
    run(dir, "nbdinfo", &[&uri("open", second.path())]);
    assert!(server.stop());
}

#[test]
fn what_is_wrong_with_tls_is_told_with_what_asks_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    image(dir);
    let export = "--export=one=disk.img,format=raw,read-only,tls-only";
    let arguments = ["--listen=unix:socket", "--tls=on", export];
    let mut server =
        Running::start(dir, &[&arguments[..], &["--tls-certificates=missing"]].concat());
    assert!(!server.status().success());
    let errors = server.errors();
    let told =
        "cannot set up TLS by --tls-certificates missing: cannot read missing/server-cert.pem";
    assert!(errors.contains(told), "{errors}");
    let certificates = Authority::new().both_sides();
    let directory = format!("--tls-certificates={}", certificates.path().display());
    let mut server = Running::start(dir, &[&arguments[..], &[&directory]].concat());
    server.address();
    // A name that is misspelt cannot be told from one that needs TLS.
    for name in ["one", "won"] {
        let uri = format!("nbd+unix:///{name}?socket=socket");
        let read = ["40", "qemu-io", "-r", "-f", "raw", "-c", "read 0 512", &uri];
        let output = Command::new("timeout").args(read).current_dir(dir).output();
        let told = String::from_utf8_lossy(&output.unwrap().stderr).into_owned();
        assert!(told.contains("without TLS; is the name right?"), "{name}: {told}");
    }
    assert!(server.stop());
}

#[test]
fn a_check_looks_at_certificates_and_at_what_exports_demand() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    image(dir);
    let certificates = Authority::new().both_sides();
    let missing = dir.join("missing");
    let ours = format!("{EXPORTS}client = cn:x\n");
    for (folder, exports, expected) in [
        (certificates.path(), EXPORTS, None),
        (&missing, EXPORTS, Some("config:4: cannot set up TLS: certfile: cannot read")),
        (certificates.path(), &ours, Some("config:9: the export \"secret\" names its clients")),
    ] {
        configure(dir, folder, "", exports);
        let mut check = Running::start(dir, &["--config=config", "--check-config"]);
        assert_eq!(check.status().success(), expected.is_none());
        let errors = check.errors();
        assert!(errors.contains(expected.unwrap_or_default()), "{errors}");
    }
    std::fs::write(dir.join("config"), format!("[generic]\nunixsock = socket\n{EXPORTS}")).unwrap();
    let mut check = Running::start(dir, &["--config=config", "--check-config"]);
    assert!(!check.status().success());
    assert!(check.errors().contains("config:6: the export \"secret\" needs TLS"));
}

#[test]
fn a_directory_of_certificates_and_files_are_read_again_together_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    image(dir);
    let (old, new) = (Authority::new(), Authority::new());
    let certificates = old.both_sides();
    let config = |exports: &str| {
        let text = format!("[generic]\nunixsock = socket\nallowlist = true\n{exports}");
        std::fs::write(dir.join("config"), text).unwrap();
    };
    let one = "[one]\nexportname = disk.img\nreadonly = true\n";
    let two = one.replace("one", "two");
    config(one);
    let folder = certificates.path().display().to_string();
    let directory = format!("--tls-certificates={folder}");
    let arguments =
        ["--config=config", "--listen=127.0.0.1:0", "--listen=unix:socket", "--tls=on", &directory];
    let mut server = Running::start(dir, &arguments);
    let address = server.address();
    let port = address.rsplit(':').next().unwrap();
    let (trusts_old, trusts_new) = (old.directory(), new.directory());
    let serves = |certificates: &TempDir, export: &str| {
        let folder = certificates.path().display();
        !fails(dir, &format!("nbds://localhost:{port}/{export}?tls-certificates={folder}"))
    };
    assert!(serves(&trusts_old, "one"));
    // New certificates do not come with broken files, and new exports not with broken certificates.
    new.add(certificates.path(), &Subject::server());
    config("[one]\nexportname = missing.img\n");
    server.signal("-HUP");
    let log = server.log_until("not reloaded").concat();
    assert!(log.contains("config:4: ") && !log.contains("certificates are read again"), "{log}");
    assert!(serves(&trusts_old, "one") && !serves(&trusts_new, "one"));
    let key = certificates.path().join("server-key.pem");
    let good = std::fs::read(&key).unwrap();
    std::fs::write(&key, "no PEM").unwrap();
    config(&format!("{one}{two}"));
    server.signal("-HUP");
    let log = server.log_until("not reloaded").concat();
    assert!(log.contains("server-key.pem"), "{log}");
    assert!(serves(&trusts_old, "one") && !serves(&trusts_old, "two"));
    std::fs::write(&key, good).unwrap();
    server.signal("-HUP");
    server.log_until("the certificates are read again");
    assert!(serves(&trusts_new, "two") && !serves(&trusts_old, "one"));
    assert!(server.stop());
}
