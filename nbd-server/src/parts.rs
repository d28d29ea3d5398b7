//! A READ for which there is no memory now: it is answered in parts that fit into what the connection has of its own, each
//! read when the one before is on the wire. Where all of it is granted meanwhile, the rest comes at once.

use std::pin::{Pin, pin};
use std::sync::Arc;

use block::{ByteRange, Segments};
use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use crate::connection::{Session, Ticket};
use crate::memory::{RESERVE_BYTES, Share};
use crate::outlet::{Content, Outgoing};
use crate::reply::{Answer, Asked};
use crate::request::Command;
use crate::wire::Request;

/// The parts of a READ, as they come.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) read: ByteRange,
    /// As in [`Command::Read`].
    pub(crate) whole: bool,
    pub(crate) coming: mpsc::Receiver<Part>,
}

/// One part, to be dropped when it is written.
#[derive(Debug)]
pub(crate) struct Part {
    /// What was read, or what it failed with.
    pub(crate) content: Result<Segments, Answer>,
    _share: Option<Share>,
    _written: oneshot::Sender<()>,
}

/// A READ that is answered in parts.
pub(crate) struct LongRead {
    pub(crate) request: Request,
    pub(crate) range: ByteRange,
    pub(crate) whole: bool,
    pub(crate) ticket: Ticket,
}

/// What is still waited for.
type Waiting<'a> = Option<Pin<&'a mut (dyn Future<Output = Share> + Send)>>;

impl LongRead {
    /// Reads and hands on one part after the other, until all are written or nobody takes them.
    pub(crate) async fn work(self, session: &Arc<Session>, replies: &mpsc::Sender<Outgoing>) {
        let Self { request, range, whole, ticket } = self;
        let begun = Instant::now();
        let _turn = session.account.parts().await;
        let (parts, coming) = mpsc::channel(1);
        let content = Content::Parts(Parts { read: range, whole, coming });
        if replies.send(Outgoing { asked: Asked::from(&request), content, ticket }).await.is_err() {
            return;
        }
        let mut all = pin!(session.account.take(range.len()));
        let mut waiting: Waiting<'_> = Some(all.as_mut());
        let (mut at, mut granted) = (range.start(), None);
        let mut answer = Answer::Done;
        while at < range.end() && answer == Answer::Done {
            let share: Option<Share> = granted.take();
            let len = if share.is_some() { range.end() - at } else { RESERVE_BYTES.into() };
            let piece = ByteRange::between(at, range.end().min(at + len));
            at = piece.end();
            let one = async {
                let content = session.read_part(piece, whole).await;
                let failed = content.clone().err();
                let (written, gone) = oneshot::channel();
                let part = Part { content, _share: share, _written: written };
                // An error means that the client is gone.
                if parts.send(part).await.is_err() {
                    return None;
                }
                let _written = gone.await;
                Some(failed.unwrap_or(Answer::Done))
            };
            let Some(done) = beside(one, &mut waiting, &mut granted).await else { return };
            answer = done;
        }
        session.count(&request, Command::Read { range, whole }, &answer, begun);
    }
}

/// Does `work`, and notes the memory that is granted meanwhile.
async fn beside<T>(
    work: impl Future<Output = T>,
    waiting: &mut Waiting<'_>,
    granted: &mut Option<Share>,
) -> T {
    let mut work = pin!(work);
    loop {
        let Some(memory) = waiting else { return work.await };
        tokio::select! {
            biased;
            done = &mut work => return done,
            share = memory => {
                *granted = Some(share);
                *waiting = None;
            }
        }
    }
}

impl Session {
    async fn read_part(&self, range: ByteRange, whole: bool) -> Result<Segments, Answer> {
        match self.work(Command::Read { range, whole }, Bytes::new(), &[], 0).await {
            Answer::Data { segments, .. } => Ok(segments),
            failed => Err(failed),
        }
    }
}
