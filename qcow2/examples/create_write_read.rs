//! Makes an image, writes to it, reads it back and tells how it is stored.
//!
//! `cargo run -p qcow2 --example create_write_read -- FOLDER`

use std::error::Error;
use std::path::{Path, PathBuf};

use block::{BlockDevice, ByteRange, Durability};
use bytes::Bytes;
use qcow2::{CreateOptions, Image, OpenOptions};

const GIB: u64 = 1 << 30;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let folder = std::env::args_os().nth(1).map_or_else(|| PathBuf::from("."), PathBuf::from);
    println!("{}", run(&folder).await?);
    Ok(())
}

/// Leaves `disk.qcow2` in `folder`.
pub(crate) async fn run(folder: &Path) -> Result<String, Box<dyn Error>> {
    let path = folder.join("disk.qcow2");
    Image::create(&path, &CreateOptions::new(10 * GIB)).await?;

    let image = Image::open(&path, OpenOptions::writing()).await?;
    let text = Bytes::from_static(b"in the middle of the disk");
    image.write(5 * GIB, text.clone(), Durability::Deferred).await?;
    image.flush().await?;

    let end = 5 * GIB + text.len() as u64;
    let read = image.read(ByteRange::between(5 * GIB, end)).await?.to_vec();
    let mut told = format!("read back: {}\n", String::from_utf8_lossy(&read));
    for extent in image.extents(ByteRange::between(0, 10 * GIB)).await? {
        let (range, allocated, zero) = (extent.range, extent.allocated, extent.zero);
        told += &format!("{range}: allocated {allocated}, zero {zero}\n");
    }
    // A request behind the end is an error with a name, and nothing is written.
    if let Err(error) = image.write(10 * GIB, text, Durability::Deferred).await {
        told += &format!("refused: {error}\n");
    }
    image.close().await?;
    Ok(told)
}
