//! Fulls and incrementals of raw files: the target always ends up as the source, for the price of what changed.

use std::fs;

use agent::Event;

use crate::support::{BLOCK, Bench, Disk, Peer, Ran, assert_same, job};

/// A source with data in `0..data` of `blocks` blocks, and a target of that size that holds other bytes.
fn pair(bench: &Bench, blocks: u64, data: u64) -> (Disk, Disk) {
    let source = Disk::sparse(bench.path(), "source", blocks * BLOCK);
    source.fill(0..data, 1);
    let target = Disk::sparse(bench.path(), "target", blocks * BLOCK);
    target.fill((0..blocks).step_by(3), 99);
    (source, target)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_incremental_sends_the_changed_blocks_and_nothing_else() {
    let bench = Bench::new();
    let (source, target) = pair(&bench, 1600, 1000);
    let server = bench.serve("server", &target);
    let full = bench.run_one(source.spec(), server.target(""), None).await.unwrap();
    assert_same(&source, &target);
    let disk = full.disk();
    assert_eq!((disk.incremental, &disk.full_reason), (false, &None));
    assert_eq!(disk.data_bytes_sent, 1000 * BLOCK);
    assert_eq!(disk.zero_bytes_sent, 600 * BLOCK);
    assert_eq!(disk.changed_bytes, disk.capacity_bytes);
    assert_eq!(disk.read_bytes, 1000 * BLOCK, "holes are not read");

    source.fill((0..200).map(|i| i * 5), 2);
    let changed =
        bench.run_one(source.spec(), server.target(""), Some(&disk.change_id)).await.unwrap();
    assert_same(&source, &target);
    let disk = changed.disk();
    assert!(disk.incremental);
    assert_eq!((disk.data_bytes_sent, disk.zero_bytes_sent), (200 * BLOCK, 0));
    assert!(disk.wire_bytes <= 200 * BLOCK * 101 / 100, "{} on the wire", disk.wire_bytes);

    let same =
        bench.run_one(source.spec(), server.target(""), Some(&disk.change_id)).await.unwrap();
    assert_eq!(same.disk().changed_bytes, 0);
    assert_eq!(bench.state_files().len(), 2, "the previous state and the new one");
}

#[tokio::test(flavor = "multi_thread")]
async fn blocks_that_became_zero_are_cleared_and_holes_are_filled() {
    let bench = Bench::new();
    let (source, target) = pair(&bench, 64, 32);
    let server = bench.serve("server", &target);
    let full = bench.run_one(source.spec(), server.target(""), None).await.unwrap();

    source.zero(3); // Zeros that the file system stores.
    source.zero(40); // Zeros over a hole: no change.
    source.fill([50], 7); // Data where a hole was.
    let ran = bench
        .run_one(source.spec(), server.target(""), Some(&full.disk().change_id))
        .await
        .unwrap();
    assert_same(&source, &target);
    assert_eq!((ran.disk().data_bytes_sent, ran.disk().zero_bytes_sent), (BLOCK, BLOCK));

    // The end of the file becomes a hole.
    source.resize(20 * BLOCK);
    source.resize(64 * BLOCK);
    let ran =
        bench.run_one(source.spec(), server.target(""), Some(&ran.disk().change_id)).await.unwrap();
    assert_same(&source, &target);
    assert_eq!((ran.disk().data_bytes_sent, ran.disk().zero_bytes_sent), (0, 13 * BLOCK));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_of_odd_size_grows() {
    let bench = Bench::new();
    let (small, large) = (10 * BLOCK + 1234, 20 * BLOCK + 77);
    let source = Disk::sparse(bench.path(), "source", small);
    source.fill(0..11, 1);
    let target = Disk::sparse(bench.path(), "target", small);
    let full = {
        let server = bench.serve("small", &target);
        bench.run_one(source.spec(), server.target(""), None).await.unwrap()
    };
    assert_same(&source, &target);
    assert_eq!(full.disk().data_bytes_sent, small);

    source.resize(large);
    source.fill([15, 20], 2);
    // A larger target whose tail holds something else: nothing may be left of it.
    target.resize(large);
    target.fill([12, 15], 66);
    let server = bench.serve("large", &target);
    let grown = bench
        .run_one(source.spec(), server.target(""), Some(&full.disk().change_id))
        .await
        .unwrap();
    assert_same(&source, &target);
    assert!(grown.disk().incremental);
    // The block that the old end cut, one in the new part, and the short one at the end.
    assert_eq!(grown.disk().data_bytes_sent, 2 * BLOCK + 77);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_usable_baseline_everything_is_sent_and_the_reason_told() {
    let bench = Bench::new();
    let (source, target) = pair(&bench, 40, 30);
    let server = bench.serve("server", &target);
    let full = bench.run_one(source.spec(), server.target(""), None).await.unwrap();
    let id = full.disk().change_id.clone();

    let expect_full = |ran: &Ran, why: &str| {
        let disk = ran.disk();
        assert!(!disk.incremental);
        assert!(disk.full_reason.as_deref().is_some_and(|reason| reason.contains(why)), "{disk:?}");
        assert_eq!(disk.changed_bytes, 40 * BLOCK);
        assert!(ran.report.warnings.iter().any(|warning| warning.contains(why)));
        let told = |event: &Event| matches!(event, Event::Warning { disk_index: Some(0), message } if message.contains(why));
        assert!(ran.events.iter().any(told));
        assert_ne!(disk.change_id, id);
    };
    let [name] = &bench.state_files()[..] else { panic!("one digest file") };
    let path = bench.state_dir().join(name);
    let mut bytes = fs::read(&path).unwrap();
    bytes[500] ^= 4;
    fs::write(&path, bytes).unwrap();
    let ran = bench.run_one(source.spec(), server.target(""), Some(&id)).await.unwrap();
    expect_full(&ran, "does not match its hash");
    fs::remove_file(&path).unwrap();
    let ran = bench.run_one(source.spec(), server.target(""), Some(&id)).await.unwrap();
    expect_full(&ran, "there are no digests");
    let ran = bench.run_one(source.spec(), server.target(""), Some("52 4d/7")).await.unwrap();
    expect_full(&ran, "not one of this agent");
    assert_same(&source, &target);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_shrank_is_sent_whole() {
    let bench = Bench::new();
    let (source, target) = pair(&bench, 40, 30);
    let full = {
        let server = bench.serve("server", &target);
        bench.run_one(source.spec(), server.target(""), None).await.unwrap()
    };
    for disk in [&source, &target] {
        disk.resize(35 * BLOCK + 512);
    }
    let server = bench.serve("small", &target);
    let previous = Some(full.disk().change_id.as_str());
    let ran = bench.run_one(source.spec(), server.target(""), previous).await.unwrap();
    assert_same(&source, &target);
    assert!(ran.disk().full_reason.as_deref().is_some_and(|reason| reason.contains("shrank")));
    assert_eq!(ran.disk().changed_bytes, 35 * BLOCK + 512);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_disk_is_sent_like_any_other() {
    let bench = Bench::new();
    let source = Disk::sparse(bench.path(), "source", 0);
    let target = Disk::sparse(bench.path(), "target", 0);
    let server = bench.serve("server", &target);
    let full = bench.run_one(source.spec(), server.target(""), None).await.unwrap();
    let previous = Some(full.disk().change_id.as_str());
    let ran = bench.run_one(source.spec(), server.target(""), previous).await.unwrap();
    assert_eq!((ran.disk().incremental, ran.disk().changed_bytes), (true, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_that_was_asked_for_needs_no_reason() {
    let bench = Bench::new();
    let (source, target) = pair(&bench, 40, 30);
    let server = bench.serve("server", &target);
    let first = bench.run_one(source.spec(), server.target(""), None).await.unwrap();
    let mut again = job(0, source.spec(), server.target(""), Some(&first.disk().change_id));
    again.full = true;
    let ran = bench.run(vec![again]).await.unwrap();
    assert_eq!((ran.disk().incremental, &ran.disk().full_reason), (false, &None));
    assert_eq!(ran.disk().changed_bytes, 40 * BLOCK);
    assert!(ran.report.warnings.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn two_disks_are_sent_at_once_and_told_apart() {
    let bench = Bench::new();
    let sizes = [300, 170];
    let (mut jobs, mut disks, mut servers) = (Vec::new(), Vec::new(), Vec::new());
    for (index, blocks) in (0..).zip(sizes) {
        let source = Disk::sparse(bench.path(), &format!("source{index}"), blocks * BLOCK);
        source.fill(0..blocks, u64::from(index));
        let target = Disk::sparse(bench.path(), &format!("target{index}"), blocks * BLOCK);
        let server = bench.serve(&format!("server{index}"), &target);
        jobs.push(job(index, source.spec(), server.target(""), None));
        disks.push((source, target));
        servers.push(server);
    }
    let ran = bench.run(jobs).await.unwrap();
    for (source, target) in &disks {
        assert_same(source, target);
    }
    let ids: Vec<_> =
        ran.report.disks.iter().map(|disk| (disk.disk_index, disk.disk_key)).collect();
    assert_eq!(ids, [(0, 2000), (1, 2001)]);
    assert_ne!(ran.report.disks[0].change_id, ran.report.disks[1].change_id);
    for (index, blocks) in (0..).zip(sizes) {
        let done: Vec<_> = ran
            .events
            .iter()
            .filter_map(|event| match event {
                Event::Progress { disk_index, bytes_done, bytes_total, .. }
                    if *disk_index == index =>
                {
                    assert_eq!(*bytes_total, blocks * BLOCK);
                    Some(*bytes_done)
                }
                _ => None,
            })
            .collect();
        assert!(done.is_sorted());
        assert_eq!(done.last(), Some(&(blocks * BLOCK)));
    }
    assert!(
        matches!(ran.events.last(), Some(Event::RunFinished { report }) if *report == ran.report)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sparse_disk_of_500_gib_costs_only_its_data() {
    let bench = Bench::new();
    let size = 500 << 30;
    let source = Disk::sparse(bench.path(), "source", size);
    let places = [0, 1, 4_000_000, 8_191_998, 8_191_999];
    source.fill(places, 1);
    let target = Disk::sparse(bench.path(), "target", size);
    let server = bench.serve("server", &target);
    let full = bench.run_one(source.spec(), server.target(""), None).await.unwrap();
    assert_eq!(full.disk().read_bytes, 5 * BLOCK);
    assert_eq!(full.disk().data_bytes_sent, 5 * BLOCK);
    assert_eq!(full.disk().changed_bytes, size);
    assert!(full.disk().wire_bytes < 6 * BLOCK, "{}", full.disk().wire_bytes);
    let compared = std::process::Command::new("qemu-img")
        .args(["compare", "-f", "raw", "-F", "raw", source.path_text(), target.path_text()])
        .output()
        .unwrap();
    assert!(compared.status.success(), "{}", String::from_utf8_lossy(&compared.stdout));

    source.fill([4_000_000], 2);
    let ran = bench
        .run_one(source.spec(), server.target(""), Some(&full.disk().change_id))
        .await
        .unwrap();
    assert_eq!(ran.disk().changed_bytes, BLOCK);
    assert!(ran.disk().wire_bytes < 2 * BLOCK);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_nbd_source_is_compared_by_digests_too() {
    let bench = Bench::new();
    let (source, target) = pair(&bench, 100, 60);
    let reader = Peer::nbdkit(bench.path(), "reader", &["--readonly", "file", source.path_text()]);
    let server = bench.serve("server", &target);
    let full = bench.run_one(reader.source(None), server.target(""), None).await.unwrap();
    assert_same(&source, &target);
    assert_eq!(full.disk().read_bytes, 60 * BLOCK, "holes are not read");
    source.fill([2, 80], 3);
    source.zero(4);
    let ran = bench
        .run_one(reader.source(None), server.target(""), Some(&full.disk().change_id))
        .await
        .unwrap();
    assert_same(&source, &target);
    assert_eq!((ran.disk().data_bytes_sent, ran.disk().zero_bytes_sent), (2 * BLOCK, BLOCK));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_block_status_is_read_whole() {
    let bench = Bench::new();
    let (source, target) = pair(&bench, 30, 10);
    let arguments = ["--no-sr", "--readonly", "file", source.path_text()];
    let reader = Peer::nbdkit(bench.path(), "reader", &arguments);
    let server = bench.serve("server", &target);
    let full = bench.run_one(reader.source(None), server.target(""), None).await.unwrap();
    assert_same(&source, &target);
    assert_eq!(full.disk().read_bytes, 30 * BLOCK);
    assert_eq!(full.disk().data_bytes_sent, 10 * BLOCK, "zeros are zeros, whoever says so");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_qcow2_image_is_read_raw_with_a_warning() {
    let bench = Bench::new();
    let (source, target) = pair(&bench, 16, 8);
    let server = bench.serve("server", &target);
    let plain = bench.run_one(source.spec(), server.target(""), None).await.unwrap();
    assert!(plain.report.warnings.is_empty(), "{:?}", plain.report.warnings);
    assert!(!agent::probe(&source.spec()).await.unwrap().looks_like_qcow2);

    let file = fs::OpenOptions::new().write(true).open(&source.path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"QFI\xfb", 0).unwrap();
    let warned = bench.run_one(source.spec(), server.target(""), None).await.unwrap();
    assert_same(&source, &target);
    assert!(warned.report.warnings.iter().any(|text| text.contains("qemu-nbd")));
    assert!(agent::probe(&source.spec()).await.unwrap().looks_like_qcow2);
}
