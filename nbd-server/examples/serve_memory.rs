//! Serves 1 GiB of memory on the usual port until it is interrupted. Try `nbdinfo nbd://localhost/scratch`.

use block::MemoryDevice;
use nbd_server::{Export, Server, ServerConfig};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let server = Server::new(ServerConfig::default());
    server.add_export(Export::new("scratch", MemoryDevice::new(1 << 30)).default_export(true))?;
    println!("listening on {}", server.listen_tcp("127.0.0.1:10809".parse()?).await?);
    std::future::pending().await
}
