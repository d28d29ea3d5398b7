//! A raw disk into a small image: measured before, copied, and compared with what it was made from.
//!
//! `cargo run -p qcow2 --example convert -- FOLDER`

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::{BlockDevice, Durability, RawDevice};
use qcow2::{
    CompareOptions, ConvertOptions, ConvertTarget, CreateOptions, Image, MeasureOptions,
    MeasureTarget, OpenOptions,
};

const SIZE: u64 = 64 << 20;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let folder = std::env::args_os().nth(1).map_or_else(|| PathBuf::from("."), PathBuf::from);
    println!("{}", run(&folder).await?);
    Ok(())
}

/// Leaves `disk.raw` and `small.qcow2` in `folder`.
pub(crate) async fn run(folder: &Path) -> Result<String, Box<dyn Error>> {
    let source: Arc<dyn BlockDevice> = RawDevice::create(&folder.join("disk.raw"), SIZE).await?;
    source.write(3 << 20, vec![3; 1 << 20].into(), Durability::Deferred).await?;

    let target = MeasureTarget::Qcow2(MeasureOptions::default());
    let measured = qcow2::measure(&*source, &target).await?;
    let mut told = format!("uncompressed: {} bytes\n", measured.required_bytes);

    let path = folder.join("small.qcow2");
    Image::create(&path, &CreateOptions::new(SIZE)).await?;
    let image = Image::open(&path, OpenOptions::writing()).await?;
    let into = ConvertTarget::Compressed { image: image.clone(), level: None };
    let options = ConvertOptions { target_is_zero: true, ..ConvertOptions::default() };
    let progress = |now: qcow2::Progress| {
        // Called often, also from several tasks.
        let _percent = now.done_bytes * 100 / now.total_bytes.max(1);
    };
    qcow2::convert(Arc::clone(&source), &into, &options, progress).await?;
    image.close().await?;
    told += &format!("smaller: {}\n", image_bytes(&path)? < measured.required_bytes);

    let copy: Arc<dyn BlockDevice> = Arc::new(Image::open(&path, OpenOptions::reading()).await?);
    let disks = [Arc::clone(&source), Arc::clone(&copy)];
    let found = qcow2::compare(disks, &CompareOptions::default(), |_| {}).await?;
    told += &format!("the same: {}\n", found.is_equal());
    source.close().await?;
    copy.close().await?;
    Ok(told)
}

fn image_bytes(path: &Path) -> std::io::Result<u64> {
    Ok(std::fs::metadata(path)?.len())
}
