//! Images that we make: QEMU finds nothing wrong with them, reads what we wrote, says of them what we said, and goes on
//! writing; dissect, which shares no code with QEMU or us, reads the same.

use block::{BlockDevice, Durability};
use qcow2::{CreateOptions, Image, OpenOptions};
use serde_json::{Value, json};

use crate::disk::Disk;
use crate::dissect::Dissect;
use crate::ours;
use crate::qemu::{BITMAP, Place, SNAPSHOT, Script, qemu_img};
use crate::random::Random;
use crate::recipe::{Below, Data, Recipe, Size, for_each};

/// Makes an image, with acts before and after the snapshot.
async fn make(recipe: &Recipe, place: &Place, seed: u64) -> (Disk, Option<Disk>) {
    let mut random = Random::new(seed);
    // Sizes of no whole sector are ours alone.
    let odd = if recipe.size == Size::Odd { 77 } else { 0 };
    let size_bytes = recipe.size_bytes() + odd;
    let fresh = Recipe { origin: crate::recipe::Origin::Empty, ..recipe.clone() };
    let mut disk = Disk::new(&fresh, size_bytes);
    Image::create(&place.image(), &ours::options(recipe, size_bytes)).await.unwrap();
    let image = ours::open(&place.image(), OpenOptions::writing()).await;
    ours::change(&image, recipe, &mut disk, &mut random, 15).await;
    if recipe.bitmaps {
        image.add_bitmap(BITMAP, recipe.granularity_bytes(), true).await.unwrap();
    }
    let mut snapshot = None;
    if recipe.snapshots {
        image.create_snapshot(SNAPSHOT).await.unwrap();
        snapshot = Some(disk.clone());
    }
    ours::change(&image, recipe, &mut disk, &mut random, 15).await;
    disk.assert_reads(&ours::read(&image, &disk).await, &format!("{}, at once", place.what));
    image.close().await.unwrap_or_else(|error| panic!("{}: {error:?}", place.what));
    (disk, snapshot)
}

/// What `qemu-img info` must say.
fn assert_info(recipe: &Recipe, place: &Place, disk: &Disk) {
    let options = Place::options(recipe);
    let text = qemu_img(place.path(), &["info", "--output=json", "--image-opts", &options]);
    let info: Value = serde_json::from_str(&text).unwrap();
    let data = &info["format-specific"]["data"];
    let mut expected = vec![
        (&info["virtual-size"], json!(disk.size_bytes / 512 * 512)),
        (&info["cluster-size"], json!(recipe.cluster_bytes)),
        (&info["dirty-flag"], json!(false)),
        (&data["compat"], json!(if recipe.version2 { "0.10" } else { "1.1" })),
        (&data["refcount-bits"], json!(recipe.refcount_bits)),
        (&data["compression-type"], json!(if recipe.zstd { "zstd" } else { "zlib" })),
        (
            &info["backing-filename"],
            match recipe.below {
                Below::Nothing => Value::Null,
                below if below.is_raw() => json!("below.raw"),
                _ => json!("below.qcow2"),
            },
        ),
        (&data["encrypt"]["format"], if recipe.luks { json!("luks") } else { Value::Null }),
        (
            &info["snapshots"][0]["name"],
            match recipe.snapshots {
                true => json!(SNAPSHOT),
                false => Value::Null,
            },
        ),
    ];
    if !recipe.version2 {
        let outside = recipe.data != Data::Inside;
        let granularity = recipe.granularity_bytes();
        expected.extend([
            (&data["lazy-refcounts"], json!(recipe.lazy)),
            (&data["extended-l2"], json!(recipe.extended)),
            (&data["corrupt"], json!(false)),
            (&data["data-file"], if outside { json!("disk.data") } else { Value::Null }),
            (
                &data["data-file-raw"],
                match outside {
                    true => json!(recipe.data == Data::RawFile),
                    false => Value::Null,
                },
            ),
            (
                &data["bitmaps"],
                match recipe.bitmaps {
                    true => {
                        json!([{ "name": BITMAP, "flags": ["auto"], "granularity": granularity }])
                    }
                    false => Value::Null,
                },
            ),
        ]);
    }
    for (found, expected) in expected {
        assert_eq!(*found, expected, "{}: {text}", place.what);
    }
}

fn judge(recipe: &Recipe, seed: u64, dissect: &Dissect) {
    let place = Place::new(recipe, seed);
    place.make_below(recipe);
    let (mut disk, snapshot) = ours::block_on(make(recipe, &place, seed));
    let what = place.what.clone();
    place.assert_clean(recipe, "made");
    disk.assert_reads(&place.read(recipe, &disk, false), &format!("{what}, by qemu"));
    assert_info(recipe, &place, &disk);
    if let Some(before) = &snapshot {
        before
            .assert_reads(&place.read(recipe, before, true), &format!("{what}, snapshot by qemu"));
    }
    if Dissect::reads(recipe) {
        disk.assert_reads(&dissect.read(&place, &disk, None), &format!("{what}, by dissect"));
        if let Some(before) = &snapshot {
            let read = dissect.read(&place, before, Some(SNAPSHOT));
            before.assert_reads(&read, &format!("{what}, snapshot by dissect"));
        }
    }
    // QEMU goes on, in the sectors that it sees.
    if recipe.size == Size::Odd {
        return;
    }
    let script = Recipe { origin: crate::recipe::Origin::Converted, ..recipe.clone() };
    let acts = Script::new(&script).draw(&mut disk, &mut Random::new(seed + 900), 8);
    place.act(recipe, &acts);
    place.assert_clean(recipe, "changed by qemu");
    ours::block_on(async {
        let image = ours::open(&place.image(), OpenOptions::reading()).await;
        disk.assert_reads(&ours::read(&image, &disk).await, &format!("{what}, changed by qemu"));
    });
}

#[test]
fn images_whose_refcounts_stay_behind_outgrow_their_first_refcount_block() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.qcow2");
    let options = CreateOptions::new(1 << 20).cluster_bytes(512).lazy_refcounts(true);
    ours::block_on(async {
        Image::create(&path, &options).await.unwrap();
        let image = ours::open(&path, OpenOptions::writing()).await;
        image.write(0, vec![7; 1 << 20].into(), Durability::Durable).await.unwrap();
        image.close().await.unwrap();
    });
    qemu_img(folder.path(), &["check", "-q", "-f", "qcow2", "disk.qcow2"]);
}

#[test]
fn what_we_made_in_clusters_of_512_bytes_and_1_kib_others_read_and_change() {
    let dissect = Dissect::start();
    for_each(512..=1 << 10, |recipe, seed| judge(recipe, seed, &dissect));
}

#[test]
fn what_we_made_in_clusters_of_2_to_8_kib_others_read_and_change() {
    let dissect = Dissect::start();
    for_each(2 << 10..=8 << 10, |recipe, seed| judge(recipe, seed, &dissect));
}

#[test]
fn what_we_made_in_clusters_of_16_and_32_kib_others_read_and_change() {
    let dissect = Dissect::start();
    for_each(16 << 10..=32 << 10, |recipe, seed| judge(recipe, seed, &dissect));
}

#[test]
fn what_we_made_in_clusters_of_64_to_256_kib_others_read_and_change() {
    let dissect = Dissect::start();
    for_each(64 << 10..=256 << 10, |recipe, seed| judge(recipe, seed, &dissect));
}

#[test]
fn what_we_made_in_clusters_of_512_kib_to_2_mib_others_read_and_change() {
    let dissect = Dissect::start();
    for_each(512 << 10..=2 << 20, |recipe, seed| judge(recipe, seed, &dissect));
}
