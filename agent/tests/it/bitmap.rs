//! Sources whose server knows what changed: `qemu-nbd` with a dirty bitmap of a qcow2 image.

use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use agent::{Address, SourceSpec};
use block::{ByteRange, DeviceError, RawDevice};
use nbd_server::{DIRTY, Export, ExtentSource, FlaggedExtent, Server, ServerConfig};

use crate::support::{BLOCK, Bench, Disk, Peer, assert_same};

fn command(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
}

fn qemu_io(image: &str, steps: &[&str]) {
    let steps = steps.iter().flat_map(|step| ["-c", step]);
    let arguments: Vec<_> = ["-f", "qcow2", image].into_iter().chain(steps).collect();
    command("qemu-io", &arguments);
}

/// The guest's view of a qcow2 image as a raw file.
fn flatten(bench: &Bench, image: &str, name: &str) -> Disk {
    let path = bench.path().join(name);
    command("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", image, path.to_str().unwrap()]);
    Disk { path }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_what_the_bitmap_calls_dirty_is_read_and_sent() {
    let bench = Bench::new();
    let image = bench.path().join("source.qcow2");
    let image = image.to_str().unwrap();
    command("qemu-img", &["create", "-f", "qcow2", image, "64M"]);
    qemu_io(image, &["write -P 1 0 8M", "write -P 2 40M 1M"]);
    command("qemu-img", &["bitmap", "--add", image, "changes"]);
    let serve = |name| {
        Peer::qemu_nbd(
            bench.path(),
            name,
            &["--read-only", "--format=qcow2", "--bitmap=changes", image],
        )
    };
    let target = Disk::sparse(bench.path(), "target", 64 << 20);
    target.fill((0..1024).step_by(7), 5);
    let server = bench.serve("server", &target);

    let full = {
        let reader = serve("first");
        bench.run_one(reader.source(Some("changes")), server.target(""), None).await.unwrap()
    };
    assert_same(&flatten(&bench, image, "full"), &target);
    assert_eq!(full.disk().read_bytes, 9 << 20, "a full reads what is allocated");
    assert!(full.disk().change_id.starts_with("bitmap:changes:"), "{}", full.disk().change_id);
    assert!(bench.state_files().is_empty());

    // Data, data over data that stays the same, explicit zeros, and a hole that becomes data.
    qemu_io(
        image,
        &[
            "write -P 3 1M 64k",
            "write -P 1 2M 64k",
            "write -z 3M 128k",
            "write -P 4 50M 192k",
            "write -P 0 5M 64k",
        ],
    );
    let ran = {
        let reader = serve("second");
        bench
            .run_one(
                reader.source(Some("changes")),
                server.target(""),
                Some(&full.disk().change_id),
            )
            .await
            .unwrap()
    };
    assert_same(&flatten(&bench, image, "changed"), &target);
    let disk = ran.disk();
    assert!(disk.incremental);
    assert_eq!(
        disk.read_bytes,
        (1 + 1 + 3 + 1) * BLOCK,
        "zeros that the server knows of are not read"
    );
    assert_eq!(
        (disk.data_bytes_sent, disk.zero_bytes_sent),
        ((1 + 1 + 3) * BLOCK, (2 + 1) * BLOCK)
    );
    assert!(disk.change_id.ends_with("/2"), "{}", disk.change_id);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bitmap_that_is_not_there_costs_a_full_and_digests_bridge_to_the_next_one() {
    let bench = Bench::new();
    let image = bench.path().join("source.qcow2");
    let image = image.to_str().unwrap();
    command("qemu-img", &["create", "-f", "qcow2", image, "16M"]);
    qemu_io(image, &["write -P 1 0 4M"]);
    let target = Disk::sparse(bench.path(), "target", 16 << 20);
    let server = bench.serve("server", &target);
    let previous = "bitmap:gone:0190f1c2-7e7e-4d9a-8f00-0123456789ab/4";

    let full = {
        let reader =
            Peer::qemu_nbd(bench.path(), "first", &["--read-only", "--format=qcow2", image]);
        bench.run_one(reader.source(Some("gone")), server.target(""), Some(previous)).await.unwrap()
    };
    let reason = full.disk().full_reason.clone().unwrap();
    assert!(reason.contains("does not offer the dirty bitmap 'gone'"), "{reason}");
    assert_eq!(full.report.warnings.len(), 2);
    assert_eq!(full.disk().changed_bytes, 16 << 20);
    assert!(full.disk().change_id.ends_with("/5"), "{}", full.disk().change_id);

    // The bitmap that appears now has missed this change; the digests have not.
    qemu_io(image, &["write -P 9 1M 64k"]);
    command("qemu-img", &["bitmap", "--add", image, "gone"]);
    let reader = Peer::qemu_nbd(
        bench.path(),
        "second",
        &["--read-only", "--format=qcow2", "--bitmap=gone", image],
    );
    let ran = bench
        .run_one(reader.source(Some("gone")), server.target(""), Some(&full.disk().change_id))
        .await
        .unwrap();
    assert_same(&flatten(&bench, image, "flat"), &target);
    assert!(ran.disk().incremental);
    assert_eq!(ran.disk().data_bytes_sent, BLOCK);
    assert!(ran.disk().change_id.starts_with("bitmap:gone:"));
}

/// Says that every third block changed.
struct EveryThird;

#[async_trait::async_trait]
impl ExtentSource for EveryThird {
    async fn extents(&self, range: ByteRange) -> Result<Vec<FlaggedExtent>, DeviceError> {
        let flags =
            |block: ByteRange| if (block.start() / BLOCK).is_multiple_of(3) { DIRTY } else { 0 };
        let one = |range: ByteRange| FlaggedExtent { range, flags: flags(range) };
        Ok(range.pieces(BLOCK).map(one).collect())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn our_own_server_tells_the_agent_what_changed() {
    let bench = Bench::new();
    let disk = Disk::sparse(bench.path(), "source", 32 * BLOCK);
    disk.fill(0..32, 1);
    let target = Disk::sparse(bench.path(), "target", 32 * BLOCK);
    let peer = bench.serve("server", &target);
    let server = Server::new(ServerConfig::default());
    let device = RawDevice::open(&disk.path, false).await.unwrap();
    let export = Export::new("disk", device)
        .read_only(true)
        .context("qemu:dirty-bitmap:changes", Arc::new(EveryThird));
    server.add_export(export).unwrap();
    let socket = bench.path().join("own.sock");
    server.listen_unix(&socket).await.unwrap();
    let source = || SourceSpec::Nbd {
        address: Address::Unix(socket.clone()),
        export: "disk".into(),
        tls: None,
        bitmap: Some("changes".into()),
    };
    let full = bench.run_one(source(), peer.target(""), None).await.unwrap();
    assert_same(&disk, &target);
    let id = full.disk().change_id.clone();
    assert!(id.starts_with("bitmap:changes:"), "{id}");
    disk.fill((0..32).step_by(3), 2);
    let ran = bench.run_one(source(), peer.target(""), Some(&id)).await.unwrap();
    assert_same(&disk, &target);
    assert!(ran.disk().incremental);
    assert_eq!(ran.disk().read_bytes, 11 * BLOCK);
    server.shutdown(Duration::from_secs(5)).await;
}
