//! Sound images of every kind, as small as they can be: what the lies are told with.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use block::{BlockDevice, ByteRange, Durability, HostFile, MemoryDevice, MemoryStorage, ZeroMode};
use bytes::Bytes;
use qcow2::{
    BackingFormat, Compression, CreateOptions, Image, KeyCost, LuksCipher, LuksOptions,
    OpenOptions, Passphrase,
};

/// What opens the encrypted image.
pub(crate) const SECRET: &str = "open sesame";

/// A sound image, closed.
pub(crate) struct Sample {
    pub(crate) name: &'static str,
    pub(crate) bytes: Vec<u8>,
}

/// The names of all kinds.
pub(crate) const KINDS: [&str; 13] = [
    "plain",
    "v2",
    "large",
    "narrow",
    "wide",
    "extended",
    "deflate",
    "zstd",
    "snapshots",
    "bitmaps",
    "data_file",
    "raw_data_file",
    "backing",
];

/// The image of a kind, or the encrypted one.
pub(crate) async fn sample(name: &'static str) -> Sample {
    let small = CreateOptions::new((100 << 10) + 512).cluster_bytes(512);
    let bytes = match name {
        "plain" => written(small, &[Step::Write, Step::Zero]).await,
        "v2" => by_qemu("compat=0.10,cluster_size=512", &["write -P 7 1000 20000"], &[]),
        "large" => {
            let options = CreateOptions::new(64 << 20).cluster_bytes(4096).lazy_refcounts(true);
            written(options, &[Step::Write, Step::Zero]).await
        }
        "narrow" => written(small.refcount_bits(1), &[Step::Write]).await,
        "wide" => written(small.refcount_bits(64), &[Step::Write, Step::Snapshot]).await,
        "extended" => {
            let options = CreateOptions::new(1 << 20).cluster_bytes(16384).extended_l2(true);
            written(options, &[Step::Write, Step::Zero]).await
        }
        "deflate" | "zstd" => {
            let kind = if name == "zstd" { Compression::Zstd } else { Compression::Deflate };
            let options = CreateOptions::new(256 << 10).cluster_bytes(4096).compression(kind);
            written(options, &[Step::Compressed, Step::Snapshot, Step::Write]).await
        }
        "snapshots" => by_qemu(
            "cluster_size=512,refcount_bits=8",
            &["write -P 7 1000 20000"],
            &[&["snapshot", "-c", "first"], &["snapshot", "-c", "second"]],
        ),
        "bitmaps" => by_qemu(
            "cluster_size=512",
            &["write -P 7 1000 20000"],
            &[&["bitmap", "--add", "-g", "512"], &["bitmap", "--add", "-g", "64k", "--disable"]],
        ),
        "data_file" | "raw_data_file" => {
            let options = small.data_file("data", name == "raw_data_file");
            written(options, &[Step::Write, Step::Zero]).await
        }
        "backing" => written(small.backing("below", BackingFormat::Raw), &[Step::Write]).await,
        "luks" => {
            let luks = LuksOptions {
                cipher: LuksCipher::Aes128Xts,
                cost: KeyCost::Rounds(1000),
                ..LuksOptions::new(Passphrase::new(SECRET))
            };
            let options = CreateOptions::new(256 << 10).cluster_bytes(4096).encryption(luks);
            written(options, &[Step::Write]).await
        }
        other => panic!("no kind {other}"),
    };
    Sample { name, bytes }
}

enum Step {
    Write,
    Zero,
    Compressed,
    Snapshot,
}

async fn written(options: CreateOptions, steps: &[Step]) -> Vec<u8> {
    let storage = MemoryStorage::with_alignment(512);
    let file = |storage: &MemoryStorage| {
        let storage = storage.clone().into_dyn();
        HostFile::from_storage(Path::new("sample.qcow2"), storage).unwrap()
    };
    let data = MemoryStorage::with_alignment(512);
    let data = options.data_file.as_ref().map(|_| file(&data));
    let below = options.backing.as_ref().map(|_| MemoryDevice::read_only(vec![0xb7; 50_000]) as _);
    let below: Option<Arc<dyn BlockDevice>> = below;
    Image::create_with_data(&file(&storage), data.as_ref(), &options).await.unwrap();
    let open = OpenOptions::writing().passphrase(Passphrase::new(SECRET));
    let image = Image::open_parts(file(&storage), data, below, open).await.unwrap();
    let cluster = image.info().cluster_bytes;
    let later = Durability::Deferred;
    for step in steps {
        match step {
            Step::Write => {
                for at in [1000, 40_000, 90_000] {
                    image.write(at, Bytes::from(vec![7; 3000]), later).await.unwrap();
                }
            }
            Step::Zero => {
                let keep = ZeroMode { keep_allocated: true, ..ZeroMode::default() };
                let range = ByteRange::between(cluster * 3, cluster * 5);
                image.write_zeroes(range, keep, later).await.unwrap();
                let range = ByteRange::between(cluster * 6, cluster * 8);
                image.write_zeroes(range, ZeroMode::default(), later).await.unwrap();
            }
            Step::Compressed => {
                for number in 0..6u8 {
                    let text = format!("{number} or so ").into_bytes();
                    let len = usize::try_from(cluster).unwrap();
                    let data = text.iter().copied().cycle().take(len).collect::<Vec<_>>();
                    let at = u64::from(number) * cluster;
                    image.write_compressed(at, data.into()).await.unwrap();
                }
            }
            Step::Snapshot => drop(image.create_snapshot("made by us").await.unwrap()),
        }
    }
    image.close().await.unwrap();
    storage.snapshot()
}

/// Lets QEMU make an image: each command goes to `qemu-img` with the image's name, and a number behind it where it adds
/// a bitmap.
fn by_qemu(options: &str, io: &[&str], commands: &[&[&str]]) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let name = path.to_str().unwrap();
    let run = |program: &str, args: &[&str]| {
        let output = Command::new(program).args(args).output();
        let output = output.unwrap_or_else(|error| panic!("{program} (qemu-utils): {error}"));
        assert!(output.status.success(), "{program} {args:?}: {output:?}");
    };
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, name, "103936"]);
    for (number, command) in commands.iter().enumerate() {
        let bitmap = format!("bitmap {number}");
        let mut args = command.to_vec();
        args.push(name);
        if command[0] == "bitmap" {
            args.push(&bitmap);
        }
        run("qemu-img", &args);
    }
    for command in io {
        run("qemu-io", &["-f", "qcow2", "-c", command, name]);
    }
    std::fs::read(path).unwrap()
}
