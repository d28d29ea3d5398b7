//! Foreign clients over TLS: libnbd's programs and QEMU's, with certificates in the directories of their conventions.
//! A client that is missing fails its test.

use std::path::Path;
use std::process::Output;
use std::sync::Arc;

use block::{BlockDevice, ByteRange, MemoryDevice};
use nbd_server::tls::{ClientCertificates, ServerTls};
use nbd_server::{Export, Server, ServerConfig, TlsMode};
use tempfile::TempDir;

use super::SIZE;
use crate::certificates::{Authority, Subject};
use crate::peers::run;

/// A server with the export "disk" on TCP and on a Unix socket, which demands TLS and a certificate.
struct Stage {
    server: Server,
    disk: Arc<MemoryDevice>,
    authority: Authority,
    /// Of both sides.
    certificates: TempDir,
    port: u16,
}

impl Stage {
    async fn new() -> Self {
        let authority = Authority::new();
        let certificates = authority.both_sides();
        let required = ClientCertificates::Required;
        let tls = ServerTls::from_directory(certificates.path(), required).unwrap();
        let server = Server::new(ServerConfig::default().tls(TlsMode::Required, tls));
        let disk = MemoryDevice::new(SIZE);
        server.add_export(Export::new("disk", Arc::clone(&disk) as _)).unwrap();
        server.listen_unix(&certificates.path().join("socket")).await.unwrap();
        let address = server.listen_tcp("127.0.0.1:0".parse().unwrap()).await.unwrap();
        Self { server, disk, authority, certificates, port: address.port() }
    }

    fn dir(&self) -> &Path {
        self.certificates.path()
    }

    /// The URI of "disk" for libnbd, with the certificates in a directory.
    fn tcp(&self, certificates: &Path) -> String {
        let directory = certificates.display();
        format!("nbds://localhost:{}/disk?tls-certificates={directory}", self.port)
    }

    fn unix(&self) -> String {
        let dir = self.dir().display();
        format!("nbds+unix:///disk?socket={dir}/socket&tls-certificates={dir}")
    }

    /// QEMU's options for its credentials, and its name of "disk".
    fn qemu(&self, certificates: &Path, more: &str) -> (String, String) {
        let dir = certificates.display();
        let object = format!("tls-creds-x509,id=tls,endpoint=client,dir={dir}{more}");
        let port = self.port;
        let image = format!(
            "driver=raw,file.driver=nbd,file.server.type=inet,file.server.host=localhost,\
             file.server.port={port},file.export=disk,file.tls-creds=tls"
        );
        (object, image)
    }

    async fn run(&self, program: &str, arguments: &[&str]) -> Output {
        run(program, arguments, self.dir()).await
    }
}

fn said(output: &Output) -> String {
    let of = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    format!("{}{}", of(&output.stdout), of(&output.stderr))
}

#[tokio::test]
async fn libnbd_reads_and_writes_over_tls() {
    let stage = Stage::new().await;
    for uri in [stage.tcp(stage.dir()), stage.unix()] {
        let info = stage.run("nbdinfo", &[&uri]).await;
        assert!(info.status.success(), "{uri}: {}", said(&info));
        assert!(said(&info).contains("with TLS"), "{}", said(&info));
        let content: Vec<u8> = (0..SIZE)
            .map(|at| u8::try_from((at / 512 + uri.len() as u64) % 251).unwrap())
            .collect();
        let (from, back) = (stage.dir().join("from"), stage.dir().join("back"));
        std::fs::write(&from, &content).unwrap();
        let there = stage.run("nbdcopy", &[from.to_str().unwrap(), &uri]).await;
        assert!(there.status.success(), "{}", said(&there));
        let stored = stage.disk.read(ByteRange::new(0, SIZE).unwrap()).await.unwrap();
        assert!(stored.to_vec() == content);
        let again = stage.run("nbdcopy", &[&uri, back.to_str().unwrap()]).await;
        assert!(again.status.success(), "{}", said(&again));
        assert!(std::fs::read(&back).unwrap() == content);
    }
}

#[tokio::test]
async fn qemu_reads_and_writes_over_tls() {
    let stage = Stage::new().await;
    let (object, image) = stage.qemu(stage.dir(), "");
    for version in ["", ",priority=NORMAL:-VERS-ALL:+VERS-TLS1.2"] {
        let object = format!("{object}{version}");
        let io = ["--object", &object, "--image-opts", &image];
        let commands = ["-c", "write -P 5 0 1M", "-c", "flush", "-c", "read -P 5 4k 512k"];
        let output = stage.run("qemu-io", &[&io[..], &commands].concat()).await;
        assert!(output.status.success(), "{}", said(&output));
        assert!(!said(&output).contains("Pattern verification failed"), "{}", said(&output));
    }
    let stored = stage.disk.read(ByteRange::new(0, 1 << 20).unwrap()).await.unwrap();
    assert!(stored.to_vec().iter().all(|byte| *byte == 5));
}

#[tokio::test]
async fn foreign_clients_that_are_not_trusted_or_do_not_trust_get_nothing() {
    let stage = Stage::new().await;
    let other = Authority::new();
    let anonymous = stage.authority.directory();
    let distrustful = other.directory();
    stage.authority.add(distrustful.path(), &Subject::client("client of a test"));
    let stranger = stage.authority.directory();
    other.add(stranger.path(), &Subject::client("client of a test"));
    for directory in [&anonymous, &distrustful, &stranger] {
        let uri = stage.tcp(directory.path());
        let output = stage.run("nbdinfo", &[&uri]).await;
        assert_eq!(output.status.code(), Some(1), "{}", said(&output));
        let (object, image) = stage.qemu(directory.path(), "");
        let info = ["info", "--object", &object, "--image-opts", &image];
        let output = stage.run("qemu-img", &info).await;
        assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    }
    let plain = format!("nbd://localhost:{}/disk", stage.port);
    let output = stage.run("nbdinfo", &[&plain]).await;
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert_eq!(stage.server.exports()[0].counters.connections, 0);
    let trusted = stage.run("nbdinfo", &[&stage.tcp(stage.dir())]).await;
    assert!(trusted.status.success(), "{}", said(&trusted));
}
