//! "Newstyle negotiation", "Handshake flags", "Client flags", "NBD_OPT_EXPORT_NAME".

use nbd_server::wire::{Fields, Headers, MAX_STRING_BYTES, option, transmission_flag};

use crate::peer::{FIXED, Peer};
use crate::stage::{SIZE, Stage, Transport};

#[tokio::test]
async fn the_server_speaks_first_and_sets_no_flag_but_the_two_there_are() {
    let stage = Stage::new().await;
    for transport in Transport::ALL {
        let mut peer = Peer::connect(&stage, transport).await;
        let greeting = peer.take(18).await;
        assert_eq!(greeting[..16], *b"NBDMAGICIHAVEOPT", "newstyle on every listener");
        assert_eq!(greeting[16..], [0, 3]);
    }
}

#[tokio::test]
async fn an_unknown_client_flag_ends_the_connection() {
    let stage = Stage::new().await;
    for bit in 2..32 {
        let mut peer = Peer::connect(&stage, Transport::ALL[bit % 2]).await;
        peer.greet(FIXED | 1 << bit).await;
        peer.is_closed().await;
    }
}

/// EXPORT_NAME, which must succeed; the transmission flags.
async fn export_name(peer: &mut Peer, name: &str, has_zeroes: bool) -> u16 {
    peer.send_option(option::EXPORT_NAME, name.as_bytes()).await;
    let answer = peer.take(10).await;
    let mut fields = Fields(&answer);
    assert_eq!(fields.u64(), Some(SIZE));
    let flags = fields.u16().unwrap();
    assert_ne!(flags & transmission_flag::HAS_FLAGS, 0);
    if has_zeroes {
        assert_eq!(peer.take(124).await, [0; 124]);
    }
    flags
}

#[tokio::test]
async fn the_zeroes_are_left_out_only_for_a_client_that_waives_them() {
    let stage = Stage::new().await;
    for transport in Transport::ALL {
        for flags in 0..4 {
            let mut peer = Peer::connect(&stage, transport).await;
            peer.greet(flags).await;
            export_name(&mut peer, "disk", flags & 2 == 0).await;
            // What comes next is a reply and nothing else.
            assert_eq!(peer.write(0, 4096, b"plain").await.error, 0);
            assert_eq!(peer.read(4095, 7).await, b"\0plain\0");
            peer.disconnect().await;
        }
    }
}

#[tokio::test]
async fn export_name_with_the_empty_name_means_the_default_export() {
    let stage = Stage::new().await;
    for flags in [0, FIXED] {
        let mut peer = Peer::connect(&stage, Transport::Unix).await;
        peer.greet(flags).await;
        let writable = export_name(&mut peer, "", flags == 0).await;
        assert_eq!(writable & transmission_flag::READ_ONLY, 0);
        peer.is_in_step_again().await;
    }
}

#[tokio::test]
async fn an_export_name_that_cannot_be_had_ends_the_session_without_a_word() {
    let stage = Stage::new().await;
    let long = [b'x'; MAX_STRING_BYTES + 1];
    for transport in Transport::ALL {
        for flags in [0, FIXED] {
            for name in [&b"none"[..], b"di\0sk", b"\xff\xfe", &long[1..], &long] {
                let mut peer = Peer::connect(&stage, transport).await;
                peer.greet(flags).await;
                peer.send_option(option::EXPORT_NAME, name).await;
                peer.is_closed().await;
            }
        }
    }
}

#[tokio::test]
async fn plain_newstyle_knows_no_option_but_export_name() {
    let stage = Stage::new().await;
    for plain in [0, 2] {
        for other in (0..14).filter(|one| *one != option::EXPORT_NAME).chain([u32::MAX]) {
            let mut peer = Peer::connect(&stage, Transport::ALL[plain as usize / 2]).await;
            peer.greet(plain).await;
            peer.send_option(other, &[]).await;
            peer.is_closed().await;
        }
    }
}

#[tokio::test]
async fn plain_newstyle_means_simple_replies() {
    let stage = Stage::new().await;
    let mut peer = Peer::connect(&stage, Transport::Tcp).await;
    peer.greet(0).await;
    let flags = export_name(&mut peer, "disk", true).await;
    assert_eq!(flags & transmission_flag::SEND_DF, 0);
    assert_eq!(peer.headers, Headers::Simple);
    assert_eq!(peer.read(0, SIZE).await.len() as u64, SIZE);
}

#[tokio::test]
async fn export_name_after_structured_replies_keeps_them() {
    let stage = Stage::new().await;
    let mut peer = Peer::fixed(&stage, Transport::Unix).await;
    peer.negotiate(Headers::Structured).await;
    let flags = export_name(&mut peer, "disk", false).await;
    assert_ne!(flags & transmission_flag::SEND_DF, 0);
    assert_eq!(peer.read(0, 8192).await, [0; 8192]);
}
