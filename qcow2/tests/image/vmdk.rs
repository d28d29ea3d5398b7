//! VMDK images read as devices, against what `qemu-img` makes of the same files. Writing VMDK is nobody's business
//! here.

use std::path::Path;

use block::{BlockDevice, ByteRange};
use qcow2::{
    BackingFormat, CreateOptions, Error, Image, OpenOptions, ReferenceError, References, Vmdk,
    VmdkError,
};

use crate::common::{block_on, pattern, qemu_img, range, read_all};

const SUBFORMATS: [&str; 5] = [
    "monolithicSparse",
    "monolithicFlat",
    "twoGbMaxExtentSparse",
    "twoGbMaxExtentFlat",
    "streamOptimized",
];

/// A disk with data, zeros and an odd end, and a VMDK of it.
fn make(dir: &Path, subformat: &str) -> (std::path::PathBuf, Vec<u8>) {
    let mut disk = vec![0; (5 << 20) + 3 * 512];
    for (at, len) in [(0, 512), (70_000, 200_000), (3 << 20, 65_536), (disk.len() - 700, 700)] {
        disk[at..at + len].copy_from_slice(&pattern(at as u64 + 1, len));
    }
    disk[2 << 20..(2 << 20) + 300_000].fill(0x11);
    let raw = dir.join("disk.raw");
    std::fs::write(&raw, &disk).unwrap();
    let path = dir.join(format!("{subformat}.vmdk"));
    let option = format!("subformat={subformat}");
    let [from, to] = [&raw, &path].map(|path| path.to_str().unwrap());
    qemu_img(&["convert", "-f", "raw", "-O", "vmdk", "-o", &option, from, to]);
    (path, disk)
}

async fn read_device(device: &dyn BlockDevice) -> Vec<u8> {
    let size = device.limits().size_bytes;
    let mut all = Vec::new();
    for piece in ByteRange::between(0, size).pieces(1_500_001) {
        all.extend(device.read(piece).await.unwrap().to_vec());
    }
    all
}

async fn open(path: &Path) -> Result<Vmdk, Error> {
    Vmdk::open(path, &OpenOptions::reading()).await
}

#[test]
fn every_subformat_that_qemu_makes_reads_like_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    for subformat in SUBFORMATS {
        let (path, disk) = make(dir.path(), subformat);
        block_on(async {
            let device = open(&path).await.unwrap();
            assert!(read_device(&device).await == disk, "{subformat}");
            let mut at = 0;
            while at < disk.len() as u64 {
                let rest = ByteRange::between(at, disk.len() as u64);
                for extent in device.extents(rest).await.unwrap() {
                    assert_eq!(extent.range.start(), at);
                    at = extent.range.end();
                    let [from, to] =
                        [extent.range.start(), at].map(|at| usize::try_from(at).unwrap());
                    let bytes = &disk[from..to];
                    assert!(!extent.zero || bytes.iter().all(|byte| *byte == 0), "{subformat}");
                }
            }
            device.close().await.unwrap();
            assert!(device.read(range(0, 1)).await.is_err());
        });
    }
}

#[test]
fn a_vmdk_can_lie_below_an_image() {
    let dir = tempfile::tempdir().unwrap();
    let (path, mut disk) = make(dir.path(), "streamOptimized");
    let top = dir.path().join("top.qcow2");
    block_on(async {
        let name = path.file_name().unwrap().to_str().unwrap();
        let options = CreateOptions::new(6 << 20).backing(name, BackingFormat::Vmdk);
        Image::create(&top, &options).await.unwrap();
        let image = Image::open(&top, OpenOptions::writing()).await.unwrap();
        disk.resize(6 << 20, 0);
        disk[100_000..100_004].copy_from_slice(b"ours");
        image.write(100_000, (&b"ours"[..]).into(), block::Durability::Deferred).await.unwrap();
        assert!(read_all(&image).await == disk);
        image.close().await.unwrap();
    });
    assert!(crate::common::raw_of(&top) == disk);
}

/// Reads parts of the disk by many tasks at once, each of which must get its own.
async fn assert_reads_at_once(device: Vmdk, disk: &[u8], what: &str) {
    let device = std::sync::Arc::new(device);
    let reads = (0..40u64).map(|number| {
        let (device, start) = (std::sync::Arc::clone(&device), number * 131_071);
        tokio::spawn(async move { (start, device.read(range(start, 99_999)).await) })
    });
    for read in reads.collect::<Vec<_>>() {
        let (start, bytes) = read.await.unwrap();
        let from = usize::try_from(start).unwrap();
        assert!(bytes.unwrap().to_vec() == disk[from..from + 99_999], "{what}: {start}");
    }
}

#[test]
fn many_readers_at_once_get_their_own_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let (path, disk) = make(dir.path(), "monolithicSparse");
    block_on(async {
        assert_reads_at_once(open(&path).await.unwrap(), &disk, "as it is").await;
    });
}

#[test]
fn extents_stay_in_the_folder() {
    let dir = tempfile::tempdir().unwrap();
    let inner = dir.path().join("inner");
    std::fs::create_dir(&inner).unwrap();
    let (path, disk) = make(&inner, "monolithicFlat");
    let flat = inner.join("monolithicFlat-flat.vmdk");
    let outside = dir.path().join("elsewhere");
    std::fs::rename(&flat, &outside).unwrap();
    std::os::unix::fs::symlink(&outside, &flat).unwrap();
    block_on(async {
        let refused = open(&path).await.map(drop);
        let reason = ReferenceError::Outside {
            target: outside.canonicalize().unwrap(),
            root: inner.canonicalize().unwrap(),
        };
        assert!(matches!(refused, Err(Error::Reference { reason: found, .. }) if found == reason));
        let wide = OpenOptions::reading().references(References::Under(dir.path().to_owned()));
        assert!(read_device(&Vmdk::open(&path, &wide).await.unwrap()).await == disk);
        for name in ["../elsewhere", "/etc/passwd", "/dev/zero", "."] {
            let text = std::fs::read_to_string(&path).unwrap();
            let other = inner.join("other.vmdk");
            std::fs::write(&other, text.replace("monolithicFlat-flat.vmdk", name)).unwrap();
            assert!(open(&other).await.is_err(), "{name}");
        }
    });
}

#[test]
fn what_takes_the_place_of_an_open_file_is_never_read() {
    let dir = tempfile::tempdir().unwrap();
    for subformat in SUBFORMATS {
        let inner = dir.path().join(subformat);
        std::fs::create_dir(&inner).unwrap();
        let (path, disk) = make(&inner, subformat);
        std::fs::remove_file(inner.join("disk.raw")).unwrap();
        block_on(async {
            let device = open(&path).await.unwrap();
            // A stranger's disk in the same shape, behind links in the place of every file.
            let strange = dir.path().join(format!("{subformat}-strange"));
            std::fs::create_dir(&strange).unwrap();
            for file in std::fs::read_dir(&inner).unwrap().map(|file| file.unwrap()) {
                let other = strange.join(file.file_name());
                let mut bytes = std::fs::read(file.path()).unwrap();
                bytes.iter_mut().skip(70_000).for_each(|byte| *byte ^= 0x55);
                std::fs::write(&other, bytes).unwrap();
                std::fs::remove_file(file.path()).unwrap();
                std::os::unix::fs::symlink(&other, file.path()).unwrap();
            }
            assert_reads_at_once(device, &disk, subformat).await;
        });
    }
}

#[test]
fn extents_say_what_they_hold_and_may_hold_no_less() {
    let dir = tempfile::tempdir().unwrap();
    let (sparse, disk) = make(dir.path(), "monolithicSparse");
    // One that was compressed as a whole can be one of several, too.
    let (packed, _) = make(dir.path(), "streamOptimized");
    let [sparse, packed] =
        [sparse, packed].map(|path| path.file_name().unwrap().to_str().unwrap().to_owned());
    let sectors = disk.len() / 512;
    let path = dir.path().join("all.vmdk");
    let put = |lines: &str| {
        let head = "# Disk DescriptorFile\nparentCID=ffffffff\ncreateType=\"custom\"\n";
        std::fs::write(&path, format!("{head}{lines}")).unwrap();
    };
    put(&format!(
        "RW {sectors} SPARSE \"{sparse}\"\nRW 8 ZERO\nRW {sectors} SPARSE \"{packed}\"\n\
         RW 100 FLAT \"disk.raw\" 6144\n"
    ));
    let wanted = [&disk[..], &[0; 4096], &disk, &disk[3 << 20..][..51200]].concat();
    block_on(async {
        let device = open(&path).await.unwrap();
        assert!(read_device(&device).await == wanted);
        let extents = device.extents(range(0, wanted.len() as u64)).await.unwrap();
        assert!(extents.iter().any(|extent| !extent.allocated), "{extents:?}");
        let last = extents.last().unwrap();
        assert!(last.range.end() == wanted.len() as u64 && last.allocated && !last.zero);
    });
    for line in [
        format!("RW {} SPARSE \"{sparse}\"", sectors + 1),
        format!("RW {} FLAT \"disk.raw\" 1", sectors),
        format!("RW 1 FLAT \"disk.raw\" {}", u64::MAX / 512),
    ] {
        put(&line);
        let refused = block_on(open(&path)).map(drop);
        let short = matches!(&refused, Err(Error::Vmdk { what: VmdkError::ShortExtent(_), .. }));
        assert!(short, "{line}: {refused:?}");
    }
    // It would lie below itself.
    put("RW 1 FLAT \"all.vmdk\"");
    let refused = block_on(open(&path)).map(drop);
    let turns = |reason: &ReferenceError| *reason == ReferenceError::Loop;
    assert!(matches!(refused, Err(Error::Reference { reason, .. }) if turns(&reason)));
}

#[test]
fn a_delta_and_a_descriptor_that_lies_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = make(dir.path(), "monolithicSparse");
    let delta = dir.path().join("delta.vmdk");
    let [below, above] = [&path, &delta].map(|path| path.to_str().unwrap());
    qemu_img(&["create", "-q", "-f", "vmdk", "-b", below, "-F", "vmdk", above]);
    block_on(async {
        let refused = open(&delta).await.map(drop);
        assert!(matches!(refused, Err(Error::Vmdk { what: VmdkError::Parent, .. })));
    });
    let (path, _) = make(dir.path(), "twoGbMaxExtentFlat");
    let text = std::fs::read_to_string(&path).unwrap();
    for (from, to) in [
        ("RW ", "RW 18446744073709551615 FLAT \"twoGbMaxExtentFlat-f001.vmdk\" 0\nRW "),
        ("RW ", "RW 9 STRANGE \"twoGbMaxExtentFlat-f001.vmdk\"\nRW "),
        ("RW ", "RW x FLAT \"twoGbMaxExtentFlat-f001.vmdk\" 0\nRW "),
        ("twoGbMaxExtentFlat\"", "nothing\""),
    ] {
        std::fs::write(&path, text.replacen(from, to, 1)).unwrap();
        let refused = block_on(open(&path)).map(drop);
        assert!(matches!(refused, Err(Error::Vmdk { .. })), "{to}: {refused:?}");
    }
}

#[test]
fn damage_is_an_error_and_never_a_panic() {
    let dir = tempfile::tempdir().unwrap();
    for subformat in ["monolithicSparse", "streamOptimized"] {
        let (path, _) = make(dir.path(), subformat);
        let good = std::fs::read(&path).unwrap();
        let mut damaged = 0;
        for at in (0..80).step_by(4) {
            for value in [0, 1, 0x7fff_ffff, u32::MAX] {
                let mut bytes = good.clone();
                bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
                std::fs::write(&path, &bytes).unwrap();
                block_on(async {
                    let Ok(device) = open(&path).await else {
                        damaged += 1;
                        return;
                    };
                    let size = device.limits().size_bytes;
                    let _any = device.read(ByteRange::between(0, size.min(6 << 20))).await;
                    let _any = device.extents(ByteRange::between(0, size)).await;
                });
            }
        }
        assert!(damaged > 10, "{subformat}: {damaged}");
        for cut in [0, 1, 511, 512, 70_000, good.len() / 2, good.len() - 1] {
            std::fs::write(&path, &good[..cut]).unwrap();
            block_on(async {
                if let Ok(device) = open(&path).await {
                    let _any = device.read(range(0, device.limits().size_bytes)).await;
                }
            });
        }
    }
}

#[test]
fn what_is_no_vmdk_that_can_be_read_is_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let said = |path: &Path| {
        let refused = block_on(open(path)).map(drop).unwrap_err();
        assert!(matches!(refused, Error::Vmdk { .. }), "{refused}");
        let text = refused.to_string();
        let start = format!("{} is no VMDK that can be read: ", path.display());
        text.strip_prefix(&start).unwrap_or_else(|| panic!("{text}")).to_owned()
    };
    let other = dir.path().join("other.vmdk");
    std::fs::write(&other, format!("# Disk DescriptorFile\n{}", "#\n".repeat(1 << 19))).unwrap();
    assert_eq!(said(&other), "a descriptor of 1048598 bytes");
    std::fs::write(&other, pattern(1, 4096)).unwrap();
    assert!(!said(&other).is_empty());

    let (path, _) = make(dir.path(), "monolithicSparse");
    let [below, above] = [&path, &other].map(|path| path.to_str().unwrap());
    qemu_img(&["create", "-q", "-f", "vmdk", "-b", below, "-F", "vmdk", above]);
    assert_eq!(said(&other), "it is a delta, which needs its parent: consolidate it first");
}

#[test]
fn a_vmdk_takes_no_change_and_no_range_behind_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let (path, disk) = make(dir.path(), "monolithicSparse");
    block_on(async {
        let device = open(&path).await.unwrap();
        assert_eq!(device.path(), path);
        let (part, later) = (range(0, 512), block::Durability::Deferred);
        for refused in [
            device.write(0, vec![1; 512].into(), later).await,
            device.write_zeroes(part, block::ZeroMode::default(), later).await,
            device.discard(part, later).await,
        ] {
            assert!(matches!(refused, Err(block::DeviceError::ReadOnly)), "{refused:?}");
        }
        device.flush().await.unwrap();
        let behind = range(disk.len() as u64 - 1, 2);
        for refused in [device.read(behind).await.map(drop), device.extents(behind).await.map(drop)]
        {
            let past = matches!(refused, Err(block::DeviceError::PastEnd { .. }));
            assert!(past, "{refused:?}");
        }
        assert_eq!(device.extents(range(100, 0)).await.unwrap(), []);
        // The extent is cut while it is open: an error, not zeros.
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(70_000).unwrap();
        let cut = device.read(range(0, disk.len() as u64)).await.map(drop).unwrap_err();
        assert_eq!(cut.kind(), block::ErrorKind::Io, "{cut}");
        device.close().await.unwrap();
        device.close().await.unwrap();
    });
}
