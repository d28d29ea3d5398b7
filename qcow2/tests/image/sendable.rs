//! Whether what images do can be spawned, and so move between threads, which the compiler judges: each operation is
//! made here, and none of them runs. What they do is tested in the files named after them.

use std::path::Path;
use std::sync::Arc;

use block::{BlockDevice, ByteRange, HostFile, MemoryStorage};
use bytes::Bytes;
use qcow2::{
    AmendOptions, CheckOptions, CommitOptions, CompareOptions, ConvertOptions, ConvertTarget,
    CreateOptions, Image, KeyChange, MeasureTarget, MergeOptions, OpenOptions, RebaseOptions,
    Repair, ResizeOptions, Slots,
};

use crate::common::block_on;
use crate::memory::host;

/// Takes what a runtime of many threads takes.
fn spawnable(_: impl Future + Send + 'static) -> usize {
    1
}

/// Whether a call can be spawned with a copy of its own of what it is called on.
macro_rules! spawnable {
    ($this:ident, $call:expr) => {{
        let $this = $this.to_owned();
        spawnable(async move { $call.await.is_ok() })
    }};
}

fn whole_disk() -> ByteRange {
    ByteRange::between(0, 1 << 20)
}

fn of_an_open_image(image: &Image) -> usize {
    let slot = || KeyChange::Remove { slots: Slots::One(0), force: false };
    spawnable!(image, image.snapshots())
        + spawnable!(image, image.create_snapshot("name"))
        + spawnable!(image, image.apply_snapshot("name"))
        + spawnable!(image, image.delete_snapshot("name"))
        + spawnable!(image, image.amend(&AmendOptions::default()))
        + spawnable!(image, image.resize(2 << 20, &ResizeOptions::default()))
        + spawnable!(image, image.change_keys(&slot()))
        + spawnable!(image, image.write_compressed(0, Bytes::new()))
        + spawnable!(image, image.map(whole_disk()))
        + spawnable!(image, image.map_chain(whole_disk()))
        + spawnable!(image, image.bitmaps())
        + spawnable!(image, image.add_bitmap("name", 65536, true))
        + spawnable!(image, image.remove_bitmap("name"))
        + spawnable!(image, image.clear_bitmap("name"))
        + spawnable!(image, image.enable_bitmap("name"))
        + spawnable!(image, image.disable_bitmap("name"))
        + spawnable!(image, image.merge_bitmap("name", &image, "other"))
        + spawnable!(image, image.dirty_extents("name", whole_disk()))
}

fn of_files(path: &Path, file: &HostFile) -> usize {
    let create = || CreateOptions::new(1 << 20);
    let reading = OpenOptions::reading;
    spawnable!(path, Image::create(&path, &create()))
        + spawnable!(file, Image::create_on(&file, &create()))
        + spawnable!(file, Image::create_with_data(&file, Some(&file), &create()))
        + spawnable!(path, Image::open(&path, reading()))
        + spawnable!(path, Image::open_with_backing(&path, None, reading()))
        + spawnable!(file, Image::open_on(file, None, reading()))
        + spawnable!(file, Image::open_parts(file, None, None, reading()))
        + spawnable!(path, Image::inspect(&path))
        + spawnable!(file, Image::inspect_on(&file))
        + spawnable!(path, Image::check(&path, CheckOptions::default(), |_| {}))
        + spawnable!(file, Image::check_on(&file, Repair::All, |_| {}))
        + spawnable!(path, Image::set_backing(&path, None))
        + spawnable!(file, Image::set_backing_on(&file, None))
}

fn of_disks(image: &Image) -> usize {
    let disk: &Arc<dyn BlockDevice> = &(Arc::new(image.clone()) as _);
    let device = ConvertTarget::Device;
    let packed = ConvertTarget::Compressed { image: image.clone(), level: None };
    let pair = &(Arc::clone(disk), packed);
    let (copy, all) = (ConvertOptions::default, CompareOptions::default);
    spawnable!(disk, qcow2::convert(disk.clone(), &device(disk), &copy(), |_| {}))
        + spawnable!(pair, qcow2::convert(pair.0, &pair.1, &copy(), |_| {}))
        + spawnable!(disk, qcow2::compare([disk.clone(), disk], &all(), |_| {}))
        + spawnable!(disk, qcow2::measure(&*disk, &MeasureTarget::Raw))
}

fn of_chains(top: &Path) -> usize {
    spawnable!(top, qcow2::commit(&top, &CommitOptions::default(), |_| {}))
        + spawnable!(top, qcow2::plan_commit(&top, &CommitOptions::default()))
        + spawnable!(top, qcow2::rebase(&top, &RebaseOptions::default(), |_| {}))
        + spawnable!(top, qcow2::plan_rebase(&top, &RebaseOptions::default(), |_| {}))
        + spawnable!(top, qcow2::merge(&top, &MergeOptions::default(), |_| {}))
        + spawnable!(top, qcow2::plan_merge(&top, &MergeOptions::default()))
}

#[test]
fn whatever_an_image_does_can_be_spawned() {
    block_on(async {
        let storage = MemoryStorage::new();
        let file = host(&storage);
        let path = Path::new("disk.qcow2");
        Image::create_on(&file, &CreateOptions::new(1 << 20)).await.unwrap();
        let image = Image::open_on(file.clone(), None, OpenOptions::writing()).await.unwrap();
        let before = storage.log_len();
        let made = of_an_open_image(&image) + of_files(path, &file) + of_disks(&image);
        #[cfg(feature = "vmdk")]
        let made = made + spawnable!(path, qcow2::Vmdk::open(&path, &OpenOptions::reading()));
        assert!(made + of_chains(path) > 40);
        // Futures do nothing until somebody runs them.
        assert!(storage.log_len() == before);
    });
}

#[test]
fn spawned_changes_of_an_image_take_effect() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
    runtime.block_on(async {
        let file = host(&MemoryStorage::new());
        Image::create_on(&file, &CreateOptions::new(1 << 20)).await.unwrap();
        let image = Image::open_on(file, None, OpenOptions::writing()).await.unwrap();
        let other = image.clone();
        let snapshot = tokio::spawn(async move { other.create_snapshot("kept").await });
        let other = image.clone();
        let grown = async move { other.resize(2 << 20, &ResizeOptions::default()).await };
        snapshot.await.unwrap().unwrap();
        tokio::spawn(grown).await.unwrap().unwrap();
        let other = image.clone();
        let wider = AmendOptions { refcount_bits: Some(64), ..AmendOptions::default() };
        tokio::spawn(async move { other.amend(&wider).await }).await.unwrap().unwrap();
        assert_eq!(image.limits().size_bytes, 2 << 20);
        assert_eq!(image.snapshots().await.unwrap().len(), 1);
        image.close().await.unwrap();
    });
}
