//! Against nbdkit: reads, writes, zeroes and flushes, and servers that lack what newer ones have.

use block::{BlockDevice, ByteRange, Durability, ZeroMode};
use bytes::Bytes;
use nbd_server::client::{ClientOptions, NbdDevice};

use crate::peer::Peer;

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

/// Writes, reads back, zeroes, flushes.
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
    device.flush().await.unwrap();
    let mut at = 0;
    while at < device.limits().size_bytes {
        let rest = range(at, device.limits().size_bytes - at);
        let extents = device.extents(rest).await.unwrap();
        assert_eq!(extents[0].range.start(), at);
        at = extents.last().unwrap().range.end();
    }
    assert_eq!(at, device.limits().size_bytes);
}

#[tokio::test]
async fn a_memory_disk_holds_what_is_written() {
    let peer = Peer::nbdkit(&["memory", "64M"]);
    let device = NbdDevice::connect(&peer.address(), "", ClientOptions::default()).await.unwrap();
    assert_eq!(device.limits().size_bytes, 64 << 20);
    assert_eq!(device.connections(), 4);
    exercise(&device).await;
    let (sent, received) = device.wire_bytes();
    assert!(sent > 200_000 && received > 400_000 - 100_000, "{sent} {received}");
    device.close().await.unwrap();
}
