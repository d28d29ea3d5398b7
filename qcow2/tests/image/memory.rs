//! Images in memory for tests: a storage that can fail and lose power, the image in it, and what it stands on.

use std::path::Path;
use std::sync::Arc;

use block::{BlockDevice, ByteRange, Durability, HostFile, MemoryDevice, MemoryStorage, ZeroMode};
use proptest::prelude::*;
use qcow2::{BackingFormat, CreateOptions, Error, Image, OpenOptions, Version};

use crate::common::{pattern, range};

/// What an image is made like.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    pub(crate) cluster_bytes: u32,
    pub(crate) size_bytes: u64,
    /// The bytes of the disk below.
    pub(crate) backing: Option<Vec<u8>>,
    /// What the storage demands of offsets.
    pub(crate) align: u16,
    pub(crate) version: Version,
    pub(crate) extended_l2: bool,
    pub(crate) refcount_bits: u32,
}

impl Shape {
    /// A disk of about a dozen L2 tables for small clusters, and of a few dozen clusters for large ones.
    pub(crate) fn new(cluster_bytes: u32) -> Self {
        let size_bytes = match cluster_bytes {
            512 => 300 << 10,
            4096 => 5 << 20,
            _ => 3 << 20,
        } + 512;
        Self {
            cluster_bytes,
            size_bytes,
            backing: None,
            align: 512,
            version: Version::V3,
            extended_l2: false,
            refcount_bits: 16,
        }
    }

    /// The same over a disk that ends before this one does.
    pub(crate) fn over_data(self) -> Self {
        let len = usize::try_from(self.size_bytes * 2 / 3 / 512 * 512).unwrap();
        Self { backing: Some(pattern(99, len)), ..self }
    }

    pub(crate) fn aligned(self, align: u16) -> Self {
        Self { align, ..self }
    }

    /// The same in version 2 of the format.
    pub(crate) fn old(self) -> Self {
        Self { version: Version::V2, ..self }
    }

    /// The same with subclusters.
    pub(crate) fn extended(self) -> Self {
        Self { extended_l2: true, ..self }
    }

    /// The same with refcounts of another width.
    pub(crate) fn refcount_bits(self, refcount_bits: u32) -> Self {
        Self { refcount_bits, ..self }
    }

    /// What a new image reads like.
    pub(crate) fn content(&self) -> Vec<u8> {
        let mut bytes = self.backing.clone().unwrap_or_default();
        bytes.resize(usize::try_from(self.size_bytes).unwrap(), 0);
        bytes
    }

    fn device(&self) -> Option<Arc<dyn BlockDevice>> {
        self.backing.clone().map(|bytes| MemoryDevice::read_only(bytes) as _)
    }

    /// An empty image.
    pub(crate) async fn create(&self) -> MemoryStorage {
        let storage = MemoryStorage::with_alignment(self.align);
        let mut options = CreateOptions::new(self.size_bytes)
            .cluster_bytes(self.cluster_bytes)
            .version(self.version)
            .extended_l2(self.extended_l2)
            .refcount_bits(self.refcount_bits);
        if self.backing.is_some() {
            options = options.backing("below", BackingFormat::Raw);
        }
        Image::create_on(&host(&storage), &options).await.unwrap();
        // Durable, with an empty log.
        MemoryStorage::from_bytes(storage.snapshot(), self.align)
    }

    pub(crate) async fn open(&self, storage: &MemoryStorage) -> Result<Image, Error> {
        Image::open_on(host(storage), self.device(), OpenOptions::writing()).await
    }

    pub(crate) async fn open_with(
        &self,
        storage: &MemoryStorage,
        options: OpenOptions,
    ) -> Result<Image, Error> {
        Image::open_on(host(storage), self.device(), options).await
    }

    pub(crate) async fn open_read_only(&self, storage: &MemoryStorage) -> Result<Image, Error> {
        Image::open_on(host(storage), self.device(), OpenOptions::reading()).await
    }
}

pub(crate) fn host(storage: &MemoryStorage) -> HostFile {
    HostFile::from_storage(Path::new("memory.qcow2"), storage.clone().into_dyn()).unwrap()
}

/// One thing that a guest does. Offsets and lengths count sectors of 512 bytes, but for unaligned writes.
#[derive(Clone, Debug)]
pub(crate) enum Act {
    Write {
        at: u64,
        len: u64,
        seed: u64,
    },
    /// Bytes, not sectors.
    WriteBytes {
        at: u64,
        len: u64,
        seed: u64,
    },
    /// Zeros as data.
    WriteZeroData {
        at: u64,
        len: u64,
    },
    Zero {
        at: u64,
        len: u64,
        keep: bool,
    },
    Discard {
        at: u64,
        len: u64,
    },
    Flush,
    Reopen,
}

impl Act {
    /// The bytes that it is about, on a disk of `size` bytes.
    pub(crate) fn range(&self, size: u64) -> ByteRange {
        let (at, len, unit) = match *self {
            Self::Write { at, len, .. }
            | Self::WriteZeroData { at, len }
            | Self::Zero { at, len, .. }
            | Self::Discard { at, len } => (at, len, 512),
            Self::WriteBytes { at, len, .. } => (at, len, 1),
            Self::Flush | Self::Reopen => (0, 0, 1),
        };
        let at = at % size.div_ceil(unit) * unit;
        ByteRange::between(at, (at + len * unit).min(size))
    }

    /// Does it to an image.
    pub(crate) async fn apply(&self, image: &Image) -> Result<(), block::DeviceError> {
        let range = self.range(image.limits().size_bytes);
        let later = Durability::Deferred;
        match self {
            Self::Write { .. } | Self::WriteBytes { .. } | Self::WriteZeroData { .. } => {
                image.write(range.start(), self.data(range).into(), later).await
            }
            Self::Zero { keep, .. } => {
                let mode = ZeroMode { keep_allocated: *keep, fast_only: false };
                image.write_zeroes(range, mode, later).await
            }
            Self::Discard { .. } => image.discard(range, later).await,
            Self::Flush => image.flush().await,
            Self::Reopen => Ok(()),
        }
    }

    /// What it writes there; zeros for what is no write.
    pub(crate) fn data(&self, range: ByteRange) -> Vec<u8> {
        let len = usize::try_from(range.len()).unwrap();
        match self {
            Self::Write { seed, .. } | Self::WriteBytes { seed, .. } => pattern(*seed, len),
            _ => vec![0; len],
        }
    }
}

/// Any act on a disk of `sectors` sectors; `bytes` lets writes be of any alignment.
pub(crate) fn any_act(sectors: u64, bytes: bool) -> impl Strategy<Value = Act> {
    let long = sectors.max(3000);
    let len = prop_oneof![3 => 1u64..9, 3 => 1u64..300, 1 => 1u64..long];
    let place = (0..sectors, len);
    prop_oneof![
        6 => (place.clone(), 1u64..1 << 40).prop_map(|((at, len), seed)| Act::Write { at, len, seed }),
        if bytes { 4 } else { 0 } => (0..sectors * 512, 1u64..200_000, 1u64..1 << 40)
            .prop_map(|(at, len, seed)| Act::WriteBytes { at, len, seed }),
        2 => place.clone().prop_map(|(at, len)| Act::WriteZeroData { at, len }),
        3 => (place.clone(), any::<bool>()).prop_map(|((at, len), keep)| Act::Zero { at, len, keep }),
        2 => place.prop_map(|(at, len)| Act::Discard { at, len }),
        2 => Just(Act::Flush),
        1 => Just(Act::Reopen),
    ]
}

/// `bytes[range]`, for ranges of the disk.
pub(crate) fn part(bytes: &[u8], range: ByteRange) -> &[u8] {
    &bytes[usize::try_from(range.start()).unwrap()..usize::try_from(range.end()).unwrap()]
}

/// As [`part`], to change.
pub(crate) fn part_mut(bytes: &mut [u8], range: ByteRange) -> &mut [u8] {
    &mut bytes[usize::try_from(range.start()).unwrap()..usize::try_from(range.end()).unwrap()]
}

/// Takes over what a discarded range reads, which must be zeros or what was there.
pub(crate) fn note_discard(model: &mut [u8], range: ByteRange, now: &[u8], what: &str) {
    let old = part_mut(model, range);
    let fits = now.len() == old.len() && now.iter().zip(&*old).all(|(n, o)| *n == 0 || n == o);
    assert!(fits, "{what}: neither zeros nor what was there");
    old.copy_from_slice(now);
}

/// Everything in a range, in one vector.
pub(crate) async fn read(image: &Image, start: u64, len: u64) -> Vec<u8> {
    image.read(range(start, len)).await.unwrap().to_vec()
}
