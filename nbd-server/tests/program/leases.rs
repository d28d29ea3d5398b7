//! Reloads and the right to write: it stays with the image, whatever exports of it are called and show of it.

use std::path::Path;
use std::sync::Arc;

use block::{BlockDevice, ByteRange, Durability};
use bytes::Bytes;
use nbd_server::client::{Address, ClientError, ClientOptions, NbdDevice};

use super::{Running, create_qcow2, image, run};

async fn connect(dir: &Path, name: &str) -> Result<Arc<NbdDevice>, ClientError> {
    let address = Address::Unix(dir.join("socket"));
    NbdDevice::connect(&address, name, ClientOptions::default()).await
}

async fn is_taken(dir: &Path, name: &str) {
    let Err(error) = connect(dir, name).await else { panic!("{name} has two writers") };
    assert!(error.to_string().contains("another client or connection is writing"), "{error}");
}

/// Serves these sections from now on; what the log says of it.
fn reload(dir: &Path, server: &mut Running, sections: &str) -> String {
    configure(dir, sections);
    server.signal("-HUP");
    let log = server.log_until("reloaded").concat();
    assert!(!log.contains("not reloaded"), "{log}");
    log
}

fn configure(dir: &Path, sections: &str) {
    let text = format!("[generic]\nunixsock = socket\nallowlist = true\n{sections}");
    std::fs::write(dir.join("config"), text).unwrap();
}

fn section(name: &str, keys: &str) -> String {
    format!("[{name}]\nexportname = disk.img\n{keys}")
}

fn is_read_only(dir: &Path, name: &str) -> bool {
    let uri = format!("nbd+unix:///{name}?socket=socket");
    run(dir, "nbdinfo", &["--json", &uri]).contains("\"is_read_only\": true")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_writer_stays_the_only_one_of_its_image_over_reloads() {
    for shape in ["", "offset = 4K\nsize = 1M\n", "sync = true\n", "offset = 512\nsync = true\n"] {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        image(dir);
        let sole =
            |name: &str, more: &str| section(name, &format!("writers = connection\n{shape}{more}"));
        configure(dir, &sole("one", ""));
        let mut server = Running::start(dir, &["--config=config"]);
        server.address();
        let writer = connect(dir, "one").await.unwrap();
        for changed in ["description = other\n", "", "timeout = 1000\n"] {
            reload(dir, &mut server, &sole("one", changed));
            is_taken(dir, "one").await;
        }
        // Renamed; one more that shows all of it to anybody; removed, and added again while its writer goes on.
        reload(dir, &mut server, &sole("two", ""));
        is_taken(dir, "two").await;
        let log = reload(dir, &mut server, &section("any", ""));
        assert!(log.contains(r#"removed=["two"]"#), "{log}");
        is_taken(dir, "any").await;
        let other = "[other]\nexportname = other.img\nfilesize = 4K\n";
        reload(dir, &mut server, other);
        reload(dir, &mut server, &format!("{other}{}", sole("one", "")));
        is_taken(dir, "one").await;
        writer.write(0, Bytes::from_static(&[7; 512]), Durability::Durable).await.unwrap();
        drop(writer);
        // The server sees it at its leisure.
        while connect(dir, "one").await.is_err() {
            tokio::task::yield_now().await;
        }
        assert!(server.stop());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parts_that_do_not_overlap_have_a_writer_each() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    image(dir);
    let sole = |name: &str, part: &str| section(name, &format!("writers = connection\n{part}"));
    let (left, right) = (sole("left", "size = 1M\n"), sole("right", "offset = 1M\n"));
    configure(dir, &format!("{left}{right}"));
    let mut server = Running::start(dir, &["--config=config"]);
    server.address();
    let (_one, _other) =
        (connect(dir, "left").await.unwrap(), connect(dir, "right").await.unwrap());
    reload(dir, &mut server, &sole("middle", "offset = 1000K\nsize = 4K\n"));
    is_taken(dir, "middle").await;
    assert!(server.stop());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_with_disks_apart_are_counted_over_reloads_too() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    image(dir);
    let apart =
        |more: &str| section("one", &format!("copyonwrite = true\nwriters = connection\n{more}"));
    configure(dir, &apart(""));
    let mut server = Running::start(dir, &["--config=config"]);
    server.address();
    let _writer = connect(dir, "one").await.unwrap();
    reload(dir, &mut server, &apart("description = other\n"));
    is_taken(dir, "one").await;
    assert!(server.stop());
}

/// Serves one section that seals its image, and has it sealed by a writer.
async fn sealed(dir: &Path, format: &str, keys: &str) -> Running {
    image(dir);
    if format == "qcow2" {
        create_qcow2(dir, "disk.img", None);
    }
    configure(dir, &section("one", keys));
    let mut server = Running::start(dir, &["--config=config"]);
    server.address();
    let writer = connect(dir, "one").await.unwrap();
    writer.write(0, Bytes::from_static(&[7; 512]), Durability::Deferred).await.unwrap();
    writer.disconnect().await;
    drop(writer);
    let log = server.log_until("sealed").concat();
    assert!(log.contains("its writer is done: sealed"), "{log}");
    server
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_sealed_stays_so_until_its_image_is_closed() {
    let shapes = ["", "offset = 4K\nsize = 1M\n", "sync = true\n"];
    for (format, shape) in ["qcow2", "raw"].into_iter().flat_map(|one| shapes.map(|two| (one, two)))
    {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let format_key = format!("format = {format}\n");
        let seals = format!("seal = true\n{format_key}{shape}");
        let mut server = sealed(dir, format, &seals).await;
        for (name, keys) in [
            ("one", &*format!("{seals}description = other\n")),
            ("one", &*format!("{format_key}{shape}")),
            ("two", &seals),
            ("three", &format_key),
        ] {
            reload(dir, &mut server, &section(name, keys));
            assert!(is_read_only(dir, name), "{name}: {keys}");
            let device = connect(dir, name).await.unwrap();
            let data = Bytes::from_static(&[9; 512]);
            assert!(device.write(0, data, Durability::Deferred).await.is_err());
            assert!(device.read(ByteRange::between(0, 512)).await.unwrap().to_vec().len() == 512);
        }
        // Nobody has it open any more: what is added later is another thing.
        reload(dir, &mut server, "[other]\nexportname = other.img\nfilesize = 4K\n");
        server.log_until("closed an image");
        reload(dir, &mut server, &section("one", &seals));
        assert!(!is_read_only(dir, "one"));
        assert!(server.stop());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sealed_image_stays_sealed_where_its_backing_files_may_lie_elsewhere() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let seals = "seal = true\nformat = qcow2\n";
    let mut server = sealed(dir, "qcow2", seals).await;
    // Which opens it anew.
    reload(dir, &mut server, &section("one", &format!("{seals}allow_references = any\n")));
    assert!(is_read_only(dir, "one"));
    assert!(server.stop());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reload_adds_no_writer_to_an_image_that_is_or_will_be_sealed() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let seals = "seal = true\nformat = qcow2\n";
    let mut server = sealed(dir, "qcow2", seals).await;
    let one = section("one", seals);
    let two = section("two", "format = qcow2\noffset = 4K\n");
    for (text, places) in [
        (format!("{one}{two}"), ["config:4: ", "(config:8)"]),
        (format!("{two}{one}"), ["config:8: ", "(config:4)"]),
    ] {
        configure(dir, &text);
        server.signal("-HUP");
        let log = server.log_until("reloaded").concat();
        assert!(log.contains("writes to the image, too"), "{log}");
        assert!(places.iter().all(|place| log.contains(place)), "{log}");
    }
    assert!(is_read_only(dir, "one"));
    // Who only reads is welcome, first in the file or not.
    reload(
        dir,
        &mut server,
        &format!("{}{one}", section("view", "format = qcow2\nreadonly = true\n")),
    );
    assert!(server.stop());
    let mut server = Running::start(dir, &["--config=config"]);
    server.address();
    assert!(is_read_only(dir, "view") && !is_read_only(dir, "one"));
    assert!(server.stop());
}
