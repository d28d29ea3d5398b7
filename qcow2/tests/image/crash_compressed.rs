//! Power cuts and failing hosts while clusters are compressed, overwritten and packed behind others that are durable
//! already.

use std::io;

use block::{BlockDevice, MemoryStorage, OpKind};
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use qcow2::Image;

use crate::check::check;
use crate::common::{block_on, range, read_all};
use crate::compressed::mixed;
use crate::crash::{Moment, reads_after};
use crate::memory::{Act, Shape, any_act, note_discard, part_mut};
use crate::rounds::rounds;

/// What is done to an image.
#[derive(Clone, Debug)]
enum Step {
    Plain(Act),
    /// So many clusters from a cluster on.
    Compress {
        at: u64,
        count: u64,
        seed: u64,
    },
}

impl Step {
    fn any(shape: &Shape) -> impl Strategy<Value = Self> + use<> {
        let clusters = shape.size_bytes.div_ceil(u64::from(shape.cluster_bytes));
        let compress = (0..clusters, 1..clusters.min(40), 0u64..1 << 40);
        proptest::prop_oneof![
            4 => compress.prop_map(|(at, count, seed)| Self::Compress { at, count, seed }),
            5 => any_act(shape.size_bytes / 512, false).prop_map(Self::Plain),
            2 => proptest::strategy::Just(Self::Plain(Act::Flush)),
        ]
    }

    /// Does it, and keeps the model up to date.
    async fn apply(
        &self,
        shape: &Shape,
        image: &Image,
        model: &mut [u8],
    ) -> Result<(), block::DeviceError> {
        match self {
            Self::Plain(Act::Flush) => image.flush().await,
            Self::Plain(act @ Act::Discard { .. }) => {
                act.apply(image).await?;
                let area = act.range(shape.size_bytes);
                let now = image.read(area).await?.to_vec();
                note_discard(model, area, &now, &format!("{act:?}"));
                Ok(())
            }
            Self::Plain(act) => {
                let area = act.range(shape.size_bytes);
                act.apply(image).await?;
                part_mut(model, area).copy_from_slice(&act.data(area));
                Ok(())
            }
            Self::Compress { at, count, seed } => {
                let cluster = u64::from(shape.cluster_bytes);
                let start = at * cluster;
                let end = (start + count * cluster).min(shape.size_bytes);
                let data = mixed(*seed, usize::try_from(end - start).unwrap());
                image.write_compressed(start, data.clone().into()).await?;
                part_mut(model, range(start, end - start)).copy_from_slice(&data);
                Ok(())
            }
        }
    }
}

fn steps(shape: &Shape, count: usize, run: u32) -> Vec<Step> {
    let mut seed = [11; 32];
    seed[..4].copy_from_slice(&run.to_le_bytes());
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &seed);
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    let any = proptest::collection::vec(Step::any(shape), count);
    any.new_tree(&mut runner).unwrap().current()
}

async fn record(shape: &Shape, steps: &[Step]) -> (MemoryStorage, Vec<Moment>) {
    let storage = shape.create().await;
    storage.without_fallocate();
    let mut image = shape.open(&storage).await.unwrap();
    let mut model = shape.content();
    let mut moments = vec![Moment { began: 0, durable: 0, content: model.clone() }];
    for step in steps {
        let began = storage.log_len();
        match step {
            Step::Plain(Act::Reopen) => {
                image.close().await.unwrap();
                moments.last_mut().unwrap().durable = storage.log_len();
                check(&storage.snapshot()).assert_clean("closed");
                image = shape.open(&storage).await.unwrap();
                continue;
            }
            step => step.apply(shape, &image, &mut model).await.unwrap(),
        }
        if matches!(step, Step::Plain(Act::Flush)) {
            moments.last_mut().unwrap().durable = storage.log_len();
            continue;
        }
        moments.push(Moment { began, durable: usize::MAX, content: model.clone() });
    }
    assert!(read_all(&image).await == model);
    image.close().await.unwrap();
    moments.last_mut().unwrap().durable = storage.log_len();
    check(&storage.snapshot()).assert_clean("closed");
    (storage, moments)
}

fn survives_every_cut(shape: &Shape, runs: u32, count: usize, seeds: u64) {
    for run in 0..rounds(runs) {
        let steps = steps(shape, count, run);
        block_on(async {
            let (storage, moments) = record(shape, &steps).await;
            for ops in 0..=storage.log_len() {
                for seed in 0..seeds {
                    let seed = if seed < 2 { seed } else { seed + ops as u64 * 31 };
                    reads_after(shape, &storage, &moments, ops, seed).await;
                }
            }
        });
    }
}

#[test]
fn compressed_clusters_of_512_bytes_survive_every_power_cut() {
    let shape = Shape { size_bytes: 80 << 10, ..Shape::new(512) }.over_data();
    survives_every_cut(&shape, 3, 20, 3);
}

#[test]
fn compressed_clusters_of_4096_bytes_survive_every_power_cut() {
    let shape = Shape { size_bytes: (300 << 10) + 512, ..Shape::new(4096) };
    survives_every_cut(&shape, 4, 24, 4);
}

#[test]
fn compressed_clusters_on_a_disk_of_4096_byte_blocks_survive_every_power_cut() {
    let shape = Shape { size_bytes: 300 << 10, ..Shape::new(4096) }.aligned(4096);
    survives_every_cut(&shape, 3, 20, 3);
}

#[test]
fn compressed_clusters_of_64_kib_survive_every_power_cut() {
    let shape = Shape { size_bytes: (700 << 10) + 512, ..Shape::new(65536) }.over_data();
    survives_every_cut(&shape, 3, 20, 3);
}

/// Lets the `nth` write fail, and finds the image clean when it is closed, unless it had to be given up.
async fn fails_cleanly(shape: &Shape, steps: &[Step], nth: usize) {
    let storage = shape.create().await;
    let image = shape.open(&storage).await.unwrap();
    storage.fail_nth(nth, io::ErrorKind::StorageFull, |op| op.kind == OpKind::Write);
    let mut model = shape.content();
    let mut failures = 0;
    for step in steps {
        if matches!(step, Step::Plain(Act::Reopen)) {
            continue;
        }
        if step.apply(shape, &image, &mut model).await.is_err() {
            failures += 1;
            // It may be there in parts: take over what is.
            match read_all_or_none(&image).await {
                Some(now) => model = now,
                None => return,
            }
        }
    }
    assert!(failures <= 1, "one write failed");
    storage.clear_faults();
    assert!(read_all(&image).await == model, "write {nth} fails");
    image.close().await.unwrap();
    check(&storage.snapshot()).assert_clean(&format!("write {nth} failed"));
}

/// `None` for an image that has to be opened again.
async fn read_all_or_none(image: &Image) -> Option<Vec<u8>> {
    let size = image.limits().size_bytes;
    image.read(range(0, size)).await.ok().map(|segments| segments.to_vec())
}

#[test]
fn a_write_that_fails_leaks_nothing_and_breaks_nothing() {
    for (size_bytes, cluster_bytes) in [(200 << 10, 4096), (700 << 10, 65536)] {
        let shape = Shape { size_bytes, ..Shape::new(cluster_bytes) };
        let steps = steps(&shape, 30, 5);
        for nth in 0..30 {
            block_on(fails_cleanly(&shape, &steps, nth));
        }
    }
}
