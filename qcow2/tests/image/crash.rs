//! Power cuts at every moment of recorded runs: what was flushed reads back, what was not is old or new, and the image
//! has leaks at most.

use block::{BlockDevice, MemoryStorage};
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use qcow2::Image;

use crate::check::check;
use crate::common::{block_on, pattern, qemu_check, qemu_create, read_all};
use crate::memory::{Act, Shape, any_act, note_discard, part, part_mut};
use crate::rounds::rounds;

const SECTOR: usize = 512;

/// A content that the disk may have from some entry of the log on.
pub(crate) struct Moment {
    /// The log's length when the request that makes it began.
    pub(crate) began: usize,
    /// The log's length when it was durable; `usize::MAX` if it never was.
    pub(crate) durable: usize,
    pub(crate) content: Vec<u8>,
}

/// Runs acts on a new image and records what the disk may read like after a power cut.
async fn record(shape: &Shape, storage: &MemoryStorage, acts: &[Act]) -> Vec<Moment> {
    let mut image = shape.open(storage).await.unwrap();
    let mut model = shape.content();
    let mut moments = vec![Moment { began: 0, durable: 0, content: model.clone() }];
    for act in acts {
        let range = act.range(shape.size_bytes);
        let began = storage.log_len();
        match act {
            Act::Flush | Act::Reopen => {
                if matches!(act, Act::Reopen) {
                    image.close().await.unwrap();
                } else {
                    image.flush().await.unwrap();
                }
                moments.last_mut().unwrap().durable = storage.log_len();
                if matches!(act, Act::Reopen) {
                    image = shape.open(storage).await.unwrap();
                }
                continue;
            }
            Act::Discard { .. } => {
                act.apply(&image).await.unwrap();
                let now = image.read(range).await.unwrap().to_vec();
                note_discard(&mut model, range, &now, &format!("{act:?}"));
            }
            _ => {
                act.apply(&image).await.unwrap();
                part_mut(&mut model, range).copy_from_slice(&act.data(range));
            }
        }
        moments.push(Moment { began, durable: usize::MAX, content: model.clone() });
    }
    image.close().await.unwrap();
    moments.last_mut().unwrap().durable = storage.log_len();
    moments
}

/// Every sector of `now` must be what it was at the last flush before `ops`, or what a request that began before has
/// made of it since.
fn assert_old_or_new(now: &[u8], moments: &[Moment], ops: usize, what: &str) {
    let first = moments.iter().rposition(|moment| moment.durable <= ops).unwrap_or(0);
    let allowed: Vec<_> =
        moments[first..].iter().enumerate().filter(|(n, m)| *n == 0 || m.began < ops).collect();
    for (number, sector) in now.chunks(SECTOR).enumerate() {
        let at = number * SECTOR;
        let fits = allowed.iter().any(|(_, m)| m.content[at..at + sector.len()] == *sector);
        assert!(fits, "{what}: sector {number} is neither old nor new");
    }
}

pub(crate) async fn reads_after(
    shape: &Shape,
    storage: &MemoryStorage,
    moments: &[Moment],
    ops: usize,
    seed: u64,
) {
    let what = format!("power cut after {ops} operations, seed {seed}");
    let left = storage.crash_image_seeded(ops, seed);
    check(&left.snapshot()).assert_consistent(&what);
    let image = shape.open_read_only(&left).await.unwrap_or_else(|error| panic!("{what}: {error}"));
    assert_old_or_new(&read_all(&image).await, moments, ops, &what);
    // On a sample, life goes on.
    if (ops + usize::try_from(seed).unwrap()).is_multiple_of(7) {
        goes_on(shape, &left, &what).await;
    }
}

async fn goes_on(shape: &Shape, left: &MemoryStorage, what: &str) {
    let before = shape.open_read_only(left).await.unwrap();
    let mut model = read_all(&before).await;
    let image: Image = shape.open(left).await.unwrap();
    for at in [0, shape.size_bytes / 3 / 512] {
        let act = Act::Write { at, len: 150, seed: at + 5 };
        let range = act.range(shape.size_bytes);
        act.apply(&image).await.unwrap();
        part_mut(&mut model, range).copy_from_slice(&act.data(range));
    }
    image.close().await.unwrap();
    check(&left.snapshot()).assert_consistent(what);
    let again = shape.open_read_only(left).await.unwrap();
    assert!(read_all(&again).await == model, "{what}: written after reopening");
}

fn survives_every_cut(shape: &Shape, runs: u32, acts: usize, seeds: u64) {
    let create = || block_on(shape.create());
    survives_every_cut_of(shape, create, runs, acts, seeds);
}

fn survives_every_cut_of(
    shape: &Shape,
    create: impl Fn() -> MemoryStorage,
    runs: u32,
    acts: usize,
    seeds: u64,
) {
    for run in 0..rounds(runs) {
        let mut seed = [7; 32];
        seed[..4].copy_from_slice(&run.to_le_bytes());
        let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &seed);
        let mut runner = TestRunner::new_with_rng(Config::default(), rng);
        let any = proptest::collection::vec(any_act(shape.size_bytes / 512, false), acts);
        let acts = any.new_tree(&mut runner).unwrap().current();
        let storage = create();
        if run % 4 != 3 {
            // Files that grow ahead, by 8 MiB and more, make every copy of them slow.
            storage.without_fallocate();
        }
        block_on(async {
            let moments = record(shape, &storage, &acts).await;
            for ops in 0..=storage.log_len() {
                for seed in 0..seeds {
                    let seed = if seed < 2 { seed } else { seed + ops as u64 * 31 };
                    reads_after(shape, &storage, &moments, ops, seed).await;
                }
            }
        });
    }
}

/// Which is lengthened by the first write to its last block.
#[test]
fn an_image_of_qemu_that_ends_within_a_block_survives_every_power_cut() {
    let shape = Shape { size_bytes: 300 << 10, ..Shape::new(65_536) };
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    qemu_create(&path, "cluster_size=65536", "300K", None);
    let bytes = std::fs::read(&path).unwrap();
    for align in [512, 4096] {
        assert_ne!(bytes.len() % usize::from(align), 0);
        let create = || MemoryStorage::from_bytes(bytes.clone(), align);
        survives_every_cut_of(&shape, create, 2, 16, 2);
    }
}

#[test]
fn clusters_of_512_bytes_survive_every_power_cut() {
    let shape = Shape { size_bytes: 100 << 10, ..Shape::new(512) };
    survives_every_cut(&shape, 4, 24, 3);
}

#[test]
fn clusters_of_512_bytes_over_a_backing_file_survive_every_power_cut() {
    let shape = Shape { size_bytes: 100 << 10, ..Shape::new(512) }.over_data();
    survives_every_cut(&shape, 4, 24, 3);
}

#[test]
fn clusters_of_4096_bytes_survive_every_power_cut() {
    let shape = Shape { size_bytes: 300 << 10, ..Shape::new(4096) }.over_data();
    survives_every_cut(&shape, 4, 24, 4);
}

#[test]
fn clusters_of_64_kib_survive_every_power_cut() {
    let shape = Shape { size_bytes: (700 << 10) + 512, ..Shape::new(65536) }.over_data();
    survives_every_cut(&shape, 4, 20, 4);
}

#[test]
fn version_2_survives_every_power_cut() {
    let shape = Shape { size_bytes: 100 << 10, ..Shape::new(512) }.old();
    survives_every_cut(&shape, 2, 24, 3);
    let shape = Shape { size_bytes: 300 << 10, ..Shape::new(4096) }.old().over_data();
    survives_every_cut(&shape, 2, 24, 3);
}

#[test]
fn subclusters_survive_every_power_cut() {
    let shape = Shape { size_bytes: 300 << 10, ..Shape::new(16384) }.extended();
    survives_every_cut(&shape, 3, 24, 3);
    survives_every_cut(&shape.over_data(), 3, 24, 3);
    let shape = Shape { size_bytes: (700 << 10) + 512, ..Shape::new(65536) }.extended();
    survives_every_cut(&shape.over_data(), 2, 20, 3);
}

#[test]
fn narrow_and_wide_refcounts_survive_every_power_cut() {
    for bits in [1, 4, 64] {
        let shape = Shape { size_bytes: 100 << 10, ..Shape::new(512) }.refcount_bits(bits);
        survives_every_cut(&shape.over_data(), 2, 20, 3);
    }
}

#[test]
fn qemu_finds_leaks_at_most_after_power_cuts() {
    let shape = Shape { size_bytes: 300 << 10, ..Shape::new(512) };
    let acts: Vec<_> = (0..12)
        .flat_map(|n| {
            let write = Act::Write { at: n * 41, len: 40, seed: n + 1 };
            let discard = Act::Discard { at: n * 23, len: 20 };
            [write, discard, Act::Flush]
        })
        .collect();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    block_on(async {
        let storage = shape.create().await;
        storage.without_fallocate();
        record(&shape, &storage, &acts).await;
        for ops in (0..storage.log_len()).step_by(5) {
            std::fs::write(&path, storage.crash_image_seeded(ops, ops as u64).snapshot()).unwrap();
            let found = qemu_check(&path);
            assert!(found.is_consistent(), "after {ops} operations: {found:?}");
        }
    });
}

#[test]
fn a_refcount_table_that_grows_survives_every_power_cut() {
    // Clusters of 512 bytes: one cluster of table counts 8 MiB.
    let shape = Shape { size_bytes: 10 << 20, ..Shape::new(512) };
    block_on(async {
        let storage = shape.create().await;
        storage.without_fallocate();
        let image = shape.open(&storage).await.unwrap();
        let write = |at: u64, len: usize| (at, pattern(at + 1, len));
        let mut model = shape.content();
        let mut flushed = 0;
        for (at, data) in [write(0, 7 << 20), write(7 << 20, 3 << 20)] {
            part_mut(&mut model, crate::common::range(at, data.len() as u64))
                .copy_from_slice(&data);
            image.write(at, data.into(), block::Durability::Deferred).await.unwrap();
            let before = storage.log_len();
            image.flush().await.unwrap();
            if at == 0 {
                flushed = storage.log_len();
                continue;
            }
            // Two thousand tables are written: look at a part of the moments, and at all near the end.
            let ops = storage.log_len();
            let moments = (before..ops).step_by(((ops - before) / 20).max(1)).chain(ops - 6..=ops);
            for moment in moments {
                let left = storage.crash_image_seeded(moment, moment as u64);
                check(&left.snapshot()).assert_consistent("while the table moves");
                let again = shape.open_read_only(&left).await.unwrap();
                let old = crate::common::range(0, 7 << 20);
                assert!(moment >= flushed);
                let now = again.read(old).await.unwrap().to_vec();
                assert!(now == part(&model, old), "what was flushed before the table moved");
            }
        }
        image.close().await.unwrap();
        check(&storage.snapshot()).assert_clean("after the table has grown");
        let again = shape.open(&storage).await.unwrap();
        assert!(read_all(&again).await == model);
    });
}
