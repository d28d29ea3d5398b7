//! A connection from STARTTLS on: the TLS handshake, then the negotiation and the transmission inside of it. What TLS
//! demands is told in `tls`.

use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite};

use crate::negotiate::Negotiation;
use crate::serve::{go_on, see_off};
use crate::server::Shared;

/// Serves a client to whom the beginning of TLS was acknowledged. There is no way back: without TLS the connection ends.
pub(crate) async fn serve<R, W>(
    shared: &Arc<Shared>,
    negotiation: Negotiation,
    reader: R,
    writer: W,
) where
    R: AsyncRead + Send + Unpin + 'static,
    W: AsyncWrite + Send + Unpin + 'static,
{
    let Some(tls) = shared.tls.read().clone() else { return };
    let accepting = tls.accept(tokio::io::join(reader, writer));
    let accepted = match negotiation.within(accepting).await {
        Some(Ok(accepted)) => accepted,
        Some(Err((error, stream))) => {
            tracing::warn!(peer = %negotiation.peer(), %error, "TLS with a client failed");
            // The client is to hear why.
            let (mut reader, mut writer) = stream.into_inner();
            see_off(shared, &mut reader, &mut writer).await;
            return;
        }
        None => return,
    };
    let peer = negotiation.peer();
    match &accepted.identity {
        Some(identity) => {
            negotiation.named(&identity.to_string());
            tracing::info!(%peer, client = %identity, "a client showed its certificate")
        }
        None => tracing::debug!(%peer, "TLS with a client without a certificate"),
    }
    let mut negotiation = negotiation.secured(accepted.identity);
    let (mut reader, mut writer) = tokio::io::split(accepted.stream);
    match negotiation.run(&mut reader, &mut writer).await {
        Ok(next) => go_on(shared, next, reader, writer).await,
        Err(error) => tracing::debug!(%error, "a client left during the handshake"),
    }
}
