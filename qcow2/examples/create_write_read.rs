//! Makes an image, writes to it, reads it back and tells how it is stored.
//!
//! `cargo run -p qcow2 --example create_write_read -- disk.qcow2`

use std::path::PathBuf;

use block::{BlockDevice, ByteRange, Durability};
use bytes::Bytes;
use qcow2::{CreateOptions, Image, OpenOptions};

const GIB: u64 = 1 << 30;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path =
        std::env::args_os().nth(1).map_or_else(|| PathBuf::from("disk.qcow2"), PathBuf::from);
    Image::create(&path, &CreateOptions::new(10 * GIB)).await?;

    let image = Image::open(&path, OpenOptions::writing()).await?;
    let text = Bytes::from_static(b"in the middle of the disk");
    image.write(5 * GIB, text.clone(), Durability::Deferred).await?;
    image.flush().await?;

    let end = 5 * GIB + text.len() as u64;
    let read = image.read(ByteRange::between(5 * GIB, end)).await?;
    println!("read back: {}", String::from_utf8_lossy(&read.to_vec()));
    for extent in image.extents(ByteRange::between(0, 10 * GIB)).await? {
        println!("{:?} allocated: {}, zero: {}", extent.range, extent.allocated, extent.zero);
    }
    println!("the file has {} bytes", image.info().file_bytes);
    image.close().await?;
    Ok(())
}
