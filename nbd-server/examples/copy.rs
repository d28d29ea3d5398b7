//! Copies one disk to another, each a raw file or an NBD URI, without reading or writing what reads as zeros; a server
//! that is restarted meanwhile is waited for. Shows `BlockDevice` and its extents; it is no replacement for `nbdcopy`.
//!
//! `cargo run -p nbd-server --example copy -- nbd+unix:///disk?socket=/run/nbd.sock copy.img`

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail, ensure};
use block::{BlockDevice, ByteRange, Durability, RawDevice, Segment, ZeroMode};
use futures_util::{TryStreamExt, stream};
use nbd_server::client::{ClientOptions, NbdDevice, NbdUri, Reconnect};

/// The bytes moved at once.
const PIECE_BYTES: u64 = 1 << 20;
/// The pieces in flight.
const WIDTH: usize = 32;

type Device = Arc<dyn BlockDevice>;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [from, to] = arguments.as_slice() else { bail!("usage: copy SOURCE TARGET") };
    let (moved_bytes, size_bytes) = run(from, to).await?;
    println!("{moved_bytes} of {size_bytes} bytes moved");
    Ok(())
}

/// How many bytes were moved, and how many the disk has.
pub(crate) async fn run(from: &str, to: &str) -> anyhow::Result<(u64, u64)> {
    let source = open(from, None).await.with_context(|| from.to_owned())?;
    let size_bytes = source.limits().size_bytes;
    let target = open(to, Some(size_bytes)).await.with_context(|| to.to_owned())?;
    ensure!(target.limits().size_bytes >= size_bytes, "the target is smaller than the source");

    let mut moved_bytes = 0;
    let mut at = 0;
    while at < size_bytes {
        // Each answer covers a part of the rest; the last extent of the last answer ends the disk.
        for extent in source.extents(ByteRange::between(at, size_bytes)).await? {
            at = extent.range.end();
            if extent.zero {
                let mode = ZeroMode::default();
                target.write_zeroes(extent.range, mode, Durability::Deferred).await?;
            } else {
                copy(&source, &target, extent.range).await?;
                moved_bytes += extent.range.len();
            }
        }
    }
    target.close().await?;
    source.close().await?;
    Ok((moved_bytes, size_bytes))
}

/// Opens an NBD URI, or a file; a target file is created with this size.
async fn open(name: &str, create_bytes: Option<u64>) -> anyhow::Result<Device> {
    if name.contains("://") {
        let uri: NbdUri = name.parse()?;
        let options =
            ClientOptions { reconnect: Some(Reconnect::default()), ..ClientOptions::default() };
        return Ok(NbdDevice::open(&uri, options).await?);
    }
    Ok(match create_bytes {
        Some(bytes) => RawDevice::create(Path::new(name), bytes).await?,
        None => RawDevice::open(Path::new(name), true).await?,
    })
}

/// Copies a range, many pieces at once; what was read is let go when its piece is written.
async fn copy(source: &Device, target: &Device, range: ByteRange) -> anyhow::Result<()> {
    stream::iter(range.pieces(PIECE_BYTES).map(anyhow::Ok))
        .try_for_each_concurrent(WIDTH, |piece| async move {
            let mut at = piece.start();
            for segment in source.read(piece).await?.0 {
                let range = ByteRange::between(at, at + segment.len());
                at = range.end();
                match segment {
                    Segment::Data(bytes) => {
                        target.write(range.start(), bytes, Durability::Deferred).await?;
                    }
                    Segment::Zero(_) => {
                        let mode = ZeroMode::default();
                        target.write_zeroes(range, mode, Durability::Deferred).await?;
                    }
                }
            }
            Ok(())
        })
        .await
}
