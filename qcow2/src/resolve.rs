//! Which layer of a chain answers for which bytes. Goes down the chain layer by layer in one loop, so that the deepest
//! chain needs no more stack than an image alone.

use std::sync::Arc;

use block::{ByteRange, RangeGuard};

use crate::error::Error;
use crate::image::{Inner, Live};
use crate::layers::Below;
use crate::mapping::{Extent, Place};
use crate::units::HostOffset;

/// A QCOW2 layer that was asked.
pub(crate) struct Layer {
    pub(crate) image: Arc<Inner>,
    pub(crate) live: Arc<Live>,
    /// Keeps its clusters as they are.
    _guard: Option<RangeGuard>,
}

/// What answers for a part of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// This layer; where it says [`Place::Unallocated`], none below has anything there.
    Layer(Place),
    /// The device below this layer, which is not a QCOW2 image.
    Device,
}

/// A part of a range, and what answers for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) range: ByteRange,
    /// The number of the layer, the top one being 0.
    pub(crate) depth: usize,
    pub(crate) source: Source,
}

/// The layers that were asked, from the top, and what answers: parts in order, without gaps, at least one.
pub(crate) struct Answers {
    pub(crate) layers: Vec<Layer>,
    pub(crate) parts: Vec<Part>,
}

impl Answers {
    /// Where they end: where the range did, or before.
    pub(crate) fn end(&self) -> u64 {
        self.parts.last().map_or(0, |last| last.range.end())
    }
}

/// Whether the clusters of a range may change while the answers are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Clusters {
    /// They stay as they are as long as the answers live.
    Locked,
    /// Requests go on.
    Free,
}

impl Inner {
    /// Which layers answer for a range that is not empty. Looks at `most` extents of each layer at most, and ends before
    /// the range does where one has more.
    ///
    /// # Errors
    /// What any of the layers fails at.
    pub(crate) async fn resolve(
        self: &Arc<Self>,
        range: ByteRange,
        most: usize,
        clusters: Clusters,
    ) -> Result<Answers, Error> {
        let (mut layers, mut parts) = (Vec::new(), Vec::new());
        // What no layer so far has answered for, in order, and how far all of them have been asked.
        let (mut open, mut end) = (vec![range], range.end());
        let mut next = Some(Arc::clone(self));
        while let Some(image) = next.take() {
            // The clusters of a layer that is below and not written stay as they are; the top one is closed before it.
            let is_fixed = !layers.is_empty() && image.limits().read_only;
            let clusters = if is_fixed { Clusters::Free } else { clusters };
            let layer = Layer::enter(image, &open, clusters).await?;
            let mut left = Vec::new();
            let stopped = layer.ask(layers.len(), &open, most, &mut parts, &mut left).await?;
            end = stopped.unwrap_or(end);
            open = left;
            if !open.is_empty() {
                match &layer.live.below {
                    Some(Below::Image(below)) => next = Some(Arc::clone(&below.inner)),
                    _ => parts.extend(open.drain(..).map(|range| Part {
                        range,
                        depth: layers.len(),
                        source: Source::Device,
                    })),
                }
            }
            layers.push(layer);
        }
        parts.retain(|part| part.range.start() < end);
        for part in &mut parts {
            part.range = ByteRange::between(part.range.start(), part.range.end().min(end));
        }
        parts.sort_unstable_by_key(|part| part.range.start());
        Ok(Answers { layers, parts })
    }
}

impl Layer {
    async fn enter(
        image: Arc<Inner>,
        open: &[ByteRange],
        clusters: Clusters,
    ) -> Result<Self, Error> {
        // Refused at once where the image is closing, instead of waiting until it is closed.
        let live = image.live()?;
        if clusters == Clusters::Free {
            return Ok(Self { image, live, _guard: None });
        }
        let start = open.first().map_or(0, |first| first.start());
        let all = ByteRange::between(start, open.last().map_or(start, |last| last.end()));
        let guard = image.guests.lock_shared(image.widen(all)).await;
        let live = image.live()?;
        Ok(Self { image, live, _guard: Some(guard) })
    }

    /// Puts what this layer answers into `parts` and what it leaves to those below into `left`. Gives the place where
    /// it stopped, unless it was asked for all.
    async fn ask(
        &self,
        depth: usize,
        open: &[ByteRange],
        most: usize,
        parts: &mut Vec<Part>,
        left: &mut Vec<ByteRange>,
    ) -> Result<Option<u64>, Error> {
        let below = self.live.backing.as_ref().map_or(0, |backing| backing.limits().size_bytes);
        let below = ByteRange::between(0, below);
        let mut count = 0;
        for wanted in open {
            let mut rest = *wanted;
            while !rest.is_empty() {
                if count >= most {
                    return Ok(Some(rest.start()));
                }
                let lookup = |core: &mut crate::core::Core| core.lookup(rest, most - count);
                let found = self.image.step(&self.live, lookup).await?;
                count += found.len().max(1);
                let reached = found.last().map_or(rest.end(), |last| last.range.end());
                for Extent { range, place } in found {
                    let mut own = range;
                    let mut place = place;
                    if let Place::Unallocated { host } = &mut place {
                        let deeper = range.intersection(below);
                        if !deeper.is_empty() {
                            push(left, deeper);
                            own = ByteRange::between(deeper.end(), range.end());
                            *host = host.map(|at| HostOffset(at.0 + deeper.len()));
                        }
                    }
                    if !own.is_empty() {
                        parts.push(Part { range: own, depth, source: Source::Layer(place) });
                    }
                }
                rest = ByteRange::between(reached, rest.end());
            }
        }
        Ok(None)
    }
}

fn push(all: &mut Vec<ByteRange>, next: ByteRange) {
    match all.last_mut() {
        Some(last) if last.end() == next.start() => {
            *last = ByteRange::between(last.start(), next.end());
        }
        _ => all.push(next),
    }
}
