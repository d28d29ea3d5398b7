//! Coming and going: handshakes on the wire, exports added and removed, listeners, limits, shutdown.

use std::os::unix::net::UnixListener as StdUnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use block::BlockDevice;
use bytes::BytesMut;
use nbd_server::wire::{self, Request, command, error, option};
use nbd_server::{
    Attendant, Export, ExportError, Limits, Peer, Removal, Server, ServerConfig, TurnedAway,
};
use tokio::io::AsyncReadExt;
use tokio::net::{TcpStream, UnixStream};

use crate::device::{Call, TestDevice};
use crate::raw::{Raw, go};

const SIZE: u64 = 1 << 20;
const GRACE: Duration = Duration::from_secs(20);

fn server() -> (Server, Arc<TestDevice>) {
    with_limits(Limits::default())
}

fn with_limits(limits: Limits) -> (Server, Arc<TestDevice>) {
    let device = TestDevice::new(SIZE);
    let server = Server::new(ServerConfig::with_limits(limits));
    server.add_export(Export::new("disk", Arc::clone(&device) as _)).unwrap();
    (server, device)
}

#[tokio::test]
async fn options_are_answered_one_after_another_and_export_name_ends_them() {
    let (server, _) = server();
    let mut raw = Raw::new(&server);
    raw.greet(1).await;
    assert_eq!(raw.option(option::STARTTLS, &[]).await[0].0, wire::reply::ERR_UNSUP);
    assert_eq!(raw.option(77, &[0; 70_000]).await[0].0, wire::reply::ERR_UNSUP);
    assert_eq!(raw.option(option::GO, &go("none")).await[0].0, wire::reply::ERR_UNKNOWN);
    assert_eq!(raw.option(option::LIST, &[]).await.len(), 2);
    raw.send_option(option::EXPORT_NAME, b"disk").await;
    let told = raw.take(134).await;
    assert_eq!(told[..8], SIZE.to_be_bytes());
    raw.request(command::FLUSH, 0, 1, 0, 0).await;
    assert_eq!(raw.reply().await.error, 0);
}

#[tokio::test]
async fn a_client_that_aborts_or_breaks_the_handshake_is_closed() {
    let (server, _) = server();
    let mut raw = Raw::new(&server);
    raw.greet(3).await;
    assert_eq!(raw.option(option::ABORT, &[]).await[0].0, wire::reply::ACK);
    assert!(raw.rest().await.is_empty());
    let mut raw = Raw::new(&server);
    raw.greet(1 << 7).await;
    assert!(raw.rest().await.is_empty());
    let mut raw = Raw::new(&server);
    raw.greet(3).await;
    raw.send_option(option::EXPORT_NAME, b"none").await;
    assert!(raw.rest().await.is_empty());
}

#[tokio::test]
async fn names_and_the_default_export_are_unique() {
    let (server, device) = server();
    let export = |name: &str| Export::new(name, Arc::clone(&device) as _);
    assert_eq!(server.add_export(export("disk")), Err(ExportError::Duplicate("disk".into())));
    assert_eq!(server.add_export(export("a\0b")), Err(ExportError::BadString));
    assert_eq!(server.add_export(export(&"x".repeat(4097))), Err(ExportError::BadString));
    server.add_export(export("first").default_export(true).description("text")).unwrap();
    let taken = Err(ExportError::DefaultTaken("first".into()));
    assert_eq!(server.add_export(export("second").default_export(true)), taken);
    assert_eq!(server.add_export(export("")), taken);
    let names: Vec<_> = server.exports().into_iter().map(|one| one.name).collect();
    assert_eq!(names, ["disk", "first"]);
    let mut raw = Raw::new(&server);
    raw.greet(3).await;
    assert_eq!(raw.go("").await.size_bytes, SIZE);
    drop(raw);
    server.remove_export("first", Removal::Drain).await.unwrap();
    server.add_export(export("")).unwrap();
}

#[tokio::test]
async fn a_read_only_export_of_a_writable_device_says_so_and_refuses() {
    let device = TestDevice::new(SIZE);
    let server = Server::new(ServerConfig::default());
    server.add_export(Export::new("disk", Arc::clone(&device) as _).read_only(true)).unwrap();
    let mut raw = Raw::new(&server);
    let entered = raw.enter(true).await;
    assert_ne!(entered.flags & wire::transmission_flag::READ_ONLY, 0);
    raw.request(command::TRIM, 0, 1, 0, 512).await;
    assert_eq!(raw.reply().await.error, error::EPERM);
    assert!(device.log().is_empty());
}

#[tokio::test]
async fn draining_lets_open_connections_go_on_and_hides_the_export_from_new_ones() {
    let (server, _) = server();
    let mut raw = Raw::entered(&server).await;
    let removal = tokio::spawn({
        let server = server.clone();
        async move { server.remove_export("disk", Removal::Drain).await.map(drop) }
    });
    while !server.exports().is_empty() {
        tokio::task::yield_now().await;
    }
    let mut late = Raw::new(&server);
    late.greet(3).await;
    assert_eq!(late.option(option::GO, &go("disk")).await[0].0, wire::reply::ERR_UNKNOWN);
    raw.request(command::FLUSH, 0, 1, 0, 0).await;
    assert_eq!(raw.reply().await.error, 0);
    assert!(!removal.is_finished());
    raw.request(command::DISC, 0, 2, 0, 0).await;
    removal.await.unwrap().unwrap();
    let unknown = Err(ExportError::Unknown("disk".into()));
    assert_eq!(server.remove_export("disk", Removal::Drain).await.map(drop), unknown);
}

#[tokio::test]
async fn cutting_answers_what_is_in_flight_refuses_the_rest_and_closes() {
    let (server, device) = server();
    let mut raw = Raw::entered(&server).await;
    let mut idle = Raw::entered(&server).await;
    device.hold(|call| matches!(call, Call::Write(..)));
    raw.request(command::WRITE, 0, 1, 0, 3).await;
    raw.send(b"abc").await;
    device.held(1).await;
    let removal = tokio::spawn({
        let server = server.clone();
        async move { server.remove_export("disk", Removal::Cut).await.map(drop) }
    });
    while !server.exports().is_empty() {
        tokio::task::yield_now().await;
    }
    raw.request(command::WRITE, 0, 2, 0, 3).await;
    raw.send(b"xyz").await;
    let refused = raw.reply().await;
    assert_eq!((refused.cookie, refused.error), (2, error::ESHUTDOWN));
    assert!(!removal.is_finished());
    device.release();
    let done = raw.reply().await;
    assert_eq!((done.cookie, done.error), (1, 0));
    assert!(raw.rest().await.is_empty() && idle.rest().await.is_empty());
    drop((raw, idle));
    removal.await.unwrap().unwrap();
    assert_eq!(device.bytes()[..3], *b"abc");
}

#[tokio::test]
async fn an_export_can_come_back_under_its_name() {
    let (server, _) = server();
    let device = server.remove_export("disk", Removal::Cut).await.unwrap();
    server.add_export(Export::new("disk", device)).unwrap();
    let mut raw = Raw::entered(&server).await;
    raw.request(command::READ, 0, 1, 0, 512).await;
    assert_eq!(raw.reply().await.error, 0);
}

#[tokio::test]
async fn shutdown_answers_refuses_flushes_and_closes() {
    let (server, device) = server();
    let mut raw = Raw::entered(&server).await;
    device.hold(|call| matches!(call, Call::Write(..)));
    raw.request(command::WRITE, 0, 1, 0, 3).await;
    raw.send(b"abc").await;
    device.held(1).await;
    let mut haggling = Raw::new(&server);
    haggling.greet(3).await;
    let stopping = tokio::spawn({
        let server = server.clone();
        async move { server.shutdown(GRACE).await }
    });
    loop {
        raw.request(command::READ, 0, 2, 0, 512).await;
        if raw.reply().await.error == error::ESHUTDOWN {
            break;
        }
    }
    let late = haggling.option(option::GO, &go("disk")).await;
    assert_eq!(late[0].0, wire::reply::ERR_SHUTDOWN);
    drop(haggling);
    let device_again = Arc::clone(&device) as _;
    let refused = server.add_export(Export::new("late", device_again));
    assert_eq!(refused, Err(ExportError::ShuttingDown));
    device.release();
    assert_eq!(raw.reply().await.cookie, 1);
    assert!(raw.rest().await.is_empty());
    drop(raw);
    let report = stopping.await.unwrap();
    assert_eq!((report.dropped_connections, report.unflushed.len()), (0, 0));
    assert_eq!(device.log().last(), Some(&Call::Flush));
    assert_eq!(server.connections(), 0);
}

/// Stops the server, and returns once it has begun to.
async fn stopping(server: &Server) -> tokio::task::JoinHandle<nbd_server::ShutdownReport> {
    let stopping = server.clone();
    let stopping = tokio::spawn(async move { stopping.shutdown(GRACE).await });
    let late = || Export::new("late", TestDevice::new(SIZE));
    while server.add_export(late()) != Err(ExportError::ShuttingDown) {
        let _ = server.remove_export("late", Removal::Drain).await;
        tokio::task::yield_now().await;
    }
    stopping
}

#[tokio::test(start_paused = true)]
async fn whatever_was_sent_before_a_shutdown_gets_one_reply_each() {
    // One at a time is let in, so that the rest has been sent, but not read.
    let mut limits = Limits::default();
    limits.in_flight_requests = 1;
    let (server, device) = with_limits(limits);
    let mut raw = Raw::entered(&server).await;
    device.hold(|call| matches!(call, Call::Read(..)));
    for cookie in 0..20 {
        raw.request(command::READ, 0, cookie, 0, 512).await;
    }
    device.held(1).await;
    // As if from afar.
    let stopped = stopping(&server).await;
    device.release();
    let mut errors = Vec::new();
    for cookie in 0..20 {
        let reply = raw.reply().await;
        assert_eq!(reply.cookie, cookie);
        errors.push(reply.error);
    }
    assert_eq!(errors[0], 0);
    assert!(errors[1..].iter().all(|error| *error == error::ESHUTDOWN), "{errors:?}");
    assert!(raw.rest().await.is_empty());
    drop(raw);
    assert_eq!(stopped.await.unwrap().dropped_connections, 0);
}

#[tokio::test(start_paused = true)]
async fn a_payload_that_a_shutdown_cuts_in_two_is_taken_and_answered() {
    let (server, device) = server();
    let mut raw = Raw::entered(&server).await;
    raw.request(command::WRITE, 0, 7, 0, 8192).await;
    raw.send(&[1; 4096]).await;
    let stopped = stopping(&server).await;
    for _ in 0..8 {
        // Slower than a client without anything to say may be.
        tokio::time::sleep(Duration::from_millis(200)).await;
        raw.send(&[1; 512]).await;
    }
    let reply = raw.reply().await;
    assert_eq!((reply.cookie, reply.error), (7, error::ESHUTDOWN));
    assert!(raw.rest().await.is_empty());
    assert_eq!(stopped.await.unwrap().dropped_connections, 0);
    assert_eq!(device.log(), [Call::Flush], "nothing was written");
}

#[tokio::test]
async fn a_client_that_never_stops_to_ask_is_answered_and_closed_in_time() {
    let mut limits = Limits::default();
    limits.close_timeout = Duration::from_millis(400);
    let (server, _) = with_limits(limits);
    let mut raw = Raw::entered(&server).await;
    raw.request(command::READ, 0, 0, 0, 512).await;
    assert_eq!(raw.reply().await.error, 0);
    let stopped = stopping(&server).await;
    let flood = async {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let (mut reader, mut writer) = tokio::io::split(raw.stream);
        let asking = async {
            let mut flush = BytesMut::new();
            let request =
                Request { flags: 0, command: command::FLUSH, cookie: 1, offset: 0, len: 0 };
            request.encode(&mut flush);
            while writer.write_all(&flush).await.is_ok() {}
            // It takes no more. What it said last is still to be read.
            std::future::pending::<()>().await;
        };
        let mut heard = Vec::new();
        tokio::select! {
            () = asking => unreachable!(),
            read = reader.read_to_end(&mut heard) => read.unwrap(),
        }
    };
    // Generous: a hang fails.
    let heard = tokio::time::timeout(Duration::from_secs(60), flood).await.unwrap();
    assert!(heard > 0);
    let report = stopped.await.unwrap();
    assert_eq!(report.dropped_connections, 0);
}

/// Counts who comes and goes; whoever leaves takes a while to be seen off.
#[derive(Default)]
struct Porter {
    arrived: AtomicUsize,
    leaving: AtomicUsize,
    left: AtomicUsize,
    takes: Duration,
}

impl Porter {
    fn counts(&self) -> [usize; 3] {
        [&self.arrived, &self.leaving, &self.left].map(|count| count.load(Ordering::Relaxed))
    }
}

#[async_trait]
impl Attendant for Porter {
    async fn arrived(&self, _: &Peer) -> Result<Option<Arc<dyn BlockDevice>>, TurnedAway> {
        self.arrived.fetch_add(1, Ordering::Relaxed);
        Ok(None)
    }

    async fn left(&self, _: &Peer) {
        self.leaving.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(self.takes).await;
        self.left.fetch_add(1, Ordering::Relaxed);
    }
}

/// A server with one client that went by itself, and one that is dropped when the server stops: its write never ends.
async fn stopped_with_a_porter(takes: Duration) -> [usize; 3] {
    let (device, porter) = (TestDevice::new(SIZE), Arc::new(Porter { takes, ..Porter::default() }));
    let server = Server::new(ServerConfig::default());
    let export = Export::new("disk", Arc::clone(&device) as _).attendant(Arc::clone(&porter) as _);
    server.add_export(export).unwrap();
    let mut goes = Raw::entered(&server).await;
    goes.request(command::DISC, 0, 1, 0, 0).await;
    assert!(goes.rest().await.is_empty());
    let mut stuck = Raw::entered(&server).await;
    device.hold(|call| matches!(call, Call::Write(..)));
    stuck.request(command::WRITE, 0, 1, 0, 1).await;
    stuck.send(b"x").await;
    device.held(1).await;
    let begun = tokio::time::Instant::now();
    let report = server.shutdown(GRACE).await;
    assert!(begun.elapsed() <= GRACE);
    assert!(report.dropped_connections > 0);
    porter.counts()
}

#[tokio::test(start_paused = true)]
async fn an_attendant_hears_once_of_each_client_that_left_or_was_dropped() {
    assert_eq!(stopped_with_a_porter(Duration::from_secs(1)).await, [2, 2, 2]);
}

#[tokio::test]
async fn an_attendant_hears_of_whoever_was_let_in_and_hung_up_before_the_answer() {
    let porter = Arc::new(Porter::default());
    let server = Server::new(ServerConfig::default());
    let export =
        Export::new("disk", TestDevice::new(SIZE) as _).attendant(Arc::clone(&porter) as _);
    server.add_export(export).unwrap();
    let mut raw = Raw::new(&server);
    raw.greet(wire::client_flag::FIXED_NEWSTYLE | wire::client_flag::NO_ZEROES).await;
    raw.send_option(wire::option::GO, b"\0\0\0\x04disk\0\0").await;
    drop(raw);
    while server.connections() > 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(porter.counts(), [1, 1, 1]);
}

#[tokio::test(start_paused = true)]
async fn an_attendant_that_hangs_does_not_keep_the_server_from_stopping() {
    assert_eq!(stopped_with_a_porter(Duration::MAX).await, [2, 2, 0]);
}

#[tokio::test(start_paused = true)]
async fn whoever_leaves_because_the_server_stops_has_not_ended_what_would_be_sealed() {
    for refused in [false, true] {
        let server = Server::new(ServerConfig::default());
        let export = Export::new("disk", TestDevice::new(SIZE) as _).seal_on_disconnect(true);
        server.add_export(export).unwrap();
        let mut raw = Raw::entered(&server).await;
        for command in [command::WRITE_ZEROES, command::FLUSH] {
            raw.request(command, 0, 1, 0, if command == command::FLUSH { 0 } else { 512 }).await;
            assert_eq!(raw.reply().await.error, 0);
        }
        let stopped = stopping(&server).await;
        if refused {
            raw.request(command::WRITE_ZEROES, 0, 2, 0, 512).await;
            assert_eq!(raw.reply().await.error, error::ESHUTDOWN);
        }
        raw.request(command::DISC, 0, 3, 0, 0).await;
        assert!(raw.rest().await.is_empty());
        stopped.await.unwrap();
        assert_eq!(server.exports()[0].is_sealed, !refused);
    }
}

#[tokio::test(start_paused = true)]
async fn shutdown_is_over_in_time_with_clients_that_hang_and_a_device_that_hangs() {
    let (server, device) = server();
    // One that never reads its replies, one in the middle of a payload, one that never answers the greeting.
    let mut deaf = Raw::with_buffer(&server, 512);
    deaf.enter(true).await;
    deaf.request(command::READ, wire::command_flag::DF, 1, 0, 1 << 20).await;
    let mut halfway = Raw::entered(&server).await;
    halfway.request(command::WRITE, 0, 1, 0, 512).await;
    let _silent = Raw::new(&server);
    let begun = tokio::time::Instant::now();
    let report = server.shutdown(GRACE).await;
    assert!(begun.elapsed() <= GRACE);
    assert_eq!((report.dropped_connections, report.unflushed.len()), (0, 0));

    let (server, stuck) = server_with_held_write().await;
    let report = server.shutdown(GRACE).await;
    assert_eq!(report.dropped_connections, 1);
    assert!(matches!(&report.unflushed[..], [(name, None)] if name == "disk"));
    drop((device, stuck));
}

#[tokio::test]
async fn shutdown_also_closes_the_connections_of_an_export_that_drains() {
    let (server, _) = server();
    let mut raw = Raw::entered(&server).await;
    let removal = tokio::spawn({
        let server = server.clone();
        async move { server.remove_export("disk", Removal::Drain).await.map(drop) }
    });
    while !server.exports().is_empty() {
        tokio::task::yield_now().await;
    }
    let stopping = tokio::spawn({
        let server = server.clone();
        async move { server.shutdown(GRACE).await }
    });
    assert!(raw.rest().await.is_empty());
    drop(raw);
    removal.await.unwrap().unwrap();
    assert_eq!(stopping.await.unwrap().dropped_connections, 0);
}

/// A server with one client whose write the device never finishes, and neither any flush.
async fn server_with_held_write() -> (Server, (Arc<TestDevice>, Raw)) {
    let (server, device) = server();
    let mut raw = Raw::entered(&server).await;
    device.hold(|_| true);
    raw.request(command::WRITE, 0, 1, 0, 1).await;
    raw.send(b"x").await;
    device.held(1).await;
    (server, (device, raw))
}

#[tokio::test]
async fn a_failed_flush_at_shutdown_is_reported() {
    let (server, device) = server();
    device.fail(std::io::ErrorKind::Other);
    let report = server.shutdown(GRACE).await;
    assert!(matches!(&report.unflushed[..], [(name, Some(_))] if name == "disk"));
}

#[tokio::test(start_paused = true)]
async fn a_handshake_that_takes_too_long_is_closed_however_busy_it_is() {
    let (server, _) = server();
    let mut silent = Raw::new(&server);
    let begun = tokio::time::Instant::now();
    assert_eq!(silent.rest().await.len(), 18);
    assert!(begun.elapsed() >= Limits::default().handshake_timeout);
    let mut busy = Raw::new(&server);
    busy.greet(3).await;
    let mut answered = 0;
    loop {
        tokio::time::sleep(Duration::from_secs(5)).await;
        let mut option = b"IHAVEOPT".to_vec();
        option.extend_from_slice(&[0, 0, 0, 77, 0, 0, 0, 0]);
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        if busy.stream.write_all(&option).await.is_err() {
            break;
        }
        let mut reply = [0; 20];
        if busy.stream.read_exact(&mut reply).await.is_err() {
            break;
        }
        let mut text = vec![0; usize::from(reply[19])];
        busy.stream.read_exact(&mut text).await.unwrap();
        answered += 1;
    }
    assert!((1..7).contains(&answered), "{answered}");
}

#[tokio::test]
async fn one_connection_too_many_is_closed_and_the_place_comes_back() {
    let mut limits = Limits::default();
    limits.connections = 1;
    let (server, _) = with_limits(limits);
    let mut first = Raw::entered(&server).await;
    assert!(Raw::new(&server).rest().await.is_empty());
    first.request(command::DISC, 0, 0, 0, 0).await;
    assert!(first.rest().await.is_empty());
    while server.connections() > 0 {
        tokio::task::yield_now().await;
    }
    Raw::entered(&server).await;
}

#[tokio::test]
async fn one_option_too_many_is_closed() {
    let mut limits = Limits::default();
    limits.options = 3;
    let (server, _) = with_limits(limits);
    let mut raw = Raw::new(&server);
    raw.greet(3).await;
    for _ in 0..3 {
        raw.option(77, &[]).await;
    }
    raw.send_option(77, &[]).await;
    assert!(raw.rest().await.is_empty());
}

#[tokio::test]
async fn counters_tell_what_was_done() {
    let (server, _) = server();
    let mut raw = Raw::entered(&server).await;
    raw.request(command::WRITE, 0, 1, 0, 5).await;
    raw.send(b"abcde").await;
    raw.reply().await;
    for (command, offset) in
        [(command::READ, 0), (command::WRITE_ZEROES, 0), (command::TRIM, 0), (command::READ, SIZE)]
    {
        raw.request(command, 0, 1, offset, 7).await;
        raw.reply().await;
    }
    let status = server.exports().remove(0);
    let counters = status.counters;
    assert_eq!((status.connections, counters.connections), (1, 1));
    assert_eq!((counters.requests, counters.errors), (5, 1));
    assert_eq!((counters.bytes_read, counters.bytes_written), (7, 5));
    assert_eq!((counters.bytes_zeroed, counters.bytes_trimmed), (7, 7));
}

#[tokio::test]
async fn tcp_tells_the_actual_port_and_stops_listening() {
    let (server, _) = server();
    let address = server.listen_tcp("127.0.0.1:0".parse().unwrap()).await.unwrap();
    assert_ne!(address.port(), 0);
    let mut raw = Raw { stream: TcpStream::connect(address).await.unwrap() };
    raw.enter(true).await;
    raw.request(command::READ, 0, 1, 0, 512).await;
    assert_eq!(raw.reply().await.error, 0);
    let taken = server.listen_tcp(address).await.unwrap_err();
    assert_eq!(taken.kind(), std::io::ErrorKind::AddrInUse);
    drop(raw);
    server.shutdown(GRACE).await;
    assert!(TcpStream::connect(address).await.is_err());
}

#[tokio::test]
async fn a_stale_socket_is_replaced_a_live_one_kept_and_ours_removed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    drop(StdUnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let (server, _) = server();
    server.listen_unix(&path).await.unwrap();
    let mut raw = Raw { stream: UnixStream::connect(&path).await.unwrap() };
    raw.enter(true).await;
    let (other, _) = with_limits(Limits::default());
    let refused = other.listen_unix(&path).await.unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::AddrInUse);
    raw.request(command::FLUSH, 0, 1, 0, 0).await;
    assert_eq!(raw.reply().await.error, 0);
    drop(raw);
    server.shutdown(GRACE).await;
    assert!(!path.exists());
    std::fs::write(&path, "no socket").unwrap();
    assert!(other.listen_unix(&path).await.is_err());
    assert_eq!(std::fs::read(&path).unwrap(), b"no socket");
}

#[tokio::test]
async fn who_was_sent_away_and_stays_keeps_no_place_that_others_ask_for() {
    let mut limits = Limits::default();
    limits.connections = 2;
    limits.close_timeout = Duration::from_secs(3600);
    let (server, _) = with_limits(limits);
    let mut stays = [Raw::new(&server), Raw::new(&server)];
    for raw in &mut stays {
        raw.greet(1 << 7).await;
        assert!(raw.rest().await.is_empty());
    }
    assert_eq!(server.connections(), 2, "both may say more");
    let finding_a_place = async {
        let mut first = [0];
        while Raw::new(&server).stream.read(&mut first).await.unwrap() == 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(GRACE, finding_a_place).await.unwrap();
}
