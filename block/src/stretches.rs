//! Which parts of a long read of a file hold data, so that its holes are told and not read. Short reads know nothing of
//! it: asking the host costs about as much as they do.
//!
//! What is remembered is data alone. Where it becomes a hole, reading it costs time and nothing else; what was remembered
//! as a hole would have to be forgotten by every write, also by those of other programs.

use parking_lot::Mutex;

use crate::{ByteRange, HostFile};

/// Reads shorter than this, in bytes, are read whole, and so are holes.
const LEAST_BYTES: u64 = 64 << 10;

/// The most stretches of data that the host is asked for at a time; behind them, a read is read whole.
const STRETCHES: usize = 32;

/// A stretch of a file that is known to have held data, the last one that was found: in a file without holes, soon all
/// of it.
#[derive(Debug)]
pub(crate) struct Stretches {
    known: Mutex<ByteRange>,
}

impl Default for Stretches {
    fn default() -> Self {
        Self { known: Mutex::new(ByteRange::between(0, 0)) }
    }
}

impl Stretches {
    /// Whether all of `range` is to be read, without asking the host.
    pub(crate) fn covers(&self, range: ByteRange) -> bool {
        range.len() < LEAST_BYTES || self.known.lock().contains(range)
    }

    /// What of `range` is to be read, in order, apart from each other; the rest reads as zeros. All of it where the host
    /// does not tell.
    pub(crate) async fn of(&self, file: &HostFile, range: ByteRange) -> Vec<ByteRange> {
        let Ok(found) = file.data_from(range, STRETCHES).await else { return vec![range] };
        self.learn(found.last().copied());
        let mut stretches: Vec<ByteRange> = Vec::with_capacity(found.len() + 1);
        let mut at = range.start();
        let is_full = found.len() >= STRETCHES;
        let told = found.last().filter(|_| is_full).map_or(range.end(), |last| last.end());
        let untold = ByteRange::between(told.min(range.end()), range.end());
        for data in found.into_iter().chain([untold]) {
            let data = data.intersection(range);
            if data.is_empty() {
                continue;
            }
            let start = if data.start() - at < LEAST_BYTES { at } else { data.start() };
            match stretches.last_mut() {
                Some(last) if last.end() == start => {
                    *last = ByteRange::between(last.start(), data.end());
                }
                _ => stretches.push(ByteRange::between(start, data.end())),
            }
            at = data.end();
        }
        match stretches.last_mut() {
            Some(last) if range.end() - at < LEAST_BYTES => {
                *last = ByteRange::between(last.start(), range.end());
            }
            _ => {}
        }
        stretches
    }

    fn learn(&self, found: Option<ByteRange>) {
        let Some(found) = found else { return };
        let mut known = self.known.lock();
        let touches = found.start() <= known.end() && known.start() <= found.end();
        *known = if touches {
            let start = found.start().min(known.start());
            ByteRange::between(start, found.end().max(known.end()))
        } else {
            found
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{MemoryStorage, OpKind};

    const KIB: u64 = 1 << 10;

    fn kib(start: u64, end: u64) -> ByteRange {
        ByteRange::between(start * KIB, end * KIB)
    }

    /// A file of 4 MiB that holds data here and there, in KiB.
    async fn file(data: &[(u64, u64)]) -> (MemoryStorage, HostFile) {
        let storage = MemoryStorage::with_alignment(512);
        let file = HostFile::from_storage("memory".as_ref(), storage.clone().into_dyn()).unwrap();
        file.set_len(4096 * KIB).await.unwrap();
        for (start, end) in data {
            let bytes = vec![1; usize::try_from((end - start) * KIB).unwrap()];
            file.write(start * KIB, bytes.into(), None).await.unwrap();
        }
        (storage, file)
    }

    async fn told(file: &HostFile, range: ByteRange) -> Vec<(u64, u64)> {
        let stretches = Stretches::default().of(file, range).await;
        stretches.iter().map(|one| (one.start() / KIB, one.end() / KIB)).collect()
    }

    #[tokio::test]
    async fn holes_are_left_out_where_they_are_long() {
        let (_, file) = file(&[(0, 100), (163, 200), (264, 300), (1000, 1100)]).await;
        // 63 KiB are no hole, 64 KiB are.
        assert_eq!(told(&file, kib(0, 4096)).await, [(0, 200), (264, 300), (1000, 1100)]);
        assert_eq!(told(&file, kib(500, 900)).await, []);
        assert_eq!(told(&file, kib(50, 263)).await, [(50, 263)]);
        assert_eq!(told(&file, kib(50, 264)).await, [(50, 200)]);
        assert_eq!(told(&file, kib(950, 1150)).await, [(950, 1150)]);
        assert_eq!(told(&file, kib(936, 1164)).await, [(1000, 1100)]);
    }

    #[tokio::test]
    async fn what_lies_behind_many_stretches_is_read() {
        let many: Vec<_> = (0..40).map(|number| (number * 100, number * 100 + 10)).collect();
        let (_, file) = file(&many).await;
        let stretches = told(&file, kib(0, 4096)).await;
        assert_eq!(stretches.len(), STRETCHES);
        assert_eq!(stretches[..2], [(0, 10), (100, 110)]);
        assert_eq!(stretches.last(), Some(&(3100, 4096)));
    }

    #[tokio::test]
    async fn a_file_without_holes_is_asked_about_once() {
        let (_, file) = file(&[(0, 4096)]).await;
        let known = Stretches::default();
        assert!(known.covers(kib(0, 63)) && !known.covers(kib(0, 64)));
        assert_eq!(known.of(&file, kib(100, 200)).await, [kib(100, 200)]);
        assert!(known.covers(kib(100, 4096)));
        assert!(!known.covers(kib(50, 150)));
        assert_eq!(known.of(&file, kib(50, 150)).await, [kib(50, 150)]);
        assert!(known.covers(kib(50, 4096)));
    }

    #[tokio::test]
    async fn where_the_host_does_not_tell_all_is_read() {
        let (storage, file) = file(&[(0, 10)]).await;
        storage.fail_nth(0, std::io::ErrorKind::Other, |op| op.kind == OpKind::Map);
        assert_eq!(told(&file, kib(0, 4096)).await, [(0, 4096)]);
        assert_eq!(told(&file, kib(0, 4096)).await, [(0, 10)]);
    }
}
