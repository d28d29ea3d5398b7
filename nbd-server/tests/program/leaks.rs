//! A crowd of clients of every kind comes and goes: the process holds no more open files than before.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::{Running, image, run};

/// How often the process is looked at, with a client that does something in between, until it holds what it should.
const LOOKS: usize = 100;

/// What a client sends before it hangs up: in the handshake, in transmission, in the middle of a request.
const SAYINGS: [&[u8]; 6] = [
    b"",
    b"\0\0\0\x03IHAVEOPT\0\0\0\x07\0\0",
    b"\0\0\0\x03IHAVEOPT\0\0\0\x03\0\0\0\0",
    b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\x03one",
    b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\x03one\x25\x60\x95\x13\0\0\0\x01\0\0\0\0\0\0\0\x01\0\0",
    b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\x03one\x25\x60\x95\x13\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\0\0\x01\0\0",
];

fn files_of(process: u32) -> usize {
    std::fs::read_dir(format!("/proc/{process}/fd")).unwrap().count()
}

/// A client of each kind; they are connected until they are dropped.
fn crowd(dir: &Path) -> Vec<UnixStream> {
    let clients = SAYINGS.iter().map(|saying| {
        let mut client = UnixStream::connect(dir.join("socket")).unwrap();
        client.read_exact(&mut [0; 18]).unwrap();
        client.write_all(saying).unwrap();
        client
    });
    clients.collect()
}

#[test]
fn a_crowd_leaves_no_open_file_behind() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    image(dir);
    let mut server =
        Running::start(dir, &["--listen=unix:socket", "--export=one=disk.img,format=raw"]);
    server.address();
    let look = || run(dir, "nbdinfo", &["--size", "nbd+unix:///one?socket=socket"]);
    look();
    drop(crowd(dir));
    // What is opened once, and kept, is open by now.
    look();
    let mut before = files_of(server.child.id());
    for _ in 0..20 {
        look();
        before = before.min(files_of(server.child.id()));
    }
    for _ in 0..5 {
        let clients: Vec<_> = (0..20).map(|_| crowd(dir)).collect();
        assert!(files_of(server.child.id()) >= before + 20 * SAYINGS.len());
        drop(clients);
    }
    let mut looks = LOOKS;
    while files_of(server.child.id()) > before && looks > 0 {
        look();
        looks -= 1;
    }
    let left = files_of(server.child.id());
    assert!(left <= before, "{left} files are open instead of {before}");
    assert!(server.stop());
}
