//! An open file as the `Read` and `Seek` of the standard library, for libraries that read files themselves. Everything
//! else asks a `HostFile`, which does not block.

use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use crate::CopySource;
use crate::copy::Origin;

/// Reads an open file from a position of its own: whatever its path leads to by now, it stays the file that was opened.
///
/// Each call blocks its thread ([`crate::Engine::run`] has some for that). A file that bypasses the page cache demands
/// alignment here, too: open it without [`crate::OpenOptions::direct`].
#[derive(Clone, Debug)]
pub struct FileReader {
    source: CopySource,
    at: u64,
}

impl FileReader {
    pub(crate) fn new(source: CopySource) -> Self {
        Self { source, at: 0 }
    }

    fn len(&self) -> io::Result<u64> {
        match &self.source.0 {
            Origin::File(file) => file.len(),
            Origin::Memory(memory) => Ok(memory.len_now()),
        }
    }
}

impl Read for FileReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = match &self.source.0 {
            Origin::File(file) => file.file.read_at(buffer, self.at)?,
            Origin::Memory(memory) => memory.read_now(self.at, buffer),
        };
        self.at = self.at.saturating_add(read as u64);
        Ok(read)
    }
}

impl Seek for FileReader {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
            SeekFrom::End(by) => self.len()?.checked_add_signed(by),
        };
        self.at = at.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{HostFile, MemoryStorage, OpenOptions};

    #[tokio::test]
    async fn a_file_reads_the_same_whatever_takes_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, b"what it held").unwrap();
        let options = OpenOptions { direct: false, ..OpenOptions::reading() };
        let file = HostFile::open(&path, options).await.unwrap();
        let mut reader = file.reader().unwrap();
        std::fs::rename(&path, dir.path().join("old")).unwrap();
        std::fs::write(&path, b"a stranger").unwrap();
        let memory = MemoryStorage::from_bytes(b"what it held".to_vec(), 1).into_dyn();
        let memory = HostFile::from_storage(&path, memory).unwrap();
        for reader in [&mut reader, &mut memory.reader().unwrap()] {
            let mut all = String::new();
            reader.read_to_string(&mut all).unwrap();
            assert_eq!(all, "what it held");
            let mut end = [0; 4];
            assert_eq!(reader.seek(SeekFrom::End(-4)).unwrap(), 8);
            reader.read_exact(&mut end).unwrap();
            assert_eq!(&end, b"held");
            assert_eq!(reader.seek(SeekFrom::Current(-9)).unwrap(), 3);
            assert!(reader.seek(SeekFrom::Current(-9)).is_err());
            assert_eq!(reader.seek(SeekFrom::Start(1 << 60)).unwrap(), 1 << 60);
            assert_eq!(reader.read(&mut end).unwrap(), 0);
        }
    }
}
