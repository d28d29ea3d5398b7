//! The same exports on a server that demands TLS, and the way in. What is said inside of TLS is told in `peer`.

use std::sync::Arc;

use nbd_server::tls::{ClientCertificates, ServerTls};
use nbd_server::wire::option;
use nbd_server::{Export, Limits, Server, ServerConfig, TlsMode};
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::certificates::Authority;
use crate::peer::FIXED;
use crate::stage::Stream;

/// A server that demands TLS, and somebody who trusts it.
pub(crate) struct Secure {
    pub(crate) server: Server,
    port: u16,
    connector: TlsConnector,
}

impl Secure {
    pub(crate) async fn new(exports: impl IntoIterator<Item = Export>, limits: Limits) -> Self {
        let directory = Authority::new().both_sides();
        let tls = ServerTls::from_directory(directory.path(), ClientCertificates::Ignored).unwrap();
        let server = Server::new(ServerConfig::with_limits(limits).tls(TlsMode::Required, tls));
        for export in exports {
            server.add_export(export).unwrap();
        }
        let port = server.listen_tcp("127.0.0.1:0".parse().unwrap()).await.unwrap().port();
        let mut roots = RootCertStore::empty();
        let authority = directory.path().join("ca-cert.pem");
        roots.add(CertificateDer::from_pem_file(authority).unwrap()).unwrap();
        let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        Self { server, port, connector: Arc::new(config).into() }
    }

    /// A connection in fixed newstyle on which TLS has begun.
    pub(crate) async fn connect(&self) -> Box<dyn Stream> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).await.unwrap();
        stream.set_nodelay(true).unwrap();
        stream.read_exact(&mut [0; 18]).await.unwrap();
        let mut asked = FIXED.to_be_bytes().to_vec();
        asked.extend(b"IHAVEOPT");
        asked.extend(option::STARTTLS.to_be_bytes());
        asked.extend([0; 4]);
        stream.write_all(&asked).await.unwrap();
        let mut acknowledged = [0; 20];
        stream.read_exact(&mut acknowledged).await.unwrap();
        assert_eq!(acknowledged[12..], [0, 0, 0, 1, 0, 0, 0, 0]);
        let name = ServerName::try_from("localhost").unwrap();
        Box::new(self.connector.connect(name, stream).await.unwrap())
    }
}
