//! A whole session of the server on arbitrary bytes over a memory device: it ends by itself, within the bound of its
//! input, and the server shuts down cleanly behind it.

use std::time::Duration;

use block::MemoryDevice;
use nbd_server::{Export, Server, ServerConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const DEVICE_BYTES: u64 = 1 << 20;

/// All that a client says.
pub(crate) async fn run(data: &[u8]) {
    let server = Server::new(ServerConfig::default());
    let device = MemoryDevice::new(DEVICE_BYTES);
    server.add_export(Export::new("disk", device).default_export(true)).expect("one export");
    let (ours, theirs) = tokio::io::duplex(64 << 10);
    server.serve_stream(theirs);
    let (mut reader, mut writer) = tokio::io::split(ours);
    let talk = async {
        // The server may close at any time; what it does not take is not our business.
        let _ = writer.write_all(data).await;
        let _ = writer.shutdown().await;
    };
    let listen = async {
        let mut replies = Vec::new();
        let _ = reader.read_to_end(&mut replies).await;
    };
    tokio::join!(talk, listen);
    server.shutdown(Duration::from_secs(5)).await;
}
