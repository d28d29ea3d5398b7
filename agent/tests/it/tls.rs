//! Sources and targets behind TLS: with the certificates that the URI names, and never without TLS.

use std::time::Duration;

use agent::AgentError;
use block::RawDevice;
use nbd_server::tls::{ClientCertificates, ServerTls};
use nbd_server::{Export, Server, ServerConfig, TlsMode};

use crate::certificates::{Authority, Subject};
use crate::support::{BLOCK, Bench, Disk, assert_same};

#[tokio::test]
async fn a_disk_goes_from_one_server_to_another_over_tls() {
    let bench = Bench::new();
    let source = Disk::sparse(bench.path(), "source", 16 * BLOCK);
    source.fill(3..9, 1);
    let target = Disk::sparse(bench.path(), "target", 16 * BLOCK);
    let authority = Authority::new();
    let directory = authority.both_sides();
    let tls = ServerTls::from_directory(directory.path(), ClientCertificates::Required).unwrap();
    let server = Server::new(ServerConfig::default().tls(TlsMode::Required, tls));
    for (name, disk, read_only) in [("from", &source, true), ("to", &target, false)] {
        let device = RawDevice::open(&disk.path, read_only).await.unwrap();
        server.add_export(Export::new(name, device).read_only(read_only)).unwrap();
    }
    let address = server.listen_tcp("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let uri = |export: &str, parameters: &str| {
        let certificates = directory.path().display();
        format!("nbds://{address}/{export}?tls-certificates={certificates}{parameters}")
    };
    let [from, to] = ["from", "to"].map(|export| uri(export, ""));
    bench.run_one(from.parse().unwrap(), to.parse().unwrap(), None).await.unwrap();
    assert_same(&source, &target);

    // Another name than the server proves, nobody's certificate, and no TLS at all.
    let elsewhere = uri("from", "&tls-hostname=elsewhere.example");
    let anonymous = authority.directory();
    let anonymous =
        format!("nbds://{address}/from?tls-certificates={}", anonymous.path().display());
    let plain = format!("nbd://{address}/from");
    for from in [elsewhere, anonymous, plain] {
        let ran = bench.run_one(from.parse().unwrap(), to.parse().unwrap(), None).await;
        assert!(matches!(ran, Err(AgentError::OpenSource { .. })), "{from}");
    }
    let plain = format!("nbd://{address}/to");
    let ran = bench.run_one(from.parse().unwrap(), plain.parse().unwrap(), None).await;
    assert!(matches!(ran, Err(AgentError::ConnectTarget { .. })));
    server.shutdown(Duration::from_secs(5)).await;
}

#[tokio::test]
async fn a_server_that_another_authority_vouches_for_is_not_spoken_to() {
    let bench = Bench::new();
    let source = Disk::sparse(bench.path(), "source", BLOCK);
    let directory = Authority::new().both_sides();
    let tls = ServerTls::from_directory(directory.path(), ClientCertificates::Ignored).unwrap();
    let server = Server::new(ServerConfig::default().tls(TlsMode::Required, tls));
    let device = RawDevice::open(&source.path, true).await.unwrap();
    server.add_export(Export::new("disk", device).read_only(true)).unwrap();
    let socket = bench.path().join("socket");
    server.listen_unix(&socket).await.unwrap();
    let target = Disk::sparse(bench.path(), "target", BLOCK);
    let peer = bench.serve("peer", &target);
    let stranger = Authority::new();
    let trusted = stranger.directory();
    stranger.add(trusted.path(), &Subject::client("an agent"));
    let uri = |parameters: &str| {
        let (socket, trusted) = (socket.display(), trusted.path().display());
        format!("nbds+unix:///disk?socket={socket}&tls-certificates={trusted}{parameters}")
    };
    let refused = bench.run_one(uri("").parse().unwrap(), peer.target(""), None).await;
    assert!(matches!(refused, Err(AgentError::OpenSource { .. })));
    let careless = uri("&tls-verify-peer=false");
    bench.run_one(careless.parse().unwrap(), peer.target(""), None).await.unwrap();
    server.shutdown(Duration::from_secs(5)).await;
}
