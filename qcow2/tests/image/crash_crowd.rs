//! Power cuts while several tasks use one image, their operations on the host let go in a seed's order: each sector
//! reads what was durable or what was begun since, and the image has leaks at most.

use block::MemoryStorage;

use crate::check::check;
use crate::common::{block_on, read_all};
use crate::crowd::{Crowd, Random, over_stamps};
use crate::memory::Shape;
use crate::rounds::rounds;

const TASKS: u64 = 6;
/// Each task's requests between opening and closing.
const ACTS: usize = 14;

/// A recorded run, in two sessions: the second finds tables on disk, and free clusters.
async fn record(shape: &Shape, seed: u64, ahead: bool) -> (MemoryStorage, Crowd) {
    let storage = shape.create().await;
    if !ahead {
        storage.without_fallocate();
    }
    let mut crowd = Crowd::new(shape, &storage, TASKS, seed);
    let mut random = Random(seed + 1000);
    for session in 0..2 {
        let image = shape.open(&storage).await.unwrap();
        crowd.work_held(&image, ACTS, &mut random).await;
        crowd.assert_last(&read_all(&image).await, "before closing");
        crowd.close(&image).await;
        check(&storage.snapshot()).assert_clean(&format!("seed {seed}, session {session}"));
    }
    crowd.settle();
    (storage, crowd)
}

/// Cuts the power at `cuts` moments of each run, evenly spread.
fn survives(shape: &Shape, runs: u32, cuts: usize) {
    for run in 0..rounds(runs) {
        // The file grows by 8 MiB and more then, and every copy of it is slow.
        let ahead = run % 4 == 3;
        let seed = u64::from(run) + 1;
        block_on(async {
            let (storage, crowd) = record(shape, seed, ahead).await;
            let len = storage.log_len();
            let cuts = if ahead { cuts / 3 } else { cuts };
            for ops in (0..len).step_by((len / cuts).max(1)).chain([len]) {
                for choice in [0, 1, 2 + ops as u64, 7_000 + ops as u64] {
                    let what = format!("run {run}, power cut after {ops} of {len}, seed {choice}");
                    let left = storage.crash_image_seeded(ops, choice);
                    check(&left.snapshot()).assert_consistent(&what);
                    let image = shape.open_read_only(&left).await;
                    let image = image.unwrap_or_else(|error| panic!("{what}: {error}"));
                    crowd.assert_old_or_new(&read_all(&image).await, ops, &what);
                }
            }
        });
    }
}

#[test]
fn six_tasks_in_clusters_of_512_bytes_survive_power_cuts() {
    survives(&Shape { size_bytes: 100 << 10, ..Shape::new(512) }, 6, 150);
}

#[test]
fn six_tasks_in_clusters_of_512_bytes_over_a_backing_file_survive_power_cuts() {
    survives(&over_stamps(Shape { size_bytes: 100 << 10, ..Shape::new(512) }), 6, 150);
}

#[test]
fn six_tasks_in_clusters_of_4096_bytes_survive_power_cuts() {
    survives(&Shape { size_bytes: 200 << 10, ..Shape::new(4096) }, 6, 150);
}

#[test]
fn six_tasks_in_clusters_of_4096_bytes_over_a_backing_file_survive_power_cuts() {
    survives(&over_stamps(Shape { size_bytes: 200 << 10, ..Shape::new(4096) }), 6, 150);
}

#[test]
fn six_tasks_in_clusters_of_64_kib_survive_power_cuts() {
    survives(&Shape { size_bytes: (900 << 10) + 512, ..Shape::new(65536) }, 4, 60);
}

#[test]
fn six_tasks_in_clusters_of_64_kib_over_a_backing_file_survive_power_cuts() {
    survives(&over_stamps(Shape { size_bytes: (900 << 10) + 512, ..Shape::new(65536) }), 4, 60);
}

#[test]
fn six_tasks_in_subclusters_survive_power_cuts() {
    let shape = Shape { size_bytes: 300 << 10, ..Shape::new(16384) }.extended();
    survives(&shape, 4, 100);
    survives(&over_stamps(shape), 4, 100);
}

#[test]
fn six_tasks_in_version_2_survive_power_cuts() {
    survives(&Shape { size_bytes: 100 << 10, ..Shape::new(512) }.old(), 3, 100);
    survives(&over_stamps(Shape { size_bytes: 200 << 10, ..Shape::new(4096) }.old()), 3, 100);
}
