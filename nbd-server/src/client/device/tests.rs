use proptest::prelude::*;

use super::*;
use crate::client::export::BlockSizes;
use crate::client::fake::{Behaviour, DISK_BYTES, Log, device, device_that, negotiated};
use crate::client::handshake::Negotiated;

const ALL: u16 = transmission_flag::SEND_FLUSH
    | transmission_flag::SEND_FUA
    | transmission_flag::SEND_TRIM
    | transmission_flag::SEND_WRITE_ZEROES
    | transmission_flag::SEND_FAST_ZERO
    | transmission_flag::CAN_MULTI_CONN;

fn range(start: u64, len: u64) -> ByteRange {
    ByteRange::new(start, len).unwrap()
}

fn small_payloads() -> ClientOptions {
    ClientOptions { max_payload_bytes: 65_536, ..Default::default() }
}

fn with_block(minimum: u32) -> Negotiated {
    let mut negotiated = negotiated(ALL, Headers::Structured);
    negotiated.export.block_sizes = BlockSizes { minimum, preferred: 4096, maximum: 1 << 20 };
    negotiated
}

fn commands(log: &Log) -> Vec<(u16, u16)> {
    log.lock().iter().map(|(command, flags, _, _)| (*command, *flags)).collect()
}

#[tokio::test]
async fn long_requests_are_cut_to_what_the_server_takes() {
    let (device, log) = device(&negotiated(ALL, Headers::Structured), 2, 0, small_payloads());
    let data: Bytes = (0..300_000_u32).map(|i| i.to_le_bytes()[1]).collect();
    device.write(1000, data.clone(), Durability::Durable).await.unwrap();
    let mut written = log.lock().clone();
    written.sort_unstable();
    let pieces: Vec<_> = written.iter().map(|(_, _, at, len)| (*at, *len)).collect();
    assert_eq!(pieces[..2], [(1000, 64_536), (65_536, 65_536)]);
    assert!(written.iter().all(|(_, flags, _, _)| *flags == command_flag::FUA));
    let read = device.read(range(1000, 300_000)).await.unwrap();
    assert_eq!(read.to_vec(), data);
    device.close().await.unwrap();
}

#[tokio::test]
async fn durability_is_a_flag_or_else_a_flush() {
    let data = Bytes::from_static(b"x");
    let (fua, log) = device(&negotiated(ALL, Headers::Structured), 1, 0, ClientOptions::default());
    fua.write(0, data.clone(), Durability::Durable).await.unwrap();
    assert_eq!(commands(&log), [(command::WRITE, command_flag::FUA)]);
    let flags = ALL & !transmission_flag::SEND_FUA;
    let (flush, log) =
        device(&negotiated(flags, Headers::Structured), 1, 0, ClientOptions::default());
    flush.write(0, data.clone(), Durability::Durable).await.unwrap();
    flush.write(0, data, Durability::Deferred).await.unwrap();
    let expected = [(command::WRITE, 0), (command::FLUSH, 0), (command::WRITE, 0)];
    assert_eq!(commands(&log), expected);
}

#[tokio::test]
async fn zeroes_take_the_way_that_the_server_has() {
    let options = ClientOptions::default;
    let (modern, log) = device(&negotiated(ALL, Headers::Structured), 1, 0, options());
    let mode = ZeroMode { keep_allocated: true, fast_only: true };
    modern.write_zeroes(range(0, 4096), mode, Durability::Deferred).await.unwrap();
    let flags = command_flag::NO_HOLE | command_flag::FAST_ZERO;
    assert_eq!(commands(&log), [(command::WRITE_ZEROES, flags)]);

    let lacking = ALL & !transmission_flag::SEND_FAST_ZERO;
    let (slow, log) = device(&negotiated(lacking, Headers::Structured), 1, 0, options());
    let refused = slow.write_zeroes(range(0, 4096), mode, Durability::Deferred).await;
    assert!(matches!(refused, Err(DeviceError::NotSupported { .. })), "{refused:?}");
    assert_eq!(commands(&log), []);

    let (old, log) = device(&negotiated(0, Headers::Simple), 1, 0, small_payloads());
    old.write(0, Bytes::from(vec![7; 200_000]), Durability::Deferred).await.unwrap();
    log.lock().clear();
    old.write_zeroes(range(10, 150_000), ZeroMode::default(), Durability::Durable).await.unwrap();
    assert!(log.lock().iter().all(|(command, ..)| *command == command::WRITE));
    let read = old.read(range(0, 200_000)).await.unwrap().to_vec();
    assert!(block::is_zero(&read[10..150_010]) && read[..10] == [7; 10]);
    assert!(read[150_010..].iter().all(|byte| *byte == 7));
}

#[tokio::test]
async fn a_server_without_trim_or_flush_is_not_asked_for_them() {
    let (device, log) = device(&negotiated(0, Headers::Structured), 1, 0, ClientOptions::default());
    device.discard(range(0, 4096), Durability::Deferred).await.unwrap();
    device.flush().await.unwrap();
    assert_eq!(commands(&log), []);
}

#[tokio::test]
async fn one_flush_is_enough_for_several_connections() {
    let (device, log) =
        device(&negotiated(ALL, Headers::Structured), 4, 0, ClientOptions::default());
    device.flush().await.unwrap();
    assert_eq!(commands(&log), [(command::FLUSH, 0)]);
}

#[tokio::test]
async fn requests_off_the_device_never_reach_the_server() {
    let (device, log) =
        device(&negotiated(ALL, Headers::Structured), 1, 0, ClientOptions::default());
    let size = DISK_BYTES as u64;
    let past = range(size - 1, 2);
    assert!(matches!(device.read(past).await, Err(DeviceError::PastEnd { .. })));
    assert!(matches!(device.extents(past).await, Err(DeviceError::PastEnd { .. })));
    let write = device.write(u64::MAX, Bytes::from_static(b"xy"), Durability::Deferred).await;
    assert!(matches!(write, Err(DeviceError::WritePastEnd { .. })), "{write:?}");
    assert_eq!(device.read(range(size, 0)).await.unwrap().len(), 0);
    assert_eq!(commands(&log), []);
}

#[tokio::test]
async fn a_read_only_export_refuses_changes_at_once() {
    let flags = ALL | transmission_flag::READ_ONLY;
    let (device, log) =
        device(&negotiated(flags, Headers::Structured), 1, 0, ClientOptions::default());
    let data = Bytes::from_static(b"x");
    let write = device.write(0, data, Durability::Deferred).await;
    assert!(matches!(write, Err(DeviceError::ReadOnly)), "{write:?}");
    device.flush().await.unwrap();
    assert_eq!(commands(&log), []);
}

#[tokio::test]
async fn a_minimum_block_size_widens_reads_narrows_hints_and_refuses_writes() {
    let (device, log) = device(&with_block(4096), 1, 0, ClientOptions::default());
    device.write(4096, Bytes::from(vec![5; 8192]), Durability::Deferred).await.unwrap();
    log.lock().clear();
    let read = device.read(range(4000, 200)).await.unwrap();
    assert_eq!(read.to_vec(), [vec![0; 96], vec![5; 104]].concat());
    device.discard(range(1, 4095), Durability::Deferred).await.unwrap();
    device.discard(range(1, 9000), Durability::Deferred).await.unwrap();
    let expected = [(command::READ, 0, 0, 8192), (command::TRIM, 0, 4096, 4096)];
    assert_eq!(log.lock()[..], expected);
    let write = device.write(1, Bytes::from_static(b"x"), Durability::Deferred).await;
    let error = write.unwrap_err();
    assert_eq!(error.kind(), block::ErrorKind::Invalid);
    let text =
        "1 bytes at offset 1 is not aligned to the server's minimum block size of 4096 bytes";
    assert_eq!(error.to_string(), text);
}

#[tokio::test]
async fn extents_say_what_is_allocated_and_other_contexts_answer_by_name() {
    let (device, _) = device(&with_block(512), 1, 0, ClientOptions::default());
    let extents = device.extents(range(0, 8192)).await.unwrap();
    let expected = [
        Extent { range: range(0, 4096), allocated: false, zero: true },
        Extent { range: range(4096, 4096), allocated: true, zero: false },
    ];
    assert_eq!(extents, expected);
    let status = device.block_status("x-test:a", range(100, 700)).await.unwrap();
    assert_eq!(status, [StatusExtent { range: range(100, 700), flags: 1 }]);
    let unknown = device.block_status("x-test:b", range(0, 1)).await;
    assert!(matches!(unknown, Err(ClientError::NoContext { .. })), "{unknown:?}");
}

#[tokio::test]
async fn several_contexts_are_told_of_by_one_request() {
    for headers in [Headers::Structured, Headers::Extended] {
        let (device, log) = device(&negotiated(ALL, headers), 2, 0, ClientOptions::default());
        let both = ["x-test:a", "base:allocation"];
        let told = device.block_statuses(&both, range(0, 8192)).await.unwrap();
        assert_eq!(told[0], [StatusExtent { range: range(0, 8192), flags: 1 }]);
        let halves = [(range(0, 4096), 3), (range(4096, 4096), 0)];
        assert_eq!(told[1], halves.map(|(range, flags)| StatusExtent { range, flags }));
        assert_eq!(commands(&log), [(command::BLOCK_STATUS, 0)]);
    }
}

#[tokio::test]
async fn a_server_that_can_choose_is_told_which_context_is_meant() {
    let negotiated = negotiated(ALL | transmission_flag::BLOCK_STATUS_PAYLOAD, Headers::Extended);
    let (device, log) = device(&negotiated, 1, 0, ClientOptions::default());
    let told = device.block_status("x-test:a", range(4096, 8192)).await.unwrap();
    assert_eq!(told, [StatusExtent { range: range(4096, 8192), flags: 1 }]);
    let chosen = (command::BLOCK_STATUS, command_flag::PAYLOAD_LEN, 4096, 8192);
    assert_eq!(log.lock().drain(..).collect::<Vec<_>>(), [chosen]);
    let all = ["x-test:a", "base:allocation"];
    device.block_statuses(&all, range(0, 8192)).await.unwrap();
    assert_eq!(commands(&log), [(command::BLOCK_STATUS, 0)]);
}

#[tokio::test]
async fn extended_headers_carry_long_requests_whole_and_announce_payloads() {
    let mut negotiated = negotiated(ALL, Headers::Extended);
    negotiated.export.size_bytes = 1 << 62;
    let (device, log) = device(&negotiated, 1, 0, ClientOptions::default());
    let all = range(0, 1 << 62);
    device.discard(all, Durability::Deferred).await.unwrap();
    let extents = device.extents(all).await.unwrap();
    assert_eq!(extents[0].range, range(0, 1 << 61));
    device.write(0, Bytes::from_static(b"x"), Durability::Deferred).await.unwrap();
    let expected = [
        (command::TRIM, 0, 0, 1 << 62),
        (command::BLOCK_STATUS, 0, 0, 1 << 62),
        (command::WRITE, command_flag::PAYLOAD_LEN, 0, 1),
    ];
    assert_eq!(log.lock()[..], expected);
}

#[tokio::test]
async fn zeros_over_a_large_disk_are_tried_at_once_and_then_in_pieces() {
    let size = 5 << 30;
    for (headers, refuses, expected) in [
        (Headers::Structured, false, vec![(0, 1 << 30); 5]),
        (Headers::Extended, false, vec![(command_flag::FAST_ZERO, size)]),
        (
            Headers::Extended,
            true,
            [vec![(command_flag::FAST_ZERO, size)], vec![(0, 1 << 30); 5]].concat(),
        ),
    ] {
        let mut negotiated = negotiated(ALL, headers);
        negotiated.export.size_bytes = size;
        let behaviour = Behaviour { no_fast_zeroes: refuses, ..Behaviour::default() };
        let (device, log) = device_that(behaviour, &negotiated, 1, ClientOptions::default());
        let (all, mode) = (range(0, size), ZeroMode::default());
        device.write_zeroes(all, mode, Durability::Deferred).await.unwrap();
        let asked: Vec<_> = log.lock().iter().map(|(_, flags, _, len)| (*flags, *len)).collect();
        assert_eq!(asked, expected);
    }
}

#[tokio::test]
async fn without_contexts_everything_is_data() {
    let (device, _) = device(&negotiated(ALL, Headers::Simple), 1, 0, ClientOptions::default());
    let extents = device.extents(range(5, 10)).await.unwrap();
    assert_eq!(extents, [Extent { range: range(5, 10), allocated: true, zero: false }]);
}

#[tokio::test]
async fn a_closed_device_answers_closed() {
    let (device, log) =
        device(&negotiated(ALL, Headers::Structured), 2, 0, ClientOptions::default());
    device.close().await.unwrap();
    device.close().await.unwrap();
    assert_eq!(commands(&log), [(command::FLUSH, 0)]);
    let read = device.read(range(0, 1)).await;
    assert!(matches!(read, Err(DeviceError::Closed)), "{read:?}");
}

#[tokio::test]
async fn a_read_larger_than_the_pool_does_not_wait_for_itself() {
    let pool = Some(BufferPool::new(65_536));
    let options = ClientOptions { pool: pool.clone(), ..small_payloads() };
    let (device, _) = device(&negotiated(ALL, Headers::Structured), 2, 0, options);
    device.write(0, Bytes::from(vec![1; DISK_BYTES]), Durability::Deferred).await.unwrap();
    // Each lets go of what it has read: whoever keeps it cannot have more than the pool.
    let read = || async { device.read(range(0, DISK_BYTES as u64)).await.map(|all| all.len()) };
    let (a, b) = tokio::join!(read(), read());
    assert_eq!(a.unwrap() + b.unwrap(), 2 * DISK_BYTES as u64);
    assert_eq!(pool.map(|pool| pool.in_use_bytes()), Some(0));
}

/// One step of a model run; offsets and lengths in bytes.
#[derive(Clone, Debug)]
enum Step {
    Write(usize, usize, u8),
    Zero(usize, usize),
    Read(usize, usize),
}

fn any_step() -> impl Strategy<Value = Step> {
    let at = 0..DISK_BYTES - 200_000;
    let len = prop_oneof![1_usize..5000, 1_usize..200_000];
    (0..3, at, len, 1_u8..).prop_map(|(kind, at, len, byte)| match kind {
        0 => Step::Write(at, len, byte),
        1 => Step::Zero(at, len),
        _ => Step::Read(at, len),
    })
}

fn any_headers() -> impl Strategy<Value = Headers> {
    prop_oneof![Just(Headers::Simple), Just(Headers::Structured), Just(Headers::Extended)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn a_device_reads_like_the_vector_it_imitates(
        steps in proptest::collection::vec(any_step(), 1..20),
        connections in 1_usize..4,
        late in 0_usize..6,
        headers in any_headers(),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let (device, _) = device(&negotiated(ALL, headers), connections, late, small_payloads());
            let mut model = vec![0; DISK_BYTES];
            for step in &steps {
                match *step {
                    Step::Write(at, len, byte) => {
                        model[at..at + len].fill(byte);
                        let data = Bytes::from(vec![byte; len]);
                        device.write(at as u64, data, Durability::Deferred).await.unwrap();
                    }
                    Step::Zero(at, len) => {
                        model[at..at + len].fill(0);
                        let range = range(at as u64, len as u64);
                        let mode = ZeroMode::default();
                        device.write_zeroes(range, mode, Durability::Durable).await.unwrap();
                    }
                    Step::Read(at, len) => {
                        let read = device.read(range(at as u64, len as u64)).await.unwrap();
                        prop_assert_eq!(read.to_vec(), &model[at..at + len]);
                    }
                }
            }
            let all = device.read(range(0, DISK_BYTES as u64)).await.unwrap();
            prop_assert_eq!(all.to_vec(), model);
            Ok(())
        })?;
    }
}
