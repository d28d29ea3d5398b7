//! Bytes that nobody vouches for, as a VMDK: opened, read and mapped. Errors are fine; a panic, a read of another length
//! than asked and a write are not.

use std::path::PathBuf;

use block::{BlockDevice, ByteRange, Engine, MemoryFiles};
use qcow2::{OpenOptions, Vmdk};

/// How much is read at once.
const AREA_BYTES: u64 = 1 << 16;

/// A place for an image, and for the extent that it may name.
pub(crate) struct Vmdks {
    image: PathBuf,
    extent: PathBuf,
    _folder: tempfile::TempDir,
}

impl Vmdks {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let [image, extent] = ["disk.vmdk", "disk-flat.vmdk"].map(|name| {
            let path = folder.path().join(name);
            std::fs::write(&path, b"").expect("a writable folder");
            path
        });
        Self { image, extent, _folder: folder }
    }

    /// Uses bytes in every way; whether they could be opened.
    pub(crate) async fn exercise(&self, bytes: &[u8]) -> bool {
        let files = MemoryFiles::new();
        for (path, bytes) in [(&self.image, bytes.to_vec()), (&self.extent, vec![0xd5; 1 << 18])] {
            files.put(path, bytes, 1).expect("the file is there");
        }
        let engine = Some(Engine::memory(files.clone()));
        let options = OpenOptions { engine, ..OpenOptions::reading() };
        let Ok(device) = Vmdk::open(&self.image, &options).await else { return false };
        let size = device.limits().size_bytes;
        for at in [0, size / 2, size.saturating_sub(AREA_BYTES)] {
            let area = ByteRange::between(at, size.min(at.saturating_add(AREA_BYTES)));
            if let Ok(segments) = device.read(area).await {
                assert_eq!(segments.len(), area.len(), "a read of another length than asked");
            }
        }
        let wide = ByteRange::between(0, size.min(1 << 40));
        if let Ok(extents) = device.extents(wide).await {
            assert!(extents.iter().all(|extent| wide.contains(extent.range)));
        }
        for path in [&self.image, &self.extent] {
            let log = files.storage(path).expect("it was put there").log();
            assert!(log.is_empty(), "what only reads must not write");
        }
        true
    }
}
