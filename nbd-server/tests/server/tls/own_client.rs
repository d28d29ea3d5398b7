//! Our client and our server over TLS: what works, who is kept out and told why, and that nothing falls back to plain
//! text.

use std::sync::Arc;

use block::{BlockDevice, ByteRange, Durability, MemoryDevice};
use bytes::Bytes;
use futures_util::future::join_all;
use nbd_server::client::{Address, ClientError, ClientOptions, NbdDevice};
use nbd_server::tls::{ClientCertificates, ClientTls, ServerTls};
use nbd_server::wire::{option, reply};
use nbd_server::{Export, ExportError, Removal, Server, TlsMode};

use super::{SIZE, listen, options, server, with};
use crate::certificates::{Authority, Subject};

async fn connect(
    address: &Address,
    export: &str,
    options: ClientOptions,
) -> Result<Arc<NbdDevice>, ClientError> {
    NbdDevice::connect(address, export, options).await
}

/// Whether a connection failed for want of trust, on either side. A client whose certificate is refused hears it behind
/// the TLS handshake in version 1.3.
fn is_distrust(failed: &Result<Arc<NbdDevice>, ClientError>) -> bool {
    matches!(failed, Err(ClientError::Tls { .. } | ClientError::HandshakeIo { .. }))
}

async fn works(server: &Server, address: &Address, options: ClientOptions) {
    let device = connect(address, "disk", options).await.unwrap();
    device.write(4096, Bytes::from_static(b"written"), Durability::Durable).await.unwrap();
    let read = device.read(ByteRange::new(4096, 7).unwrap()).await.unwrap();
    assert_eq!(read.to_vec(), b"written");
    device.close().await.unwrap();
    assert!(server.exports()[0].counters.requests > 0);
}

#[tokio::test]
async fn many_requests_in_flight_arrive_whole_over_tls() {
    let authority = Authority::new();
    let directory = authority.both_sides();
    let server = server(directory.path(), TlsMode::Required, ClientCertificates::Required);
    let device = connect(&listen(&server).await, "disk", options(directory.path())).await.unwrap();
    assert_eq!(device.connections(), 4);
    let piece = 200_000_u64;
    let count = SIZE / piece;
    let data = |index: u64| {
        let byte = |at: u64| u8::try_from((at * 7 + index * 31) % 251).unwrap();
        Bytes::from((0..piece).map(byte).collect::<Vec<_>>())
    };
    let write = |index: u64| device.write(index * piece, data(index), Durability::Deferred);
    for written in join_all((0..count).map(write)).await {
        written.unwrap();
    }
    let read = |index: u64| device.read(ByteRange::new(index * piece, piece).unwrap());
    for (index, read) in (0..).zip(join_all((0..count).map(read)).await) {
        assert!(read.unwrap().to_vec() == data(index), "piece {index}");
    }
    let (sent, received) = device.wire_bytes();
    assert!(sent > count * piece && received > count * piece);
    device.close().await.unwrap();
}

#[tokio::test]
async fn unix_sockets_speak_tls_too() {
    let authority = Authority::new();
    let directory = authority.both_sides();
    let server = server(directory.path(), TlsMode::Required, ClientCertificates::Ignored);
    let socket = directory.path().join("socket");
    server.listen_unix(&socket).await.unwrap();
    let address = Address::Unix(socket);
    works(&server, &address, options(directory.path())).await;
    let listed = NbdDevice::list_with(&address, &options(directory.path())).await.unwrap();
    assert_eq!(listed[0].name, "disk");
}

#[tokio::test]
async fn a_server_that_cannot_prove_who_it_is_gets_no_request_and_goes_on_serving() {
    let (authority, other) = (Authority::new(), Authority::new());
    let trusting = authority.directory();
    let wrong_host = Subject { hosts: vec!["elsewhere.example".to_owned()], ..Subject::server() };
    let expired = Subject { expired: true, ..Subject::server() };
    let wrong_purpose = Subject { purpose: Subject::client("x").purpose, ..Subject::server() };
    for (case, issuer, subject) in [
        ("wrong authority", &other, Subject::server()),
        ("wrong host", &authority, wrong_host),
        ("expired", &authority, expired),
        ("wrong purpose", &authority, wrong_purpose),
    ] {
        let (certificate, key) = issuer.issue(&subject);
        let none = ClientCertificates::Ignored;
        let tls = ServerTls::from_pem(certificate.as_bytes(), key.as_bytes(), none, None).unwrap();
        let directory = authority.both_sides();
        let server = server(directory.path(), TlsMode::Required, none);
        server.replace_tls(tls).unwrap();
        let address = listen(&server).await;
        let failed = connect(&address, "disk", options(trusting.path())).await;
        assert!(matches!(failed, Err(ClientError::Tls { .. })), "{case}: {failed:?}");
        assert_eq!(server.exports()[0].counters.connections, 0, "{case}");
        // Nor does the URI's way of not looking let it pass by accident.
        works(&server, &address, with(ClientTls::unverified(None).unwrap())).await;
    }
}

#[tokio::test]
async fn the_name_that_is_expected_can_be_another_than_the_one_that_is_called() {
    let authority = Authority::new();
    let directory = authority.directory();
    let subject = Subject { hosts: vec!["backup.example".to_owned()], ..Subject::server() };
    authority.add(directory.path(), &subject);
    let server = server(directory.path(), TlsMode::Required, ClientCertificates::Ignored);
    let address = listen(&server).await;
    let tls = ClientTls::from_directory(directory.path()).unwrap();
    works(&server, &address, with(tls.clone().host_name("backup.example").unwrap())).await;
    for name in [tls.clone(), tls.host_name("other.example").unwrap()] {
        let failed = connect(&address, "disk", with(name)).await;
        assert!(matches!(failed, Err(ClientError::Tls { .. })), "{failed:?}");
    }
}

#[tokio::test]
async fn clients_without_a_valid_certificate_are_kept_out_where_one_is_required() {
    let (authority, other) = (Authority::new(), Authority::new());
    let directory = authority.both_sides();
    let server = server(directory.path(), TlsMode::Required, ClientCertificates::Required);
    let address = listen(&server).await;
    let of = |issuer: &Authority, subject: Option<Subject>| {
        let directory = authority.directory();
        if let Some(subject) = subject {
            issuer.add(directory.path(), &subject);
        }
        options(directory.path())
    };
    let expired = Subject { expired: true, ..Subject::client("client of a test") };
    for (case, options) in [
        ("none", of(&authority, None)),
        ("of another authority", of(&other, Some(Subject::client("client of a test")))),
        ("expired", of(&authority, Some(expired))),
    ] {
        let failed = connect(&address, "disk", options).await;
        assert!(is_distrust(&failed), "{case}: {failed:?}");
        assert_eq!(server.exports()[0].counters.connections, 0, "{case}");
    }
    works(&server, &address, options(directory.path())).await;
}

#[tokio::test]
async fn tls_is_demanded_offered_or_refused_by_the_server_alone() {
    let authority = Authority::new();
    let directory = authority.both_sides();
    let plain = ClientOptions::default;
    let server = server(directory.path(), TlsMode::Required, ClientCertificates::Ignored);
    let failed = connect(&listen(&server).await, "disk", plain()).await;
    let demanded = matches!(failed, Err(ClientError::Refused { reply: reply::ERR_TLS_REQD, .. }));
    assert!(demanded, "{failed:?}");

    let server = super::server(directory.path(), TlsMode::Offered, ClientCertificates::Ignored);
    let address = listen(&server).await;
    works(&server, &address, plain()).await;
    works(&server, &address, options(directory.path())).await;

    let server = super::server(directory.path(), TlsMode::Off, ClientCertificates::Ignored);
    let address = listen(&server).await;
    works(&server, &address, plain()).await;
    let before = server.exports()[0].counters.connections;
    let failed = connect(&address, "disk", options(directory.path())).await;
    let refused = matches!(failed, Err(ClientError::Refused { option: option::STARTTLS, .. }));
    assert!(refused, "{failed:?}");
    assert_eq!(server.exports()[0].counters.connections, before);
}

#[tokio::test]
async fn an_export_for_tls_only_does_not_exist_without_it() {
    let authority = Authority::new();
    let directory = authority.both_sides();
    let server = server(directory.path(), TlsMode::Offered, ClientCertificates::Ignored);
    let refused = |failed: Result<Arc<NbdDevice>, ClientError>| match failed {
        Err(ClientError::Refused { reply, .. }) => reply,
        other => panic!("{other:?}"),
    };
    let address = listen(&server).await;
    let plain = ClientOptions::default;
    assert_eq!(refused(connect(&address, "none", plain()).await), reply::ERR_UNKNOWN);
    let secret = Export::new("secret", MemoryDevice::new(SIZE)).tls_only(true);
    server.add_export(secret).unwrap();
    for name in ["secret", "none"] {
        assert_eq!(refused(connect(&address, name, plain()).await), reply::ERR_TLS_REQD);
    }
    let names = |options: ClientOptions| {
        let address = &address;
        async move {
            let listed = NbdDevice::list_with(address, &options).await.unwrap();
            listed.into_iter().map(|export| export.name).collect::<Vec<_>>()
        }
    };
    assert_eq!(names(plain()).await, ["disk"]);
    works(&server, &address, plain()).await;
    assert_eq!(names(options(directory.path())).await, ["disk", "secret"]);
    connect(&address, "secret", options(directory.path())).await.unwrap();
    let unknown = connect(&address, "none", options(directory.path())).await;
    assert_eq!(refused(unknown), reply::ERR_UNKNOWN);
}

#[tokio::test]
async fn an_export_that_names_its_clients_exists_for_them_alone() {
    let authority = Authority::new();
    let directory = authority.both_sides();
    let server = server(directory.path(), TlsMode::Required, ClientCertificates::Requested);
    for (name, client) in
        [("first", "cn:one"), ("second", "cn:two"), ("both", "dns:CLIENT.example")]
    {
        let export = Export::new(name, MemoryDevice::new(SIZE));
        server.add_export(export.clients([client.parse().unwrap()])).unwrap();
    }
    let address = listen(&server).await;
    let of = |common_name: Option<&'static str>| {
        let directory = authority.directory();
        if let Some(common_name) = common_name {
            authority.add(directory.path(), &Subject::client(common_name));
        }
        options(directory.path())
    };
    for (client, expected) in [
        (Some("one"), &["both", "disk", "first"][..]),
        (Some("two"), &["both", "disk", "second"]),
        (Some("One"), &["both", "disk"]),
        (None, &["disk"]),
    ] {
        let listed = NbdDevice::list_with(&address, &of(client)).await.unwrap();
        let names: Vec<_> = listed.iter().map(|export| export.name.as_str()).collect();
        assert_eq!(names, expected, "{client:?}");
        for name in ["disk", "first", "second", "both"] {
            let connected = connect(&address, name, of(client)).await;
            assert_eq!(connected.is_ok(), expected.contains(&name), "{client:?} {name}");
        }
    }
}

#[tokio::test]
async fn exports_that_no_client_could_prove_to_be_meant_by_are_refused() {
    let authority = Authority::new();
    let directory = authority.both_sides();
    let export = || Export::new("x", MemoryDevice::new(SIZE));
    let named = || export().clients(["cn:one".parse().unwrap()]);
    let off = server(directory.path(), TlsMode::Off, ClientCertificates::Ignored);
    for export in [export().tls_only(true), named()] {
        let replaced = off.replace_exports([export.clone()], Removal::Cut);
        assert_eq!(replaced.unwrap_err(), ExportError::NeedsTls("x".into()));
        assert_eq!(off.add_export(export), Err(ExportError::NeedsTls("x".into())));
        assert_eq!(off.exports().len(), 1);
    }
    let ignoring = server(directory.path(), TlsMode::Offered, ClientCertificates::Ignored);
    let refused = Err(ExportError::NeedsClientCertificates("x".into()));
    assert_eq!(ignoring.add_export(named()), refused);
    let looking = server(directory.path(), TlsMode::Offered, ClientCertificates::Requested);
    looking.add_export(named()).unwrap();
    let tls = ServerTls::from_directory(directory.path(), ClientCertificates::Ignored).unwrap();
    assert_eq!(looking.replace_tls(tls), refused);
}

#[tokio::test]
async fn a_new_certificate_is_for_new_connections() {
    let (old, new) = (Authority::new(), Authority::new());
    let (before, after) = (old.both_sides(), new.both_sides());
    let required = ClientCertificates::Required;
    let server = server(before.path(), TlsMode::Required, required);
    let address = listen(&server).await;
    let open = connect(&address, "disk", options(before.path())).await.unwrap();
    server.replace_tls(ServerTls::from_directory(after.path(), required).unwrap()).unwrap();
    works(&server, &address, options(after.path())).await;
    assert!(is_distrust(&connect(&address, "disk", options(before.path())).await));
    open.write(0, Bytes::from_static(b"still here"), Durability::Durable).await.unwrap();
    open.close().await.unwrap();
}
