//! TLS on the server's side: against our client, against one without manners, and against foreign ones.

mod own_client;
mod peers;
mod raw;

use std::path::Path;

use block::MemoryDevice;
use nbd_server::client::{Address, ClientOptions};
use nbd_server::tls::{ClientCertificates, ClientTls, ServerTls};
use nbd_server::{Export, Limits, Server, ServerConfig, TlsMode};

/// The size of "disk" in bytes.
const SIZE: u64 = 8 << 20;

/// A server with the export "disk" and the certificate in a directory.
fn server(directory: &Path, mode: TlsMode, clients: ClientCertificates) -> Server {
    server_with(directory, mode, clients, Limits::default())
}

fn server_with(
    directory: &Path,
    mode: TlsMode,
    clients: ClientCertificates,
    limits: Limits,
) -> Server {
    let tls = ServerTls::from_directory(directory, clients).unwrap();
    let server = Server::new(ServerConfig::with_limits(limits).tls(mode, tls));
    server.add_export(Export::new("disk", MemoryDevice::new(SIZE)).default_export(true)).unwrap();
    server
}

/// A TCP address of the server.
async fn listen(server: &Server) -> Address {
    let address = server.listen_tcp("127.0.0.1:0".parse().unwrap()).await.unwrap();
    Address::Tcp { host: "127.0.0.1".to_owned(), port: address.port() }
}

/// Options of a client that trusts the authority in a directory and shows the certificate there.
fn options(directory: &Path) -> ClientOptions {
    with(ClientTls::from_directory(directory).unwrap())
}

fn with(tls: ClientTls) -> ClientOptions {
    ClientOptions { tls: Some(tls), ..ClientOptions::default() }
}
