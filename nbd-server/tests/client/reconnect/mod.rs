//! Servers that go away and come back: what was asked is answered all the same, what was answered stays, and what
//! cannot be kept is said.

mod machine;
mod programs;

use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use block::{BlockDevice, ByteRange, DeviceError, Durability, ErrorKind, ZeroMode};
use bytes::Bytes;
use futures_util::future::join_all;
use nbd_server::client::{ClientError, ClientOptions, NbdDevice, Reconnect};
use proptest::prelude::*;

use machine::{Asked, DISK_BYTES, Fate, Machine};

/// Patient, and quick to try again.
fn policy() -> Reconnect {
    Reconnect {
        first_delay: Duration::from_millis(1),
        longest_delay: Duration::from_millis(20),
        ..Reconnect::default()
    }
}

fn options(connections: usize, reconnect: Reconnect) -> ClientOptions {
    ClientOptions { connections, reconnect: Some(reconnect), ..ClientOptions::default() }
}

async fn open(machine: &Machine, options: ClientOptions) -> Arc<NbdDevice> {
    NbdDevice::connect(&machine.address(), "disk", options).await.unwrap()
}

fn range(start: u64, len: u64) -> ByteRange {
    ByteRange::new(start, len).expect("a range")
}

async fn write(device: &NbdDevice, start: u64, byte: u8, len: usize) {
    let data = Bytes::from(vec![byte; len]);
    device.write(start, data, Durability::Deferred).await.unwrap();
}

async fn reads(device: &NbdDevice, start: u64, byte: u8, len: usize) {
    let read = device.read(range(start, len as u64)).await.unwrap().to_vec();
    assert!(read == vec![byte; len], "{:?} instead of {byte} at {start}", &read[..4.min(len)]);
}

/// What a device failed at, behind [`ClientError::Gone`].
fn gone(error: &DeviceError) -> &ClientError {
    match error {
        DeviceError::Backend { source, .. } => match source.downcast_ref() {
            Some(ClientError::Gone(cause)) => cause,
            _ => panic!("{error}"),
        },
        _ => panic!("{error}"),
    }
}

#[tokio::test]
async fn requests_in_flight_when_the_connections_break_are_sent_again() {
    let machine = Machine::start();
    let device = open(&machine, options(2, policy())).await;
    write(&device, 0, 7, 4096).await;
    device.flush().await.unwrap();
    machine.decide(|_| Fate::Held);
    let write = async {
        device.write(8192, Bytes::from(vec![3; 4096]), Durability::Deferred).await.unwrap();
    };
    let zero = device.write_zeroes(range(512, 512), ZeroMode::default(), Durability::Durable);
    let cut = async {
        machine.held(4).await;
        machine.power_off();
        machine.power_on();
        machine.decide(|_| Fate::Done);
    };
    let (read, (), zeroed, flushed, ()) =
        tokio::join!(device.read(range(2048, 4)), write, zero, device.flush(), cut);
    assert_eq!(read.unwrap().to_vec(), [7; 4]);
    zeroed.unwrap();
    flushed.unwrap();
    reads(&device, 512, 0, 512).await;
    reads(&device, 8192, 3, 4096).await;
    device.close().await.unwrap();
    assert!(machine.durable()[8192..12_288] == [3; 4096]);
}

#[tokio::test]
async fn without_the_option_a_broken_connection_is_an_error() {
    let machine = Machine::start();
    let device = open(&machine, ClientOptions::default()).await;
    machine.cut_all().await;
    let read = device.read(range(0, 4)).await.unwrap_err();
    assert_eq!(read.kind(), ErrorKind::Io);
    device.disconnect().await;
}

#[tokio::test]
async fn what_was_answered_and_not_flushed_survives_the_server() {
    let machine = Machine::start();
    let device = open(&machine, options(1, policy())).await;
    write(&device, 0, 1, 8192).await;
    write(&device, 4096, 2, 8192).await;
    let zero = device.write_zeroes(range(6144, 512), ZeroMode::default(), Durability::Deferred);
    zero.await.unwrap();
    // Durable over what is not: the order counts.
    let durable = Bytes::from(vec![9; 512]);
    device.write(0, durable, Durability::Durable).await.unwrap();
    for _ in 0..3 {
        machine.power_off();
        machine.power_on();
        reads(&device, 0, 9, 512).await;
        reads(&device, 512, 1, 3584).await;
        reads(&device, 4096, 2, 2048).await;
        reads(&device, 6144, 0, 512).await;
        reads(&device, 6656, 2, 5632).await;
    }
    device.flush().await.unwrap();
    machine.asked();
    machine.power_off();
    machine.power_on();
    reads(&device, 4096, 2, 2048).await;
    assert_eq!(machine.asked(), [Asked::Read(4096, 2048)], "flushed changes were made again");
}

#[tokio::test]
async fn changes_that_overlap_are_made_again_one_after_the_other() {
    let machine = Machine::start();
    let device = open(&machine, options(1, policy())).await;
    write(&device, 0, 1, 8192).await;
    write(&device, 4096, 2, 8192).await;
    machine.power_off();
    machine.decide(|asked| if asked == Asked::Write(0, 8192) { Fate::Held } else { Fate::Done });
    machine.power_on();
    let release = async {
        machine.held(1).await;
        settle().await;
        machine.decide(|_| Fate::Done);
    };
    tokio::join!(reads(&device, 4096, 2, 8192), release);
}

/// Lets everybody do what is left to do.
async fn settle() {
    for _ in 0..200 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn an_answer_that_is_heard_after_the_servers_death_does_not_count() {
    let machine = Machine::start();
    let device = open(&machine, options(1, policy())).await;
    machine.asked();
    let data = Bytes::from(vec![1; 512]);
    let mut write = std::pin::pin!(device.write(0, data, Durability::Deferred));
    let sent = std::future::poll_fn(|context| Poll::Ready(write.as_mut().poll(context))).await;
    assert!(sent.is_pending());
    // The answer comes, and nobody listens yet.
    settle().await;
    assert_eq!(machine.asked(), [Asked::Write(0, 512)]);
    machine.power_off();
    machine.power_on();
    reads(&device, 0, 0, 512).await;
    write.await.unwrap();
    reads(&device, 0, 1, 512).await;
    assert!(machine.asked().contains(&Asked::Write(0, 512)), "lost without a word");
}

#[tokio::test]
async fn a_connection_that_breaks_alone_is_replaced_without_making_changes_again() {
    let machine = Machine::start();
    let device = open(&machine, options(3, policy())).await;
    write(&device, 0, 1, 512).await;
    machine.asked();
    machine.cut_one().await;
    while machine.cables() < 3 {
        // Something has to be asked for the break to be seen.
        reads(&device, 0, 1, 512).await;
    }
    let asked = machine.asked();
    assert!(asked.iter().all(|one| matches!(one, Asked::Read(..))), "{asked:?}");
}

#[tokio::test]
async fn a_connection_that_only_looks_alive_does_not_vouch_for_the_server() {
    let machine = Machine::start();
    let soon = Duration::from_millis(150);
    let options = ClientOptions {
        stall_timeout: Some(soon),
        handshake_timeout: soon * 4,
        ..options(2, policy())
    };
    let device = open(&machine, options).await;
    write(&device, 0, 1, 512).await;
    machine.silence_one();
    machine.power_off();
    machine.power_on();
    for _ in 0..20 {
        reads(&device, 0, 1, 512).await;
    }
}

#[tokio::test]
async fn another_export_behind_the_same_name_is_refused_for_good() {
    let machine = Machine::start();
    let device = open(&machine, options(2, policy())).await;
    write(&device, 0, 1, 512).await;
    machine.power_off();
    machine.power_on_with(DISK_BYTES * 2);
    let flush = device.flush().await.unwrap_err();
    assert!(matches!(gone(&flush), ClientError::Changed { what: "size" }), "{flush}");
    assert_eq!(
        flush.to_string(),
        "the connection could not be restored: the server came back with another size"
    );
    machine.power_off();
    machine.power_on();
    let read = device.read(range(0, 512)).await.unwrap_err();
    assert!(matches!(gone(&read), ClientError::Changed { .. }), "{read}");
    device.close().await.unwrap_err();
}

#[tokio::test]
async fn a_change_that_cannot_be_made_again_is_never_hidden() {
    let machine = Machine::start();
    let device = open(&machine, options(1, policy())).await;
    write(&device, 512, 1, 512).await;
    machine.power_off();
    machine.decide(|asked| match asked {
        Asked::Write(..) => Fate::Fails,
        _ => Fate::Done,
    });
    machine.power_on();
    let read = device.read(range(0, 4096)).await.unwrap_err();
    let lost = range(512, 512);
    let cause = gone(&read);
    assert!(matches!(cause, ClientError::NotRestored { range, .. } if *range == lost), "{cause}");
    machine.decide(|_| Fate::Done);
    for failed in [device.flush().await, device.close().await] {
        assert!(matches!(gone(&failed.unwrap_err()), ClientError::NotRestored { .. }));
    }
}

#[tokio::test]
async fn a_server_that_stays_away_is_waited_for_no_longer_than_allowed() {
    let machine = Machine::start();
    let patience = Duration::from_millis(60);
    let device = open(&machine, options(2, Reconnect { patience, ..policy() })).await;
    write(&device, 0, 5, 512).await;
    machine.power_off();
    let (read, flush) = tokio::join!(device.read(range(0, 512)), device.flush());
    assert!(matches!(gone(&read.unwrap_err()), ClientError::HandshakeClosed { .. }));
    gone(&flush.unwrap_err());
    // Whoever asks later finds it again, and what it had answered.
    machine.power_on();
    reads(&device, 0, 5, 512).await;
    device.close().await.unwrap();
    assert!(machine.durable()[..512] == [5; 512]);
}

#[tokio::test]
async fn a_request_that_kills_the_server_is_given_up() {
    let machine = Machine::start();
    let resends = 3;
    let device = open(&machine, options(2, Reconnect { resends, ..policy() })).await;
    write(&device, 0, 5, 512).await;
    machine.decide(|asked| match asked {
        Asked::Write(4096, _) => Fate::Crash,
        _ => Fate::Done,
    });
    let killer = device.write(4096, Bytes::from_static(b"x"), Durability::Deferred).await;
    assert_eq!(killer.unwrap_err().kind(), ErrorKind::Io);
    reads(&device, 0, 5, 512).await;
    device.close().await.unwrap();
    assert!(machine.durable()[..512] == [5; 512]);
}

#[tokio::test]
async fn a_server_that_takes_its_leave_is_left_and_found_again() {
    let machine = Machine::start();
    let device = open(&machine, options(2, policy())).await;
    write(&device, 0, 5, 512).await;
    for _ in 0..3 {
        machine.decide(|asked| if asked == Asked::Flush { Fate::Done } else { Fate::Held });
        let held = async {
            machine.held(1).await;
            let release = async {
                tokio::task::yield_now().await;
                machine.decide(|_| Fate::Done);
            };
            tokio::join!(machine.restart(), release);
        };
        tokio::join!(write(&device, 512, 6, 512), held);
        reads(&device, 0, 5, 512).await;
        reads(&device, 512, 6, 512).await;
    }
}

#[tokio::test]
async fn what_is_kept_is_bounded_by_flushes_of_the_clients_own() {
    let machine = Machine::start();
    let unflushed_bytes = 64 << 10;
    let device = open(&machine, options(1, Reconnect { unflushed_bytes, ..policy() })).await;
    for index in 0..9 {
        write(&device, index << 15, 1, 1 << 15).await;
    }
    let asked = machine.asked();
    let flushes = asked.iter().filter(|one| **one == Asked::Flush).count();
    assert_eq!((asked.len(), flushes), (13, 4), "{asked:?}");
    machine.decide(|asked| if asked == Asked::Flush { Fate::Fails } else { Fate::Done });
    let mut failed = 0;
    for index in 0..3 {
        let data = Bytes::from(vec![1; 1 << 15]);
        let written = device.write(index << 15, data, Durability::Deferred).await;
        failed += usize::from(written.is_err());
    }
    assert_eq!(failed, 2, "nothing may be kept beyond the bound");
}

#[tokio::test]
async fn a_client_without_a_server_can_be_left() {
    let machine = Machine::start();
    let device = open(&machine, options(2, policy())).await;
    machine.power_off();
    let waiting = device.read(range(0, 512));
    let leave = async {
        tokio::task::yield_now().await;
        device.disconnect().await;
    };
    let (read, ()) = tokio::join!(waiting, leave);
    assert!(matches!(read, Err(DeviceError::Closed)), "{read:?}");
}

/// One step of one writer, in its own part of the disk.
#[derive(Clone, Debug)]
enum Step {
    Write { at: u64, len: usize, byte: u8, durable: bool },
    Zero { at: u64, len: usize },
    Read { at: u64, len: usize },
    Flush,
}

/// What goes wrong between two steps of somebody.
#[derive(Clone, Copy, Debug)]
enum Trouble {
    Crash,
    CutAll,
    CutOne,
    Nothing,
}

const WRITERS: u64 = 3;
const PART: u64 = DISK_BYTES / 4;

fn any_step() -> impl Strategy<Value = Step> {
    let span = || (0..PART / 2, 1_usize..20_000);
    prop_oneof![
        4 => (span(), 1_u8.., prop::bool::weighted(0.2))
            .prop_map(|((at, len), byte, durable)| Step::Write { at, len, byte, durable }),
        1 => span().prop_map(|(at, len)| Step::Zero { at, len }),
        3 => span().prop_map(|(at, len)| Step::Read { at, len }),
        1 => Just(Step::Flush),
    ]
}

fn any_trouble() -> impl Strategy<Value = Trouble> {
    use Trouble::{Crash, CutAll, CutOne, Nothing};
    prop_oneof![Just(Crash), Just(CutAll), Just(CutOne), Just(Nothing)]
}

/// Takes the steps one after another; returns what its part holds then.
async fn take_steps(device: &NbdDevice, part: u64, steps: &[Step]) -> Vec<u8> {
    let start = part * PART;
    let mut model = vec![0; usize::try_from(PART).unwrap()];
    for step in steps {
        match *step {
            Step::Write { at, len, byte, durable } => {
                let how = if durable { Durability::Durable } else { Durability::Deferred };
                device.write(start + at, Bytes::from(vec![byte; len]), how).await.unwrap();
                model[usize::try_from(at).unwrap()..][..len].fill(byte);
            }
            Step::Zero { at, len } => {
                let (zero, mode) = (range(start + at, len as u64), ZeroMode::default());
                device.write_zeroes(zero, mode, Durability::Deferred).await.unwrap();
                model[usize::try_from(at).unwrap()..][..len].fill(0);
            }
            Step::Read { at, len } => {
                let read = device.read(range(start + at, len as u64)).await.unwrap().to_vec();
                assert!(read == model[usize::try_from(at).unwrap()..][..len], "{step:?}");
            }
            Step::Flush => device.flush().await.unwrap(),
        }
        tokio::task::yield_now().await;
    }
    model
}

async fn live_through(scripts: &[Vec<Step>], troubles: &[(usize, Trouble)], connections: usize) {
    let machine = Machine::start();
    let reconnect = Reconnect { unflushed_bytes: 40_000, resends: 1000, ..policy() };
    let device = open(&machine, options(connections, reconnect)).await;
    let trouble = async {
        for (pause, trouble) in troubles {
            for _ in 0..*pause {
                tokio::task::yield_now().await;
            }
            match trouble {
                Trouble::Crash => {
                    machine.power_off();
                    tokio::task::yield_now().await;
                    machine.power_on();
                }
                Trouble::CutAll => machine.cut_all().await,
                Trouble::CutOne if machine.cables() > 0 => machine.cut_one().await,
                Trouble::CutOne | Trouble::Nothing => {}
            }
        }
    };
    let writers =
        join_all((0..).zip(scripts).map(|(part, steps)| take_steps(&device, part, steps)));
    let (models, ()) = tokio::join!(writers, trouble);
    device.flush().await.unwrap();
    machine.power_off();
    let durable = machine.durable();
    for (part, model) in models.iter().enumerate() {
        let start = part * usize::try_from(PART).unwrap();
        assert!(durable[start..][..model.len()] == model[..], "part {part}");
    }
}

fn rounds() -> u32 {
    let rounds = std::env::var("SENDENSE_TEST_ROUNDS").ok().and_then(|text| text.parse().ok());
    32 * rounds.unwrap_or(1)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: rounds(), ..ProptestConfig::default() })]
    #[test]
    fn whatever_breaks_a_disk_holds_what_was_written(
        scripts in prop::collection::vec(
            prop::collection::vec(any_step(), 1..40),
            usize::try_from(WRITERS).unwrap(),
        ),
        troubles in prop::collection::vec((0_usize..60, any_trouble()), 0..12),
        connections in 1_usize..4,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(live_through(&scripts, &troubles, connections));
    }
}
