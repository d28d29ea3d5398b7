//! Power cuts in all configurations: guests that meet inside clusters, compressed clusters, snapshots, bitmaps and
//! sizes that change meanwhile, in one file or two, each write lost or torn in sectors and in larger blocks.

mod deeds;
mod hurt;
mod judge;
mod ledger;
mod qemu;
mod setup;
mod together;

use block::BlockDevice;
use qcow2::OpenOptions;

use crate::common::block_on;
use crate::crowd::Random;
use crate::rounds::rounds;
use deeds::{Doer, all_values, note, pick};
use judge::{Judge, assert_clean};
use ledger::{Flush, Ledger};
use qemu::Qemu;
use setup::{Files, Setup};

/// The batches of one run.
const BATCHES: u64 = 26;
/// The choices of what is left at each moment at which power goes.
const CHOICES: u64 = 3;
/// QEMU looks at one cut of so many: no multiple of the choices, so that it sees each of them.
const SHOWN: u64 = 8;

/// A run, and what may be left of it at each moment.
async fn record(setup: &Setup, seed: u64) -> (Files, Ledger) {
    let files = Files::create(setup).await;
    if !seed.is_multiple_of(4) {
        // Files that grow ahead are long, and every copy of them is slow.
        files.storages().for_each(block::MemoryStorage::without_fallocate);
    }
    let doer = Doer { files: files.clone(), clock: std::sync::Arc::new(1.into()) };
    let mut ledger = Ledger::new(setup);
    let mut random = Random(seed);
    let mut image = files.open(OpenOptions::writing()).await.unwrap();
    for number in 0..BATCHES {
        let last = number + 1 == BATCHES;
        if last || random.below(9) == 0 {
            let what = format!("{}, seed {seed}, closed after {number} batches", setup.name);
            let read: Vec<_> = all_values(&image).await.unwrap();
            let expected: Vec<_> = ledger.content().into_iter().map(Some).collect();
            assert!(read == expected, "{what}: as it reads");
            let began = doer.tick();
            image.close().await.unwrap();
            ledger.flushes.push(Flush { began, durable: files.now() });
            assert_clean(&files, &what).await;
            image = files.open(OpenOptions::writing()).await.unwrap();
            continue;
        }
        let deeds = pick(&mut random, &ledger, &files, number);
        let done = doer.run_all(&image, deeds, &mut random, false).await;
        for done in &done {
            assert!(done.error.is_none(), "{}: {:?}: {:?}", setup.name, done.deed, done.error);
        }
        note(&mut ledger, done);
    }
    ledger.settle();
    (files, ledger)
}

fn survives(name: &str) {
    let setup = Setup::all().into_iter().find(|setup| setup.name == name).unwrap();
    for run in 0..u64::from(rounds(if setup.is_costly() { 1 } else { 2 })) {
        let seed = run * 7 + 3;
        block_on(async {
            let (files, ledger) = record(&setup, seed).await;
            let all = files.now();
            let step = (all / setup.moments).max(1);
            let mut qemu = Qemu::new(&files);
            for now in (0..all).step_by(step).chain([all]) {
                for choice in 0..CHOICES {
                    // Nothing, all, or torn; with two files also one without the other.
                    let number = now as u64 / step as u64 * CHOICES + choice;
                    let cut = if choice == 0 { number / CHOICES % 4 } else { 4 + number };
                    let what =
                        format!("{name}, seed {seed}: power cut after {now} of {all}, {cut}");
                    let left = files.cut(now, cut);
                    let judge = Judge { ledger: &ledger, now, what };
                    let disk = judge.judge(&left, number).await;
                    if number % SHOWN == 4 {
                        qemu.see(&left, &disk, judge.what);
                    }
                }
            }
            qemu.assert_reads();
        });
    }
}

macro_rules! survive_power_cuts {
    ($($(#[$only:meta])? $test:ident: $name:literal;)*) => {
        $($(#[$only])?
        #[test]
        fn $test() {
            survives($name);
        })*

        #[test]
        fn every_configuration_loses_power_somewhere() {
            let known: Vec<_> = Setup::all().iter().map(|setup| setup.name).collect();
            assert_eq!(known, [$($(#[$only])? $name),*]);
        }
    };
}

survive_power_cuts! {
    version_2_in_clusters_of_512_bytes_survives_power_cuts: "v2-512";
    version_2_in_clusters_of_4_kib_survives_power_cuts: "v2-4k";
    version_2_in_clusters_of_64_kib_survives_power_cuts: "v2-64k";
    refcounts_of_one_bit_in_clusters_of_512_bytes_survive_power_cuts: "bits-1-512";
    refcounts_of_one_bit_on_a_disk_of_4_kib_blocks_survive_power_cuts: "bits-1-4k";
    refcounts_of_64_bits_survive_power_cuts: "bits-64";
    extended_entries_in_clusters_of_64_kib_survive_power_cuts: "extended-64k";
    extended_entries_in_clusters_of_16_kib_survive_power_cuts: "extended-16k";
    lazy_refcounts_in_clusters_of_512_bytes_survive_power_cuts: "lazy-512";
    lazy_refcounts_in_clusters_of_4_kib_survive_power_cuts: "lazy-4k";
    lazy_refcounts_in_clusters_of_64_kib_survive_power_cuts: "lazy-64k";
    a_data_file_in_clusters_of_64_kib_survives_power_cuts: "data-64k";
    a_data_file_in_clusters_of_512_bytes_survives_power_cuts: "data-512";
    a_data_file_under_extended_entries_survives_power_cuts: "data-extended";
    a_raw_data_file_survives_power_cuts: "raw-data";
    clusters_compressed_by_zstd_survive_power_cuts: "zstd-4k";
    bitmaps_and_snapshots_in_clusters_of_512_bytes_survive_power_cuts: "all-512";
    snapshots_and_sizes_in_clusters_of_64_kib_survive_power_cuts: "all-64k";
    bitmaps_and_snapshots_in_clusters_of_2_mib_survive_power_cuts: "all-2m";
    extended_entries_in_clusters_of_2_mib_survive_power_cuts: "extended-2m";
    clusters_of_64_kib_over_an_image_survive_power_cuts: "image-below-64k";
    clusters_of_16_kib_over_an_image_survive_power_cuts: "image-below-16k";
    a_data_file_over_an_image_survives_power_cuts: "image-below-data";
    #[cfg(feature = "luks")]
    encrypted_clusters_of_4_kib_survive_power_cuts: "luks-4k";
    #[cfg(feature = "luks")]
    encrypted_parts_of_clusters_survive_power_cuts: "luks-extended";
    #[cfg(feature = "luks")]
    an_encrypted_data_file_survives_power_cuts: "luks-data";
}
