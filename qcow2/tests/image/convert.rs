//! Copies between raw files and images in all directions, compared by `qemu-img`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::{BlockDevice, Durability, RawDevice};
use qcow2::{
    CompareOptions, Comparison, ConvertOptions, ConvertTarget, Converted, Image, OpenOptions,
    compare, convert,
};

use crate::common::{block_on, pattern, qemu_check, qemu_create, qemu_img, qemu_io};
use crate::compressed::mixed;

struct Files {
    dir: tempfile::TempDir,
}

impl Files {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A raw file with data, zeros and holes.
    fn raw(&self, name: &str, len: usize) -> (PathBuf, Vec<u8>) {
        let path = self.path(name);
        let mut bytes = vec![0; len];
        bytes[..len / 2].copy_from_slice(&mixed(len as u64, len / 2));
        let tail = pattern(5, 5000);
        let at = len - len / 4;
        bytes[at..at + 5000].copy_from_slice(&tail);
        std::fs::write(&path, &bytes[..len / 2]).unwrap();
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &tail, at as u64).unwrap();
        file.set_len(len as u64).unwrap();
        (path, bytes)
    }
}

async fn raw(path: &Path) -> Arc<dyn BlockDevice> {
    RawDevice::open(path, true).await.unwrap()
}

async fn image(path: &Path) -> Image {
    Image::open(path, OpenOptions::writing()).await.unwrap()
}

async fn copy(
    source: Arc<dyn BlockDevice>,
    target: ConvertTarget,
    options: &ConvertOptions,
) -> Converted {
    convert(source, &target, options, |_| ()).await.unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn assert_same(first: (&Path, &str), second: (&Path, &str)) {
    let args = ["compare", "-f", first.1, "-F", second.1, text(first.0), text(second.0)];
    assert!(qemu_img(&args).contains("identical"));
}

#[test]
fn raw_files_become_images_and_images_raw_files() {
    for options in ["cluster_size=512", "cluster_size=65536", "cluster_size=2M", "extended_l2=on"] {
        let files = Files::new();
        let (from, _) = files.raw("from.raw", 9 << 20);
        let to = files.path("to.qcow2");
        qemu_create(&to, options, "9M", None);
        block_on(async {
            let target = image(&to).await;
            let device: Arc<dyn BlockDevice> = Arc::new(target.clone());
            let done =
                copy(raw(&from).await, ConvertTarget::Device(device), &Default::default()).await;
            assert!(done.skipped_bytes > 4 << 20, "{done:?}");
            target.close().await.unwrap();
            assert!(qemu_check(&to).is_clean(), "{options}");
            assert_same((&from, "raw"), (&to, "qcow2"));

            let back = files.path("back.raw");
            let target = RawDevice::create(&back, 9 << 20).await.unwrap();
            let source = Arc::new(image(&to).await);
            let options = ConvertOptions { in_order: false, ..ConvertOptions::default() };
            copy(source, ConvertTarget::Device(target.clone()), &options).await;
            target.close().await.unwrap();
            assert_same((&from, "raw"), (&back, "raw"));
        });
    }
}

#[test]
fn images_are_compressed_as_they_are_copied() {
    for options in [
        "cluster_size=4096",
        "cluster_size=65536,compression_type=zstd",
        "cluster_size=2M,extended_l2=on",
    ] {
        for (len, size) in [((9 << 20) + 1536, (9 << 20) + 1536), ((9 << 20) + 512, 10 << 20)] {
            let files = Files::new();
            let (from, bytes) = files.raw("from.raw", len);
            let to = files.path("to.qcow2");
            qemu_create(&to, options, &size.to_string(), None);
            block_on(async {
                let target = image(&to).await;
                // What lies behind the source stays.
                let tail = pattern(1, size - len);
                target.write(len as u64, tail.clone().into(), Durability::Durable).await.unwrap();
                let to = ConvertTarget::Compressed { image: target.clone(), level: Some(2) };
                let done = copy(raw(&from).await, to, &ConvertOptions::default()).await;
                let all = done.written_bytes + done.zeroed_bytes + done.skipped_bytes;
                assert_eq!(all, len as u64, "{done:?}");
                // Clusters of 2 MiB are larger than the holes.
                let skips = done.skipped_bytes > 1 << 20;
                assert!(skips || options.contains("2M"), "{options}: {done:?}");
                let now = crate::common::read_all(&target).await;
                assert!(now == [bytes, tail].concat(), "{options}, {len} of {size}");
                target.close().await.unwrap();
            });
            assert!(qemu_check(&to).is_clean(), "{options}");
            if size == len {
                assert_same((&from, "raw"), (&to, "qcow2"));
                let json = qemu_img(&["check", "--output", "json", text(&to)]);
                let json: serde_json::Value = serde_json::from_str(&json).unwrap();
                let compressed = json["compressed-clusters"].as_u64().unwrap();
                assert!(compressed >= json["allocated-clusters"].as_u64().unwrap() / 3, "{json}");
            }
        }
    }
}

#[test]
fn what_the_targets_backing_file_has_already_is_left_to_it() {
    let files = Files::new();
    let (base, top, to) = (files.path("base.qcow2"), files.path("top.qcow2"), files.path("to"));
    qemu_create(&base, "cluster_size=65536", "8M", None);
    qemu_io(&base, &["write -P 1 0 6M"]);
    qemu_create(&top, "cluster_size=4096", "8M", Some("base.qcow2"));
    qemu_io(&top, &["write -P 2 1M 100k", "write -z 3M 64k", "write -P 3 7M 4k"]);
    for compressed in [false, true] {
        let _none_before = std::fs::remove_file(&to);
        qemu_create(&to, "cluster_size=65536", "8M", Some("base.qcow2"));
        block_on(async {
            let target = image(&to).await;
            let source = Image::open(&top, OpenOptions::reading()).await.unwrap();
            let options =
                ConvertOptions { layer: Some(source.clone()), ..ConvertOptions::default() };
            let place = match compressed {
                true => ConvertTarget::Compressed { image: target.clone(), level: None },
                false => ConvertTarget::Device(Arc::new(target.clone())),
            };
            let done = copy(Arc::new(source), place, &options).await;
            assert!(done.skipped_bytes > 7 << 20, "{done:?}");
            target.close().await.unwrap();
        });
        assert!(qemu_check(&to).is_clean());
        assert_same((&top, "qcow2"), (&to, "qcow2"));
    }
}

#[test]
fn a_target_with_old_content_is_overwritten_everywhere() {
    let files = Files::new();
    let (from, _) = files.raw("from.raw", 5 << 20);
    let to = files.path("to.qcow2");
    for compressed in [false, true] {
        let _none_before = std::fs::remove_file(&to);
        qemu_create(&to, "cluster_size=16384", "5M", None);
        qemu_io(&to, &["write -P 9 0 5M"]);
        block_on(async {
            let target = image(&to).await;
            let place = match compressed {
                true => ConvertTarget::Compressed { image: target.clone(), level: None },
                false => ConvertTarget::Device(Arc::new(target.clone())),
            };
            copy(raw(&from).await, place, &ConvertOptions::default()).await;
            let disks: [Arc<dyn BlockDevice>; 2] = [raw(&from).await, Arc::new(target.clone())];
            let found = compare(disks, &CompareOptions::default(), |_| ()).await.unwrap();
            assert_eq!(found, Comparison::Equal);
            target.close().await.unwrap();
        });
        assert!(qemu_check(&to).is_clean());
        assert_same((&from, "raw"), (&to, "qcow2"));
    }
}
