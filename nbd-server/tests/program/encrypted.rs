//! Encrypted images through the program, with QEMU as the judge of what they hold. What is wrong with their headers is
//! the library's matter.

use std::path::Path;

use super::{Running, run};

const URI: &str = "nbd+unix:///one?socket=socket";

/// The image as QEMU's options name it.
const IMAGE: &str = "driver=qcow2,file.filename=disk.qcow2,encrypt.key-secret=s0";

const SECRET: [&str; 2] = ["--object", "secret,id=s0,data=open sesame"];

/// Makes an encrypted image of 2 MiB, and files with its passphrase and another one, as an editor leaves them.
fn create(dir: &Path) {
    std::fs::write(dir.join("key"), "open sesame\n").unwrap();
    std::fs::write(dir.join("wrong"), "open barley\n").unwrap();
    let options = "encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=10";
    let image = ["-o", options, "disk.qcow2", "2M"];
    run(dir, "qemu-img", &[&["create", "-q", "-f", "qcow2"], &SECRET[..], &image[..]].concat());
    let write = ["-c", "write -P 7 70000 10000", "-c", "write -P 8 1M 64k", "--image-opts", IMAGE];
    run(dir, "qemu-io", &[&SECRET[..], &write].concat());
}

/// The disk as QEMU decrypts it.
fn decrypted(dir: &Path) -> Vec<u8> {
    let rest = ["--image-opts", IMAGE, "-O", "raw", "theirs.img"];
    run(dir, "qemu-img", &[&["convert"], &SECRET[..], &rest].concat());
    std::fs::read(dir.join("theirs.img")).unwrap()
}

#[test]
fn an_encrypted_image_is_served_in_clear_to_who_has_its_passphrase() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    create(dir);
    let before = decrypted(dir);
    assert!(before[70_000..80_000] == [7; 10_000]);
    let export = "--export=one=disk.qcow2,passphrase-file=wrong,passphrase-file=key";
    let mut server = Running::start(dir, &["--listen=unix:socket", export]);
    server.address();
    assert_eq!(run(dir, "nbdinfo", &["--size", URI]).trim(), "2097152");
    run(dir, "nbdcopy", &[URI, "ours.img"]);
    assert!(std::fs::read(dir.join("ours.img")).unwrap() == before);
    run(dir, "qemu-io", &["-f", "raw", "-c", "write -P 0x5a 75000 100000", URI]);
    assert!(server.stop());
    let mut written = before;
    written[75_000..175_000].fill(0x5a);
    assert!(decrypted(dir) == written);
    let bytes = std::fs::read(dir.join("disk.qcow2")).unwrap();
    assert!(!bytes.windows(64).any(|window| window == [0x5a; 64]), "plain text on disk");
}

#[test]
fn an_encrypted_image_is_not_served_without_its_passphrase() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    create(dir);
    for (options, reason) in [
        ("", "the export needs passphrase-file=FILE"),
        (",passphrase-file=wrong", "the passphrase opens none of its key slots"),
        (",passphrase-file=missing", "cannot read the passphrase from missing"),
        (",passphrase-file=key,format=raw", "a raw image takes no passphrase"),
    ] {
        let export = format!("--export=one=disk.qcow2{options}");
        let mut server = Running::start(dir, &["--listen=unix:socket", &export]);
        assert!(!server.status().success(), "{options}");
        let errors = server.errors();
        assert!(errors.contains(reason) && !errors.contains("sesame"), "{options}: {errors}");
    }
}

#[test]
fn a_key_slot_that_asks_for_too_much_work_is_not_tried() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    create(dir);
    let export = "--export=one=disk.qcow2,passphrase-file=key";
    for (seconds, reason) in
        [("0.0001", Some("--unlock-seconds allows more")), ("x", Some("number")), ("600", None)]
    {
        let unlock = format!("--unlock-seconds={seconds}");
        let mut server = Running::start(dir, &["--listen=unix:socket", export, &unlock]);
        match reason {
            None => {
                server.address();
                assert!(server.stop());
            }
            Some(reason) => {
                assert!(!server.status().success(), "{seconds}");
                let errors = server.errors();
                assert!(errors.contains(reason), "{seconds}: {errors}");
            }
        }
    }
}
