//! Hosts that fail: every operation of a run in turn, and file systems without room. What fails is answered, what was
//! flushed stays, and an image that closes is clean.

use std::io;

use block::{BlockDevice, DeviceError, Durability, ErrorKind, MemoryStorage, OpKind};
use qcow2::{Error, Image};

use crate::check::check;
use crate::common::{block_on, pattern, range, read_all};
use crate::memory::{Act, Shape, part, part_mut};

fn acts() -> Vec<Act> {
    let mut acts = Vec::new();
    for n in 0..5 {
        acts.push(Act::Write { at: n * 37, len: 60, seed: n + 1 });
        acts.push(Act::WriteBytes { at: n * 9001 + 77, len: 3000, seed: n + 100 });
        acts.push(Act::Discard { at: n * 11, len: 16 });
        acts.push(Act::Zero { at: n * 31 + 7, len: 33, keep: n % 2 == 0 });
        acts.push(Act::Flush);
    }
    acts
}

fn is_poisoned(error: &DeviceError) -> bool {
    match error {
        DeviceError::Backend { source, .. } => {
            matches!(source.downcast_ref::<Error>(), Some(Error::Poisoned { .. }))
        }
        _ => false,
    }
}

/// What each byte may be: one content, or any of two while a request that failed may have got half-way.
struct Either {
    now: Vec<u8>,
    or: Vec<u8>,
    /// Not touched since the last flush: poisoned or not, this must be there.
    safe: Vec<bool>,
}

impl Either {
    fn assert_holds_or_zero(&self, bytes: &[u8], area: block::ByteRange, what: &str) {
        let fits = part(&self.now, area).iter().zip(part(&self.or, area)).zip(bytes);
        let wrong = fits.filter(|((now, or), byte)| **byte != 0 && byte != now && byte != or);
        assert_eq!(wrong.count(), 0, "{what}: discarded");
    }

    fn assert_holds(&self, bytes: &[u8], what: &str) {
        let fits = bytes.iter().zip(self.now.iter().zip(&self.or));
        let wrong = fits.enumerate().find(|(_, (byte, (now, or)))| byte != now && byte != or);
        assert!(wrong.is_none(), "{what}: {wrong:?}");
    }
}

/// Runs all acts while the host fails; reopens an image that is poisoned. Gives the number of answers that were errors.
async fn run(shape: &Shape, storage: &MemoryStorage, what: &str) -> usize {
    let mut image = shape.open(storage).await.unwrap();
    let now = shape.content();
    let mut disk = Either { or: now.clone(), safe: vec![true; now.len()], now };
    let (mut errors, mut poisoned) = (0, false);
    let acts = acts();
    for act in &acts {
        let area = act.range(shape.size_bytes);
        let new = match act {
            Act::Flush => Vec::new(),
            Act::Discard { .. } => vec![0; usize::try_from(area.len()).unwrap()],
            _ => act.data(area),
        };
        let touched = usize::try_from(area.start()).unwrap()..usize::try_from(area.end()).unwrap();
        disk.safe[touched].fill(false);
        match act.apply(&image).await {
            Ok(()) if matches!(act, Act::Flush) => disk.safe.fill(true),
            Ok(()) if matches!(act, Act::Discard { .. }) => {
                // The fault may hit this read instead, once.
                let now = match image.read(area).await {
                    Ok(segments) => segments.to_vec(),
                    Err(_) => image.read(area).await.unwrap().to_vec(),
                };
                disk.assert_holds_or_zero(&now, area, what);
                part_mut(&mut disk.now, area).copy_from_slice(&now);
                part_mut(&mut disk.or, area).copy_from_slice(&now);
            }
            Ok(()) => {
                part_mut(&mut disk.now, area).copy_from_slice(&new);
                part_mut(&mut disk.or, area).copy_from_slice(&new);
            }
            Err(error) => {
                errors += 1;
                part_mut(&mut disk.or, area).copy_from_slice(&new);
                if is_poisoned(&error) {
                    poisoned = true;
                    image = reopened(shape, storage, image, &mut disk, what).await;
                }
            }
        }
    }
    storage.clear_faults();
    match image.close().await {
        Ok(()) if poisoned => check(&storage.snapshot()).assert_consistent(what),
        Ok(()) => check(&storage.snapshot()).assert_clean(what),
        Err(error) => assert!(is_poisoned(&error), "{what}: {error}"),
    }
    let again = shape.open_read_only(storage).await.unwrap();
    disk.assert_holds(&read_all(&again).await, what);
    errors
}

/// Whoever holds the poisoned image gets nothing out of it; the file is an image still.
async fn reopened(
    shape: &Shape,
    storage: &MemoryStorage,
    image: Image,
    disk: &mut Either,
    what: &str,
) -> Image {
    let refused = image.read(range(0, 512)).await.unwrap_err();
    assert!(is_poisoned(&refused), "{what}: {refused}");
    assert!(image.close().await.is_err());
    check(&storage.snapshot()).assert_consistent(what);
    // A fault happens once, and it has happened.
    let again = shape.open(storage).await.unwrap();
    // What was flushed is there; what was not may be gone.
    let left = read_all(&again).await;
    let known = disk.safe.iter().zip(&left).zip(disk.now.iter().zip(&disk.or));
    for ((safe, left), (now, or)) in known {
        assert!(!safe || left == now || left == or, "{what}: flushed and gone");
    }
    disk.now.clone_from(&left);
    disk.or = left;
    again
}

#[test]
fn every_operation_may_fail_once() {
    for shape in [Shape::new(512), Shape::new(4096).over_data().aligned(4096)] {
        let shape = Shape { size_bytes: 200 << 10, ..shape };
        let shape = if shape.backing.is_some() { shape.over_data() } else { shape };
        for kind in [io::ErrorKind::StorageFull, io::ErrorKind::Other] {
            let mut failed = 0;
            for nth in 0.. {
                let what = format!("clusters of {}, {kind:?} at {nth}", shape.cluster_bytes);
                let errors = block_on(async {
                    let storage = shape.create().await;
                    storage.without_fallocate();
                    let opened = shape.open(&storage).await.unwrap();
                    drop(opened);
                    // Opening itself reads four times.
                    storage.fail_nth(nth + 8, kind, |op| op.kind != OpKind::Map);
                    run(&shape, &storage, &what).await
                });
                failed += errors;
                if errors == 0 && nth > 60 {
                    break;
                }
            }
            assert!(failed > 50, "only {failed} faults were noticed");
        }
    }
}

#[test]
fn a_full_host_fails_the_request_and_nothing_else() {
    for fallocate in [true, false] {
        let shape = Shape::new(65536);
        block_on(async {
            let storage = shape.create().await;
            if !fallocate {
                storage.without_fallocate();
            }
            storage.limit_len(14 * 65536);
            let image = shape.open(&storage).await.unwrap();
            image.write(0, pattern(1, 300_000).into(), Durability::Durable).await.unwrap();
            let big = image.write(1 << 20, pattern(2, 1 << 20).into(), Durability::Deferred).await;
            assert_eq!(big.unwrap_err().kind(), ErrorKind::NoSpace);
            let small = image.write(2 << 20, pattern(3, 65536).into(), Durability::Durable).await;
            small.unwrap();
            let mut model = shape.content();
            part_mut(&mut model, range(0, 300_000)).copy_from_slice(&pattern(1, 300_000));
            part_mut(&mut model, range(2 << 20, 65536)).copy_from_slice(&pattern(3, 65536));
            assert!(read_all(&image).await == model);
            image.close().await.unwrap();
            check(&storage.snapshot()).assert_clean("after the host was full");
            let again = shape.open_read_only(&storage).await.unwrap();
            assert!(read_all(&again).await == model);
        });
    }
}

#[test]
fn a_failed_sync_poisons_until_reopening() {
    let shape = Shape::new(65536);
    block_on(async {
        let storage = shape.create().await;
        let image = shape.open(&storage).await.unwrap();
        image.write(0, pattern(1, 65536).into(), Durability::Durable).await.unwrap();
        storage.fail_nth(0, io::ErrorKind::Other, |op| op.kind == OpKind::Sync);
        image.write(65536, pattern(2, 65536).into(), Durability::Deferred).await.unwrap();
        assert!(is_poisoned(&image.flush().await.unwrap_err()));
        let refused = image.write(0, pattern(3, 512).into(), Durability::Deferred).await;
        let error = refused.unwrap_err();
        assert!(is_poisoned(&error) && error.to_string().contains("sync"), "{error}");
        assert!(image.close().await.is_err());
        let again = shape.open(&storage).await.unwrap();
        let first = again.read(range(0, 65536)).await.unwrap().to_vec();
        assert!(first == part(&pattern(1, 65536), range(0, 65536)));
        again.close().await.unwrap();
        check(&storage.snapshot()).assert_consistent("after a failed sync");
    });
}
