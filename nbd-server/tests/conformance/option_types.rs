//! "NBD_OPT_ABORT", "NBD_OPT_LIST", "NBD_OPT_STRUCTURED_REPLY", "NBD_REP_SERVER".

use nbd_server::wire::{Fields, Headers, command, option, reply};

use crate::peer::Peer;
use crate::stage::{Stage, Transport, Way};

#[tokio::test]
async fn abort_is_acknowledged_whatever_data_it_brings() {
    let stage = Stage::new().await;
    for way in Way::all() {
        for data in [&b""[..], b"farewell", &[0; 300_000]] {
            let mut peer = Peer::haggling(&stage, way).await;
            assert_eq!(peer.only(option::ABORT, data).await, reply::ACK);
            peer.is_closed().await;
        }
    }
}

#[tokio::test]
async fn a_client_that_aborts_and_is_gone_hurts_nobody() {
    let stage = Stage::new().await;
    for transport in Transport::ALL {
        let mut stays = Peer::fixed(&stage, transport).await;
        for _ in 0..8 {
            let mut leaves = Peer::fixed(&stage, transport).await;
            leaves.send_option(option::ABORT, &[]).await;
        }
        stays.go("disk").await;
        stays.is_in_step_again().await;
    }
}

#[tokio::test]
async fn list_names_every_export_once_and_then_acknowledges() {
    let stage = Stage::new().await;
    for way in Way::all() {
        let mut peer = Peer::haggling(&stage, way).await;
        let mut replies = peer.option(option::LIST, &[]).await;
        assert_eq!(replies.pop().unwrap().0, reply::ACK);
        let mut names = Vec::new();
        for (kind, data) in replies {
            assert_eq!(kind, reply::SERVER);
            let mut fields = Fields(&data);
            let len = fields.u32().unwrap() as usize;
            assert!(len <= data.len() - 4);
            let name = String::from_utf8(fields.take(len).unwrap().to_vec()).unwrap();
            let text = String::from_utf8(fields.0.to_vec()).unwrap();
            assert_eq!(text, if name == "disk" { "a disk" } else { "" });
            names.push(name);
        }
        names.sort();
        assert_eq!(names, ["disk", "fixed", "giant"]);
    }
}

#[tokio::test]
async fn structured_replies_are_used_only_where_they_were_negotiated() {
    let stage = Stage::new().await;
    for way in Way::all() {
        let mut peer = Peer::entered(&stage, way, "disk").await;
        // Data, an error before anything is read, and success without data.
        assert_eq!(peer.write(0, 0, &[1; 4096]).await.error, 0);
        let read = peer.ask(command::READ, 0, 0, 8192).await;
        assert_eq!(read.chunks.is_empty(), way.headers == Headers::Simple);
        let failed = peer.ask(command::READ, 1 << 15, 0, 512).await;
        assert_ne!(failed.error, 0);
        assert_eq!(failed.chunks.is_empty(), way.headers == Headers::Simple);
        peer.is_in_step_again().await;
    }
}
