//! Power cuts, failing hosts and dropped futures while snapshots are made, applied and deleted: the image is what it was
//! before or what it is after, and goes on.

use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, Waker};

use block::{BlockDevice, CrashChoice, Durability, MemoryStorage, OpKind};
use qcow2::{Error, Image};

use crate::check::check;
use crate::common::{block_on, pattern, qemu_check, range, read_all};
use crate::memory::{Act, Shape, part_mut};
use crate::rounds::rounds;
use crate::snapshots::{Deed, Model};

/// What happens in every run: all that snapshots share and all that they do not.
fn deeds(shape: &Shape) -> Vec<Deed> {
    let sectors = shape.size_bytes / 512;
    let write = |at: u64, len, seed| Deed::Act(Act::Write { at: at % sectors, len, seed });
    vec![
        write(0, 40, 1),
        write(sectors / 2, 30, 2),
        Deed::Create,
        write(20, 30, 3),
        Deed::Act(Act::Zero { at: sectors / 2, len: 20, keep: false }),
        Deed::Create,
        write(sectors / 3, 50, 4),
        Deed::Apply(0),
        write(sectors / 4, 10, 5),
        Deed::Delete(0),
        Deed::Create,
        Deed::Delete(0),
        Deed::Delete(0),
    ]
}

/// A deed that writes the metadata anew: where its log begins and ends, and what is before and after.
struct Span {
    deed: Deed,
    began: usize,
    ended: usize,
    before: Model,
    after: Model,
}

async fn record(shape: &Shape) -> (MemoryStorage, Vec<Span>) {
    let storage = shape.create().await;
    storage.without_fallocate();
    let image = shape.open(&storage).await.unwrap();
    let mut model = Model::new(shape);
    let mut spans = Vec::new();
    for deed in deeds(shape) {
        // All that came before is durable, so that there are two states and no others.
        image.flush().await.unwrap();
        let (began, before) = (storage.log_len(), model.clone());
        if model.apply(&image, &deed).await {
            let ended = storage.log_len();
            spans.push(Span { deed, began, ended, before, after: model.clone() });
        }
    }
    image.close().await.unwrap();
    (storage, spans)
}

/// What a power cut leaves where a device writes `unit` bytes whole or not at all.
fn cut(storage: &MemoryStorage, ops: usize, seed: u64, unit: u64) -> MemoryStorage {
    storage.crash_image(ops, |choice: &CrashChoice<'_>| {
        let place = choice.sector.map_or(u64::MAX, |at| at / unit);
        match seed {
            0 => false,
            1 => true,
            _ => {
                let mixed = (choice.index as u64 ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                let mixed = (mixed ^ place).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                // Some operations are lost whole, some are there whole, the others are torn.
                match ((mixed.wrapping_sub(place) >> 7) ^ (choice.index as u64 * seed)) % 3 {
                    0 => (choice.index as u64 + seed).is_multiple_of(2),
                    _ => (mixed >> 40).is_multiple_of(2),
                }
            }
        }
    })
}

fn survives_every_cut(shape: &Shape, seeds: u64) {
    block_on(async {
        let (storage, spans) = record(shape).await;
        assert_eq!(spans.len(), 7);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.qcow2");
        let (mut old, mut new, mut looked) = (0, 0, 0u64);
        for span in &spans {
            for ops in span.began..=span.ended {
                for seed in 0..seeds {
                    for unit in [512, 4096] {
                        let what = format!("{:?} cut after {ops}, {seed}, {unit}", span.deed);
                        let left = cut(&storage, ops, seed, unit);
                        let found = check(&left.snapshot());
                        found.assert_consistent(&what);
                        looked += 1;
                        if looked.is_multiple_of(97) && shape.backing.is_none() {
                            std::fs::write(&path, left.snapshot()).unwrap();
                            assert!(qemu_check(&path).is_consistent(), "{what}");
                        }
                        let image = shape.open_read_only(&left).await.unwrap();
                        let snapshots = image.snapshots().await.unwrap().len();
                        let disk = read_all(&image).await;
                        image.close().await.unwrap();
                        let is = |model: &Model| {
                            model.snapshots.len() == snapshots && model.disk == disk
                        };
                        let model = if is(&span.after) { &span.after } else { &span.before };
                        assert!(is(model), "{what}: neither before nor after");
                        new += u64::from(is(&span.after));
                        old += u64::from(is(&span.before));
                        model.assert_is(shape, &left, &what).await;
                    }
                }
            }
        }
        assert!(old > 100 && new > 20, "{old} old and {new} new states");
    });
}

#[test]
fn snapshots_in_clusters_of_512_bytes_survive_every_power_cut() {
    let shape = Shape { size_bytes: 60 << 10, ..Shape::new(512) };
    survives_every_cut(&shape, 3 * u64::from(rounds(1)));
}

#[test]
fn snapshots_in_clusters_of_4096_bytes_over_a_backing_file_survive_every_power_cut() {
    let shape = Shape { size_bytes: 100 << 10, ..Shape::new(4096) }.over_data();
    survives_every_cut(&shape, 4 * u64::from(rounds(1)));
}

#[test]
fn snapshots_in_clusters_of_64_kib_survive_every_power_cut() {
    let shape = Shape { size_bytes: (300 << 10) + 512, ..Shape::new(65536) };
    survives_every_cut(&shape, 3 * u64::from(rounds(1)));
}

/// A snapshot is there, and one more is to be made, applied or deleted.
async fn prepared(shape: &Shape) -> (MemoryStorage, Image, Model) {
    let storage = shape.create().await;
    storage.without_fallocate();
    let image = shape.open(&storage).await.unwrap();
    let mut model = Model::new(shape);
    for deed in &deeds(shape)[..5] {
        model.apply(&image, deed).await;
    }
    image.flush().await.unwrap();
    (storage, image, model)
}

async fn attempt(image: &Image, deed: &Deed) -> Result<(), Error> {
    match deed {
        Deed::Create => image.create_snapshot("more").await.map(drop),
        Deed::Apply(_) => image.apply_snapshot("1").await,
        _ => image.delete_snapshot("1").await,
    }
}

/// The model once [`attempt`] has succeeded.
fn attempted(model: &Model, deed: &Deed) -> Model {
    let mut after = model.clone();
    match deed {
        Deed::Create => after.snapshots.push(("2".to_owned(), model.disk.clone())),
        Deed::Apply(_) => after.disk.clone_from(&model.snapshots[0].1),
        _ => drop(after.snapshots.remove(0)),
    }
    after
}

/// The image takes writes and snapshots as if nothing had happened.
async fn goes_on(
    shape: &Shape,
    storage: &MemoryStorage,
    image: &Image,
    model: &mut Model,
    what: &str,
) {
    for deed in [Deed::Act(Act::Write { at: 7, len: 60, seed: 77 }), Deed::Create, Deed::Apply(0)] {
        model.apply(image, &deed).await;
    }
    assert!(read_all(image).await == model.disk, "{what}: going on");
    image.close().await.unwrap();
    check(&storage.snapshot()).assert_clean(what);
    model.assert_is(shape, storage, what).await;
}

async fn fails_at(shape: &Shape, deed: &Deed, nth: usize, kind: io::ErrorKind) -> bool {
    let what = format!("{deed:?}, {kind:?} at {nth}");
    let (storage, image, model) = prepared(shape).await;
    storage.fail_nth(nth, kind, |op| op.kind != OpKind::Map);
    let result = attempt(&image, deed).await;
    storage.clear_faults();
    let after = attempted(&model, deed);
    match result {
        Ok(()) => {
            goes_on(shape, &storage, &image, &mut after.clone(), &what).await;
            false
        }
        Err(Error::Poisoned { .. }) => {
            assert!(image.read(range(0, 512)).await.is_err() && image.close().await.is_err());
            check(&storage.snapshot()).assert_consistent(&what);
            let again = shape.open(&storage).await.unwrap();
            let listed = again.snapshots().await.unwrap().len();
            let disk = read_all(&again).await;
            let is = |model: &Model| model.snapshots.len() == listed && model.disk == disk;
            let mut model = if is(&after) { after.clone() } else { model };
            assert!(is(&model), "{what}: neither before nor after");
            for deed in [Deed::Create, Deed::Apply(0)] {
                model.apply(&again, &deed).await;
            }
            again.close().await.unwrap();
            check(&storage.snapshot()).assert_clean(&what);
            model.assert_is(shape, &storage, &what).await;
            true
        }
        Err(error) => {
            assert!(matches!(error, Error::Host(_)), "{what}: {error}");
            assert!(read_all(&image).await == model.disk, "{what}: as before");
            attempt(&image, deed).await.unwrap();
            goes_on(shape, &storage, &image, &mut after.clone(), &what).await;
            true
        }
    }
}

#[test]
fn every_operation_of_a_snapshot_may_fail() {
    for shape in [
        Shape { size_bytes: 60 << 10, ..Shape::new(512) },
        Shape { size_bytes: 100 << 10, ..Shape::new(4096) }.over_data(),
    ] {
        for deed in [Deed::Create, Deed::Apply(0), Deed::Delete(0)] {
            for kind in [io::ErrorKind::StorageFull, io::ErrorKind::Other] {
                let mut nth = 0;
                while block_on(fails_at(&shape, &deed, nth, kind)) {
                    nth += 1;
                }
                assert!(nth > 10, "{deed:?}: only {nth} operations");
            }
        }
    }
}

#[test]
fn a_full_host_refuses_a_snapshot_and_gets_its_space_back() {
    let shape = Shape::new(65536);
    block_on(async {
        for more in 0..8 {
            let (storage, image, mut model) = prepared(&shape).await;
            let used = storage.snapshot().len() as u64;
            storage.limit_len(used + more * 65536);
            match image.create_snapshot("more").await {
                Ok(_) => {
                    model = attempted(&model, &Deed::Create);
                    assert!(more > 0, "there is room where there was none");
                }
                Err(error) => {
                    assert_eq!(error.kind(), block::ErrorKind::NoSpace, "{error}");
                    assert!(storage.snapshot().len() as u64 <= used.next_multiple_of(65536));
                }
            }
            storage.limit_len(u64::MAX);
            goes_on(&shape, &storage, &image, &mut model, &format!("{more} clusters more")).await;
        }
    });
}

fn poll_once<T>(future: Pin<&mut (impl Future<Output = T> + ?Sized)>) -> Poll<T> {
    future.poll(&mut Context::from_waker(Waker::noop()))
}

#[test]
fn a_snapshot_whose_future_is_dropped_is_not_made_or_closes_the_image() {
    let shape = Shape { size_bytes: 60 << 10, ..Shape::new(512) };
    let (mut unmade, mut poisoned) = (0, 0);
    for steps in 0..2000 {
        let what = format!("dropped after {steps} operations");
        let ended = block_on(async {
            let (storage, image, mut model) = prepared(&shape).await;
            let held = storage.hold(|op| op.kind != OpKind::Map);
            let ended = {
                let mut making = pin!(image.create_snapshot("more"));
                let mut ended = poll_once(making.as_mut()).is_ready();
                for _ in 0..steps {
                    held.release_one();
                    // Lest the runtime thinks that this task has done enough.
                    tokio::task::yield_now().await;
                    ended |= poll_once(making.as_mut()).is_ready();
                    if ended {
                        break;
                    }
                }
                ended
            };
            if ended {
                return true;
            }
            // Whatever is in flight keeps everybody else away.
            let mut write = pin!(image.write(512, pattern(5, 512).into(), Durability::Deferred));
            let early = poll_once(write.as_mut());
            drop(held);
            let written = match early {
                Poll::Ready(result) => result,
                Poll::Pending => write.await,
            };
            let after = attempted(&model, &Deed::Create);
            if written.is_ok() {
                unmade += 1;
                part_mut(&mut model.disk, range(512, 512)).copy_from_slice(&pattern(5, 512));
                goes_on(&shape, &storage, &image, &mut model, &what).await;
            } else {
                poisoned += 1;
                assert!(image.close().await.is_err());
                check(&storage.snapshot()).assert_consistent(&what);
                let again = shape.open(&storage).await.unwrap();
                let made = again.snapshots().await.unwrap().len() == after.snapshots.len();
                let model = if made { after } else { model };
                again.close().await.unwrap();
                model.assert_is(&shape, &storage, &what).await;
            }
            false
        });
        if ended {
            break;
        }
    }
    assert!(unmade > 10 && poisoned > 1, "{unmade} not made, {poisoned} poisoned");
}
