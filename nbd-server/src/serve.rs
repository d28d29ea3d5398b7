//! One client from its first byte to its last: the negotiation, then transmission, and what the attendant of the export
//! does after it. What is said is told in `negotiate` and `connection`.

use std::pin::pin;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;

use crate::clients::Client;
use crate::connection::{self, Ended};
use crate::export::Attachment;
use crate::negotiate::{Entered, Negotiation, Next};
use crate::server::Shared;

/// Serves a client.
pub(crate) async fn serve<R, W>(
    shared: &Arc<Shared>,
    mut reader: R,
    mut writer: W,
    client: &Arc<Client>,
) where
    R: AsyncRead + Send + Unpin + 'static,
    W: AsyncWrite + Send + Unpin + 'static,
{
    let mut negotiation = Negotiation::new(shared, client);
    match negotiation.run(&mut reader, &mut writer).await {
        #[cfg(feature = "tls")]
        Ok(Next::StartTls) => crate::secure::serve(shared, negotiation, reader, writer).await,
        Ok(next) => go_on(shared, next, reader, writer).await,
        Err(error) => tracing::debug!(%error, "a client left during the handshake"),
    }
}

/// What comes after a negotiation, other than TLS.
pub(crate) async fn go_on<R, W>(shared: &Arc<Shared>, next: Next, mut reader: R, mut writer: W)
where
    R: AsyncRead + Send + Unpin,
    W: AsyncWrite + Send + Unpin + 'static,
{
    match next {
        Next::Enter(entered) => attend(shared, *entered, reader, writer).await,
        Next::StartTls | Next::Close => see_off(shared, &mut reader, &mut writer).await,
    }
}

/// Closes a connection that does not enter an export; once somebody else finds no place, without waiting for its client.
pub(crate) async fn see_off<R, W>(shared: &Shared, reader: &mut R, writer: &mut W)
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let closing = connection::linger(reader, writer, shared.limits.close_timeout);
    // Dropped or not: it is closed next.
    tokio::select! {
        biased;
        _ = shared.unless_dropped(closing) => {}
        () = shared.connections.refused() => {}
    }
}

/// Transmission, and what the attendant of the export, which has let the client in, does after it.
async fn attend<R, W>(shared: &Arc<Shared>, entered: Entered, reader: R, writer: W)
where
    R: AsyncRead + Send + Unpin,
    W: AsyncWrite + Send + Unpin + 'static,
{
    let export = entered.agreement.facts.name.clone();
    let (attachment, attendant) = (entered.attachment.clone(), entered.attachment.attendant());
    let client = Arc::clone(&attachment.client);
    tracing::Span::current().record("export", &*export);
    // A connection enters one export.
    let _ = client.export.set(export);
    tracing::debug!("a client uses the export");
    attachment.begin();
    let transmission = connection::transmit(shared, entered, reader, writer);
    let ended = shared.unless_dropped(transmission).await;
    part(shared, attachment, ended).await;
    shared.departures.tell();
    if let Some(attendant) = attendant {
        let _ = shared.unless_over(attendant.left(&client.peer)).await;
    }
    shared.left.raise();
}

/// Gives back what the connection held, and only then lets the client know that it is over: who has seen its end finds
/// the export sealed. Where that takes too long, the client does not wait for it.
async fn part<R, W>(shared: &Shared, attachment: Attachment, ended: Option<Ended<R, W>>)
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let by_word = ended.as_ref().is_some_and(|ended| ended.by_word);
    let farewell = ended.and_then(|ended| ended.farewell);
    let mut leaving = pin!(shared.unless_dropped(attachment.leave(shared, by_word)));
    let left = timeout(shared.limits.sealing_patience(), &mut leaving).await;
    let closing = async {
        if let Some(farewell) = farewell {
            // Dropped or not: it is closed next.
            let _ = shared.unless_dropped(farewell.say(shared.limits.close_timeout)).await;
        }
    };
    match left {
        Ok(_) => closing.await,
        Err(_) => drop(tokio::join!(closing, leaving)),
    }
}
