//! The examples run, and do what they say: nobody copies one that no longer works.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

#[expect(dead_code, reason = "main is for those who run it")]
#[path = "../examples/copy.rs"]
mod copy;
#[expect(dead_code, reason = "main is for those who run it")]
#[path = "../examples/serve_chain.rs"]
mod serve_chain;
#[expect(dead_code, reason = "main is for those who run it")]
#[path = "../examples/serve_memory.rs"]
mod serve_memory;

use serve_chain::Served;

/// Runs a program to its success, beside the runtime that serves it; what it printed.
async fn run(dir: &Path, program: &str, arguments: &[&str]) -> String {
    let mut command = Command::new("timeout");
    command.args(["40", program]).args(arguments).current_dir(dir);
    let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {errors}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[tokio::test]
async fn memory_is_served() {
    let (server, address) = serve_memory::serve("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let uri = format!("nbd://{address}/scratch");
    let here = Path::new(".");
    assert_eq!(run(here, "nbdinfo", &["--size", &uri]).await.trim(), (1 << 30).to_string());
    run(here, "qemu-io", &["-f", "raw", "-c", "write -P 7 1M 1M", &uri]).await;
    let default = format!("nbd://{address}");
    run(here, "qemu-io", &["-f", "raw", "-c", "read -P 7 1M 1M", &default]).await;
    server.shutdown(std::time::Duration::from_secs(5)).await;
}

#[tokio::test]
async fn a_chain_is_served_as_it_is_and_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    run(dir, "qemu-img", &["create", "-q", "-f", "qcow2", "monday", "8M"]).await;
    run(dir, "qemu-io", &["-c", "write -P 1 0 2M", "monday"]).await;
    let over = ["create", "-q", "-f", "qcow2", "-b", "monday", "-F", "qcow2", "tuesday"];
    run(dir, "qemu-img", &over).await;
    let served = Served::start(&dir.join("socket"), &dir.join("tuesday")).await.unwrap();
    let uri = |export: &str| format!("nbd+unix:///{export}?socket=socket");
    let write = ["-f", "raw", "-c", "write -P 2 1M 2M", &uri("now")];
    run(dir, "qemu-io", &write).await;
    run(dir, "nbdcopy", &[&uri("before"), "yesterday"]).await;
    run(dir, "nbdcopy", &[&uri(""), "today"]).await;
    served.stop().await.unwrap();
    let filled = |spans: [(usize, u8); 3]| {
        spans.into_iter().flat_map(|(mib, byte)| vec![byte; mib << 20]).collect::<Vec<u8>>()
    };
    assert!(std::fs::read(dir.join("yesterday")).unwrap() == filled([(2, 1), (6, 0), (0, 0)]));
    assert!(std::fs::read(dir.join("today")).unwrap() == filled([(1, 1), (2, 2), (5, 0)]));
    run(dir, "qemu-img", &["check", "-q", "tuesday"]).await;
    run(dir, "qemu-img", &["compare", "-F", "raw", "tuesday", "today"]).await;
}

#[tokio::test]
async fn a_disk_is_copied_there_and_back() {
    let dir = tempfile::tempdir().unwrap();
    let [from, to] = ["from", "to"].map(|name| dir.path().join(name).display().to_string());
    let mut bytes = vec![0; 3 << 20];
    bytes[1 << 20..(1 << 20) + 70_000].fill(9);
    // With holes where there is nothing.
    let sparse = std::fs::File::create(&from).unwrap();
    sparse.set_len(3 << 20).unwrap();
    sparse.write_all_at(&bytes[1 << 20..(1 << 20) + 70_000], 1 << 20).unwrap();
    let (server, address) = serve_memory::serve("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let uri = format!("nbd://{address}/scratch");
    let (moved, size) = copy::run(&from, &uri).await.unwrap();
    assert_eq!(size, 3 << 20);
    assert!((70_000..1 << 20).contains(&moved), "{moved} bytes moved");
    let (_, size) = copy::run(&uri, &to).await.unwrap();
    assert_eq!(size, 1 << 30);
    let copied = std::fs::File::open(&to).unwrap();
    let mut head = vec![0; bytes.len()];
    std::io::Read::read_exact(&mut &copied, &mut head).unwrap();
    assert!(head == bytes);
    server.shutdown(std::time::Duration::from_secs(5)).await;
}
