//! A corpus of images that lie, made from sound ones of every kind: each field at its limits, each table cut off, each
//! structure over another. None may make the library panic or hang, read or write what is not the image's, or make a
//! sound image worse. `SENDENSE_TEST_ROUNDS=100` tells every lie.

mod anatomy;
#[cfg(feature = "vmdk")]
mod disguised;
mod exercise;
#[cfg(feature = "luks")]
mod locked;
#[path = "../common/rounds.rs"]
mod rounds;
mod samples;

use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

use anatomy::{Anatomy, Mutant};
use block::BlockDevice;
use exercise::{Outcome, exercise};
use qcow2::{BitmapError, CheckOptions, CreateOptions, Error, Image, OpenOptions, Passphrase};
use rounds::rounds;
use samples::{KINDS, SECRET, sample};

/// What nothing takes unless it hangs: the machine may be busy with other tests.
const HANGS_AFTER: Duration = Duration::from_secs(120);

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(future)
}

/// Uses all these images, and says what became of each.
fn use_all(
    mutants: impl Iterator<Item = Mutant>,
    passphrases: &[Passphrase],
) -> Vec<(Mutant, Outcome)> {
    let mut outcomes = Vec::new();
    for mutant in mutants {
        let (tell, hear) = mpsc::channel();
        let (bytes, passphrases) = (mutant.bytes.clone(), passphrases.to_vec());
        let worker = std::thread::spawn(move || {
            let outcome = block_on(exercise(&bytes, &passphrases));
            // Nobody listens any more where this came too late.
            let _late = tell.send(outcome);
        });
        match hear.recv_timeout(HANGS_AFTER) {
            Ok(outcome) => outcomes.push((mutant, outcome)),
            Err(mpsc::RecvTimeoutError::Timeout) => panic!("it hangs where {}", mutant.what),
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                assert!(worker.join().is_ok(), "it breaks where {}", mutant.what);
            }
        }
    }
    outcomes
}

/// A field may hold another number and the image be a sound one all the same: a date, a flag of a reserved area, a
/// cluster that reads as zeros. `qemu-img check` agrees; it never finds, or refuses, what went unnoticed here.
fn assert_sound_to_qemu(kind: &str, liars: &[(Mutant, Outcome)]) {
    let dir = tempfile::tempdir().unwrap();
    for name in ["data", "below"] {
        std::fs::write(dir.path().join(name), vec![0; 103_936]).unwrap();
    }
    // What a name leads to is not asked here, and both are told what opens an image.
    let options = match kind {
        "data_file" | "raw_data_file" => ",data-file.driver=file,data-file.filename=data",
        "luks" => ",encrypt.key-secret=words",
        "backing" => ",backing.driver=raw,backing.file.driver=file,backing.file.filename=below",
        _ => "",
    };
    let words = format!("secret,id=words,data={SECRET}");
    let image = format!("driver=qcow2,file.filename=disk{options}");
    for (Mutant { what, bytes }, _) in
        liars.iter().filter(|(_, outcome)| outcome.opened && outcome.clean)
    {
        std::fs::write(dir.path().join("disk"), bytes).unwrap();
        let mut check = Command::new("qemu-img");
        check.current_dir(dir.path()).args(["check", "-q", "--object", &words]);
        let output = check.args(["--image-opts", &image]).output();
        let output = output.unwrap_or_else(|error| panic!("qemu-img: {error}"));
        let found = String::from_utf8_lossy(&output.stderr);
        let is_stricter = kind == "bitmaps" && is_otherwise_to_qemu(what);
        assert!(output.status.success() || is_stricter, "{kind}: {what}: {found}");
    }
}

/// Where QEMU refuses bitmaps that are none the worse: it counts the bits of a disk by whole sectors and misses the last
/// one, and does not know the flag (2) that says of unknown extra data that it may be ignored.
fn is_otherwise_to_qemu(what: &str) -> bool {
    let size = what.strip_prefix("size is 0x").map(|text| u64::from_str_radix(text, 16).unwrap());
    size.is_some_and(|bytes| bytes % 512 != 0) || what.ends_with("flags is 0x4")
}

/// Tells the lies of one kind of image.
fn lie_with(kind: &'static str, fields: u32, overlaps: u32) {
    let sound = block_on(sample(kind));
    let passphrases = [Passphrase::new(SECRET)];
    let outcome = block_on(exercise(&sound.bytes, &passphrases));
    let all_good = Outcome { opened: true, opened_for_writing: true, clean: true, repaired: true };
    assert_eq!(outcome, all_good, "{kind} as it is");
    let anatomy = Anatomy::of(&sound.bytes);
    let liars = use_all(anatomy.liars(rounds(fields)), &passphrases);
    assert!(!liars.is_empty());
    let noticed = liars.iter().filter(|(_, outcome)| !outcome.opened || !outcome.clean).count();
    assert!(noticed * 4 > liars.len(), "{kind}: {noticed} of {} lies are noticed", liars.len());
    assert_sound_to_qemu(kind, &liars);
    for others in [
        use_all(anatomy.overlaps(rounds(overlaps)), &passphrases),
        use_all(anatomy.stumps(), &passphrases),
    ] {
        assert_sound_to_qemu(kind, &others);
    }
    assert_modest();
}

/// No lie had memory taken for it: everything that was told here needed less than one command may take.
fn assert_modest() {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let kilobytes: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(kilobytes < 512 << 10, "{kilobytes} KiB were in use");
}

macro_rules! kinds {
    ($($kind:ident: $fields:literal, $overlaps:literal;)*) => {
        $(#[test]
        fn $kind() {
            lie_with(stringify!($kind), $fields, $overlaps);
        })*
    };
}

mod an_image_that_lies_is_refused_or_flagged {
    use super::lie_with;

    kinds! {
        plain: 500, 100;
        v2: 300, 50;
        large: 300, 50;
        narrow: 300, 50;
        wide: 300, 100;
        extended: 300, 50;
        deflate: 300, 100;
        zstd: 300, 50;
        snapshots: 500, 100;
        bitmaps: 500, 100;
        data_file: 300, 50;
        raw_data_file: 200, 50;
        backing: 200, 50;
    }

    #[cfg(feature = "luks")]
    kinds! {
        luks: 100, 20;
    }
}

#[test]
fn the_kinds_have_a_sample_each() {
    for kind in KINDS {
        let sample = block_on(sample(kind));
        assert_eq!(sample.name, kind);
        let anatomy = Anatomy::of(&sample.bytes);
        assert!(anatomy.fields.len() > 20 && anatomy.structures.len() > 4, "{kind}");
    }
}

#[test]
fn an_empty_disk_takes_no_bitmap() {
    block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("empty");
        Image::create(&path, &CreateOptions::new(0)).await.unwrap();
        let image = Image::open(&path, OpenOptions::writing()).await.unwrap();
        let refused = image.add_bitmap("of nothing", 512, true).await;
        let reason = BitmapError::EmptyDisk;
        assert!(matches!(refused, Err(Error::Bitmap { reason: found, .. }) if found == reason));
        image.close().await.unwrap();
        let report = Image::check(&path, CheckOptions::default(), |_| {}).await.unwrap();
        assert!(report.is_clean(), "{report:?}");
    });
}

/// The fuzz target begins with an image of every kind. `SENDENSE_WRITE_SEEDS=1` writes them anew.
#[test]
fn the_seeds_of_the_fuzzer_are_sound_images_of_every_kind() {
    for kind in KINDS {
        let fresh = block_on(sample(kind));
        let bytes = seed("qcow2_image", kind, &fresh.bytes);
        let outcome = block_on(exercise(&bytes, &[]));
        assert!(outcome.opened_for_writing && outcome.clean, "{kind}: {outcome:?}");
        // The fixed fields of the header, where sizes and features are told; where tables lie is chance.
        let shape =
            |bytes: &[u8]| (bytes[4..8].to_vec(), bytes[20..36].to_vec(), bytes[72..80].to_vec());
        assert_eq!(shape(&bytes), shape(&fresh.bytes), "{kind} has another shape by now");
    }
}

/// The target of LUKS headers begins with one of which no bit is flipped.
#[cfg(feature = "luks")]
#[test]
fn the_seed_of_the_fuzzer_of_luks_opens_and_flipped_bits_are_refused_or_harmless() {
    let locked = block_on(locked::Locked::new());
    let header = seed("luks", "as_it_is", &[0; 592]);
    assert!(block_on(locked.exercise(&header)));
    let mut refused = 0;
    for byte in (0..header.len()).step_by(3) {
        let mut flips = header.clone();
        flips[byte] = 1 << (byte % 8);
        refused += u32::from(!block_on(locked.exercise(&flips)));
    }
    assert!(refused > 50, "only {refused} flips are noticed");
}

/// Those of the target that reads VMDK, too.
#[cfg(feature = "vmdk")]
#[test]
fn the_seeds_of_the_fuzzer_of_vmdk_can_be_read() {
    let vmdks = disguised::Vmdks::new();
    for subformat in ["monolithicSparse", "streamOptimized", "monolithicFlat"] {
        let bytes = seed("vmdk", subformat, &vmdk_sample(subformat));
        assert!(block_on(vmdks.exercise(&bytes)), "{subformat}");
        for cut in (0..bytes.len()).step_by(bytes.len() / 97 + 1) {
            block_on(vmdks.exercise(&bytes[..cut]));
        }
    }
}

/// A VMDK of 192 KiB of which a third is data; one that names its extent calls it `disk-flat.vmdk`.
#[cfg(feature = "vmdk")]
fn vmdk_sample(subformat: &str) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let mut disk = vec![0; 192 << 10];
    disk[64 << 10..128 << 10].fill(7);
    std::fs::write(dir.path().join("disk.raw"), disk).unwrap();
    let option = format!("subformat={subformat}");
    let line = ["convert", "-f", "raw", "-O", "vmdk", "-o", &option, "disk.raw", "disk.vmdk"];
    let mut convert = Command::new("qemu-img");
    let output = convert.args(line).current_dir(dir.path()).output();
    let output = output.unwrap_or_else(|error| panic!("qemu-img (qemu-utils): {error}"));
    assert!(output.status.success(), "{output:?}");
    std::fs::read(dir.path().join("disk.vmdk")).unwrap()
}

/// The committed seed of a fuzz target, which is `fresh` if seeds are to be written.
fn seed(target: &str, name: &str, fresh: &[u8]) -> Vec<u8> {
    let path = format!("{}/../fuzz/corpus/{target}/{name}", env!("CARGO_MANIFEST_DIR"));
    if std::env::var_os("SENDENSE_WRITE_SEEDS").is_some() {
        std::fs::write(&path, fresh).unwrap();
    }
    std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
}
