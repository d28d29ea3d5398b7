//! Our client over TLS against QEMU's server and nbdkit, by URIs as people write them.

use block::{BlockDevice, ByteRange, Durability};
use bytes::Bytes;
use nbd_server::client::{Address, ClientError, ClientOptions, NbdDevice, NbdUri};
use nbd_server::wire::{option, reply};

use crate::certificates::{Authority, Subject};
use crate::foreign::disk;
use crate::peer::{Peer, scratch};

/// The URI of a peer's socket.
fn uri(peer: &Peer, export: &str, query: &str) -> NbdUri {
    let Address::Unix(socket) = peer.address() else { panic!("not a Unix socket") };
    format!("nbds+unix:///{export}?socket={}{query}", socket.display()).parse().unwrap()
}

async fn writes_and_reads(uri: &NbdUri) {
    let device = NbdDevice::open(uri, ClientOptions::default()).await.unwrap();
    let data = Bytes::from((0..=255).cycle().take(1 << 20).collect::<Vec<u8>>());
    device.write(12_288, data.clone(), Durability::Durable).await.unwrap();
    let read = device.read(ByteRange::new(12_288, 1 << 20).unwrap()).await.unwrap();
    assert!(read.to_vec() == data);
    device.close().await.unwrap();
}

/// What every server with a certificate for this host, which demands one of clients, does with ours.
async fn is_trusted_and_trusts(
    peer: &Peer,
    export: &str,
    authority: &Authority,
    certificates: &str,
) {
    writes_and_reads(&uri(peer, export, &format!("&tls-certificates={certificates}"))).await;
    let open = async |query: &str| {
        NbdDevice::open(&uri(peer, export, query), ClientOptions::default()).await
    };

    let other = Authority::new();
    let distrustful = other.directory();
    authority.add(distrustful.path(), &Subject::client("client of a test"));
    let distrustful = format!("&tls-certificates={}", distrustful.path().display());
    let failed = open(&distrustful).await;
    assert!(matches!(failed, Err(ClientError::Tls { .. })), "{failed:?}");
    open(&format!("{distrustful}&tls-verify-peer=false")).await.unwrap().close().await.unwrap();
    let elsewhere = format!("&tls-certificates={certificates}&tls-hostname=elsewhere.example");
    let failed = open(&elsewhere).await;
    assert!(matches!(failed, Err(ClientError::Tls { .. })), "{failed:?}");

    let anonymous = authority.directory();
    let failed = open(&format!("&tls-certificates={}", anonymous.path().display())).await;
    let kept_out = matches!(
        failed,
        Err(ClientError::Tls { .. }
            | ClientError::HandshakeIo { .. }
            | ClientError::HandshakeClosed { .. })
    );
    assert!(kept_out, "{failed:?}");
    let plain = NbdDevice::connect(&peer.address(), export, ClientOptions::default()).await;
    let demanded = matches!(plain, Err(ClientError::Refused { reply: reply::ERR_TLS_REQD, .. }));
    assert!(demanded, "{plain:?}");
}

#[tokio::test]
async fn qemus_server_is_spoken_to_over_tls() {
    let authority = Authority::new();
    let directory = authority.both_sides();
    let path = directory.path().display().to_string();
    let dir = scratch();
    let file = std::fs::File::create(dir.path().join("disk")).unwrap();
    file.set_len(4 << 20).unwrap();
    let object = format!("tls-creds-x509,id=tls,endpoint=server,verify-peer=on,dir={path}");
    let arguments = ["--object", &object, "--tls-creds", "tls", "--format=raw", "disk"];
    let peer = Peer::qemu_nbd(dir, &arguments);
    is_trusted_and_trusts(&peer, "", &authority, &path).await;
}

#[tokio::test]
async fn nbdkit_is_spoken_to_over_tls() {
    let authority = Authority::new();
    let directory = authority.both_sides();
    let path = directory.path().display().to_string();
    let certificates = format!("--tls-certificates={path}");
    let arguments = ["--tls=require", &certificates, "--tls-verify-peer", "memory", "4M"];
    let peer = Peer::nbdkit(&arguments);
    is_trusted_and_trusts(&peer, "", &authority, &path).await;
}

#[tokio::test]
async fn qemu_storage_daemon_is_spoken_to_over_tls() {
    let authority = Authority::new();
    let directory = authority.both_sides();
    let path = directory.path().display().to_string();
    let object =
        format!("--object=tls-creds-x509,id=tls,endpoint=server,verify-peer=on,dir={path}");
    let arguments = [
        &object,
        "--blockdev=driver=file,node-name=image,filename=disk",
        "--export=type=nbd,id=e,node-name=image,name=disk,writable=on",
    ];
    let peer = Peer::qemu_storage_daemon(disk("raw"), ",tls-creds=tls", &arguments);
    is_trusted_and_trusts(&peer, "disk", &authority, &path).await;
}

#[tokio::test]
async fn the_reference_server_is_spoken_to_over_tls() {
    let authority = Authority::new();
    let directory = authority.both_sides();
    let path = directory.path().display().to_string();
    let generic = format!(
        "certfile = {path}/server-cert.pem\nkeyfile = {path}/server-key.pem\n\
         cacertfile = {path}/ca-cert.pem\nforce_tls = true"
    );
    let peer = Peer::reference(disk("raw"), &generic, "flush = true\nfua = true");
    is_trusted_and_trusts(&peer, "disk", &authority, &path).await;
}

#[tokio::test]
async fn a_server_without_tls_is_not_spoken_to_by_a_uri_that_demands_it() {
    let authority = Authority::new();
    let directory = authority.both_sides();
    let query = format!("&tls-certificates={}", directory.path().display());
    for arguments in [&["--tls=off", "memory", "1M"][..], &["--mask-handshake=0", "memory", "1M"]] {
        let peer = Peer::nbdkit(arguments);
        let failed = NbdDevice::open(&uri(&peer, "", &query), ClientOptions::default()).await;
        let refused = matches!(
            failed,
            Err(ClientError::Refused { option: option::STARTTLS, .. }
                | ClientError::NotSupported { what: "TLS" })
        );
        assert!(refused, "{failed:?}");
    }
}
