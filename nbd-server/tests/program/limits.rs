//! The limits that the command line and files set, each reached by somebody who is told as much as can be.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::stop::{entered, request};
use super::{Running, image};

/// A client that has read the greeting, if there was one, and answered it.
fn greeted(dir: &Path) -> Option<UnixStream> {
    let mut stream = UnixStream::connect(dir.join("socket")).unwrap();
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).ok()?;
    assert_eq!(&greeting, b"NBDMAGICIHAVEOPT\0\x03");
    stream.write_all(&[0, 0, 0, 3]).unwrap();
    Some(stream)
}

/// Asks for an export by GO; the type of the last reply, and its text.
fn go(stream: &mut UnixStream, export: &str) -> (u32, String) {
    let mut option = b"IHAVEOPT\0\0\0\x07".to_vec();
    option.extend(u32::try_from(export.len() + 6).unwrap().to_be_bytes());
    option.extend(u32::try_from(export.len()).unwrap().to_be_bytes());
    option.extend(export.as_bytes());
    option.extend([0, 0]);
    stream.write_all(&option).unwrap();
    loop {
        let mut header = [0; 20];
        stream.read_exact(&mut header).unwrap();
        let kind = u32::from_be_bytes(header[12..16].try_into().unwrap());
        let mut data = vec![0; u32::from_be_bytes(header[16..].try_into().unwrap()) as usize];
        stream.read_exact(&mut data).unwrap();
        if kind == 1 || kind >> 31 == 1 {
            return (kind, String::from_utf8(data).unwrap());
        }
    }
}

#[test]
fn a_file_that_may_not_grow_further_fails_a_write_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    std::fs::File::create(dir.join("disk.img")).unwrap().set_len(8 << 20).unwrap();
    // In units of 512 bytes.
    let script = "ulimit -f 4096 && exec \"$0\" --listen=unix:socket --export==disk.img,format=raw";
    let program = env!("CARGO_BIN_EXE_nbd-server");
    let mut server = Running::launch(dir, "sh", &["-c", script, program]);
    server.address();
    let mut client = entered(dir);
    for (at, expected) in [(1 << 20, 0), (4 << 20, 28), (1 << 20, 0)] {
        client.write_all(&request(1, 1, at, 4096)).unwrap();
        client.write_all(&[9; 4096]).unwrap();
        let mut reply = [0; 16];
        client.read_exact(&mut reply).unwrap();
        assert_eq!(reply[4..8], u32::to_be_bytes(expected), "at {at}");
    }
    drop(client);
    assert!(server.stop());
}

const ACK: (u32, String) = (1, String::new());

#[test]
fn the_command_line_limits_connections_of_a_client_and_to_an_export() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    image(dir);
    let arguments = [
        "--listen=unix:socket",
        "--export=one=disk.img,format=raw,read-only,max-connections=1",
        "--export=two=disk.img,format=raw,read-only",
        "--max-connections-per-client=3",
        "--max-connections-per-export=1",
        "--memory-limit=32M",
        "--payload-timeout=5",
    ];
    let mut server = Running::start(dir, &arguments);
    server.address();
    let mut clients = [(); 3].map(|()| greeted(dir).unwrap());
    assert!(greeted(dir).is_none(), "the fourth connection of this user");
    let [one, two, late] = &mut clients;
    assert_eq!(go(one, "one"), ACK);
    assert_eq!(go(two, "two"), ACK);
    for export in ["one", "two"] {
        let (kind, text) = go(late, export);
        assert_eq!((kind, text.contains("as many connections")), (1 << 31 | 2, true), "{text}");
    }
    drop(clients);
    assert!(server.stop());
}

#[test]
fn a_configuration_limits_connections_and_idle_time() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    image(dir);
    let export = "exportname = disk.img\nreadonly = true\n";
    let generic = "[generic]\nunixsock = socket\nmaxconnections = 1\nmax_connections_per_client = 2\ntimeout = 3\n";
    let text = format!("{generic}[one]\n{export}[two]\n{export}maxconnections = 2\ntimeout = 0\n");
    std::fs::write(dir.join("config"), text).unwrap();
    let mut server = Running::start(dir, &["--config=config"]);
    server.address();
    let (mut first, mut second) = (greeted(dir).unwrap(), greeted(dir).unwrap());
    assert!(greeted(dir).is_none(), "the third connection of this user");
    assert_eq!(go(&mut first, "one"), ACK);
    assert_eq!(go(&mut second, "one").0, 1 << 31 | 2);
    assert_eq!(go(&mut second, "two"), ACK);
    let mut rest = Vec::new();
    first.read_to_end(&mut rest).unwrap();
    assert!(rest.is_empty(), "closed without a word");
    assert!(server.log_until("idle for too long").concat().contains("one"));
    // The other one may be idle for ever. A FLUSH is answered.
    let mut flush = vec![0x25, 0x60, 0x95, 0x13, 0, 0, 0, 3];
    flush.extend([7; 8]);
    flush.extend([0; 12]);
    second.write_all(&flush).unwrap();
    let mut reply = [0; 16];
    second.read_exact(&mut reply).unwrap();
    assert_eq!(reply[4..], [0, 0, 0, 0, 7, 7, 7, 7, 7, 7, 7, 7]);
    drop((first, second));
    // Their places come back when the server has seen that they left.
    let mut next = (0..10_000).find_map(|_| greeted(dir)).unwrap();
    assert_eq!(go(&mut next, "two"), ACK);
    drop(next);
    assert!(server.stop());
}

/// Sends an option, and reads the type of its reply; nothing where the connection ends instead.
fn option(stream: &mut UnixStream, number: u8, data: &[u8]) -> Option<u32> {
    let mut option = b"IHAVEOPT\0\0\0".to_vec();
    option.push(number);
    option.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
    option.extend(data);
    stream.write_all(&option).unwrap();
    let mut header = [0; 20];
    stream.read_exact(&mut header).ok()?;
    let len = u32::from_be_bytes(header[16..].try_into().unwrap());
    stream.read_exact(&mut vec![0; usize::try_from(len).unwrap()]).unwrap();
    Some(u32::from_be_bytes(header[12..16].try_into().unwrap()))
}

#[test]
fn the_command_line_limits_the_options_of_a_client() {
    const UNSUPPORTED: Option<u32> = Some(1 << 31 | 1);
    const INVALID: Option<u32> = Some(1 << 31 | 3);
    const TOO_BIG: Option<u32> = Some(1 << 31 | 9);
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    image(dir);
    let arguments = [
        "--listen=unix:socket",
        "--export=one=disk.img,format=raw",
        "--max-options=3",
        "--max-option-bytes=5000",
    ];
    let mut server = Running::start(dir, &arguments);
    server.address();
    let mut client = greeted(dir).unwrap();
    // INFO, whose name is said to be longer than its data.
    assert_eq!(option(&mut client, 6, &[1; 5000]), INVALID);
    assert_eq!(option(&mut client, 6, &[1; 5001]), TOO_BIG);
    assert_eq!(option(&mut client, 77, &[]), UNSUPPORTED);
    assert_eq!(option(&mut client, 77, &[]), None);
    drop(client);
    assert!(server.stop());
}

/// The requests that are under way, of a client that has sent many and reads no reply, once that number stays.
#[cfg(feature = "metrics")]
fn in_flight(limit: &str) -> u64 {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    image(dir);
    let text = format!(
        "[generic]\nunixsock = socket\nmetrics = 0\n{limit}\n[one]\nexportname = disk.img\n"
    );
    std::fs::write(dir.join("config"), text).unwrap();
    let mut server = Running::start(dir, &["--config=config"]);
    let metrics = super::metrics::address(&mut server);
    server.address();
    let mut client = greeted(dir).unwrap();
    assert_eq!(go(&mut client, "one"), ACK);
    let mut reads = Vec::new();
    for _ in 0..100 {
        reads.extend([0x25, 0x60, 0x95, 0x13, 0, 0, 0, 0]);
        reads.extend([7; 8]);
        reads.extend([0; 8]);
        reads.extend((64_u32 << 10).to_be_bytes());
    }
    client.write_all(&reads).unwrap();
    let told = || {
        let page = super::metrics::ask(&metrics, "GET /metrics");
        let mut lines = page.lines();
        let value =
            lines.find_map(|line| line.strip_prefix("nbd_export_in_flight{export=\"one\"} "));
        value.unwrap().trim().parse::<u64>().unwrap()
    };
    let (mut now, mut since) = (told(), 0);
    while now == 0 || since < 50 {
        let next = told();
        since = if next == now { since + 1 } else { 0 };
        now = next;
    }
    // All of them are answered in the end.
    let mut replies = vec![0; 100 * (16 + (64 << 10))];
    client.read_exact(&mut replies).unwrap();
    drop(client);
    assert!(server.stop());
    now
}

#[cfg(feature = "metrics")]
#[test]
fn a_configuration_limits_what_a_connection_has_in_flight() {
    assert_eq!(in_flight("max_in_flight = 3"), 3);
    // A third would be longer than what is left.
    assert_eq!(in_flight("max_in_flight_bytes = 160K"), 2);
    assert!(in_flight("") > 50, "most fit neither into the socket nor a limit");
}

#[test]
fn it_may_open_as_many_files_as_the_host_allows_it() {
    let dir = tempfile::tempdir().unwrap();
    super::image(dir.path());
    let lowered = "ulimit -Sn 64 && exec \"$0\" \"$@\"";
    let (program, export) = (env!("CARGO_BIN_EXE_nbd-server"), "--export=one=disk.img,format=raw");
    let mut server = Running::launch(
        dir.path(),
        "sh",
        &["-c", lowered, program, "--listen=unix:socket", export],
    );
    server.address();
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", server.child.id())).unwrap();
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files")).unwrap();
    let numbers: Vec<&str> = line.split_whitespace().collect();
    assert_ne!(numbers[0], "64");
    assert_eq!(numbers[0], numbers[1]);
    assert!(server.stop());
}
