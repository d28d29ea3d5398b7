//! Images that QEMU makes: we read what was written to them, in the disk, the snapshot and the bitmap, and QEMU reads
//! what we write into them.

use std::collections::BTreeSet;

use block::{BlockDevice, ByteRange};
use qcow2::{Image, LayerState, OpenOptions};

use crate::disk::{Act, Disk};
use crate::ours;
use crate::qemu::{BITMAP, Place, SNAPSHOT, Script, qemu_img};
use crate::random::Random;
use crate::recipe::{Below, Recipe, Size, for_each};

/// An image as QEMU leaves it.
pub(crate) struct Made {
    pub(crate) place: Place,
    pub(crate) disk: Disk,
    /// What the snapshot holds.
    snapshot: Option<Disk>,
    /// What was done since the bitmap was made.
    since: Vec<Act>,
}

/// Lets QEMU make an image, with acts before and after the snapshot.
pub(crate) fn make(recipe: &Recipe, seed: u64) -> Made {
    let mut random = Random::new(seed);
    let place = Place::new(recipe, seed);
    let mut disk = Disk::new(recipe, recipe.size_bytes());
    let mut script = Script::new(recipe);
    place.make(recipe, &disk);
    place.act(recipe, &script.draw(&mut disk, &mut random, 12));
    let options = Place::options(recipe);
    if recipe.bitmaps {
        let granularity = recipe.granularity_bytes().to_string();
        let args = ["bitmap", "--add", "-g", &granularity, "--image-opts", &options, BITMAP];
        qemu_img(place.path(), &args);
    }
    let snapshot = recipe.snapshots.then(|| {
        qemu_img(place.path(), &["snapshot", "--image-opts", "-c", SNAPSHOT, &options]);
        disk.clone()
    });
    let since = script.draw(&mut disk, &mut random, 12);
    place.act(recipe, &since);
    Made { place, disk, snapshot, since }
}

/// Insists that nothing is told of the disk outside the windows.
async fn assert_nothing_else(image: &Image, recipe: &Recipe, disk: &Disk, what: &str) {
    if recipe.size != Size::Huge || recipe.below != Below::Nothing {
        return;
    }
    let cluster = u64::from(recipe.cluster_bytes);
    for extent in image.map(ByteRange::between(0, disk.size_bytes)).await.unwrap() {
        let is_inside = disk.windows.iter().any(|window| {
            let range = window.range();
            range.start <= extent.range.start()
                && extent.range.end() <= range.end.next_multiple_of(cluster)
        });
        let is_zero = matches!(extent.state, LayerState::Zero | LayerState::Unallocated);
        assert!(is_inside || is_zero, "{what}: {extent:?}");
    }
}

/// Insists that the bitmap tells of these acts, and of nothing else.
async fn assert_dirty(image: &Image, recipe: &Recipe, disk: &Disk, acts: &[Act], what: &str) {
    let unit = recipe.granularity_bytes();
    let expected: BTreeSet<u64> =
        acts.iter().flat_map(|act| act.range.start / unit..act.range.end.div_ceil(unit)).collect();
    let mut found = BTreeSet::new();
    let mut rest = ByteRange::between(0, disk.size_bytes);
    while !rest.is_empty() {
        let extents = image.dirty_extents(BITMAP, rest).await.unwrap();
        for extent in extents.iter().filter(|extent| extent.dirty) {
            found.extend(extent.range.start() / unit..extent.range.end().div_ceil(unit));
        }
        rest = ByteRange::between(extents.last().unwrap().range.end(), rest.end());
    }
    assert_eq!(found, expected, "{what}: the bitmap, in units of {unit}");
}

fn judge(recipe: &Recipe, seed: u64) {
    let Made { place, mut disk, snapshot, since } = make(recipe, seed);
    let what = place.what.clone();
    place.assert_clean(recipe, "made");
    disk.assert_reads(&place.read(recipe, &disk, false), &format!("{what}, qemu of its own"));
    ours::block_on(async {
        if let Some(before) = &snapshot {
            let options = OpenOptions::reading().snapshot(SNAPSHOT);
            let image = ours::open(&place.image(), options).await;
            before.assert_reads(&ours::read(&image, before).await, &format!("{what}, snapshot"));
        }
        let image = ours::open(&place.image(), OpenOptions::writing()).await;
        disk.assert_reads(&ours::read(&image, &disk).await, &format!("{what}, as made"));
        assert_nothing_else(&image, recipe, &disk, &what).await;
        if recipe.bitmaps {
            assert_dirty(&image, recipe, &disk, &since, &what).await;
        }
        let mut random = Random::new(seed + 500);
        ours::change(&image, recipe, &mut disk, &mut random, 25).await;
        disk.assert_reads(&ours::read(&image, &disk).await, &format!("{what}, changed"));
        image.close().await.unwrap_or_else(|error| panic!("{what}: {error:?}"));
    });
    place.assert_clean(recipe, "changed");
    disk.assert_reads(&place.read(recipe, &disk, false), &format!("{what}, qemu of ours"));
    if let Some(before) = &snapshot {
        before.assert_reads(
            &place.read(recipe, before, true),
            &format!("{what}, qemu of the snapshot"),
        );
    }
}

#[test]
fn what_qemu_made_in_clusters_of_512_bytes_and_1_kib_we_read_and_change() {
    for_each(512..=1 << 10, judge);
}

#[test]
fn what_qemu_made_in_clusters_of_2_to_8_kib_we_read_and_change() {
    for_each(2 << 10..=8 << 10, judge);
}

#[test]
fn what_qemu_made_in_clusters_of_16_and_32_kib_we_read_and_change() {
    for_each(16 << 10..=32 << 10, judge);
}

#[test]
fn what_qemu_made_in_clusters_of_64_to_256_kib_we_read_and_change() {
    for_each(64 << 10..=256 << 10, judge);
}

#[test]
fn what_qemu_made_in_clusters_of_512_kib_to_2_mib_we_read_and_change() {
    for_each(512 << 10..=2 << 20, judge);
}
