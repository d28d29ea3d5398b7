//! Three backups of one disk as layers over each other: where its bytes lie, whether all is sound, and the oldest two
//! made one.
//!
//! `cargo run -p qcow2 --example chain -- FOLDER`

use std::error::Error;
use std::path::{Path, PathBuf};

use block::{BlockDevice, ByteRange, Durability};
use qcow2::{BackingFormat, CheckOptions, CreateOptions, Image, MergeOptions, OpenOptions};

const SIZE: u64 = 64 << 20;
const MIB: u64 = 1 << 20;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let folder = std::env::args_os().nth(1).map_or_else(|| PathBuf::from("."), PathBuf::from);
    println!("{}", run(&folder).await?);
    Ok(())
}

/// Leaves `full.qcow2` and `tuesday.qcow2` in `folder`.
pub(crate) async fn run(folder: &Path) -> Result<String, Box<dyn Error>> {
    let names = ["full.qcow2", "monday.qcow2", "tuesday.qcow2"];
    let new = CreateOptions::new(SIZE);
    Image::create(&folder.join(names[0]), &new).await?;
    for pair in names.windows(2) {
        // Seen from the new image, so that the folder can be moved.
        let over = new.clone().backing(pair[0], BackingFormat::Qcow2);
        Image::create(&folder.join(pair[1]), &over).await?;
    }
    for (number, name) in (0u8..).zip(names) {
        // Layers below the one that is opened are only read.
        let image = Image::open(&folder.join(name), OpenOptions::writing()).await?;
        let bytes = vec![number + 1; 1 << 20];
        image.write(u64::from(number) * MIB, bytes.into(), Durability::Deferred).await?;
        image.close().await?;
    }

    let top = folder.join(names[2]);
    let image = Image::open(&top, OpenOptions::reading()).await?;
    let mut told = String::new();
    for extent in image.map_chain(ByteRange::between(0, SIZE)).await? {
        let layer = extent.layer.file_name().unwrap_or_default().display();
        let what = if extent.data { "data" } else { "zeros" };
        told += &format!("{}: {what}, {} below the top, in {layer}\n", extent.range, extent.depth);
    }
    image.close().await?;

    // The layers above the merged ones read as before at every moment.
    let oldest = MergeOptions { remove: true, ..MergeOptions::default() };
    qcow2::merge(&top, &oldest, |_| {}).await?;
    for name in [names[0], names[2]] {
        let report = Image::check(&folder.join(name), CheckOptions::default(), |_| {}).await?;
        told += &format!("{name} is clean: {}\n", report.is_clean());
    }
    Ok(told)
}
