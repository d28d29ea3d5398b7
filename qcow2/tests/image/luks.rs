//! Encrypted images, with QEMU as the judge: what it writes we read to the byte, and the other way round. How a LUKS
//! header is laid out is tested beside its code.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use block::{BlockDevice, Durability, ZeroMode};
use bytes::Bytes;
use qcow2::{
    CreateOptions, DEFAULT_UNLOCK_TIME, Error, Feature, Image, KeyChange, KeyCost, KeyError,
    LuksOptions, OpenOptions, Passphrase, Slots, UnlockError,
};

use crate::common::{block_on, pattern, range, read_all};

const SECRET: &str = "open sesame";

/// Runs a program of QEMU with the passphrase as the object `sec0`, and `old` as `sec1`.
fn qemu(program: &str, secret: &str, args: &[&str]) -> String {
    let object = format!("secret,id=sec0,data={secret}");
    let mut all: Vec<&str> = if program == "qemu-img" { vec![args[0]] } else { vec![] };
    all.extend(["--object", &object]);
    all.extend(if program == "qemu-img" { &args[1..] } else { args });
    let output = Command::new(program).args(&all).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && !said.contains("failed"), "{program} {all:?}: {said}");
    said
}

/// The image as QEMU's options name it.
fn opts(path: &Path) -> String {
    format!("driver=qcow2,file.filename={},encrypt.key-secret=sec0", path.display())
}

fn create_by_qemu(path: &Path, secret: &str, more: &str, size: &str, backing: &[&str]) {
    let options = format!("encrypt.format=luks,encrypt.key-secret=sec0,encrypt.iter-time=10{more}");
    let mut args = vec!["create", "-q", "-f", "qcow2", "-o", &options];
    args.extend(backing);
    args.extend([path.to_str().unwrap(), size]);
    qemu("qemu-img", secret, &args);
}

fn raw_by_qemu(path: &Path, secret: &str) -> Vec<u8> {
    let raw = path.with_extension("raw");
    qemu(
        "qemu-img",
        secret,
        &["convert", "--image-opts", &opts(path), "-O", "raw", raw.to_str().unwrap()],
    );
    std::fs::read(raw).unwrap()
}

/// `qemu-img check` exits with 0 for a clean image only.
fn assert_clean(path: &Path, secret: &str) {
    qemu("qemu-img", secret, &["check", "-q", "--image-opts", &opts(path)]);
}

fn reading() -> OpenOptions {
    OpenOptions::reading().passphrase(Passphrase::new(SECRET))
}

fn writing() -> OpenOptions {
    OpenOptions::writing().passphrase(Passphrase::new(SECRET))
}

fn read_file(path: &Path, options: OpenOptions) -> Result<Vec<u8>, Error> {
    block_on(async {
        let image = Image::open(path, options).await?;
        Ok(read_all(&image).await)
    })
}

#[test]
fn what_qemu_encrypts_is_read_in_every_cipher_and_hash() {
    let dir = tempfile::tempdir().unwrap();
    for (name, more) in [
        ("default", ""),
        ("aes-128", ",encrypt.cipher-alg=aes-128,encrypt.hash-alg=sha1,cluster_size=4096"),
        ("plain", ",encrypt.hash-alg=sha512,encrypt.ivgen-alg=plain,cluster_size=2M"),
    ] {
        let path = dir.path().join(name);
        create_by_qemu(&path, SECRET, more, "8M", &[]);
        let write = [
            "-c",
            "write -P 0x5a 12345 1000000",
            "-c",
            "write -z 2M 64k",
            "-c",
            "write -P 7 8388607 1",
        ];
        let opts = opts(&path);
        let mut args = vec!["--image-opts"];
        args.extend(write);
        args.push(&opts);
        qemu("qemu-io", SECRET, &args);
        let mut model = vec![0; 8 << 20];
        model[12345..1_012_345].fill(0x5a);
        model[8_388_607] = 7;
        assert!(read_file(&path, reading()).unwrap() == model, "{name}");
        let bytes = std::fs::read(&path).unwrap();
        assert!(
            !bytes.windows(64).any(|window| window == [0x5a; 64]),
            "{name}: plain text on disk"
        );
    }
}

#[test]
fn no_passphrase_and_a_wrong_one_are_refused_and_say_so() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    create(&path, SECRET, 65_536, |_| {});
    let without = read_file(&path, OpenOptions::reading());
    assert!(matches!(without, Err(Error::Locked { reason: UnlockError::NoPassphrase, .. })));
    let wrong = OpenOptions::reading().passphrase(Passphrase::new("open barley"));
    assert!(!format!("{wrong:?}").contains("barley"));
    let refused = read_file(&path, wrong.clone());
    assert!(matches!(refused, Err(Error::Locked { reason: UnlockError::WrongPassphrase, .. })));
    // One that fits among several is enough.
    assert!(read_file(&path, wrong.passphrase(Passphrase::new(SECRET))).is_ok());
}

/// Where the LUKS header of an image starts.
fn luks_at(bytes: &[u8]) -> usize {
    bytes.windows(8).position(|window| window == b"LUKS\xba\xbe\0\x01").unwrap()
}

#[test]
fn a_header_may_hold_anything_and_what_we_do_not_have_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    create(&path, SECRET, 65_536, |_| {});
    let good = std::fs::read(&path).unwrap();
    let base = luks_at(&good);
    let with = |at: usize, bytes: &[u8]| {
        let mut bad = good.clone();
        bad[base + at..base + at + bytes.len()].copy_from_slice(bytes);
        std::fs::write(&path, bad).unwrap();
        read_file(&path, reading())
    };
    for (at, text, wanted) in [
        (8, &b"serpent\0"[..], "serpent-xts-plain64 with a key of 512 bits"),
        (40, b"cbc-essiv:sha256\0", "aes-cbc-essiv:sha256 with a key of 512 bits"),
        (108, &[0, 0, 0, 48], "aes-xts-plain64 with a key of 384 bits"),
    ] {
        match with(at, text) {
            Err(Error::Unsupported { feature: Feature::LuksCipher(name), .. }) => {
                assert_eq!(name, wanted);
            }
            other => panic!("{other:?}"),
        }
    }
    let version = with(6, &[0, 2]);
    assert!(matches!(version, Err(Error::Unsupported { feature: Feature::LuksVersion(2), .. })));
    let hash = with(72, b"md5\0");
    assert!(matches!(hash, Err(Error::Unsupported { feature: Feature::LuksHash(_), .. })));
    let slow = with(212, &[0xff; 4]);
    assert!(matches!(slow, Err(Error::Locked { reason: UnlockError::TooMuchWork { .. }, .. })));
    // Fields of four bytes at their edges: refused, or (where nothing depends on them) opened to the same disk.
    let numbers = [0u32, 1, 7, 8, 0x7fff_ffff, 0x8000_0000, u32::MAX];
    let fields = (104..112).chain(164..168).chain(208..592).step_by(4);
    for at in fields.filter(|at| *at < 208 || (at - 208) % 48 < 8 || (at - 208) % 48 >= 40) {
        for number in numbers {
            match with(at, &number.to_be_bytes()) {
                Ok(disk) => assert!(disk == vec![0; 2 << 20]),
                Err(Error::Corrupt { .. } | Error::Unsupported { .. } | Error::Locked { .. }) => {}
                Err(other) => panic!("{at}: {other}"),
            }
        }
    }
}

/// The slot that asks for too much, its rounds and the limit.
fn too_much<T: std::fmt::Debug>(result: Result<T, Error>) -> (usize, u64, u64) {
    match result {
        Err(Error::Locked { reason: UnlockError::TooMuchWork { slot, rounds, limit }, .. }) => {
            (slot, rounds, limit)
        }
        other => panic!("{other:?}"),
    }
}

/// Changes the rounds that a key slot asks for.
fn set_rounds(path: &Path, slot: usize, rounds: u32) {
    let mut bytes = std::fs::read(path).unwrap();
    let at = luks_at(&bytes) + 208 + slot * 48 + 4;
    bytes[at..at + 4].copy_from_slice(&rounds.to_be_bytes());
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn a_luks_header_that_breaks_a_rule_is_refused_by_field_place_and_value() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    create(&path, SECRET, 65_536, |_| {});
    let good = std::fs::read(&path).unwrap();
    let base = luks_at(&good);
    let said = |at: usize, bytes: &[u8]| {
        let mut bad = good.clone();
        bad[at..at + bytes.len()].copy_from_slice(bytes);
        std::fs::write(&path, bad).unwrap();
        read_file(&path, reading()).map(drop).unwrap_err().to_string()
    };
    let be4 = u32::to_be_bytes;
    let broken: &[(usize, &[u8], &str)] = &[
        (0, b"LUKX", "field magic holds 1280658264, which the format forbids"),
        (6, &[0, 0], "field version holds 0, which the format forbids"),
        (8, &[b'a'; 32], "field cipher-name is no text that ends"),
        (40, b"\x07", "field cipher-mode is no text that ends"),
        (72, b"\0", "field hash-spec is no text that ends"),
        (104, &be4(7), "field payload-offset holds 7, which the format forbids"),
        (164, &be4(0), "field mk-digest-iter holds 0, which the format forbids"),
        (208, &be4(5), "field key slot state holds 5, which the format forbids"),
        (212, &be4(0), "field key slot iterations holds 0, which the format forbids"),
        (252, &be4(3999), "field key slot stripes holds 3999, which the format forbids"),
    ];
    for (at, bytes, wanted) in broken {
        let place = format!("{} is corrupt at {:#x}: LUKS header ", path.display(), base + at);
        assert_eq!(said(base + at, bytes), place + wanted);
    }
    for (slot, sector) in [(0, be4(0)), (3, be4(8)), (7, be4(u32::MAX))] {
        let at = base + 208 + slot * 48 + 40;
        let text = said(at, &sector);
        // Of two that overlap the first is named.
        let named = if slot == 3 { 0 } else { slot };
        let rule = format!("the material of LUKS key slot {named} overlaps what it must not");
        assert!(text.ends_with(&rule), "{text}");
    }
    // What the header of the image says of it: extension 0x0537be77 holds its place and its length.
    let pointer = good.windows(4).position(|four| four == [0x05, 0x37, 0xbe, 0x77]).unwrap() + 8;
    let len = u64::from_be_bytes(good[pointer + 8..pointer + 16].try_into().unwrap());
    for (at, bytes) in [(base as u64 + 512, len), (1 << 40, len), (base as u64, 1 << 40)] {
        let text = said(pointer, &[at.to_be_bytes(), bytes.to_be_bytes()].concat());
        let rule = format!(
            "the encryption header of {bytes} bytes at {at:#x} is not in clusters of this file"
        );
        assert!(text.ends_with(&rule), "{text}");
    }
}

#[test]
fn work_that_takes_too_long_is_refused_unless_it_is_allowed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    create(&path, SECRET, 65_536, |options| {
        let luks = options.encryption.as_mut().unwrap();
        luks.cost = KeyCost::Rounds(3000);
    });
    let open = |unlock_time| read_file(&path, OpenOptions { unlock_time, ..reading() });
    // 3000 rounds for the slot, and the least that a digest may take.
    assert_eq!(too_much(open(Duration::ZERO)), (0, 4000, 0));
    let (_, rounds, limit) = too_much(open(Duration::from_micros(1)));
    assert!(rounds == 4000 && limit < rounds);
    assert!(open(DEFAULT_UNLOCK_TIME).is_ok());
    set_rounds(&path, 0, 0x4000_0000);
    let (_, rounds, limit) = too_much(open(DEFAULT_UNLOCK_TIME));
    assert!(rounds == 0x4000_0000 + 1000 && limit > 4000, "{rounds} {limit}");
}

fn add_key(path: &Path, added: &str, cost: KeyCost) {
    block_on(async {
        let image = Image::open(path, writing()).await.unwrap();
        let (existing, added) = (Passphrase::new(SECRET), Passphrase::new(added));
        let change = KeyChange::Add { existing, added, slot: None, cost, force: false };
        image.change_keys(&change).await.unwrap();
        image.close().await.unwrap();
    });
}

#[test]
fn a_slot_that_asks_for_too_much_hides_no_other_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    create(&path, SECRET, 65_536, |_| {});
    add_key(&path, "two", KeyCost::Rounds(1000));
    add_key(&path, "three", KeyCost::Rounds(1000));
    set_rounds(&path, 0, u32::MAX);
    set_rounds(&path, 1, u32::MAX);
    let open =
        |secret: &str| read_file(&path, OpenOptions::reading().passphrase(Passphrase::new(secret)));
    assert!(open("three").is_ok());
    let (slot, rounds, _) = too_much(open(SECRET));
    assert_eq!((slot, rounds), (0, u64::from(u32::MAX) + 1000));
    // It cannot be told whether the passphrase opens those slots, too.
    block_on(async {
        let options = OpenOptions::writing().passphrase(Passphrase::new("three"));
        let image = Image::open(&path, options).await.unwrap();
        let slots = Slots::OpenedBy(Passphrase::new("three"));
        let removed = image.change_keys(&KeyChange::Remove { slots, force: true }).await;
        assert_eq!(too_much(removed).0, 0);
        image.close().await.unwrap();
    });
    assert!(open("three").is_ok());
}

#[test]
fn the_work_is_bounded_for_each_slot_and_not_for_all() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    // Each of eight slots asks for a quarter of what one may ask for: together it is twice as much.
    let unlock_time = Duration::from_millis(30);
    let measured = dir.path().join("measured.qcow2");
    create(&measured, SECRET, 65_536, |_| {});
    set_rounds(&measured, 0, u32::MAX);
    let (_, _, limit) = too_much(read_file(&measured, OpenOptions { unlock_time, ..reading() }));
    let cost = KeyCost::Rounds(u32::try_from(limit / 2).unwrap());
    let unlock_time = unlock_time * 2;
    create(&path, SECRET, 65_536, |options| options.encryption.as_mut().unwrap().cost = cost);
    (1..8).for_each(|slot| add_key(&path, &slot.to_string(), cost));
    let open = |secret: &str| {
        let options = OpenOptions::reading().passphrase(Passphrase::new(secret));
        read_file(&path, OpenOptions { unlock_time, ..options })
    };
    assert!(open("7").is_ok());
    let wrong = open("8");
    assert!(
        matches!(wrong, Err(Error::Locked { reason: UnlockError::WrongPassphrase, .. })),
        "{wrong:?}"
    );
}

#[test]
fn an_image_with_the_default_cost_of_qemu_opens_by_the_last_of_its_keys() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    let options = "encrypt.format=luks,encrypt.key-secret=sec0";
    let name = path.to_str().unwrap();
    qemu("qemu-img", SECRET, &["create", "-q", "-f", "qcow2", "-o", options, name, "1M"]);
    for added in ["two", "three"] {
        let object = format!("secret,id=sec1,data={added}");
        let change = "encrypt.state=active,encrypt.new-secret=sec1";
        let image = opts(&path);
        let line = ["amend", "--object", &object, "--image-opts", "-o", change, &image];
        qemu("qemu-img", SECRET, &line);
    }
    // The last of the slots, behind all others; each try costs seconds.
    let open =
        |secret: &str| read_file(&path, OpenOptions::reading().passphrase(Passphrase::new(secret)));
    assert!(open("three").is_ok());
    let wrong = open("four");
    assert!(
        matches!(wrong, Err(Error::Locked { reason: UnlockError::WrongPassphrase, .. })),
        "{wrong:?}"
    );
}

#[test]
fn a_key_costs_what_this_machine_does_in_the_time_asked_for_and_not_too_little() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    create(&path, SECRET, 65_536, |options| {
        options.encryption.as_mut().unwrap().cost = KeyCost::Milliseconds(1);
    });
    assert!(read_file(&path, reading()).unwrap() == vec![0; 2 << 20]);
    assert_eq!(raw_by_qemu(&path, SECRET).len(), 2 << 20);
    let bytes = std::fs::read(&path).unwrap();
    let rounds = &bytes[luks_at(&bytes) + 212..][..4];
    assert!(u32::from_be_bytes(rounds.try_into().unwrap()) >= 1000);
}

#[test]
fn legacy_aes_is_refused_with_advice() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    crate::common::qemu_create(&path, "compat=1.1", "1M", None);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[35] = 1;
    std::fs::write(&path, bytes).unwrap();
    let error = read_file(&path, reading()).unwrap_err();
    assert!(matches!(error, Error::Unsupported { feature: Feature::LegacyEncryption, .. }));
    assert!(error.to_string().contains("convert"), "{error}");
}

#[test]
fn what_we_write_in_any_pieces_qemu_reads() {
    let dir = tempfile::tempdir().unwrap();
    for (name, more) in [("64k", ""), ("4k", ",cluster_size=4k,encrypt.cipher-alg=aes-128")] {
        let path = dir.path().join(name);
        create_by_qemu(&path, SECRET, more, "2M", &[]);
        let mut model = vec![0; 2 << 20];
        block_on(async {
            let image = Image::open(&path, writing()).await.unwrap();
            for (seed, (at, len)) in [
                (100, 5),
                (511, 2),
                (512, 512),
                (4000, 70_000),
                (65_536, 65_536),
                (65_000, 3),
                (2_097_151, 1),
                (1_000_001, 300_000),
                (70_000, 513),
            ]
            .into_iter()
            .enumerate()
            {
                let bytes = pattern(seed as u64 + 1, len);
                model[at..at + len].copy_from_slice(&bytes);
                image.write(at as u64, bytes.into(), Durability::Deferred).await.unwrap();
            }
            image
                .write_zeroes(range(66_000, 700), ZeroMode::default(), Durability::Deferred)
                .await
                .unwrap();
            model[66_000..66_700].fill(0);
            image.discard(range(1 << 20, 128 << 10), Durability::Deferred).await.unwrap();
            model[1 << 20..(1 << 20) + (128 << 10)].fill(0);
            let all = read_all(&image).await;
            let first = all.iter().zip(&model).position(|(a, b)| a != b);
            assert_eq!(first, None, "{name}");
            image.close().await.unwrap();
        });
        assert!(raw_by_qemu(&path, SECRET) == model, "{name}");
        assert_clean(&path, SECRET);
    }
}

/// Makes an image by ourselves: cheap keys, for tests that only need some.
fn create(path: &Path, secret: &str, cluster_bytes: u32, how: impl Fn(&mut CreateOptions)) {
    let mut options = CreateOptions::new(2 << 20).cluster_bytes(cluster_bytes);
    let cost = KeyCost::Rounds(1000);
    options.encryption = Some(LuksOptions { cost, ..LuksOptions::new(Passphrase::new(secret)) });
    how(&mut options);
    block_on(Image::create(path, &options)).unwrap();
}

#[test]
fn what_we_encrypt_is_read_by_qemu_through_writes_of_any_size() {
    let dir = tempfile::tempdir().unwrap();
    let below = dir.path().join("below.qcow2");
    create(&below, "below", 4096, |_| {});
    let mut model = pattern(99, 1_500_000);
    model.resize(2 << 20, 0);
    block_on(async {
        let options = OpenOptions::writing().passphrase(Passphrase::new("below"));
        let image = Image::open(&below, options).await.unwrap();
        image.write(0, model.clone().into(), Durability::Deferred).await.unwrap();
        image.close().await.unwrap();
    });
    for (name, cluster_bytes, extended) in
        [("a", 512, false), ("b", 65_536, false), ("c", 16_384, true), ("d", 2 << 20, false)]
    {
        let path = dir.path().join(name);
        create(&path, SECRET, cluster_bytes, |options| {
            options.extended_l2 = extended;
            options.backing = Some(qcow2::BackingName {
                path: "below.qcow2".to_owned(),
                format: qcow2::BackingFormat::Qcow2,
            });
        });
        let mut model = model.clone();
        block_on(async {
            let both = writing().passphrase(Passphrase::new("below"));
            let image = Image::open(&path, both).await.unwrap();
            for step in 0..120u64 {
                let at = step.wrapping_mul(0x9e37_79b9_7f4a_7c15) % ((2 << 20) - 70_000);
                let len = [1, 3, 511, 512, 513, 4096, 70_000][usize::try_from(step % 7).unwrap()];
                let start = usize::try_from(at).unwrap();
                let place = &mut model[start..start + len];
                if step % 5 == 4 {
                    let zeros = range(at, len as u64);
                    let mode = ZeroMode { keep_allocated: step % 2 == 0, fast_only: false };
                    image.write_zeroes(zeros, mode, Durability::Deferred).await.unwrap();
                    place.fill(0);
                } else {
                    let bytes = pattern(step + 1, len);
                    place.copy_from_slice(&bytes);
                    image.write(at, bytes.into(), Durability::Deferred).await.unwrap();
                }
            }
            assert!(read_all(&image).await == model, "{name}");
            image.close().await.unwrap();
        });
        let raw = dir.path().join("raw");
        let options = format!("{},backing.encrypt.key-secret=sec1", opts(&path));
        let sealed = ["convert", "--object", "secret,id=sec1,data=below", "--image-opts", &options];
        qemu("qemu-img", SECRET, &[&sealed[..], &["-O", "raw", raw.to_str().unwrap()]].concat());
        assert!(std::fs::read(&raw).unwrap() == model, "{name}");
        let options = format!("{},backing.encrypt.key-secret=sec1", opts(&path));
        let check =
            ["check", "-q", "--object", "secret,id=sec1,data=below", "--image-opts", &options];
        qemu("qemu-img", SECRET, &check);
    }
}

#[test]
fn layers_of_a_chain_have_their_own_passphrases_or_none() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.qcow2");
    create_by_qemu(&base, "below", "", "4M", &[]);
    let middle = dir.path().join("middle.qcow2");
    crate::common::qemu_create(&middle, "cluster_size=4096", "4M", Some("base.qcow2"));
    let top = dir.path().join("top.qcow2");
    create_by_qemu(&top, SECRET, ",cluster_size=16k", "4M", &["-b", "middle.qcow2", "-F", "qcow2"]);
    let (below, between, above) = (pattern(1, 3 << 20), pattern(2, 9000), pattern(3, 777));
    let mut model = vec![0; 4 << 20];
    for (at, bytes) in [(5000, &below), (20_000, &between), (21_000, &above)] {
        model[at..at + bytes.len()].copy_from_slice(bytes);
    }
    let both = |options: OpenOptions| options.passphrase(Passphrase::new("below"));
    block_on(async {
        for (path, at, bytes) in
            [(&base, 5000, below), (&middle, 20_000, between), (&top, 21_000, above)]
        {
            let image = Image::open(path, both(writing())).await.unwrap();
            image.write(at, Bytes::from(bytes), Durability::Deferred).await.unwrap();
            image.close().await.unwrap();
        }
    });
    assert!(read_file(&top, both(reading())).unwrap() == model);
    let locked = read_file(&top, reading());
    assert!(matches!(locked, Err(Error::Locked { file, .. }) if file.ends_with("base.qcow2")));
}

#[test]
fn keys_are_added_and_removed_and_qemu_opens_by_those_that_are_left() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    create(&path, SECRET, 65_536, |_| {});
    let change = |change: KeyChange| {
        block_on(async {
            let image = Image::open(
                &path,
                OpenOptions::writing()
                    .passphrase(Passphrase::new(SECRET))
                    .passphrase(Passphrase::new("two")),
            )
            .await?;
            image.change_keys(&change).await?;
            image.close().await?;
            Ok::<_, Error>(())
        })
    };
    let key = |error: Error| match error {
        Error::Key { reason, .. } => reason,
        other => panic!("{other}"),
    };
    let add = |added: &str, slot, force| KeyChange::Add {
        existing: Passphrase::new(SECRET),
        added: Passphrase::new(added),
        slot,
        cost: KeyCost::Rounds(1000),
        force,
    };
    let remove = |slots, force| KeyChange::Remove { slots, force };
    let only = change(remove(Slots::One(0), false)).map_err(key);
    assert_eq!(only, Err(KeyError::LastKey));
    for slot in 1..8 {
        change(add("two", if slot % 2 == 0 { None } else { Some(slot) }, false)).unwrap();
    }
    assert_eq!(change(add("nine", None, false)).map_err(key), Err(KeyError::NoFreeSlot));
    assert_eq!(change(add("nine", Some(3), false)).map_err(key), Err(KeyError::SlotInUse(3)));
    assert_eq!(change(add("nine", Some(8), true)).map_err(key), Err(KeyError::NoSuchSlot(8)));
    change(add("six", Some(6), true)).unwrap();
    for secret in [SECRET, "two", "six"] {
        assert_eq!(raw_by_qemu(&path, secret).len(), 2 << 20, "{secret}");
    }
    change(remove(Slots::One(5), false)).unwrap();
    assert_eq!(change(remove(Slots::One(5), false)).map_err(key), Err(KeyError::SlotEmpty(5)));
    change(remove(Slots::OpenedBy(Passphrase::new(SECRET)), false)).unwrap();
    let gone = read_file(&path, reading());
    assert!(matches!(gone, Err(Error::Locked { reason: UnlockError::WrongPassphrase, .. })));
    for secret in ["two", "six"] {
        assert_eq!(raw_by_qemu(&path, secret).len(), 2 << 20, "{secret}");
    }
    assert_clean(&path, "six");
}
