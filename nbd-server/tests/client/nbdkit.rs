//! Against nbdkit: reads, writes, zeroes and flushes; servers that lack what newer ones have; servers that fail.

use std::sync::Arc;
use std::time::Duration;

use block::{BlockDevice, ByteRange, DeviceError, Durability, ErrorKind, Limits, ZeroMode};
use bytes::Bytes;
use futures_util::future::join_all;
use nbd_server::client::{Address, ClientError, ClientOptions, NbdDevice};
use nbd_server::wire::Headers;
use tokio::net::{TcpListener, UnixStream};

use crate::peer::{Peer, scratch};

fn pattern(seed: u64, len: usize) -> Bytes {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    std::iter::repeat_with(next).take(len).collect()
}

fn range(start: u64, len: u64) -> ByteRange {
    ByteRange::new(start, len).expect("a range")
}

async fn open(address: &Address, options: ClientOptions) -> Arc<NbdDevice> {
    NbdDevice::connect(address, "", options).await.unwrap()
}

/// Writes, reads back, zeroes, flushes, and walks the extents.
async fn exercise(device: &NbdDevice) {
    let data = pattern(1, 200_000);
    device.write(12_345, data.clone(), Durability::Deferred).await.unwrap();
    let read = device.read(range(12_345, 200_000)).await.unwrap();
    assert_eq!(read.len(), 200_000);
    assert_eq!(read.to_vec(), data);
    let zero = range(20_000, 100_000);
    device.write_zeroes(zero, ZeroMode::default(), Durability::Durable).await.unwrap();
    let mut expected = data.to_vec();
    expected[7655..107_655].fill(0);
    assert_eq!(device.read(range(12_345, 200_000)).await.unwrap().to_vec(), expected);
    device.discard(range(0, 4096), Durability::Deferred).await.unwrap();
    device.flush().await.unwrap();
    let Limits { size_bytes, .. } = device.limits();
    let mut at = 0;
    while at < size_bytes {
        let extents = device.extents(range(at, size_bytes - at)).await.unwrap();
        for extent in extents {
            assert_eq!(extent.range.start(), at);
            at = extent.range.end();
        }
    }
    assert_eq!(at, size_bytes);
}

/// Many requests at once, over all of a disk of 64 MiB, each verified.
async fn pipeline(device: &Arc<NbdDevice>) {
    let pieces = 0..512_u64;
    let writes = pieces.clone().map(|index| async move {
        let data = pattern(index, 128 << 10);
        device.write(index << 17, data, Durability::Deferred).await
    });
    for written in join_all(writes).await {
        written.unwrap();
    }
    device.flush().await.unwrap();
    let reads = pieces.map(|index| async move {
        let read = device.read(range(index << 17, 128 << 10)).await.unwrap().to_vec();
        read == pattern(index, 128 << 10)
    });
    assert!(join_all(reads).await.into_iter().all(|same| same));
}

#[tokio::test]
async fn a_memory_disk_holds_what_is_written_over_several_connections() {
    let peer = Peer::nbdkit(&["memory", "64M"]);
    let device = open(&peer.address(), ClientOptions::default()).await;
    assert_eq!(device.limits().size_bytes, 64 << 20);
    assert_eq!(device.connections(), 4);
    exercise(&device).await;
    pipeline(&device).await;
    let (sent, received) = device.wire_bytes();
    let payload = 64 << 20;
    assert!(sent > payload && sent < payload + (1 << 20), "{sent} bytes sent");
    assert!(received > payload && received < payload + (2 << 20), "{received} bytes received");
    device.close().await.unwrap();
}

#[tokio::test]
async fn a_file_holds_what_is_written_over_one_connection() {
    let dir = scratch();
    std::fs::File::create(dir.path().join("disk")).unwrap().set_len(64 << 20).unwrap();
    let peer = Peer::nbdkit_in(dir, &["file", "disk"]);
    let options = ClientOptions { connections: 1, in_flight: 64, ..Default::default() };
    let device = open(&peer.address(), options).await;
    let extents = device.extents(range(0, 64 << 20)).await.unwrap();
    assert!(extents.iter().all(|extent| extent.zero), "{extents:?}");
    exercise(&device).await;
    pipeline(&device).await;
    device.close().await.unwrap();
    let file = std::fs::read(peer.dir().join("disk")).unwrap();
    assert!(file[..128 << 10] == pattern(0, 128 << 10));
}

#[tokio::test]
async fn replies_out_of_order_find_their_requests() {
    // Each request takes the server a time of its own, so that the replies overtake each other.
    let read = r#"pread=sleep 0.0$(( $4 / 65536 % 7 )); head -c $3 /dev/zero | tr '\0' "\\$(( $4 / 65536 % 7 + 1 ))""#;
    let size = "get_size=echo 1048576";
    let peer = Peer::nbdkit(&["--threads=16", "eval", size, read, "thread_model=echo parallel"]);
    let options = ClientOptions { connections: 1, ..Default::default() };
    let device = open(&peer.address(), options).await;
    let reads = (0..16_u64).map(|index| {
        let device = Arc::clone(&device);
        async move { (index, device.read(range(index << 16, 65_536)).await.unwrap().to_vec()) }
    });
    for (index, bytes) in join_all(reads).await {
        let expected = u8::try_from(index % 7 + 1).unwrap();
        assert!(bytes.iter().all(|byte| *byte == expected), "block {index}");
    }
}

#[tokio::test]
async fn servers_that_lack_newer_options_are_met_where_they_are() {
    for arguments in [
        &["--no-sr"][..],
        &["--mask-handshake=0"],
        &["--mask-handshake=1"],
        &["--mask-handshake=2"],
    ] {
        let peer = Peer::nbdkit(&[arguments, &["memory", "1M"]].concat());
        let device = open(&peer.address(), ClientOptions::default()).await;
        let simple = device.export().headers == Headers::Simple;
        assert!(simple || arguments == ["--mask-handshake=1"]);
        exercise(&device).await;
        device.close().await.unwrap();
    }
}

#[tokio::test]
async fn filters_that_take_abilities_away_change_nothing_for_the_caller() {
    let peer = Peer::nbdkit(&[
        "--filter=nozero",
        "--filter=fua",
        "--filter=noextents",
        "memory",
        "1M",
        "fuamode=discard",
        "zeromode=none",
    ]);
    let device = open(&peer.address(), ClientOptions::default()).await;
    assert!(!device.limits().fast_zeroes);
    exercise(&device).await;
}

#[tokio::test]
async fn block_sizes_are_kept() {
    let peer = Peer::nbdkit(&[
        "--filter=blocksize-policy",
        "memory",
        "8M",
        "blocksize-error-policy=error",
        "blocksize-minimum=4096",
        "blocksize-preferred=65536",
        "blocksize-maximum=1M",
    ]);
    let device = open(&peer.address(), ClientOptions::default()).await;
    let sizes = device.export().block_sizes;
    assert_eq!((sizes.minimum, sizes.preferred, sizes.maximum), (4096, 65_536, 1 << 20));
    let data = pattern(3, 5 << 20);
    device.write(4096, data.clone(), Durability::Durable).await.unwrap();
    assert_eq!(device.read(range(4096, 5 << 20)).await.unwrap().to_vec(), data);
    assert_eq!(device.read(range(5000, 10)).await.unwrap().to_vec(), data[904..914]);
    let zero = range(4096, 5 << 20);
    device.write_zeroes(zero, ZeroMode::default(), Durability::Deferred).await.unwrap();
    assert!(block::is_zero(&device.read(zero).await.unwrap().to_vec()));
    let refused = device.write(1, Bytes::from_static(b"x"), Durability::Deferred).await;
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::Invalid);
}

#[tokio::test]
async fn errors_of_the_server_come_through_and_the_connection_lives() {
    let peer = Peer::nbdkit(&[
        "--filter=error",
        "memory",
        "1M",
        "error-pwrite=ENOSPC",
        "error-pwrite-rate=100%",
        "error-pread=EIO",
        "error-pread-rate=100%",
    ]);
    let device = open(&peer.address(), ClientOptions::default()).await;
    for _ in 0..3 {
        let write = device.write(0, Bytes::from_static(b"x"), Durability::Deferred).await;
        assert_eq!(write.unwrap_err().kind(), ErrorKind::NoSpace);
        let read = device.read(range(0, 512)).await.unwrap_err();
        assert_eq!(read.kind(), ErrorKind::Io);
        assert!(
            read.to_string().starts_with("the server failed READ of 512 bytes at offset 0: EIO"),
            "{read}"
        );
    }
    device.flush().await.unwrap();
}

#[tokio::test]
async fn a_server_that_dies_fails_what_is_in_flight() {
    // A read that never ends: the plugin waits for a pipe that nobody opens.
    let peer =
        Peer::nbdkit(&["eval", "get_size=echo 1048576", "pread=mkfifo $tmpdir/p; cat $tmpdir/p"]);
    let options = ClientOptions { connections: 1, ..Default::default() };
    let device = open(&peer.address(), options).await;
    let reads = join_all((0..4_u64).map(|index| device.read(range(index * 512, 512))));
    let kill = async {
        tokio::task::yield_now().await;
        peer.kill();
    };
    let (answers, ()) = tokio::join!(reads, kill);
    for answer in answers {
        let error = answer.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io);
        assert!(matches!(error, DeviceError::Backend { .. }), "{error:?}");
    }
    device.disconnect().await;
}

#[tokio::test]
async fn a_name_over_tcp_reaches_the_server() {
    let peer = Peer::nbdkit(&["memory", "1M"]);
    let Address::Unix(socket) = peer.address() else { panic!("not a Unix socket") };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut tcp, _)) = listener.accept().await {
            let mut unix = UnixStream::connect(&socket).await.unwrap();
            // Ends when both sides have.
            tokio::spawn(async move { tokio::io::copy_bidirectional(&mut tcp, &mut unix).await });
        }
    });
    let address = Address::Tcp { host: "localhost".to_owned(), port };
    let device = open(&address, ClientOptions::default()).await;
    exercise(&device).await;
    device.close().await.unwrap();
}

#[tokio::test]
async fn exports_are_listed_and_an_unknown_one_is_refused_in_words() {
    let peer = Peer::nbdkit(&[
        "eval",
        "list_exports=printf 'INTERLEAVED\\none\\nthe first\\ntwo\\nthe second\\n'",
        "open=[ \"$3\" = one ] || { echo ENOENT no such thing >&2; exit 1; }; echo h",
        "get_size=echo 4096",
        "pread=head -c $3 /dev/zero",
    ]);
    let listed = NbdDevice::list(&peer.address()).await.unwrap();
    let listed: Vec<_> = listed.iter().map(|e| (e.name.as_str(), e.description.as_str())).collect();
    assert_eq!(listed, [("one", "the first"), ("two", "the second")]);
    let connect = |name| {
        let address = peer.address();
        async move { NbdDevice::connect(&address, name, ClientOptions::default()).await }
    };
    assert_eq!(connect("one").await.unwrap().limits().size_bytes, 4096);
    let refused = connect("three").await.unwrap_err();
    assert!(matches!(refused, ClientError::Refused { .. }), "{refused:?}");
}

#[tokio::test]
async fn an_oldstyle_server_and_a_missing_one_are_named() {
    let peer = Peer::nbdkit(&["--oldstyle", "memory", "1M"]);
    let old = NbdDevice::connect(&peer.address(), "", ClientOptions::default()).await.unwrap_err();
    assert!(old.to_string().contains("oldstyle"), "{old}");
    let nobody = Address::Unix(peer.dir().join("nobody"));
    let missing = NbdDevice::connect(&nobody, "", ClientOptions::default()).await.unwrap_err();
    assert!(matches!(missing, ClientError::Connect { .. }), "{missing:?}");
    let (mute, silent) = (peer.dir().join("mute"), Duration::from_millis(20));
    let _listener = tokio::net::UnixListener::bind(&mute).unwrap();
    let options = ClientOptions { handshake_timeout: silent, ..Default::default() };
    let slow = NbdDevice::connect(&Address::Unix(mute), "", options).await.unwrap_err();
    assert!(matches!(slow, ClientError::Timeout { .. }), "{slow:?}");
}
