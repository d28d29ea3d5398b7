//! Our client against our server, over a socket, with requests in flight together.

use std::sync::Arc;

use block::{BlockDevice, ByteRange, Durability, ZeroMode};
use bytes::Bytes;
use futures_util::future::join_all;
use nbd_server::client::{Address, ClientOptions, NbdDevice};
use nbd_server::wire::Headers;
use nbd_server::{Export, Server, ServerConfig};
use proptest::prelude::*;

use crate::device::TestDevice;

const SIZE: u64 = 256 << 10;
/// Requests of one batch lie in regions of their own, so that their order does not matter.
const REGIONS: u64 = 8;
const MAX_BATCH: usize = 8;

#[derive(Clone, Debug)]
struct Step {
    /// Begin and length in a region, in bytes.
    at: u64,
    len: u64,
    what: What,
}

#[derive(Clone, Debug)]
enum What {
    Write(u8, bool),
    Zero(bool),
    Discard,
    Read,
}

fn any_step() -> impl Strategy<Value = Step> {
    let what = prop_oneof![
        (1_u8.., any::<bool>()).prop_map(|(byte, durable)| What::Write(byte, durable)),
        any::<bool>().prop_map(What::Zero),
        Just(What::Discard),
        Just(What::Read),
    ];
    let region = SIZE / REGIONS;
    (0..region, 0..region, what).prop_map(move |(at, len, what)| Step {
        at,
        len: len.min(region - at),
        what,
    })
}

async fn apply(device: &NbdDevice, region: u64, step: &Step, model: &[u8]) {
    let start = region * (SIZE / REGIONS) + step.at;
    let range = ByteRange::new(start, step.len).unwrap();
    let span = usize::try_from(range.start()).unwrap()..usize::try_from(range.end()).unwrap();
    match step.what {
        What::Write(byte, durable) => {
            let durability = if durable { Durability::Durable } else { Durability::Deferred };
            let data = Bytes::from(vec![byte; span.len()]);
            device.write(start, data, durability).await.unwrap();
        }
        What::Zero(keep_allocated) => {
            let mode = ZeroMode { keep_allocated, fast_only: false };
            device.write_zeroes(range, mode, Durability::Deferred).await.unwrap();
        }
        What::Discard => device.discard(range, Durability::Deferred).await.unwrap(),
        What::Read => {
            let read = device.read(range).await.unwrap().to_vec();
            assert!(read == model[span], "{step:?}");
        }
    }
}

/// What the disk holds after a step, where that is told; a discard leaves it open.
fn expect(model: &mut [u8], region: u64, step: &Step) -> bool {
    let start = usize::try_from(region * (SIZE / REGIONS) + step.at).unwrap();
    let span = start..start + usize::try_from(step.len).unwrap();
    match step.what {
        What::Write(byte, _) => model[span].fill(byte),
        What::Zero(_) => model[span].fill(0),
        What::Discard => return false,
        What::Read => {}
    }
    true
}

async fn run(batches: Vec<Vec<Step>>, headers: Headers) {
    let target = TestDevice::new(SIZE);
    let server = Server::new(ServerConfig::default());
    server.add_export(Export::new("disk", Arc::clone(&target) as _)).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    server.listen_unix(&path).await.unwrap();
    let address = Address::Unix(path);
    let options = ClientOptions { headers, ..ClientOptions::default() };
    let device = NbdDevice::connect(&address, "disk", options).await.unwrap();
    assert_eq!(device.export().headers, headers);
    let mut model = vec![0; usize::try_from(SIZE).unwrap()];
    for batch in &batches {
        let steps = || (0..).zip(batch.iter());
        join_all(steps().map(|(region, step)| apply(&device, region, step, &model))).await;
        let told: Vec<bool> =
            steps().map(|(region, step)| expect(&mut model, region, step)).collect();
        if told.contains(&false) {
            model = target.bytes();
        }
    }
    device.flush().await.unwrap();
    let all = ByteRange::between(0, SIZE);
    assert!(device.read(all).await.unwrap().to_vec() == model);
    let mut at = 0;
    while at < SIZE {
        for extent in device.extents(ByteRange::between(at, SIZE)).await.unwrap() {
            assert_eq!(extent.range.start(), at);
            at = extent.range.end();
            let span = usize::try_from(extent.range.start()).unwrap()..usize::try_from(at).unwrap();
            assert!(!extent.zero || model[span].iter().all(|byte| *byte == 0));
        }
    }
    device.disconnect().await;
    let report = server.shutdown(std::time::Duration::from_secs(20)).await;
    assert_eq!(report.dropped_connections, 0);
    assert!(target.bytes() == model);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn a_disk_behind_client_and_server_is_like_a_flat_buffer(
        batches in proptest::collection::vec(
            proptest::collection::vec(any_step(), 1..=MAX_BATCH),
            1..12,
        ),
        headers in prop_oneof![
            Just(Headers::Simple), Just(Headers::Structured), Just(Headers::Extended)
        ],
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(run(batches, headers));
    }
}
