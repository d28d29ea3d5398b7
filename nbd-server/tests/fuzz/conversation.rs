//! Our client and our server in conversation about a disk that a vector imitates: what was written is read, what is told
//! to be zero is zero, a dropped request does no harm beyond its own bytes, and in the end the disk is what it should be.

use std::sync::Arc;
use std::time::Duration;

use block::{BlockDevice, ByteRange, Durability, MemoryDevice, ZeroMode};
use bytes::Bytes;
use futures_util::future::join_all;
use nbd_server::client::{ClientOptions, NbdDevice};
use nbd_server::wire::{Fields, Headers};
use nbd_server::{Export, Server, ServerConfig};

const PARTS: u64 = 4;
const PART: u64 = 8192;
const DISK: u64 = PARTS * PART;
/// The most operations of one input.
const MAX_OPERATIONS: usize = 256;

/// What is done to a part of the disk.
#[derive(Clone, Copy, Debug)]
enum Operation {
    Write(u8, Durability),
    Zero(ZeroMode),
    Discard,
    Read,
    Status,
    Flush,
    /// A write of which nobody waits for the end.
    Drop(u8),
}

fn operation(kind: u8, byte: u8) -> Operation {
    match kind % 12 {
        0 => Operation::Flush,
        1 => Operation::Status,
        2 => Operation::Discard,
        3 => Operation::Zero(ZeroMode { keep_allocated: byte & 1 != 0, fast_only: byte & 2 != 0 }),
        4 => Operation::Drop(byte),
        5 => Operation::Write(byte, Durability::Durable),
        6..=8 => Operation::Read,
        _ => Operation::Write(byte, Durability::Deferred),
    }
}

fn span(range: ByteRange) -> std::ops::Range<usize> {
    usize::try_from(range.start()).unwrap()..usize::try_from(range.end()).unwrap()
}

/// What a part holds, where that is known.
type Model = Vec<Option<u8>>;

async fn apply(
    device: &NbdDevice,
    range: ByteRange,
    operation: Operation,
    model: &mut [Option<u8>],
) {
    let len = model.len();
    let set = |model: &mut [Option<u8>], value| model.fill(value);
    match operation {
        Operation::Write(byte, how) => {
            device.write(range.start(), Bytes::from(vec![byte; len]), how).await.unwrap();
            set(model, Some(byte));
        }
        Operation::Zero(mode) => {
            device.write_zeroes(range, mode, Durability::Deferred).await.unwrap();
            set(model, Some(0));
        }
        Operation::Discard => {
            device.discard(range, Durability::Deferred).await.unwrap();
            set(model, None);
            learn(device, range, model).await;
        }
        Operation::Read => learn(device, range, model).await,
        Operation::Status => {
            for extent in device.extents(range).await.unwrap() {
                let told = span(ByteRange::between(
                    extent.range.start() - range.start(),
                    extent.range.end() - range.start(),
                ));
                assert!(!extent.zero || model[told].iter().all(|byte| byte.is_none_or(|b| b == 0)));
            }
        }
        Operation::Flush => device.flush().await.unwrap(),
        Operation::Drop(byte) => {
            let data = Bytes::from(vec![byte; len]);
            let mut write = std::pin::pin!(device.write(range.start(), data, Durability::Deferred));
            let _ = std::future::poll_fn(|context| {
                std::task::Poll::Ready(write.as_mut().poll(context))
            })
            .await;
            // It may be done at any time from now on, until a flush has come after it.
            set(model, None);
        }
    }
}

/// Reads, compares with what is known, and knows all of it then.
async fn learn(device: &NbdDevice, range: ByteRange, model: &mut [Option<u8>]) {
    let read = device.read(range).await.unwrap().to_vec();
    assert_eq!(read.len(), model.len());
    for (known, byte) in model.iter_mut().zip(read) {
        assert!(known.is_none_or(|known| known == byte), "{byte} instead of {known:?}");
        *known = Some(byte);
    }
}

fn options(shape: u8) -> ClientOptions {
    let headers = [Headers::Simple, Headers::Structured, Headers::Extended];
    ClientOptions {
        headers: headers[usize::from(shape % 3)],
        in_flight: usize::from(shape >> 2 & 7) + 1,
        max_payload_bytes: if shape & 32 != 0 { 512 } else { 1 << 20 },
        ..ClientOptions::default()
    }
}

/// The first byte is how the client is; then operations of six bytes, one after another in each part of the disk and at
/// once in different ones.
pub(crate) async fn run(data: &[u8]) {
    let Some((&shape, data)) = data.split_first() else { return };
    let disk = MemoryDevice::new(DISK);
    let server = Server::new(ServerConfig::default());
    server.add_export(Export::new("disk", Arc::clone(&disk) as _)).expect("one export");
    let (ours, theirs) = tokio::io::duplex(16 << 10);
    server.serve_stream(theirs);
    let opened = NbdDevice::over_stream(ours, "disk", options(shape)).await;
    let device = opened.expect("our own server");
    let mut scripts: [Vec<(ByteRange, Operation)>; 4] = Default::default();
    let mut rest = Fields(data);
    for _ in 0..MAX_OPERATIONS {
        let (Some(head), Some(at), Some(len)) = (rest.take(2), rest.u16(), rest.u16()) else {
            break;
        };
        let at = u64::from(at) % PART;
        let len = u64::from(len) % (PART - at) + 1;
        let part = usize::from(head[0] >> 6);
        let range = ByteRange::between(at, at + len);
        scripts[part].push((range, operation(head[0] & 63, head[1])));
    }
    let parts = (0..).zip(&scripts).map(|(part, script)| take_part(&device, part, script));
    let models = join_all(parts).await;
    device.close().await.unwrap();
    let report = server.shutdown(Duration::from_secs(20)).await;
    assert_eq!(report.dropped_connections, 0);
    let bytes = disk.to_vec();
    for (known, byte) in models.iter().flatten().zip(&bytes) {
        assert!(known.is_none_or(|known| known == *byte), "{byte} instead of {known:?} in the end");
    }
}

async fn take_part(device: &NbdDevice, part: u64, script: &[(ByteRange, Operation)]) -> Model {
    let mut model = vec![Some(0); usize::try_from(PART).unwrap()];
    // The bytes of writes that nobody waits for, which may come late.
    let mut late = vec![false; model.len()];
    for (inside, operation) in script {
        let start = part * PART + inside.start();
        let range = ByteRange::between(start, start + inside.len());
        let here = span(*inside);
        apply(device, range, *operation, &mut model[here.clone()]).await;
        late[here.clone()]
            .iter_mut()
            .for_each(|late| *late |= matches!(operation, Operation::Drop(_)));
        for (known, late) in model[here.clone()].iter_mut().zip(&late[here]) {
            if *late {
                *known = None;
            }
        }
    }
    model
}
