//! Runs that fail or are stopped: the right error, promptly, and nothing left behind that a later run would believe.

use agent::{AgentError, CancelToken, Event, SourceSpec, event_channel, probe, run};

use crate::support::{BLOCK, Bench, Disk, Peer, job};

/// A target of 1 MiB whose every write sets the length of `source`.
fn resizing(bench: &Bench, source: &Disk, size: u64) -> Peer {
    let pwrite = format!("pwrite=cat >/dev/null; truncate --size={size} {}", source.path_text());
    let script = [
        "eval",
        "get_size=echo 1M",
        "pread=exit 1",
        "can_write=exit 0",
        "can_zero=exit 3",
        &pwrite,
    ];
    Peer::nbdkit(bench.path(), "resizing", &script)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_of_another_size_is_refused_before_anything_is_sent() {
    let bench = Bench::new();
    let source = Disk::sparse(bench.path(), "source", 10 * BLOCK);
    source.fill(0..10, 1);
    for size in [9 * BLOCK, 10 * BLOCK + 512] {
        let target = Disk::sparse(bench.path(), &format!("target{size}"), size);
        let server = bench.serve(&format!("server{size}"), &target);
        let failed = bench.run_one(source.spec(), server.target(""), None).await.err().unwrap();
        assert!(
            matches!(failed, AgentError::SizeMismatch { source_bytes, target_bytes, .. }
                if source_bytes == 10 * BLOCK && target_bytes == size),
            "{failed}"
        );
        assert!(target.read().iter().all(|byte| *byte == 0));
    }
    assert!(bench.state_files().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn ends_that_do_not_open_are_named() {
    let bench = Bench::new();
    let source = Disk::sparse(bench.path(), "source", BLOCK);
    let server = Peer::nbdkit(bench.path(), "server", &["--readonly", "memory", "64k"]);
    let failed = bench.run_one(source.spec(), server.target(""), None).await.err().unwrap();
    assert!(matches!(failed, AgentError::TargetReadOnly { .. }), "{failed}");
    let missing = SourceSpec::File(bench.path().join("missing"));
    let failed = bench.run_one(missing.clone(), server.target(""), None).await.err().unwrap();
    assert!(matches!(failed, AgentError::OpenSource { .. }), "{failed}");
    assert!(failed.to_string().contains("missing"), "{failed}");
    assert!(probe(&missing).await.is_err());
    let nobody: agent::Target =
        format!("nbd+unix:///x?socket={}", bench.path().join("nobody").display()).parse().unwrap();
    let failed = bench.run_one(source.spec(), nobody, None).await.err().unwrap();
    assert!(matches!(failed, AgentError::ConnectTarget { .. }), "{failed}");
    let failed = bench.run(Vec::new()).await.err().unwrap();
    assert!(matches!(failed, AgentError::NoDisks), "{failed}");
    let twice = vec![job(0, source.spec(), server.target(""), None); 2];
    let failed = bench.run(twice).await.err().unwrap();
    assert!(matches!(failed, AgentError::DuplicateDisk { .. }), "{failed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_is_probed_without_being_read() {
    let bench = Bench::new();
    let server = Peer::nbdkit(
        bench.path(),
        "server",
        &["--filter=error", "memory", "3M", "error-pread-rate=100%"],
    );
    let info = probe(&server.source(Some("b"))).await.unwrap();
    assert_eq!((info.size_bytes, info.bitmap_offered), (3 << 20, Some(false)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_fails_ends_the_run_with_the_offset_and_stops_the_other_disks() {
    let bench = Bench::new();
    let source = Disk::sparse(bench.path(), "source", 16 * BLOCK);
    source.fill([5], 1);
    let failing = Peer::nbdkit(
        bench.path(),
        "failing",
        &["--filter=error", "memory", "1M", "error-pwrite=ENOSPC", "error-pwrite-rate=100%"],
    );
    // The other disk cannot end by itself: its target never answers a write within the test's time.
    let endless = Disk::sparse(bench.path(), "endless", 16 * BLOCK);
    endless.fill(0..16, 2);
    let stuck =
        Peer::nbdkit(bench.path(), "stuck", &["--filter=delay", "memory", "1M", "wdelay=3600"]);
    let jobs = vec![
        job(0, source.spec(), failing.target(""), None),
        job(1, endless.spec(), stuck.target(""), None),
    ];
    let failed = bench.run(jobs).await.err().unwrap();
    let AgentError::WriteTarget { disk, range, .. } = &failed else { panic!("{failed}") };
    assert_eq!((disk.index, range.start(), range.len()), (0, 5 * BLOCK, BLOCK));
    assert!(failed.to_string().contains(&format!("at offset {}", 5 * BLOCK)), "{failed}");
    assert!(bench.state_files().is_empty(), "{:?}", bench.state_files());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unreadable_source_block_is_named() {
    let bench = Bench::new();
    let target = Disk::sparse(bench.path(), "target", 1 << 20);
    let server = bench.serve("server", &target);
    let bad = 5 * BLOCK + 700;
    let pread = format!(
        "pread=if [ $4 -le {bad} ] && [ $(( $3 + $4 )) -gt {bad} ]; then echo EIO bad sector >&2; exit 1; fi; \
         head -c $3 /dev/zero"
    );
    let broken = Peer::nbdkit(bench.path(), "broken", &["eval", "get_size=echo 1M", &pread]);
    let failed = bench.run_one(broken.source(None), server.target(""), None).await.err().unwrap();
    let AgentError::ReadSource { range, .. } = &failed else { panic!("{failed}") };
    assert_eq!((range.start(), range.len()), (5 * BLOCK, BLOCK));
    assert!(bench.state_files().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flush_that_fails_leaves_no_change_id() {
    let bench = Bench::new();
    let source = Disk::sparse(bench.path(), "source", 1 << 20);
    source.fill(0..16, 2);
    let server = Peer::nbdkit(
        bench.path(),
        "server",
        &[
            "eval",
            "get_size=echo 1M",
            "pread=exit 1",
            "pwrite=cat >/dev/null",
            "can_write=exit 0",
            "can_zero=exit 3",
            "can_flush=exit 0",
            "flush=echo EIO no room >&2; exit 1",
        ],
    );
    let failed = bench.run_one(source.spec(), server.target(""), None).await.err().unwrap();
    assert!(matches!(failed, AgentError::FlushTarget { .. }), "{failed}");
    assert!(bench.state_files().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_run_ends_though_its_target_does_not_answer() {
    let bench = Bench::new();
    let source = Disk::sparse(bench.path(), "source", 64 << 20);
    source.fill(0..1024, 2);
    let stuck =
        Peer::nbdkit(bench.path(), "stuck", &["--filter=delay", "memory", "64M", "wdelay=3600"]);
    let (sender, mut events) = event_channel();
    let cancel = CancelToken::new();
    let jobs = vec![job(0, source.spec(), stuck.target(""), None)];
    let running = tokio::spawn(run(jobs, bench.options(), sender, cancel.clone()));
    // Once the disk has begun, writes are under way sooner or later; cancelling is right at any time.
    while !matches!(events.recv().await, Some(Event::DiskStarted { .. })) {}
    cancel.cancel();
    let failed = running.await.unwrap().err().unwrap();
    assert!(matches!(failed, AgentError::Cancelled), "{failed}");
    let mut last = None;
    while let Some(event) = events.recv().await {
        last = Some(event);
    }
    assert!(matches!(last, Some(Event::RunFailed { .. })));
    assert!(bench.state_files().is_empty(), "{:?}", bench.state_files());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_shrinks_meanwhile_fails_its_disk_and_leaves_no_change_id() {
    let bench = Bench::new();
    let source = Disk::sparse(bench.path(), "source", 1 << 20);
    source.fill(0..16, 2);
    let server = resizing(&bench, &source, 5 * BLOCK);
    let failed = bench.run_one(source.spec(), server.target(""), None).await.err().unwrap();
    let AgentError::ReadSource { range, .. } = &failed else { panic!("{failed}") };
    assert_eq!((range.start(), range.end()), (5 * BLOCK, 1 << 20));
    let sizes = format!("cut the file from {} bytes to {}", 1 << 20, 5 * BLOCK);
    assert!(failed.to_string().contains(&sizes), "{failed}");
    assert!(bench.state_files().is_empty(), "{:?}", bench.state_files());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_grows_meanwhile_is_worth_a_warning() {
    let bench = Bench::new();
    let source = Disk::sparse(bench.path(), "source", 1 << 20);
    source.fill(0..16, 2);
    let server = resizing(&bench, &source, 3 << 20);
    let ran = bench.run_one(source.spec(), server.target(""), None).await.unwrap();
    let [warning] = ran.report.warnings.as_slice() else { panic!("{:?}", ran.report.warnings) };
    assert!(warning.contains("grew from 1048576 to 3145728 bytes"), "{warning}");
    let told =
        |event: &Event| matches!(event, Event::Warning { message, .. } if message == warning);
    assert!(ran.events.iter().any(told));
    assert_eq!(ran.disk().data_bytes_sent, 1 << 20);
}
