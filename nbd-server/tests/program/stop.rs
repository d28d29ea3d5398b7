//! The end of the program: in time whoever hangs, and with what was answered on the disk.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::{Running, create_qcow2, image, run};

/// A client in transmission with simple replies, on the default export.
pub(super) fn entered(dir: &Path) -> UnixStream {
    let mut stream = UnixStream::connect(dir.join("socket")).unwrap();
    stream.read_exact(&mut [0; 18]).unwrap();
    let name = b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\0";
    stream.write_all(name).unwrap();
    stream.read_exact(&mut [0; 10]).unwrap();
    stream
}

/// A request header of simple replies.
pub(super) fn request(command: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    let mut bytes = vec![0x25, 0x60, 0x95, 0x13, 0, 0];
    bytes.extend(command.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    bytes
}

#[test]
fn whatever_was_sent_before_the_signal_gets_one_reply() {
    const REQUESTS: u64 = 400;
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    create_qcow2(dir, "disk.qcow2", None);
    for _ in 0..3 {
        let arguments = ["--listen=unix:socket", "--export=one=disk.qcow2"];
        let mut server = Running::start(dir, &arguments);
        server.address();
        let mut client = entered(dir);
        let commands = [(3, 0), (4, 4096), (6, 4096)].into_iter().cycle();
        let requests = (0..REQUESTS).zip(commands);
        let sent: Vec<u8> = requests
            .flat_map(|(cookie, (command, len))| request(command, cookie, 0, len))
            .collect();
        client.write_all(&sent).unwrap();
        server.signal("-TERM");
        let mut replies = Vec::new();
        client.read_to_end(&mut replies).unwrap();
        let mut cookies: Vec<u64> = Vec::new();
        for reply in replies.chunks(16) {
            let (error, cookie) = reply[4..].split_at(4);
            assert!(matches!(error, [0, 0, 0, 0 | 108]), "{error:?}");
            cookies.push(u64::from_be_bytes(cookie.try_into().unwrap()));
        }
        cookies.sort_unstable();
        assert_eq!(cookies, (0..REQUESTS).collect::<Vec<_>>());
        drop(client);
        assert!(server.ended());
    }
}

#[test]
fn what_is_run_behind_a_client_is_run_once_for_each_also_for_those_that_are_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    image(dir);
    let export = "exportname = disk.img\ndefault = true\nprerun = echo came >>log\npostrun = echo went >>log\n";
    let text = format!("[generic]\nunixsock = socket\nshutdown_timeout = 4\n[one]\n{export}");
    std::fs::write(dir.join("config"), text).unwrap();
    let mut server = Running::start(dir, &["--config=config"]);
    server.address();
    drop(entered(dir));
    // In the middle of a payload it is waited for, until there is no time left.
    let mut halfway = entered(dir);
    halfway.write_all(&request(1, 1, 0, 4096)).unwrap();
    halfway.write_all(&[9; 100]).unwrap();
    // What was sent before has been read once another client is served.
    let silent = UnixStream::connect(dir.join("socket")).unwrap();
    drop(entered(dir));
    assert!(server.stop());
    drop((halfway, silent));
    let log = std::fs::read_to_string(dir.join("log")).unwrap();
    let count = |word| log.lines().filter(|line| *line == word).count();
    assert_eq!((count("came"), count("went")), (3, 3), "{log}");
}

#[test]
fn it_ends_with_0_in_time_with_clients_that_hang_and_keeps_what_it_answered() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    create_qcow2(dir, "disk.qcow2", None);
    let arguments = ["--listen=unix:socket", "--export=one=disk.qcow2", "--shutdown-timeout=4"];
    let mut server = Running::start(dir, &arguments);
    server.address();
    // One half way through the greeting, one in the middle of a payload, one that reads no replies.
    let silent = UnixStream::connect(dir.join("socket")).unwrap();
    let mut halfway = entered(dir);
    halfway.write_all(&request(1, 1, 0, 4096)).unwrap();
    halfway.write_all(&[9; 100]).unwrap();
    let mut deaf = entered(dir);
    for cookie in 0..64 {
        deaf.write_all(&request(0, cookie, 0, 1 << 20)).unwrap();
    }
    // Two that send a byte at a time, of a payload and of an option, and one that never stops to ask.
    let mut payload = entered(dir);
    payload.write_all(&request(1, 1, 0, 1 << 20)).unwrap();
    let mut option = UnixStream::connect(dir.join("socket")).unwrap();
    option.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x07\xff\xff\xff\xff").unwrap();
    let busy = [(payload, vec![9]), (option, vec![0]), (entered(dir), request(3, 1, 0, 0))];
    let busy = busy.map(|(mut stream, bytes)| {
        let mut listening = stream.try_clone().unwrap();
        let sending = std::thread::spawn(move || while stream.write_all(&bytes).is_ok() {});
        let listening = std::thread::spawn(move || {
            let _ = std::io::copy(&mut listening, &mut std::io::sink());
        });
        [sending, listening]
    });
    // And one that was answered.
    let mut good = entered(dir);
    good.write_all(&request(1, 7, 4096, 4096)).unwrap();
    good.write_all(&[5; 4096]).unwrap();
    let mut reply = [0; 16];
    good.read_exact(&mut reply).unwrap();
    assert_eq!(reply[4..], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7]);
    assert!(server.stop());
    drop((silent, halfway, deaf, good));
    busy.into_iter().flatten().for_each(|thread| thread.join().unwrap());
    run(dir, "qemu-img", &["check", "-q", "disk.qcow2"]);
    let read = ["-f", "qcow2", "-c", "read -P 5 4k 4k", "disk.qcow2"];
    assert!(!run(dir, "qemu-io", &read).contains("failed"));
}

#[test]
fn two_signals_at_one_moment_are_one() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    create_qcow2(dir, "disk.qcow2", None);
    let mut server = Running::start(dir, &["--listen=unix:socket", "--export=one=disk.qcow2"]);
    server.address();
    let mut client = entered(dir);
    client.write_all(&request(4, 1, 0, 4096)).unwrap();
    client.read_exact(&mut [0; 16]).unwrap();
    // As timeout(1) does it.
    let pid = server.child.id().to_string();
    let sent = std::process::Command::new("kill").args(["-TERM", &pid, &pid, &pid]).status();
    assert!(sent.unwrap().success());
    assert!(server.ended());
    run(dir, "qemu-img", &["check", "-q", "disk.qcow2"]);
}

#[test]
fn a_second_signal_ends_it_at_once_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    image(dir);
    // What is run behind a client keeps its connection, and so the end.
    let export = "exportname = disk.img\ndefault = true\npostrun = exec sleep 30 >/dev/null 2>&1\n";
    let text = format!("[generic]\nunixsock = socket\nshutdown_timeout = 3600\n[one]\n{export}");
    std::fs::write(dir.join("config"), text).unwrap();
    let mut server = Running::start(dir, &["--config=config"]);
    server.address();
    let stays = entered(dir);
    server.signal("-TERM");
    // The first signal is taken when nobody can connect any more.
    while UnixStream::connect(dir.join("socket")).is_ok() {
        std::thread::yield_now();
    }
    // One that comes close behind it is no second one.
    while server.child.try_wait().unwrap().is_none() {
        server.signal("-TERM");
    }
    assert_eq!(server.status().code(), Some(1));
    assert!(server.errors().contains("stopped by a second signal; images may need a check"));
    drop(stays);
}

#[test]
fn what_is_run_before_a_client_does_not_outlive_the_server_and_what_is_run_behind_it_may() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    image(dir);
    for fifo in ["before", "after"] {
        run(dir, "mkfifo", &[fifo]);
    }
    let export = "exportname = disk.img\nprerun = { sleep 600; true; } >before\n[two]\nexportname = disk.img\ndefault = true\n\
                  readonly = true\npostrun = { read line <after; echo $line >done; } 2>/dev/null\n";
    let text = format!("[generic]\nunixsock = socket\nshutdown_timeout = 2\n[one]\n{export}");
    std::fs::write(dir.join("config"), text).unwrap();
    let mut server = Running::start(dir, &["--config=config"]);
    server.address();
    drop(entered(dir));
    let mut arriving = UnixStream::connect(dir.join("socket")).unwrap();
    arriving.read_exact(&mut [0; 18]).unwrap();
    arriving.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\x03one").unwrap();
    // Opens once the command runs, and ends with the last of its processes.
    let mut before = std::fs::File::open(dir.join("before")).unwrap();
    assert!(server.stop());
    let (ended, waited) = std::sync::mpsc::channel();
    std::thread::spawn(move || ended.send(before.read_to_end(&mut Vec::new()).is_ok()));
    assert_eq!(waited.recv_timeout(super::END_TIMEOUT), Ok(true));
    run(dir, "mkfifo", &["done"]);
    std::fs::write(dir.join("after"), "went\n").unwrap();
    assert_eq!(std::fs::read_to_string(dir.join("done")).unwrap(), "went\n");
}
