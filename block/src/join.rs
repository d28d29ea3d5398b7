//! Waiting for several operations of one caller at once. Only what devices and copies between them need: results in
//! order, the first error at once, a bound on how many run; anything richer belongs to whoever embeds us.

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::iter::Enumerate;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::vec::IntoIter;

/// How many futures of one call run at once. Each wake-up looks at all that run, so this bounds that work, too.
const AT_ONCE: usize = 64;

/// Runs all futures, at most 64 at once, and gives their results in order.
///
/// Answers the first error that occurs. The other futures are dropped then: what they handed to the host goes on.
pub fn try_join_all<F, T, E>(futures: impl IntoIterator<Item = F>) -> TryJoinAll<F, T>
where
    F: Future<Output = Result<T, E>>,
{
    let waiting: Vec<_> = futures.into_iter().map(Box::pin).collect();
    TryJoinAll {
        results: waiting.iter().map(|_| None).collect(),
        waiting: waiting.into_iter().enumerate(),
        running: Vec::new(),
    }
}

/// The futures that [`try_join_all`] runs, as one future.
#[must_use = "futures do nothing unless awaited"]
pub struct TryJoinAll<F, T> {
    waiting: Enumerate<IntoIter<Pin<Box<F>>>>,
    running: Vec<(usize, Pin<Box<F>>)>,
    results: Vec<Option<T>>,
}

impl<F, T> Unpin for TryJoinAll<F, T> {}

impl<F, T, E> Future for TryJoinAll<F, T>
where
    F: Future<Output = Result<T, E>>,
{
    type Output = Result<Vec<T>, E>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let Self { waiting, running, results } = &mut *self;
        let mut index = 0;
        loop {
            // Whoever joins in stands at the end, and gets its first turn there.
            let places = AT_ONCE - running.len();
            running.extend(waiting.by_ref().take(places));
            let Some((place, future)) = running.get_mut(index) else { break };
            match future.as_mut().poll(context) {
                Poll::Pending => index += 1,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Ready(Ok(result)) => {
                    if let Some(slot) = results.get_mut(*place) {
                        *slot = Some(result);
                    }
                    running.swap_remove(index);
                }
            }
        }
        if running.is_empty() {
            return Poll::Ready(Ok(results.drain(..).flatten().collect()));
        }
        Poll::Pending
    }
}

/// Futures that run at once while their owner goes on to make more: it adds one as long as there is room for its
/// liking, and takes results as they come. They run only while a result is waited for.
///
/// Each wake-up looks at all that run, so a few dozen are what it is good for.
pub struct InFlight<F: Future> {
    slots: VecDeque<Slot<F>>,
}

enum Slot<F: Future> {
    Running(Pin<Box<F>>),
    Done(F::Output),
}

impl<F: Future> InFlight<F> {
    /// With none running.
    pub fn new() -> Self {
        Self { slots: VecDeque::new() }
    }

    /// Adds one, behind all others.
    pub fn push(&mut self, future: F) {
        self.slots.push_back(Slot::Running(Box::pin(future)));
    }

    /// How many run, or have a result that nobody has taken.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// The result of the one that was added first, when it is there; `None` where there is none.
    pub async fn oldest(&mut self) -> Option<F::Output> {
        poll_fn(|context| {
            self.run(context);
            self.take(|place| place == 0)
        })
        .await
    }

    /// The result of whichever is ready first; `None` where there is none.
    pub async fn any(&mut self) -> Option<F::Output> {
        poll_fn(|context| {
            self.run(context);
            self.take(|_| true)
        })
        .await
    }

    fn run(&mut self, context: &mut Context<'_>) {
        for slot in &mut self.slots {
            if let Slot::Running(future) = slot
                && let Poll::Ready(output) = future.as_mut().poll(context)
            {
                *slot = Slot::Done(output);
            }
        }
    }

    fn take(&mut self, may: impl Fn(usize) -> bool) -> Poll<Option<F::Output>> {
        if self.slots.is_empty() {
            return Poll::Ready(None);
        }
        let mut done = self.slots.iter().enumerate();
        let found = done.find(|(place, slot)| may(*place) && matches!(slot, Slot::Done(_)));
        let Some((place, _)) = found else { return Poll::Pending };
        match self.slots.remove(place) {
            Some(Slot::Done(output)) => Poll::Ready(Some(output)),
            Some(Slot::Running(_)) | None => Poll::Pending,
        }
    }
}

impl<F: Future> Default for InFlight<F> {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use tokio::sync::oneshot;

    use super::*;

    #[tokio::test]
    async fn results_come_in_order_whatever_finishes_first() {
        let (mut senders, mut receivers) = (Vec::new(), Vec::new());
        for _ in 0..200 {
            let (sender, receiver) = oneshot::channel::<usize>();
            senders.push(sender);
            receivers.push(receiver);
        }
        let joined = tokio::spawn(try_join_all(receivers));
        for (index, sender) in senders.into_iter().enumerate().rev() {
            sender.send(index).expect("somebody listens");
        }
        assert_eq!(joined.await.unwrap(), Ok((0..200).collect()));
        assert_eq!(
            try_join_all(Vec::<std::future::Ready<Result<u8, u8>>>::new()).await,
            Ok(vec![])
        );
    }

    #[tokio::test]
    async fn the_first_error_ends_all_and_no_more_than_the_bound_run() {
        let (running, most) = (Cell::new(0_usize), Cell::new(0));
        let futures = (0..500).map(|number| {
            let (running, most) = (&running, &most);
            async move {
                running.set(running.get() + 1);
                most.set(most.get().max(running.get()));
                tokio::task::yield_now().await;
                running.set(running.get() - 1);
                if number == 300 { Err(number) } else { Ok(()) }
            }
        });
        assert_eq!(try_join_all(futures).await, Err(300));
        assert_eq!(most.get(), AT_ONCE);
    }

    #[tokio::test]
    async fn those_in_flight_are_taken_in_order_or_as_they_come() {
        let (mut senders, mut flight) = (Vec::new(), InFlight::new());
        for _ in 0..4 {
            let (sender, receiver) = oneshot::channel::<u8>();
            senders.push(Some(sender));
            flight.push(receiver);
        }
        let mut send = |number: u8| {
            let sender = senders[usize::from(number)].take().expect("sent once");
            sender.send(number).expect("somebody listens");
        };
        send(2);
        assert_eq!(flight.any().await, Some(Ok(2)));
        send(1);
        {
            let mut oldest = std::pin::pin!(flight.oldest());
            let mut context = Context::from_waker(std::task::Waker::noop());
            assert!(oldest.as_mut().poll(&mut context).is_pending());
        }
        send(0);
        assert_eq!(flight.oldest().await, Some(Ok(0)));
        assert_eq!(flight.oldest().await, Some(Ok(1)));
        assert_eq!(flight.len(), 1);
        send(3);
        assert_eq!(flight.oldest().await, Some(Ok(3)));
        assert!(flight.is_empty());
        assert_eq!(flight.any().await, None);
    }
}
