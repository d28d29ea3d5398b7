//! A TCP proxy that counts what passes through it: the wire, seen by nobody's own counters.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Result;

/// A proxy that lives as long as the test process.
pub struct CountingProxy {
    address: SocketAddr,
    to_server: Arc<AtomicU64>,
}

impl CountingProxy {
    /// Listens on a port of its own and passes every connection on to `server`.
    ///
    /// # Errors
    /// Where it cannot listen.
    pub fn start(server: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let proxy = Self { address: listener.local_addr()?, to_server: Arc::default() };
        let to_server = Arc::clone(&proxy.to_server);
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let Ok(onward) = TcpStream::connect(server) else { return };
                let (Ok(back_from), Ok(back_to)) = (onward.try_clone(), client.try_clone()) else {
                    return;
                };
                let to_server = Arc::clone(&to_server);
                std::thread::spawn(move || pump(client, onward, Some(&to_server)));
                std::thread::spawn(move || pump(back_from, back_to, None));
            }
        });
        Ok(proxy)
    }

    /// Where clients connect.
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// Bytes that went from clients to the server since the last call.
    pub fn take_to_server(&self) -> u64 {
        self.to_server.swap(0, Ordering::SeqCst)
    }
}

/// Copies one direction until it ends; counts before passing on, so that nothing arrives uncounted.
fn pump(mut from: TcpStream, mut to: TcpStream, count: Option<&AtomicU64>) {
    let mut buffer = vec![0; 256 << 10];
    while let Ok(len @ 1..) = from.read(&mut buffer) {
        if let Some(count) = count {
            count.fetch_add(len as u64, Ordering::SeqCst);
        }
        if to.write_all(&buffer[..len]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}
