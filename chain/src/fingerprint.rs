//! Cheap checksums by which a layer that was replaced, truncated or written to is recognised before anything is put on
//! it. They are no proof that every byte is intact: that takes reading the whole file.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{Error, FileOp, LayerRule};

/// How much of the beginning of a file is compared: the header, and the tables that an image is created with.
const HEAD_BYTES: u64 = 256 << 10;

/// How many pieces of the rest are compared.
const SAMPLES: u32 = 32;

/// The size of such a piece.
const SAMPLE_BYTES: u64 = 4096;

/// The most that a manifest may make us compare.
const MAX_HEAD_BYTES: u64 = 4 << 20;

/// The most pieces that a manifest may make us compare.
const MAX_SAMPLES: u32 = 4096;

/// CRC-32 checksums of the beginning of a file and of pieces spread evenly over it, the last one at its end.
///
/// Two images of one size with the same layout but other content have the same tables: the pieces tell them apart. With
/// a mebibyte of reading at most it costs milliseconds, whatever the size of the layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// How many bytes from the beginning of the file are covered.
    pub head_bytes: u64,
    /// The checksum of these.
    pub head_crc32: u32,
    /// How many pieces of 4096 bytes are covered.
    pub samples: u32,
    /// The checksum of all these together.
    pub samples_crc32: u32,
}

/// What the host says of a layer's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Measure {
    pub(crate) file_bytes: u64,
    pub(crate) allocated_bytes: u64,
}

/// Length and space of an open regular file.
pub(crate) fn measure(file: &File, path: &Path) -> Result<Measure, Error> {
    let metadata = file.metadata().map_err(|error| FileOp::Stat.failed(path, error))?;
    if !metadata.is_file() {
        return Err(Error::Layer { file: path.to_path_buf(), rule: LayerRule::NotAFile });
    }
    // `blocks` counts 512 bytes each, whatever the file system's own blocks are (stat(2)).
    let allocated_bytes = metadata.blocks().saturating_mul(512);
    Ok(Measure { file_bytes: metadata.len(), allocated_bytes })
}

impl Fingerprint {
    /// Reads what a new fingerprint of a file of `file_bytes` covers.
    pub(crate) fn take(file: &File, path: &Path, file_bytes: u64) -> Result<Self, Error> {
        let plan =
            Self { head_bytes: HEAD_BYTES.min(file_bytes), samples: SAMPLES, ..Self::default() };
        plan.again(file, path, file_bytes)
    }

    /// Compares a file, whose length has been compared before, with this fingerprint.
    pub(crate) fn compare(self, file: &File, path: &Path, file_bytes: u64) -> Result<(), Error> {
        let differs = |part| {
            Err(Error::Layer { file: path.to_path_buf(), rule: LayerRule::Content { part } })
        };
        let found = self.again(file, path, file_bytes)?;
        if found.head_bytes != self.head_bytes || found.head_crc32 != self.head_crc32 {
            return differs("header");
        }
        if found.samples != self.samples || found.samples_crc32 != self.samples_crc32 {
            return differs("content");
        }
        Ok(())
    }

    /// The checksums of the parts that `self` covers.
    fn again(self, file: &File, path: &Path, file_bytes: u64) -> Result<Self, Error> {
        let head_bytes = self.head_bytes.min(file_bytes).min(MAX_HEAD_BYTES);
        let samples = self.samples.min(MAX_SAMPLES);
        let mut head = crc32fast::Hasher::new();
        feed(&mut head, file, path, 0, head_bytes)?;
        let mut rest = crc32fast::Hasher::new();
        for number in 0..samples {
            let at = sample_at(number, samples, file_bytes);
            feed(&mut rest, file, path, at, SAMPLE_BYTES.min(file_bytes - at))?;
        }
        Ok(Self {
            head_bytes,
            head_crc32: head.finalize(),
            samples,
            samples_crc32: rest.finalize(),
        })
    }
}

/// Where piece `number` of `samples` begins: the last at the last whole block, the others evenly before it.
fn sample_at(number: u32, samples: u32, file_bytes: u64) -> u64 {
    let last = file_bytes.saturating_sub(1) / SAMPLE_BYTES;
    let place = u128::from(last) * u128::from(number + 1) / u128::from(samples.max(1));
    u64::try_from(place).map_or(0, |block| block * SAMPLE_BYTES)
}

fn feed(
    hasher: &mut crc32fast::Hasher,
    file: &File,
    path: &Path,
    at: u64,
    len: u64,
) -> Result<(), Error> {
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    file.read_exact_at(&mut bytes, at).map_err(|error| FileOp::Read.failed(path, error))?;
    hasher.update(&bytes);
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn file_with(bytes: &[u8]) -> (tempfile::NamedTempFile, File) {
        let temp = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(temp.path(), bytes).unwrap();
        let file = File::open(temp.path()).unwrap();
        (temp, file)
    }

    #[test]
    fn files_of_any_small_length_have_a_fingerprint_that_compares() {
        for len in [0, 1, 4095, 4096, 4097, 300_000] {
            let (temp, file) = file_with(&vec![3; len]);
            let file_bytes = u64::try_from(len).unwrap();
            let fingerprint = Fingerprint::take(&file, temp.path(), file_bytes).unwrap();
            fingerprint.compare(&file, temp.path(), file_bytes).unwrap();
        }
    }

    #[test]
    fn a_changed_head_and_a_changed_last_block_are_told_apart() {
        let mut bytes = vec![3; 1 << 20];
        let (temp, file) = file_with(&bytes);
        let fingerprint = Fingerprint::take(&file, temp.path(), 1 << 20).unwrap();
        for (at, what) in [(70_000, "header"), ((1 << 20) - 1, "content")] {
            bytes[at] ^= 1;
            std::fs::write(temp.path(), &bytes).unwrap();
            let error = fingerprint.compare(&file, temp.path(), 1 << 20).unwrap_err();
            let Error::Layer { rule: LayerRule::Content { part }, .. } = error else {
                panic!("{error}")
            };
            assert_eq!(part, what);
            bytes[at] ^= 1;
        }
    }

    proptest! {
        #[test]
        fn every_piece_lies_in_the_file(samples in 1..MAX_SAMPLES, file_bytes in 1_u64.., seed: u32) {
            let at = sample_at(seed % samples, samples, file_bytes);
            prop_assert!(at < file_bytes);
            prop_assert!(sample_at(samples - 1, samples, file_bytes) + SAMPLE_BYTES >= file_bytes);
        }
    }
}
