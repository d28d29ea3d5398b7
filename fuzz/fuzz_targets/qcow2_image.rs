//! Arbitrary bytes as an image: opening refuses or works, and then reading, writing, zeroing, discarding and closing
//! answer without a panic and within bounded memory.

#![no_main]

use std::path::Path;

use block::{BlockDevice, ByteRange, Durability, HostFile, MemoryStorage, ZeroMode};
use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use qcow2::{Image, OpenOptions};

const READ_BYTES: u64 = 1 << 16;
/// The host is full here: an image may say that its tables lie terabytes away.
const HOST_BYTES: u64 = 16 << 20;

async fn exercise(bytes: &[u8], options: OpenOptions, writes: bool) {
    let storage = MemoryStorage::from_bytes(bytes.to_vec(), 512);
    storage.limit_len(HOST_BYTES);
    let storage = storage.into_dyn();
    let Ok(file) = HostFile::from_storage(Path::new("fuzzed.qcow2"), storage) else { return };
    let Ok(image) = Image::open_on(file, None, options).await else { return };
    let size = image.limits().size_bytes;
    for start in [0, size / 2, size.saturating_sub(READ_BYTES)] {
        let range = ByteRange::between(start, size.min(start.saturating_add(READ_BYTES)));
        if writes {
            let len = usize::try_from(range.len().min(5000)).unwrap_or(0);
            let _ = image.write(start, Bytes::from(vec![0x5a; len]), Durability::Deferred).await;
            let _ = image.write_zeroes(range, ZeroMode::default(), Durability::Deferred).await;
            let _ = image.flush().await;
            let _ = image.discard(range, Durability::Durable).await;
        }
        if let Ok(segments) = image.read(range).await {
            assert_eq!(segments.len(), range.len(), "a read of another length than asked");
        }
        if let Ok(extents) = image.extents(range).await {
            assert!(extents.iter().all(|extent| range.contains(extent.range)));
        }
    }
    let _ = image.close().await;
}

fuzz_target!(|data: &[u8]| {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    runtime.expect("a runtime").block_on(async {
        exercise(data, OpenOptions::reading(), false).await;
        exercise(data, OpenOptions::writing(), true).await;
    });
});
