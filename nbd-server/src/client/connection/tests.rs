use std::time::Duration;

use block::{Segment, Segments};
use bytes::BytesMut;
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

use super::*;
use crate::client::error::ReplyFault;
use crate::client::fake::{halves, negotiated};
use crate::client::memory::client_pool;
use crate::wire::{ChunkHeader, REQUEST_BYTES, SIMPLE_REPLY_MAGIC, chunk, command};

/// A connection in transmission with structured replies, and the server's end of its stream.
fn connection(options: &ClientOptions) -> (Arc<Connection>, DuplexStream) {
    let (halves, server, _) = halves();
    (Arc::new(Connection::start(halves, &negotiated(0, Headers::Structured), options)), server)
}

fn read_call(start: u64, len: usize) -> Call {
    Call {
        command: command::READ,
        flags: 0,
        range: ByteRange::new(start, len as u64).unwrap(),
        payload: Bytes::new(),
        contexts: Vec::new(),
    }
}

fn write_call(start: u64, payload: &'static [u8]) -> Call {
    Call {
        command: command::WRITE,
        flags: 0,
        range: ByteRange::new(start, payload.len() as u64).unwrap(),
        payload: Bytes::from_static(payload),
        contexts: Vec::new(),
    }
}

async fn ask(connection: &Connection, call: Call) -> Result<Answer, ClientError> {
    let memory = match call.command {
        command::READ => {
            let len = usize::try_from(call.range.len()).unwrap();
            Destination::wait(client_pool(), len).await
        }
        _ => Destination::none(),
    };
    connection.call(call, memory).await
}

async fn request(server: &mut DuplexStream) -> Request {
    let mut header = [0; REQUEST_BYTES];
    server.read_exact(&mut header).await.unwrap();
    Request::decode(&header).unwrap()
}

fn simple(error: u32, cookie: u64) -> Vec<u8> {
    [&SIMPLE_REPLY_MAGIC.to_be_bytes()[..], &error.to_be_bytes(), &cookie.to_be_bytes()].concat()
}

fn data(cookie: u64, offset: u64, content: &[u8]) -> Vec<u8> {
    let mut reply = BytesMut::new();
    let len = u32::try_from(content.len() + 8).unwrap();
    ChunkHeader { flags: 1, kind: chunk::OFFSET_DATA, cookie, len }.encode(&mut reply);
    reply.extend_from_slice(&offset.to_be_bytes());
    reply.extend_from_slice(content);
    reply.to_vec()
}

fn protocol(error: &ClientError) -> ReplyFault {
    match error {
        ClientError::Lost(cause) => match **cause {
            LostCause::Protocol(fault) => fault,
            ref other => panic!("{other}"),
        },
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn replies_find_their_requests_in_any_order() {
    let (connection, mut server) = connection(&ClientOptions::default());
    let (first, second) = (read_call(0, 4), read_call(8, 4));
    let serve = async {
        let (a, b) = (request(&mut server).await, request(&mut server).await);
        server.write_all(&data(b.cookie, b.offset, b"late")).await.unwrap();
        server.write_all(&data(a.cookie, a.offset, b"soon")).await.unwrap();
    };
    let (a, b, ()) = tokio::join!(ask(&connection, first), ask(&connection, second), serve);
    let bytes = |bytes: &'static [u8]| {
        Answer::Data(Segments(vec![Segment::Data(Bytes::from_static(bytes))]))
    };
    assert_eq!((a.unwrap(), b.unwrap()), (bytes(b"soon"), bytes(b"late")));
}

#[tokio::test]
async fn a_caller_that_goes_away_leaves_the_stream_in_order() {
    let (connection, mut server) =
        connection(&ClientOptions { in_flight: 2, ..Default::default() });
    let call = read_call(0, 4);
    let gone = {
        let connection = Arc::clone(&connection);
        tokio::spawn(async move { ask(&connection, call).await })
    };
    let first = request(&mut server).await;
    gone.abort();
    assert!(gone.await.unwrap_err().is_cancelled());
    assert_eq!(connection.free_slots(), Some(1), "the request is in flight, whoever waits for it");
    let call = write_call(0, b"abcd");
    let serve = async {
        let second = request(&mut server).await;
        server.read_exact(&mut [0; 4]).await.unwrap();
        server.write_all(&data(first.cookie, 0, b"dead")).await.unwrap();
        server.write_all(&simple(0, second.cookie)).await.unwrap();
    };
    let (answer, ()) = tokio::join!(ask(&connection, call), serve);
    assert_eq!(answer.unwrap(), Answer::Success);
    assert_eq!(connection.free_slots(), Some(2));
}

#[tokio::test]
async fn the_window_bounds_what_is_in_flight() {
    let (connection, mut server) =
        connection(&ClientOptions { in_flight: 1, ..Default::default() });
    let second_may_come = std::sync::atomic::AtomicBool::new(false);
    let serve = async {
        let first = request(&mut server).await;
        server.read_exact(&mut [0; 1]).await.unwrap();
        // Everything that could still arrive has arrived when the runtime has nothing else to do.
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        let early = tokio::time::timeout(Duration::ZERO, server.read_u8()).await;
        assert!(early.is_err(), "a second request passed the window");
        second_may_come.store(true, std::sync::atomic::Ordering::SeqCst);
        server.write_all(&simple(0, first.cookie)).await.unwrap();
        let second = request(&mut server).await;
        server.read_exact(&mut [0; 1]).await.unwrap();
        server.write_all(&simple(0, second.cookie)).await.unwrap();
    };
    let (a, b) = (ask(&connection, write_call(0, b"a")), ask(&connection, write_call(1, b"b")));
    let (a, b, ()) = tokio::join!(a, b, serve);
    assert!(a.is_ok() && b.is_ok() && second_may_come.into_inner());
}

#[tokio::test]
async fn an_error_reply_fails_its_request_only() {
    let (connection, mut server) = connection(&ClientOptions::default());
    let serve = async {
        let first = request(&mut server).await;
        server.read_exact(&mut [0; 1]).await.unwrap();
        server.write_all(&simple(28, first.cookie)).await.unwrap();
    };
    let (answer, ()) = tokio::join!(ask(&connection, write_call(7, b"a")), serve);
    let error = answer.unwrap_err();
    assert_eq!(error.kind(), block::ErrorKind::NoSpace);
    assert_eq!(error.to_string(), "the server failed WRITE of 1 bytes at offset 7: ENOSPC");
    assert_eq!(connection.free_slots(), Some(16));
}

#[tokio::test]
async fn an_error_that_is_unknown_is_one_of_the_request_and_the_connection_goes_on() {
    let (connection, mut server) = connection(&ClientOptions::default());
    for (error, kind) in [(5, block::ErrorKind::Io), (77, block::ErrorKind::Invalid)] {
        let serve = async {
            let asked = request(&mut server).await;
            server.read_exact(&mut [0; 1]).await.unwrap();
            server.write_all(&simple(error, asked.cookie)).await.unwrap();
        };
        let (answer, ()) = tokio::join!(ask(&connection, write_call(7, b"a")), serve);
        assert_eq!(answer.unwrap_err().kind(), kind);
    }
}

#[tokio::test]
async fn a_server_that_hangs_up_fails_all_that_is_in_flight_and_all_that_comes() {
    let (connection, mut server) = connection(&ClientOptions::default());
    let (first, second) = (read_call(0, 4), read_call(4, 4));
    let serve = async {
        let first = request(&mut server).await;
        request(&mut server).await;
        // Half of a reply, then nothing.
        server.write_all(&data(first.cookie, 0, b"abcd")[..30]).await.unwrap();
        drop(server);
    };
    let (a, b, ()) = tokio::join!(ask(&connection, first), ask(&connection, second), serve);
    for answer in [a, b, ask(&connection, write_call(0, b"x")).await] {
        let Err(ClientError::Lost(cause)) = &answer else { panic!("{answer:?}") };
        assert!(matches!(**cause, LostCause::Closed), "{cause}");
        let error = block::DeviceError::from(answer.unwrap_err());
        assert_eq!(error.kind(), block::ErrorKind::Io);
    }
    assert_eq!(connection.free_slots(), None);
}

#[tokio::test]
async fn a_reply_to_nothing_kills_the_connection() {
    let (connection, mut server) = connection(&ClientOptions::default());
    let call = read_call(0, 4);
    let serve = async {
        let first = request(&mut server).await;
        server.write_all(&simple(0, first.cookie + 1)).await.unwrap();
        first.cookie
    };
    let (answer, cookie) = tokio::join!(ask(&connection, call), serve);
    let unknown = ReplyFault::UnknownCookie { cookie: cookie + 1 };
    assert_eq!(protocol(&answer.unwrap_err()), unknown);
}

#[tokio::test]
async fn a_second_answer_kills_the_connection() {
    let (connection, mut server) = connection(&ClientOptions::default());
    let (first, second) = (read_call(0, 4), read_call(4, 4));
    let serve = async {
        let first = request(&mut server).await;
        request(&mut server).await;
        let reply = data(first.cookie, 0, b"abcd");
        server.write_all(&[&reply[..], &reply].concat()).await.unwrap();
        first.cookie
    };
    let (a, b, cookie) = tokio::join!(ask(&connection, first), ask(&connection, second), serve);
    assert!(a.is_ok());
    assert_eq!(protocol(&b.unwrap_err()), ReplyFault::UnknownCookie { cookie });
}

#[tokio::test(start_paused = true)]
async fn a_server_that_owes_a_reply_and_is_silent_counts_as_dead() {
    let stall_timeout = Some(Duration::from_secs(7));
    let (connection, _server) = connection(&ClientOptions { stall_timeout, ..Default::default() });
    let error = ask(&connection, write_call(0, b"x")).await.unwrap_err();
    let ClientError::Lost(cause) = &error else { panic!("{error}") };
    assert!(matches!(**cause, LostCause::Stalled(_)), "{cause}");
}

#[tokio::test(start_paused = true)]
async fn a_server_that_falls_silent_amid_a_reply_counts_as_dead() {
    let stall_timeout = Some(Duration::from_secs(7));
    let (connection, mut server) =
        connection(&ClientOptions { stall_timeout, ..Default::default() });
    let call = read_call(0, 4);
    let serve = async {
        let first = request(&mut server).await;
        server.write_all(&data(first.cookie, 0, b"abcd")[..29]).await.unwrap();
    };
    let (answer, ()) = tokio::join!(ask(&connection, call), serve);
    let Err(ClientError::Lost(cause)) = &answer else { panic!("{answer:?}") };
    assert!(matches!(**cause, LostCause::Stalled(_)), "{cause}");
}

#[tokio::test(start_paused = true)]
async fn a_server_that_owes_nothing_may_be_silent_for_ever() {
    let stall_timeout = Some(Duration::from_secs(7));
    let (connection, mut server) =
        connection(&ClientOptions { stall_timeout, ..Default::default() });
    tokio::time::advance(Duration::from_secs(3600)).await;
    let serve = async {
        let first = request(&mut server).await;
        server.read_exact(&mut [0; 1]).await.unwrap();
        server.write_all(&simple(0, first.cookie)).await.unwrap();
    };
    let (answer, ()) = tokio::join!(ask(&connection, write_call(0, b"x")), serve);
    assert_eq!(answer.unwrap(), Answer::Success);
}

#[tokio::test]
async fn disconnecting_waits_for_what_is_in_flight_and_says_so() {
    let (connection, mut server) = connection(&ClientOptions::default());
    let call = ask(&connection, write_call(0, b"x"));
    let serve = async {
        let first = request(&mut server).await;
        server.read_exact(&mut [0; 1]).await.unwrap();
        server.write_all(&simple(0, first.cookie)).await.unwrap();
        let last = request(&mut server).await;
        assert_eq!((last.command, last.offset, last.len), (command::DISC, 0, 0));
        let mut rest = Vec::new();
        server.read_to_end(&mut rest).await.unwrap();
        assert!(rest.is_empty(), "something was sent after DISC");
        drop(server);
    };
    let disconnect = async {
        tokio::task::yield_now().await;
        connection.disconnect().await;
    };
    let (answer, (), ()) = tokio::join!(call, disconnect, serve);
    assert_eq!(answer.unwrap(), Answer::Success);
    let later = ask(&connection, write_call(0, b"x")).await;
    assert!(matches!(later, Err(ClientError::Closed)), "{later:?}");
}

#[tokio::test(start_paused = true)]
async fn a_server_that_does_not_hang_up_does_not_hold_the_client() {
    let (connection, _server) = connection(&ClientOptions::default());
    connection.disconnect().await;
    assert_eq!(connection.free_slots(), None);
}

#[tokio::test]
async fn a_dropped_connection_ends_in_order() {
    let (connection, mut server) = connection(&ClientOptions::default());
    drop(connection);
    assert_eq!(request(&mut server).await.command, command::DISC);
    assert_eq!(server.read(&mut [0]).await.unwrap(), 0);
}

/// Bytes with a chance to be taken for replies.
fn any_reply() -> impl Strategy<Value = Vec<u8>> {
    let cookie = prop_oneof![0_u64..3, any::<u64>()];
    prop_oneof![
        (0_u32..2, cookie.clone()).prop_map(|(error, cookie)| simple(error, cookie)),
        (cookie.clone(), 0_u64..12, 0_usize..12).prop_map(|(cookie, at, len)| data(
            cookie,
            at,
            &vec![1; len]
        )),
        (0_u16..2, prop_oneof![0_u16..7, 0x8000_u16..0x8004], cookie, 0_u32..20).prop_map(
            |(flags, kind, cookie, len)| {
                let mut reply = BytesMut::new();
                ChunkHeader { flags, kind, cookie, len }.encode(&mut reply);
                reply.to_vec()
            }
        ),
        proptest::collection::vec(any::<u8>(), 0..30),
    ]
}

proptest! {
    #[test]
    fn whatever_a_server_sends_every_request_ends(
        replies in proptest::collection::vec(any_reply(), 0..8)
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let (connection, mut server) = connection(&ClientOptions::default());
            let calls = [read_call(0, 8), read_call(4, 8)];
            let [a, b] = calls.map(|call| ask(&connection, call));
            let serve = async {
                // The client may have hung up already.
                let _ = server.write_all(&replies.concat()).await;
                drop(server);
            };
            let all = async { tokio::join!(a, b, ask(&connection, write_call(0, b"x")), serve) };
            let ended = tokio::time::timeout(Duration::from_secs(10), all).await;
            prop_assert!(ended.is_ok(), "a request hangs");
            Ok(())
        })?;
    }
}
