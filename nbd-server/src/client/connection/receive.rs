//! The task that reads replies: headers through a small buffer, payloads straight into the memory of their request.
//! It also notices a server that owes replies and is silent.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::watch;
use tokio::time::Instant;

use super::{InFlight, Shared};
use crate::client::error::{LostCause, ReplyFault};
use crate::client::reply::{Header, Step};

/// Runs until the server hangs up or the connection dies, then tells `end`.
pub(super) async fn run(
    socket: impl AsyncRead + Unpin,
    shared: Arc<Shared>,
    stall_timeout: Option<Duration>,
    end: watch::Sender<bool>,
) {
    let mut source = Source { socket, shared: &shared, stall_timeout, amid_reply: false };
    let cause = tokio::select! {
        biased;
        _ = shared.death() => None,
        cause = source.replies() => Some(cause),
    };
    // Also after an orderly end: whoever comes later learns that nobody reads any more.
    if let Some(cause) = cause {
        shared.die(cause);
    }
    // The device may be gone by now.
    let _ = end.send(true);
}

struct Source<'a, S> {
    socket: S,
    shared: &'a Shared,
    stall_timeout: Option<Duration>,
    /// A reply has begun: its request is not in the table, but owed all the same.
    amid_reply: bool,
}

impl<S: AsyncRead + Unpin> Source<'_, S> {
    /// Reads replies until one cannot be read; says why.
    async fn replies(&mut self) -> LostCause {
        let mut scratch = Vec::new();
        loop {
            if let Err(cause) = self.reply(&mut scratch).await {
                return cause;
            }
        }
    }

    /// Reads one simple reply, or one chunk.
    async fn reply(&mut self, scratch: &mut Vec<u8>) -> Result<(), LostCause> {
        let header = self.header().await?;
        let cookie = header.cookie();
        let mut request = self.shared.take(cookie).ok_or(ReplyFault::UnknownCookie { cookie })?;
        self.amid_reply = true;
        let mut step = request.assembly.begin(header)?;
        loop {
            step = match step {
                Step::Bytes(len) => {
                    scratch.clear();
                    scratch.resize(len, 0);
                    self.fill(scratch).await?;
                    request.assembly.bytes(scratch)?
                }
                Step::Fill { at, len } => {
                    let outside = ReplyFault::OutsideRequest { offset: at as u64, len: len as u64 };
                    let place = request.destination.get_mut(at, len).ok_or(outside)?;
                    self.fill(place).await?;
                    request.assembly.filled()?
                }
                Step::More => {
                    request.since = Instant::now();
                    self.shared.put_back(cookie, request);
                    break;
                }
                Step::Done => {
                    answer(request);
                    break;
                }
            }
        }
        self.amid_reply = false;
        Ok(())
    }

    async fn header(&mut self) -> Result<Header, LostCause> {
        let mut bytes = [0; Header::LONGEST];
        self.fill(bytes.split_at_mut(Header::SHORTEST).0).await?;
        let missing = Header::len(&bytes)? - Header::SHORTEST;
        self.fill(bytes.split_at_mut(Header::SHORTEST).1.split_at_mut(missing).0).await?;
        Ok(Header::decode(&bytes)?)
    }

    /// Fills `place`, however slowly it comes, as long as something comes.
    async fn fill(&mut self, mut place: &mut [u8]) -> Result<(), LostCause> {
        while !place.is_empty() {
            let count = self.some(place).await?;
            if count == 0 {
                return Err(LostCause::Closed);
            }
            place = place.split_at_mut(count).1;
        }
        Ok(())
    }

    /// Reads at least a byte; 0 means that the server hung up.
    async fn some(&mut self, place: &mut [u8]) -> Result<usize, LostCause> {
        let Some(limit) = self.stall_timeout else {
            return hung_up(self.socket.read(place).await);
        };
        loop {
            let waiting_since = Instant::now();
            // A read that is dropped has taken nothing from the stream.
            match tokio::time::timeout(limit, self.socket.read(place)).await {
                Ok(read) => return hung_up(read),
                Err(_) if self.amid_reply || self.shared.owes_since(waiting_since) => {
                    return Err(LostCause::Stalled(limit));
                }
                Err(_) => {}
            }
        }
    }
}

/// A server that ends TLS without saying so has hung up, too.
fn hung_up(read: std::io::Result<usize>) -> Result<usize, LostCause> {
    match read {
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Ok(0),
        read => Ok(read?),
    }
}

/// Tells the caller, if it still waits. The place in the window is free from here.
fn answer(request: InFlight) {
    let InFlight { assembly, destination, answer, .. } = request;
    let outcome = assembly.finish(|| destination.freeze());
    // Nobody waits any more: the buffer goes back where it came from.
    let _ = answer.send(outcome);
}
