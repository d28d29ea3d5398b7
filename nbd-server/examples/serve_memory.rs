//! Serves 1 GiB of memory until it is interrupted. Then `nbdinfo nbd://localhost/scratch` tells of it.
//!
//! `cargo run -p nbd-server --example serve_memory -- 127.0.0.1:10809`

use std::error::Error;
use std::net::SocketAddr;

use block::MemoryDevice;
use nbd_server::{Export, Server, ServerConfig};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let address = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:10809".to_owned());
    let (_server, address) = serve(address.parse()?).await?;
    println!("listening on {address}");
    std::future::pending().await
}

/// Port 0 takes any that is free.
pub(crate) async fn serve(address: SocketAddr) -> Result<(Server, SocketAddr), Box<dyn Error>> {
    let server = Server::new(ServerConfig::default());
    let disk = MemoryDevice::new(1 << 30);
    server.add_export(Export::new("scratch", disk).default_export(true))?;
    let address = server.listen_tcp(address).await?;
    Ok((server, address))
}
