//! A snapshot inside an image, and a bitmap that tells what has changed since it was made.
//!
//! `cargo run -p qcow2 --example points_in_time -- FOLDER`

use std::error::Error;
use std::path::{Path, PathBuf};

use block::{BlockDevice, ByteRange, Durability};
use qcow2::{CreateOptions, Image, OpenOptions};

const SIZE: u64 = 64 << 20;
const CHUNK: u64 = 64 << 10;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let folder = std::env::args_os().nth(1).map_or_else(|| PathBuf::from("."), PathBuf::from);
    println!("{}", run(&folder).await?);
    Ok(())
}

/// Leaves `machine.qcow2` in `folder`.
pub(crate) async fn run(folder: &Path) -> Result<String, Box<dyn Error>> {
    let path = folder.join("machine.qcow2");
    Image::create(&path, &CreateOptions::new(SIZE)).await?;
    let image = Image::open(&path, OpenOptions::writing()).await?;
    image.write(0, b"the old days".to_vec().into(), Durability::Deferred).await?;
    image.create_snapshot("before the upgrade").await?;
    image.add_bitmap("since", CHUNK, true).await?;
    image.write(0, b"these days, ".to_vec().into(), Durability::Deferred).await?;
    image.write(9 * CHUNK, vec![7; 100].into(), Durability::Deferred).await?;

    let mut told = String::new();
    // What an incremental backup has to read.
    for extent in image.dirty_extents("since", ByteRange::between(0, SIZE)).await? {
        if extent.dirty {
            told += &format!("changed: {}\n", extent.range);
        }
    }
    image.close().await?;

    let text = ByteRange::between(0, 12);
    let options = OpenOptions::reading().snapshot("before the upgrade");
    let then = Image::open(&path, options).await?;
    let read = then.read(text).await?.to_vec();
    told += &format!("then: {}\n", String::from_utf8_lossy(&read));
    then.close().await?;

    let image = Image::open(&path, OpenOptions::writing()).await?;
    // A disk that goes back would change under a bitmap that is to be kept up to date.
    if let Err(error) = image.apply_snapshot("before the upgrade").await {
        told += &format!("refused: {error}\n");
        image.remove_bitmap("since").await?;
        image.apply_snapshot("before the upgrade").await?;
    }
    let read = image.read(text).await?.to_vec();
    told += &format!("now: {}\n", String::from_utf8_lossy(&read));
    image.close().await?;
    Ok(told)
}
