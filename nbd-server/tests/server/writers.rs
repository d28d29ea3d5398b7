//! One writer at a time, and exports that are sealed when theirs is done.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use block::{BlockDevice, ByteRange, DeviceError};
use nbd_server::wire::{self, command, error, option, transmission_flag};
use nbd_server::{
    Attendant, Export, Lease, Limits, Peer, Removal, Server, ServerConfig, TurnedAway, Window,
    Writers,
};
use parking_lot::Mutex;

use crate::device::{Call, TestDevice};
use crate::raw::{Entered, Raw, go};

const SIZE: u64 = 1 << 20;

fn server(shape: impl FnOnce(Export) -> Export) -> (Server, Arc<TestDevice>) {
    let device = TestDevice::new(SIZE);
    let server = Server::new(ServerConfig::default());
    server.add_export(shape(Export::new("disk", Arc::clone(&device) as _))).unwrap();
    (server, device)
}

/// A client of a user, in the handshake.
async fn user(server: &Server, uid: u32) -> Raw {
    let mut raw = Raw::of(server, Peer::Unix { uid });
    raw.greet(3).await;
    raw
}

async fn enter(server: &Server, uid: u32) -> (Raw, Entered) {
    enter_as(server, uid, "disk").await
}

async fn enter_as(server: &Server, uid: u32, name: &str) -> (Raw, Entered) {
    let mut raw = user(server, uid).await;
    let entered = raw.go(name).await;
    (raw, entered)
}

async fn is_refused(server: &Server, uid: u32) {
    is_refused_as(server, uid, "disk").await;
}

async fn is_refused_as(server: &Server, uid: u32, name: &str) {
    let mut raw = user(server, uid).await;
    for option in [option::INFO, option::GO] {
        let replies = raw.option(option, &go(name)).await;
        let [(kind, text)] = &replies[..] else { panic!("{replies:?}") };
        assert_eq!(*kind, wire::reply::ERR_POLICY);
        assert_eq!(text, b"another client or connection is writing to the export");
    }
}

/// Leaves by DISC, and waits until the server has noticed.
async fn disconnect(server: &Server, mut raw: Raw) {
    let before = server.exports()[0].connections;
    raw.request(command::DISC, 0, 0, 0, 0).await;
    assert!(raw.rest().await.is_empty());
    while server.exports()[0].connections == before {
        tokio::task::yield_now().await;
    }
}

async fn flush(raw: &mut Raw) {
    raw.request(command::FLUSH, 0, 9, 0, 0).await;
    assert_eq!(raw.reply().await.error, 0);
}

fn is_read_only(entered: Entered) -> bool {
    entered.flags & transmission_flag::READ_ONLY != 0
}

#[tokio::test]
async fn a_second_writer_is_refused_with_a_text_and_gets_in_when_the_first_has_left() {
    let (server, device) = server(|export| export.writers(Writers::OneClient));
    server.add_export(Export::new("view", Arc::clone(&device) as _).read_only(true)).unwrap();
    let (first, entered) = enter(&server, 1).await;
    assert!(!is_read_only(entered));
    let (second, _) = enter(&server, 1).await;
    is_refused(&server, 2).await;
    let mut reader = user(&server, 2).await;
    reader.go("view").await;
    disconnect(&server, first).await;
    is_refused(&server, 2).await;
    drop(second);
    while server.exports()[0].connections > 0 {
        tokio::task::yield_now().await;
    }
    let (mut other, entered) = enter(&server, 2).await;
    assert!(!is_read_only(entered), "nothing is sealed that was not to be");
    other.request(command::WRITE, 0, 1, 0, 3).await;
    other.send(b"abc").await;
    assert_eq!(other.reply().await.error, 0);
    is_refused(&server, 1).await;
}

#[tokio::test]
async fn a_read_only_export_has_no_writer() {
    let (server, _) = server(|export| export.read_only(true).writers(Writers::OneConnection));
    let _both = (enter(&server, 1).await, enter(&server, 2).await);
}

#[tokio::test]
async fn one_connection_is_not_shared_even_with_the_same_client() {
    let (server, _) = server(|export| export.writers(Writers::OneConnection));
    let (first, _) = enter(&server, 1).await;
    is_refused(&server, 1).await;
    disconnect(&server, first).await;
    enter(&server, 1).await;
}

#[tokio::test]
async fn connections_are_said_to_agree_only_where_there_can_be_two() {
    type Shape = fn(Export) -> Export;
    let shapes: [(Shape, bool); 9] = [
        (|export| export, true),
        (|export| export.max_connections(2), true),
        (|export| export.max_connections(1), false),
        (|export| export.max_connections(1).read_only(true), false),
        (|export| export.writers(Writers::OneConnection), false),
        (|export| export.writers(Writers::OneConnection).read_only(true), true),
        (|export| export.writers(Writers::OneClient), true),
        (|export| export.seal_on_disconnect(true), true),
        (|export| export.withhold(transmission_flag::CAN_MULTI_CONN), false),
    ];
    for (number, (shape, agrees)) in shapes.into_iter().enumerate() {
        let (server, _) = server(shape);
        let (_raw, entered) = enter(&server, 1).await;
        let told = entered.flags & transmission_flag::CAN_MULTI_CONN != 0;
        assert_eq!(told, agrees, "shape {number}");
    }
    // Two of whom nobody knows who they are never are one client.
    let (server, _) = server(|export| export.writers(Writers::OneClient));
    let mut raw = Raw::new(&server);
    raw.greet(3).await;
    assert_eq!(raw.go("disk").await.flags & transmission_flag::CAN_MULTI_CONN, 0);
}

#[tokio::test]
async fn connections_are_not_said_to_agree_where_the_server_lets_each_client_have_one() {
    let flags = async |change: fn(&mut Limits)| {
        let mut limits = Limits::default();
        change(&mut limits);
        let server = Server::new(ServerConfig::with_limits(limits));
        server.add_export(Export::new("disk", TestDevice::new(SIZE))).unwrap();
        enter(&server, 1).await.1.flags & transmission_flag::CAN_MULTI_CONN
    };
    assert_ne!(flags(|limits| limits.connections_per_client = Some(2)).await, 0);
    assert_eq!(flags(|limits| limits.connections_per_client = Some(1)).await, 0);
    assert_eq!(flags(|limits| limits.connections_per_export = Some(1)).await, 0);
    assert_eq!(flags(|limits| limits.connections = 1).await, 0);
}

/// Remembers what it was told, and can refuse.
#[derive(Default)]
struct Witness {
    device: Mutex<Option<Arc<TestDevice>>>,
    sealed: Mutex<Vec<Option<Call>>>,
    refuses: Mutex<bool>,
}

#[async_trait]
impl Attendant for Witness {
    async fn arrived(&self, _: &Peer) -> Result<Option<Arc<dyn BlockDevice>>, TurnedAway> {
        Ok(None)
    }

    async fn sealed(&self) -> Result<(), DeviceError> {
        let last = self.device.lock().as_ref().and_then(|device| device.log().last().copied());
        self.sealed.lock().push(last);
        if *self.refuses.lock() { Err(DeviceError::NotSupported { what: "it" }) } else { Ok(()) }
    }

    async fn left(&self, _: &Peer) {}
}

#[tokio::test]
async fn an_export_is_flushed_and_read_only_once_its_writer_is_done() {
    let witness = Arc::new(Witness::default());
    let (server, device) =
        server(|export| export.seal_on_disconnect(true).attendant(Arc::clone(&witness) as _));
    *witness.device.lock() = Some(Arc::clone(&device));
    let (mut first, _) = enter(&server, 1).await;
    let (second, _) = enter(&server, 1).await;
    is_refused(&server, 2).await;
    first.request(command::WRITE, 0, 1, 0, 3).await;
    first.send(b"abc").await;
    assert_eq!(first.reply().await.error, 0);
    disconnect(&server, first).await;
    assert!(witness.sealed.lock().is_empty() && !server.exports()[0].is_sealed);
    disconnect(&server, second).await;
    assert_eq!(*witness.sealed.lock(), [Some(Call::Flush)], "told once, behind the flush");
    let status = server.exports().remove(0);
    assert!(status.is_sealed && status.read_only);
    for uid in [1, 2] {
        let (mut reader, entered) = enter(&server, uid).await;
        assert!(is_read_only(entered));
        reader.request(command::WRITE, 0, 1, 0, 3).await;
        reader.send(b"xyz").await;
        assert_eq!(reader.reply().await.error, error::EPERM);
        disconnect(&server, reader).await;
    }
    assert_eq!(device.bytes()[..3], *b"abc");
    assert_eq!(witness.sealed.lock().len(), 1);
}

#[tokio::test]
async fn a_writer_that_was_lost_can_come_back_and_end_what_it_began() {
    let (server, device) = server(|export| export.seal_on_disconnect(true));
    let (mut first, _) = enter(&server, 1).await;
    let (lost, _) = enter(&server, 1).await;
    flush(&mut first).await;
    drop(lost);
    while server.exports()[0].connections > 1 {
        tokio::task::yield_now().await;
    }
    disconnect(&server, first).await;
    assert!(!server.exports()[0].is_sealed);
    let (looks, entered) = enter(&server, 2).await;
    assert!(!is_read_only(entered));
    disconnect(&server, looks).await;
    assert!(!server.exports()[0].is_sealed, "whoever only looks around ends nothing");
    assert_eq!(device.log(), [Call::Flush]);
    let (mut again, _) = enter(&server, 1).await;
    flush(&mut again).await;
    disconnect(&server, again).await;
    assert!(server.exports()[0].is_sealed);
}

#[tokio::test]
async fn a_connection_that_came_in_the_place_of_a_lost_one_ends_what_that_began() {
    let (server, _) = server(|export| export.seal_on_disconnect(true));
    let (mut first, _) = enter(&server, 1).await;
    let (mut lost, _) = enter(&server, 1).await;
    flush(&mut lost).await;
    drop(lost);
    while server.exports()[0].connections > 1 {
        tokio::task::yield_now().await;
    }
    let (mut back, _) = enter(&server, 1).await;
    back.request(command::WRITE, 0, 1, 0, 3).await;
    back.send(b"abc").await;
    assert_eq!(back.reply().await.error, 0);
    disconnect(&server, back).await;
    flush(&mut first).await;
    disconnect(&server, first).await;
    assert!(server.exports()[0].is_sealed);
}

#[tokio::test]
async fn a_seal_that_was_taken_back_is_not_put_on_when_the_old_writer_leaves() {
    for (keeps, is_sealed) in [(false, false), (true, true)] {
        let (server, device) = server(|export| export.seal_on_disconnect(true));
        let shape = |seals: bool| {
            let export = Export::new("disk", Arc::clone(&device) as _).description("new");
            [export.writers(Writers::OneClient).seal_on_disconnect(seals)]
        };
        let (mut old, _) = enter(&server, 1).await;
        flush(&mut old).await;
        let replaced = server.replace_exports(shape(keeps), Removal::Drain).unwrap();
        old.request(command::DISC, 0, 0, 0, 0).await;
        assert!(old.rest().await.is_empty());
        replaced.retired[0].unused().await;
        assert_eq!(server.exports()[0].is_sealed, is_sealed);
        let (_, entered) = enter(&server, 2).await;
        assert_eq!(is_read_only(entered), is_sealed);
    }
}

/// Turns clients away while it is closed, once it is told to.
#[derive(Default)]
struct Closed {
    is_closed: Mutex<bool>,
    waits: tokio::sync::Notify,
    answer: tokio::sync::Notify,
}

#[async_trait]
impl Attendant for Closed {
    async fn arrived(&self, _: &Peer) -> Result<Option<Arc<dyn BlockDevice>>, TurnedAway> {
        if !*self.is_closed.lock() {
            return Ok(None);
        }
        self.waits.notify_one();
        self.answer.notified().await;
        Err(TurnedAway("it is closed".to_owned()))
    }

    async fn left(&self, _: &Peer) {}
}

fn turned_away(replies: &[(u32, Vec<u8>)]) {
    let [(kind, text)] = replies else { panic!("{replies:?}") };
    assert_eq!(*kind, wire::reply::ERR_POLICY);
    assert_eq!(text, b"the server failed to prepare the export; its log tells why");
}

#[tokio::test]
async fn whoever_was_turned_away_holds_no_place_and_may_choose_again() {
    let closed = Arc::new(Closed::default());
    let (server, _) =
        server(|export| export.max_connections(1).attendant(Arc::clone(&closed) as _));
    *closed.is_closed.lock() = true;
    let mut raw = user(&server, 1).await;
    closed.answer.notify_one();
    turned_away(&raw.option(option::GO, &go("disk")).await);
    assert_eq!(server.exports()[0].connections, 0);
    *closed.is_closed.lock() = false;
    raw.go("disk").await;
    assert_eq!(server.exports()[0].connections, 1);
}

#[tokio::test]
async fn a_connection_that_was_turned_away_keeps_no_export_from_being_sealed() {
    for is_last in [false, true] {
        let closed = Arc::new(Closed::default());
        let (server, _) =
            server(|export| export.seal_on_disconnect(true).attendant(Arc::clone(&closed) as _));
        let (mut writer, _) = enter(&server, 1).await;
        *closed.is_closed.lock() = true;
        let mut other = user(&server, 1).await;
        let going = tokio::spawn(async move {
            let replies = other.option(option::GO, &go("disk")).await;
            (other, replies)
        });
        closed.waits.notified().await;
        flush(&mut writer).await;
        if is_last {
            disconnect(&server, writer).await;
            closed.answer.notify_one();
            turned_away(&going.await.unwrap().1);
        } else {
            closed.answer.notify_one();
            turned_away(&going.await.unwrap().1);
            disconnect(&server, writer).await;
        }
        assert!(server.exports()[0].is_sealed, "{is_last}");
    }
}

#[tokio::test]
async fn what_cannot_be_made_durable_is_not_sealed() {
    let witness = Arc::new(Witness::default());
    let (server, device) =
        server(|export| export.seal_on_disconnect(true).attendant(Arc::clone(&witness) as _));
    *witness.refuses.lock() = true;
    let (mut raw, _) = enter(&server, 1).await;
    flush(&mut raw).await;
    disconnect(&server, raw).await;
    assert_eq!(witness.sealed.lock().len(), 1);
    let (mut raw, entered) = enter(&server, 2).await;
    assert!(!is_read_only(entered));
    flush(&mut raw).await;
    device.fail(std::io::ErrorKind::Other);
    disconnect(&server, raw).await;
    assert_eq!(witness.sealed.lock().len(), 1, "not told where the flush failed");
    assert!(!server.exports()[0].is_sealed);
}

#[tokio::test]
async fn an_export_that_changes_keeps_its_writer_and_its_seal() {
    let (server, device) = server(|export| export.writers(Writers::OneClient));
    let shape = |text: &str| {
        let export = Export::new("disk", Arc::clone(&device) as _).description(text);
        export.seal_on_disconnect(true)
    };
    let (old, _) = enter(&server, 1).await;
    let replaced = server.replace_exports([shape("new")], Removal::Drain).unwrap();
    assert_eq!(replaced.changed, ["disk"]);
    is_refused(&server, 2).await;
    let (mut new, _) = enter(&server, 1).await;
    flush(&mut new).await;
    drop(old);
    replaced.retired[0].unused().await;
    disconnect(&server, new).await;
    assert!(!server.exports()[0].is_sealed, "a connection to the old one was lost");
    let (mut again, _) = enter(&server, 2).await;
    flush(&mut again).await;
    disconnect(&server, again).await;
    server.replace_exports([shape("newer")], Removal::Drain).unwrap();
    assert!(server.exports()[0].is_sealed);
    server.replace_exports([], Removal::Drain).unwrap();
    server.replace_exports([shape("newer")], Removal::Drain).unwrap();
    assert!(!server.exports()[0].is_sealed, "one that was removed and added is a new one");
}

#[tokio::test]
async fn a_writer_keeps_others_from_its_device_whatever_exports_of_it_are_called() {
    let (server, device) = server(|export| export.writers(Writers::OneClient));
    let export = |name: &str| Export::new(name, Arc::clone(&device) as _);
    let sole = |name: &str| export(name).writers(Writers::OneClient);
    server.add_export(export("all")).unwrap();
    server.add_export(export("view").read_only(true)).unwrap();
    let (first, _) = enter(&server, 1).await;
    is_refused_as(&server, 2, "all").await;
    let _reader = enter_as(&server, 2, "view").await;
    // Renamed.
    server.replace_exports([sole("new")], Removal::Drain).unwrap();
    is_refused_as(&server, 2, "new").await;
    // Removed, and added again while its writer is still there.
    server.replace_exports([], Removal::Drain).unwrap();
    server.add_export(sole("disk")).unwrap();
    is_refused(&server, 2).await;
    let (second, _) = enter(&server, 1).await;
    drop((first, second));
    loop {
        let mut raw = user(&server, 2).await;
        let replies = raw.option(option::GO, &go("disk")).await;
        if replies.last().unwrap().0 == wire::reply::ACK {
            break;
        }
    }
}

#[tokio::test]
async fn windows_of_one_lease_keep_each_other_out_where_they_overlap() {
    let device: Arc<dyn BlockDevice> = TestDevice::new(SIZE);
    let (server, lease) = (Server::new(ServerConfig::default()), Lease::new());
    let part = |name: &str, start: u64, end: u64| {
        let range = ByteRange::between(start, end);
        let window = Window::new(Arc::clone(&device), range).unwrap();
        Export::new(name, window).writers(Writers::OneClient).lease(Arc::clone(&lease), range)
    };
    let half = SIZE / 2;
    let table = [part("left", 0, half), part("right", half, SIZE), part("disk", 0, SIZE)];
    server.replace_exports(table, Removal::Drain).unwrap();
    let (_left, _right) = (enter_as(&server, 1, "left").await, enter_as(&server, 2, "right").await);
    is_refused_as(&server, 2, "left").await;
    is_refused_as(&server, 1, "right").await;
    is_refused(&server, 1).await;
    // A table of new windows finds the same writers.
    let table = [part("left", 0, half).description("new"), part("middle", 4096, half + 1)];
    server.replace_exports(table, Removal::Drain).unwrap();
    is_refused_as(&server, 2, "left").await;
    is_refused_as(&server, 1, "middle").await;
    enter_as(&server, 1, "left").await;
}

#[tokio::test]
async fn a_seal_is_on_all_that_has_its_lease_and_lasts_as_long() {
    let (server, device) = server(|export| export.seal_on_disconnect(true));
    let export = |name: &str| Export::new(name, Arc::clone(&device) as _);
    let (mut writer, _) = enter(&server, 1).await;
    flush(&mut writer).await;
    disconnect(&server, writer).await;
    assert!(server.exports()[0].is_sealed);
    // Under another name, and not asking for it any more.
    let replaced = server.replace_exports([export("new")], Removal::Drain).unwrap();
    let (mut late, entered) = enter_as(&server, 1, "new").await;
    assert!(is_read_only(entered) && server.exports()[0].is_sealed);
    late.request(command::WRITE, 0, 1, 0, 3).await;
    late.send(b"abc").await;
    assert_eq!(late.reply().await.error, error::EPERM);
    // Nothing is left of it but a connection, and then nothing at all.
    server.replace_exports([], Removal::Drain).unwrap();
    server.replace_exports([export("newer")], Removal::Drain).unwrap();
    assert!(server.exports()[0].is_sealed);
    server.replace_exports([], Removal::Drain).unwrap();
    drop(late);
    replaced.retired[0].unused().await;
    while server.connections() > 0 {
        tokio::task::yield_now().await;
    }
    server.replace_exports([export("newest")], Removal::Drain).unwrap();
    assert!(!server.exports()[0].is_sealed);
}

/// Lets everybody do what can be done now.
async fn settle() {
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test(start_paused = true)]
async fn who_comes_before_the_server_knows_that_the_writer_left_waits_for_its_place() {
    let (server, device) = server(|export| export.writers(Writers::OneConnection));
    let small = Export::new("small", Arc::clone(&device) as _).read_only(true).max_connections(1);
    server.add_export(small).unwrap();
    for (name, by_word) in [("disk", true), ("disk", false), ("small", true), ("small", false)] {
        let begun = tokio::time::Instant::now();
        let (mut first, _) = enter_as(&server, 1, name).await;
        let mut second = user(&server, 2).await;
        second.send_option(option::GO, &go(name)).await;
        settle().await;
        if by_word {
            first.request(command::DISC, 0, 0, 0, 0).await;
        }
        drop(first);
        let replies = second.option_replies(option::GO).await;
        assert_eq!(replies.last().unwrap().0, wire::reply::ACK, "{name}, {by_word}");
        // Not by the end of its patience, from which it would have got in as well.
        assert_eq!(begun.elapsed(), Duration::ZERO, "{name}, {by_word}");
        // As long as it stays, the next one waits in vain, once for all it asks until it succeeds in something.
        let mut third = user(&server, 3).await;
        for option in [option::INFO, option::GO] {
            let replies = third.option(option, &go(name)).await;
            assert_eq!(replies.last().unwrap().0, wire::reply::ERR_POLICY);
            assert_eq!(begun.elapsed(), Duration::from_secs(1), "{name}, {by_word}");
        }
        drop(second);
        while server.connections() > 1 {
            tokio::task::yield_now().await;
        }
        assert_eq!(third.option(option::INFO, &go(name)).await.last().unwrap().0, wire::reply::ACK);
        let _fourth = enter_as(&server, 4, name).await;
        let replies = third.option(option::GO, &go(name)).await;
        assert_eq!(replies.last().unwrap().0, wire::reply::ERR_POLICY);
        assert_eq!(begun.elapsed(), Duration::from_secs(2), "{name}, {by_word}");
        drop((_fourth, third));
        while server.connections() > 0 {
            tokio::task::yield_now().await;
        }
    }
}
