//! Serves a QCOW2 image with all that lies below it: as `now`, which clients write, and the image below it as `before`,
//! which stays as it was. Ends when it is interrupted, with the image closed.
//!
//! `cargo run -p nbd-server --example serve_chain -- /run/disk.sock tuesday.qcow2`, then
//! `nbdcopy 'nbd+unix:///before?socket=/run/disk.sock' yesterday.img`

use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use block::BlockDevice;
use nbd_server::{Export, Server, ServerConfig};
use qcow2::{Image, OpenOptions};

/// How long clients may take to leave.
const PATIENCE: Duration = Duration::from_secs(10);

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [socket, image] = arguments.as_slice() else {
        return Err("usage: serve_chain SOCKET IMAGE".into());
    };
    let served = Served::start(socket.as_ref(), image.as_ref()).await?;
    println!("listening on {socket}");
    tokio::signal::ctrl_c().await?;
    served.stop().await
}

/// A chain that clients use.
pub(crate) struct Served {
    server: Server,
    image: Image,
}

impl Served {
    pub(crate) async fn start(socket: &Path, image: &Path) -> Result<Self, Box<dyn Error>> {
        let server = Server::new(ServerConfig::default());
        // With every image below it, which are opened for reading alone.
        let image = Image::open(image, OpenOptions::writing()).await?;
        let now = Export::new("now", Arc::new(image.clone()));
        server.add_export(now.default_export(true))?;
        if let Some(below) = image.backing_image()? {
            server.add_export(Export::new("before", Arc::new(below)).read_only(true))?;
        }
        server.listen_unix(socket).await?;
        Ok(Self { server, image })
    }

    pub(crate) async fn stop(self) -> Result<(), Box<dyn Error>> {
        // What was answered is in the image by then, and nobody asks any more.
        self.server.shutdown(PATIENCE).await;
        self.image.close().await?;
        Ok(())
    }
}
