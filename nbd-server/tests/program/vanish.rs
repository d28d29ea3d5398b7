//! Clients whose machine vanishes without a word, in a network of their own.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::process::{Command, Stdio};

use super::{Running, image};

/// Starts the server, and in the same network the clients; the server ends when it knows of the last that it has left.
const SCRIPT: &str = "ip link set lo up && exec \"$0\" --listen=127.0.0.1:10809 --export=one=disk.img,format=raw \
                      --once --peer-timeout=3";

#[test]
fn clients_that_vanish_idle_or_with_replies_on_their_way_are_found_out() {
    let dir = tempfile::tempdir().unwrap();
    image(dir.path());
    // Whoever is not root is it in a world of their own.
    let is_root = std::fs::metadata("/proc/self").unwrap().uid() == 0;
    let apart = if is_root { "-n" } else { "-rn" };
    let program = env!("CARGO_BIN_EXE_nbd-server");
    let mut server = Running::launch(dir.path(), "unshare", &[apart, "sh", "-c", SCRIPT, program]);
    assert_eq!(server.address(), "127.0.0.1:10809");
    let pid = server.child.id().to_string();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/program/vanish.py");
    let user = if is_root { &["-n"][..] } else { &["-n", "-U", "--preserve-credentials"] };
    let mut clients = Command::new("nsenter")
        .args(["-t", &pid])
        .args(user)
        .args(["/usr/bin/python3", script, "10809"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(clients.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "vanished\n");
    // By itself: without a bound, it would wait for hours.
    assert!(server.ended());
    drop(clients.stdin.take());
    clients.wait().unwrap();
}
