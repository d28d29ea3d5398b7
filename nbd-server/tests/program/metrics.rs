//! Counters over HTTP, and logs as JSON.

use std::io::{Read, Write};
use std::net::TcpStream;

use super::{Running, image, run};

/// Where a server tells its counters, as its log says.
pub(super) fn address(server: &mut Running) -> String {
    let log = server.log_until("/metrics").concat();
    let (_, address) = log.split_once("http://").unwrap();
    address.split_once('/').unwrap().0.to_owned()
}

/// What a server answers to a request without a body.
pub(super) fn ask(address: &str, request: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(format!("{request} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn counters_are_told_over_http_and_the_log_is_json_that_names_connections() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    image(dir);
    let arguments = [
        "--listen=unix:socket",
        "--export=one=disk.img,format=raw",
        "--metrics=0",
        "--log-format=json",
    ];
    let mut server = Running::start(dir, &arguments);
    let address = address(&mut server);
    assert!(address.starts_with("127.0.0.1:"), "{address}");
    server.address();
    run(dir, "qemu-io", &["-f", "raw", "-c", "write 0 4k", "nbd+unix:///one?socket=socket"]);
    let told = ask(&address, "GET /metrics");
    assert!(told.starts_with("HTTP/1.1 200"), "{told}");
    assert!(told.contains("text/plain; version=0.0.4"), "{told}");
    assert!(told.contains("nbd_export_bytes_total{export=\"one\",kind=\"write\"} 4096"), "{told}");
    for (request, status) in
        [("GET /", "404"), ("POST /metrics", "405"), ("GET /metrics/x", "404"), ("x", "400")]
    {
        let told = ask(&address, request);
        assert!(told.starts_with(&format!("HTTP/1.1 {status}")), "{request}: {told}");
    }
    // A listener that is stuck in a question keeps nobody from stopping.
    let mut stuck = TcpStream::connect(&address).unwrap();
    stuck.write_all(b"GET").unwrap();
    // A client that breaks the rules is told of with its connection.
    let mut rude = std::os::unix::net::UnixStream::connect(dir.join("socket")).unwrap();
    rude.write_all(&[0xff; 100]).unwrap();
    let line = server.log_until("closing a connection in the handshake").pop().unwrap();
    assert!(line.starts_with("{\"timestamp\":") && line.ends_with("}\n"), "{line}");
    assert!(line.contains("\"name\":\"connection\"") && line.contains("\"peer\":\"unix:uid="));
    assert!(server.stop());
}

#[test]
fn who_asks_for_counters_does_not_wait_for_those_who_say_nothing() {
    let dir = tempfile::tempdir().unwrap();
    image(dir.path());
    let arguments = ["--listen=unix:socket", "--export=one=disk.img,format=raw", "--metrics=0"];
    let mut server = Running::start(dir.path(), &arguments);
    let address = address(&mut server);
    server.address();
    let begun = std::time::Instant::now();
    for _ in 0..20 {
        // They take all places, and longer each time than all of this may take together.
        let _silent: Vec<_> = (0..32).map(|_| TcpStream::connect(&address).unwrap()).collect();
        assert!(ask(&address, "GET /metrics").starts_with("HTTP/1.1 200"));
    }
    assert!(begun.elapsed() < std::time::Duration::from_secs(30));
    assert!(server.stop());
}
