//! A LUKS header of which any bits are flipped: with the right passphrase it opens and reads, or is refused. A panic, a
//! read of another length than asked and work without end are not.

use std::path::Path;
use std::time::Duration;

use block::{BlockDevice, ByteRange, HostFile, MemoryStorage};
use qcow2::{CreateOptions, Image, KeyCost, LuksCipher, LuksOptions, OpenOptions, Passphrase};

const SIZE_BYTES: u64 = 64 << 10;
/// How long a key slot may work.
const UNLOCK_TIME: Duration = Duration::from_secs(1);

/// An encrypted image, and where its LUKS header lies.
pub(crate) struct Locked {
    bytes: Vec<u8>,
    header_at: usize,
    passphrase: Passphrase,
}

impl Locked {
    pub(crate) async fn new() -> Self {
        let passphrase = Passphrase::new("open sesame");
        let luks = LuksOptions {
            cipher: LuksCipher::Aes128Xts,
            cost: KeyCost::Rounds(1000),
            ..LuksOptions::new(passphrase.clone())
        };
        let options = CreateOptions::new(SIZE_BYTES).cluster_bytes(4096).encryption(luks);
        let storage = MemoryStorage::with_alignment(512);
        Image::create_with_data(&file(&storage), None, &options).await.expect("a new image");
        let bytes = storage.snapshot();
        let magic = b"LUKS\xba\xbe";
        let header_at = bytes.windows(6).position(|part| part == magic).expect("a LUKS header");
        Self { bytes, header_at, passphrase }
    }

    /// Flips the bits of the header that are set in `flips`; whether it still opens.
    pub(crate) async fn exercise(&self, flips: &[u8]) -> bool {
        let mut bytes = self.bytes.clone();
        for (byte, flip) in bytes[self.header_at..].iter_mut().zip(flips) {
            *byte ^= flip;
        }
        let storage = MemoryStorage::from_bytes(bytes, 512);
        let options = OpenOptions {
            unlock_time: UNLOCK_TIME,
            ..OpenOptions::reading().passphrase(self.passphrase.clone())
        };
        let Ok(image) = Image::open_parts(file(&storage), None, None, options).await else {
            return false;
        };
        let all = ByteRange::between(0, SIZE_BYTES);
        if let Ok(segments) = image.read(all).await {
            assert_eq!(segments.len(), all.len(), "a read of another length than asked");
        }
        let _may_fail = image.close().await;
        assert!(storage.log().is_empty(), "what only looks must not write");
        true
    }
}

fn file(storage: &MemoryStorage) -> HostFile {
    let storage = storage.clone().into_dyn();
    HostFile::from_storage(Path::new("locked.qcow2"), storage).expect("a file in memory")
}
