//! "Metadata querying", "NBD_OPT_LIST_META_CONTEXT", "NBD_OPT_SET_META_CONTEXT", "The base: metadata namespace",
//! "NBD_REP_META_CONTEXT".

use nbd_server::wire::{Headers, command, error, option, reply};

use crate::peer::{Peer, context, queries};
use crate::stage::{STRIPES, Stage, Way};

const BASE: &str = "base:allocation";

/// What LIST shows.
async fn list(peer: &mut Peer, export: &str, wanted: &[&str]) -> Vec<String> {
    let mut replies = peer.option(option::LIST_META_CONTEXT, &queries(export, wanted)).await;
    assert_eq!(replies.pop().unwrap().0, reply::ACK);
    replies.into_iter().map(|one| context(one).1).collect()
}

#[tokio::test]
async fn contexts_need_chunks() {
    let stage = Stage::new().await;
    for way in Way::with([Headers::Simple]) {
        let mut peer = Peer::haggling(&stage, way).await;
        for asked in [option::LIST_META_CONTEXT, option::SET_META_CONTEXT] {
            assert_eq!(peer.only(asked, &queries("disk", &[BASE])).await, reply::ERR_INVALID);
        }
        peer.go("disk").await;
        assert_eq!(peer.ask(command::BLOCK_STATUS, 0, 0, 512).await.error, error::EINVAL);
    }
}

#[tokio::test]
async fn list_shows_everything_to_a_client_that_asks_nothing() {
    let stage = Stage::new().await;
    for way in Way::with_chunks() {
        let mut peer = Peer::haggling(&stage, way).await;
        assert_eq!(list(&mut peer, "disk", &[]).await, [BASE, STRIPES]);
        assert_eq!(list(&mut peer, "", &[]).await, [BASE, STRIPES]);
        assert_eq!(list(&mut peer, "fixed", &[]).await, [BASE]);
    }
}

#[tokio::test]
async fn list_shows_what_some_query_names_each_once() {
    let stage = Stage::new().await;
    for way in Way::with_chunks() {
        let mut peer = Peer::haggling(&stage, way).await;
        let cases: [(&[&str], &[&str]); 7] = [
            (&[BASE], &[BASE]),
            (&["base:", BASE, BASE], &[BASE]),
            (&["x-test:"], &[STRIPES]),
            (&["x-test:", "base:"], &[BASE, STRIPES]),
            (&["base:unknown"], &[]),
            (&["qemu:", "x-other:", "nbd-server:x"], &[]),
            (&["qemu:", STRIPES], &[STRIPES]),
        ];
        for (wanted, expected) in cases {
            assert_eq!(list(&mut peer, "disk", wanted).await, expected, "{wanted:?}");
        }
    }
}

#[tokio::test]
async fn a_listed_context_has_no_number_yet() {
    let stage = Stage::new().await;
    for way in Way::with_chunks() {
        let mut peer = Peer::haggling(&stage, way).await;
        let mut replies = peer.option(option::LIST_META_CONTEXT, &queries("disk", &[])).await;
        replies.pop();
        assert!(replies.into_iter().all(|one| context(one).0 == 0));
    }
}

#[tokio::test]
async fn set_selects_the_contexts_that_are_named_each_with_its_own_number() {
    let stage = Stage::new().await;
    for way in Way::with_chunks() {
        let mut peer = Peer::haggling(&stage, way).await;
        let cases: [(&[&str], &[&str]); 6] = [
            (&[], &[]),
            (&["base:"], &[]),
            (&["x-test:", "base:unknown", "qemu:dirty-bitmap:x"], &[]),
            (&[BASE, BASE], &[BASE]),
            (&["x-other:y", STRIPES], &[STRIPES]),
            (&[STRIPES, BASE], &[BASE, STRIPES]),
        ];
        for (wanted, expected) in cases {
            let selected = peer.select("disk", wanted).await;
            let names: Vec<_> = selected.iter().map(|(_, name)| name.as_str()).collect();
            assert_eq!(names, expected);
            let mut ids: Vec<_> = selected.iter().map(|(id, _)| *id).collect();
            ids.dedup();
            assert_eq!(ids.len(), expected.len(), "numbers are unique");
        }
    }
}

#[tokio::test]
async fn a_new_selection_replaces_the_old_even_where_it_fails() {
    let stage = Stage::new().await;
    let broken = [queries("disk", &[BASE]), vec![0]].concat();
    for way in Way::with_chunks() {
        for (data, expected) in [
            (queries("disk", &[]), reply::ACK),
            (queries("none", &[BASE]), reply::ERR_UNKNOWN),
            (broken.clone(), reply::ERR_INVALID),
            (vec![0; 1 << 20], reply::ERR_TOO_BIG),
        ] {
            let mut peer = Peer::haggling(&stage, way).await;
            peer.select("disk", &[BASE]).await;
            assert_eq!(peer.only(option::SET_META_CONTEXT, &data).await, expected);
            peer.go("disk").await;
            assert_eq!(peer.ask(command::BLOCK_STATUS, 0, 0, 512).await.error, error::EINVAL);
        }
    }
}

#[tokio::test]
async fn a_selection_holds_for_the_export_it_was_made_for() {
    let stage = Stage::new().await;
    for way in Way::with_chunks() {
        for (export, works) in [("disk", true), ("fixed", false), ("", false)] {
            let mut peer = Peer::haggling(&stage, way).await;
            peer.select("disk", &[BASE]).await;
            peer.go(export).await;
            let told = peer.ask(command::BLOCK_STATUS, 0, 0, 512).await;
            assert_eq!(told.error == 0, works, "{export:?}");
            peer.is_in_step_again().await;
        }
    }
}

#[tokio::test]
async fn a_listing_selects_nothing_and_forgets_nothing() {
    let stage = Stage::new().await;
    for way in Way::with_chunks() {
        let mut peer = Peer::haggling(&stage, way).await;
        peer.select("disk", &[STRIPES]).await;
        list(&mut peer, "disk", &[BASE]).await;
        peer.go("disk").await;
        let told = peer.ask(command::BLOCK_STATUS, 0, 0, 512).await;
        assert_eq!(told.status.len(), 1);
    }
}

#[tokio::test]
async fn a_status_without_a_selection_is_invalid() {
    let stage = Stage::new().await;
    for way in Way::all() {
        let mut peer = Peer::haggling(&stage, way).await;
        peer.go("disk").await;
        assert_eq!(peer.ask(command::BLOCK_STATUS, 0, 0, 512).await.error, error::EINVAL);
        peer.is_in_step_again().await;
    }
}
