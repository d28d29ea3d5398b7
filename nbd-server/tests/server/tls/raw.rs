//! TLS against a client without manners: what it sends in plain text behind STARTTLS, what survives into TLS, and
//! clients that never get there.

use std::sync::Arc;

use bytes::BufMut;
use nbd_server::tls::ClientCertificates;
use nbd_server::wire::{self, client_flag, option, reply};
use nbd_server::{Limits, Server, TlsMode};
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore, SupportedProtocolVersion};
use tempfile::TempDir;
use tokio::io::DuplexStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::{server, server_with};
use crate::certificates::Authority;
use crate::raw::{Raw, go};

const FIXED: u32 = client_flag::FIXED_NEWSTYLE | client_flag::NO_ZEROES;

fn start_tls() -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.put_u64(wire::IHAVEOPT);
    bytes.put_u32(option::STARTTLS);
    bytes.put_u32(0);
    bytes
}

fn demanding(directory: &TempDir) -> Server {
    server(directory.path(), TlsMode::Required, ClientCertificates::Ignored)
}

/// Asks for TLS and does it, in one of these versions.
async fn secured(
    mut raw: Raw,
    directory: &TempDir,
    versions: &[&'static SupportedProtocolVersion],
) -> std::io::Result<Raw<TlsStream<DuplexStream>>> {
    assert_eq!(raw.option(option::STARTTLS, &[]).await, [(reply::ACK, Vec::new())]);
    let mut roots = RootCertStore::empty();
    let path = directory.path().join("ca-cert.pem");
    roots.add(CertificateDer::from_pem_file(path).unwrap()).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from("localhost").unwrap();
    let stream = TlsConnector::from(Arc::new(config)).connect(name, raw.stream).await?;
    Ok(Raw { stream })
}

#[tokio::test]
async fn versions_1_2_and_1_3_are_spoken() {
    let directory = Authority::new().both_sides();
    let server = demanding(&directory);
    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        let mut raw = Raw::new(&server);
        raw.greet(FIXED).await;
        let mut raw = secured(raw, &directory, &[version]).await.unwrap();
        let entered = raw.go("disk").await;
        assert_eq!(entered.size_bytes, super::SIZE);
        raw.request(wire::command::READ, 0, 1, 0, 512).await;
        let reply = raw.reply_of(512).await;
        assert_eq!((reply.error, reply.content[0].1.len()), (0, 512));
    }
}

#[tokio::test]
async fn version_1_1_is_refused_with_an_alert() {
    let directory = Authority::new().both_sides();
    let server = demanding(&directory);
    let mut raw = Raw::new(&server);
    raw.greet(FIXED).await;
    assert_eq!(raw.option(option::STARTTLS, &[]).await, [(reply::ACK, Vec::new())]);
    // A ClientHello of version 1.1 with one cipher suite of that time and the algorithms of signatures.
    let mut hello = vec![3, 2];
    hello.put_bytes(7, 32);
    hello.put_slice(&[0, 0, 2, 0xc0, 0x13, 1, 0]);
    hello.put_slice(&[0, 10, 0, 13, 0, 6, 0, 4, 4, 3, 4, 1]);
    let len = u8::try_from(hello.len()).unwrap();
    raw.send(&[0x16, 3, 1, 0, len + 4, 1, 0, 0, len]).await;
    raw.send(&hello).await;
    let answer = raw.rest().await;
    // An alert record: fatal, protocol_version.
    assert_eq!((answer[0], &answer[answer.len() - 2..]), (0x15, &[2, 70][..]), "{answer:?}");
    assert_eq!(server.exports()[0].counters.connections, 0);
}

/// CVE-2021-3716.
#[tokio::test]
async fn plain_text_behind_starttls_is_neither_answered_nor_kept() {
    let directory = Authority::new().both_sides();
    for mode in [TlsMode::Offered, TlsMode::Required] {
        let server = server(directory.path(), mode, ClientCertificates::Ignored);
        let mut raw = Raw::new(&server);
        raw.greet(FIXED).await;
        let mut bytes = start_tls();
        bytes.put_u64(wire::IHAVEOPT);
        bytes.put_u32(option::GO);
        let data = go("disk");
        bytes.put_u32(u32::try_from(data.len()).unwrap());
        bytes.put_slice(&data);
        raw.send(&bytes).await;
        assert!(raw.rest().await.is_empty());
        assert_eq!(server.exports()[0].counters.connections, 0);
    }
}

#[tokio::test]
async fn plain_text_in_place_of_tls_ends_the_connection() {
    let directory = Authority::new().both_sides();
    let server = demanding(&directory);
    let mut raw = Raw::new(&server);
    raw.greet(FIXED).await;
    assert_eq!(raw.option(option::STARTTLS, &[]).await, [(reply::ACK, Vec::new())]);
    raw.send_option(option::GO, &go("disk")).await;
    let answer = raw.rest().await;
    assert!(answer.first().is_none_or(|first| *first == 0x15), "an alert or nothing: {answer:?}");
    assert_eq!(server.exports()[0].counters.connections, 0);
}

/// CVE-2021-3716.
#[tokio::test]
async fn what_was_negotiated_in_plain_text_is_forgotten_behind_tls() {
    let directory = Authority::new().both_sides();
    let server = server(directory.path(), TlsMode::Offered, ClientCertificates::Ignored);
    let mut raw = Raw::new(&server);
    raw.greet(FIXED).await;
    let contexts = b"\0\0\0\x04disk\0\0\0\x01\0\0\0\x0fbase:allocation";
    raw.option(option::STRUCTURED_REPLY, &[]).await;
    assert_eq!(raw.option(option::SET_META_CONTEXT, contexts).await.len(), 2);
    let mut raw = secured(raw, &directory, rustls::ALL_VERSIONS).await.unwrap();
    assert_eq!(raw.option(option::STARTTLS, &[]).await[0].0, reply::ERR_INVALID);
    let again = raw.option(option::SET_META_CONTEXT, contexts).await;
    assert_eq!(again[0].0, reply::ERR_INVALID, "structured replies are to be asked for again");
    raw.go("disk").await;
    raw.request(wire::command::BLOCK_STATUS, 0, 1, 0, 512).await;
    assert_eq!(raw.reply().await.error, wire::error::EINVAL);
    raw.request(wire::command::READ, 0, 2, 0, 1).await;
    let reply = raw.reply_of(1).await;
    assert_eq!(reply.content, [(u16::MAX, vec![0])], "a simple reply");
}

#[tokio::test(start_paused = true)]
async fn a_client_that_never_begins_tls_is_dropped_in_time() {
    let directory = Authority::new().both_sides();
    let limits = Limits::default();
    let none = ClientCertificates::Ignored;
    let server = server_with(directory.path(), TlsMode::Required, none, limits);
    for begun in [&[][..], &[0x16, 3, 1, 1, 0]] {
        let mut raw = Raw::new(&server);
        raw.greet(FIXED).await;
        assert_eq!(raw.option(option::STARTTLS, &[]).await, [(reply::ACK, Vec::new())]);
        raw.send(begun).await;
        // The clock goes on by itself where nothing else happens.
        assert!(raw.rest().await.is_empty());
        assert_eq!(server.connections(), 0);
    }
}

#[tokio::test]
async fn the_end_of_a_connection_is_told_in_terms_of_tls() {
    let directory = Authority::new().both_sides();
    let server = demanding(&directory);
    // Reading to the end fails where TLS was cut off.
    let mut raw = Raw::new(&server);
    raw.greet(FIXED).await;
    let mut raw = secured(raw, &directory, rustls::ALL_VERSIONS).await.unwrap();
    raw.go("disk").await;
    raw.request(wire::command::DISC, 0, 0, 0, 0).await;
    assert!(raw.rest().await.is_empty());

    let mut raw = Raw::new(&server);
    raw.greet(FIXED).await;
    let mut raw = secured(raw, &directory, rustls::ALL_VERSIONS).await.unwrap();
    assert_eq!(raw.option(option::ABORT, &[]).await[0].0, reply::ACK);
    assert!(raw.rest().await.is_empty());
}
