//! Copying a disk into another: what the source knows to be zero is not read, what the target knows to be zero is not
//! written, and several requests are in flight. Files are opened, made and named by the caller.

mod pace;
mod runs;
mod salvage;

use std::num::NonZeroU64;
use std::sync::Arc;

use block::{
    BlockDevice, ByteRange, DeviceError, Durability, InFlight, Segment, Segments, ZeroMode,
    try_join_all,
};
use bytes::Bytes;
use tokio::sync::oneshot;

use crate::image::Image;
use crate::lend::{Lent, Taker};
use crate::progress::Progress;
use crate::read::LayerState;
use crate::units::index;
use crate::walk::{Layers, Walk};
use pace::Pace;
use runs::Run;

/// How much is read and written at once, in bytes.
const CHUNK_BYTES: u64 = 2 << 20;
/// How many zeros are written at once, in bytes: a step of the progress.
const ZERO_STEP_BYTES: u64 = 1 << 30;
/// How many chunks are in flight where the caller does not say otherwise.
const DEFAULT_REQUESTS: usize = 8;
/// The most chunks that are in flight, whatever the caller says: with [`CHUNK_BYTES`] the bound on memory.
const MAX_REQUESTS: usize = 64;
/// How many zeros in a row are left out where the caller does not say otherwise, in bytes.
const DEFAULT_SPARSE_BYTES: u64 = 4096;
/// The most unreadable ranges that are remembered; what lies in others is only counted.
pub const MAX_UNREADABLE_RANGES: usize = 1 << 16;

/// How a disk is copied.
#[derive(Clone)]
pub struct ConvertOptions {
    /// So many zeros in a row, in bytes, become zeros that take no space. Taken as a power of two from 512 to 2 MiB;
    /// 0: none do, and everything is allocated.
    pub sparse_bytes: u64,
    /// Whether the caller knows that the target reads as zeros. Otherwise the target is asked.
    pub target_is_zero: bool,
    /// The source as an image, if the target has the same backing file: what this layer says nothing about is left
    /// out.
    pub layer: Option<Image>,
    /// How many chunks of 2 MiB are in flight: 1 to 64.
    pub requests: usize,
    /// Whether writes begin in the order of the disk, so that a new image is laid out like it.
    pub in_order: bool,
    /// The most bytes that are read in a second.
    pub bytes_per_sec: Option<NonZeroU64>,
    /// Whether to go on where the source cannot be read: with zeros, and a note in [`Converted::unreadable`].
    pub salvage: bool,
}

impl Default for ConvertOptions {
    fn default() -> Self {
        Self {
            sparse_bytes: DEFAULT_SPARSE_BYTES,
            target_is_zero: false,
            layer: None,
            requests: DEFAULT_REQUESTS,
            in_order: true,
            bytes_per_sec: None,
            salvage: false,
        }
    }
}

/// Where a copy goes.
#[derive(Clone)]
pub enum ConvertTarget {
    /// A disk.
    Device(Arc<dyn BlockDevice>),
    /// An image, in compressed clusters: zeros count by clusters then, whatever [`ConvertOptions::sparse_bytes`] says.
    Compressed {
        /// The image.
        image: Image,
        /// From 1 (fast) to [`crate::Compression::max_level`]; `None`: the usual one.
        level: Option<u8>,
    },
}

/// What a copy did, in bytes of the disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Converted {
    /// Written as data.
    pub written_bytes: u64,
    /// Written as zeros.
    pub zeroed_bytes: u64,
    /// Of what was written as data: copied, or shared, by the host alone.
    pub by_host_bytes: u64,
    /// Left out, because the target read like that already.
    pub skipped_bytes: u64,
    /// Could not be read, and became zeros.
    pub unreadable_bytes: u64,
    /// Where that was, in order: the first [`MAX_UNREADABLE_RANGES`] ranges of it.
    pub unreadable: Vec<ByteRange>,
}

/// Why a copy is not complete.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConvertError {
    /// The target is smaller than the source.
    #[error("the target has {target_bytes} bytes, and the source {source_bytes}")]
    TargetTooSmall {
        /// The size of the source.
        source_bytes: u64,
        /// The size of the target.
        target_bytes: u64,
    },
    /// A disk does not say how a range is stored.
    #[error("cannot tell how {range} are stored: {source}")]
    Extents {
        /// The range.
        range: ByteRange,
        /// What the disk answered.
        source: DeviceError,
    },
    /// The source could not be read.
    #[error("cannot read {range} of the source: {source}")]
    Read {
        /// The range.
        range: ByteRange,
        /// What the source answered.
        source: DeviceError,
    },
    /// The target could not be written.
    #[error("cannot write {range} of the target: {source}")]
    Write {
        /// The range.
        range: ByteRange,
        /// What the target answered.
        source: DeviceError,
    },
    /// The target could not be made durable.
    #[error("cannot make the target durable: {0}")]
    Flush(DeviceError),
}

/// Copies a disk into another that is at least as large, and makes the copy durable. What a larger target has behind
/// the end of the source stays as it is.
///
/// Nobody else may write to either. Dropping the future leaves the target as far as it has come.
///
/// # Errors
/// [`ConvertError`]; then the target holds a part of the source.
pub async fn convert(
    source: Arc<dyn BlockDevice>,
    target: &ConvertTarget,
    options: &ConvertOptions,
    progress: impl Fn(Progress) + Send + Sync,
) -> Result<Converted, ConvertError> {
    let images = options.layer.as_ref().map(std::slice::from_ref);
    let layers = images.map(|images| Layered { images, taker: None });
    convert_layers(source, target, options, layers, progress).await
}

/// As [`convert`], for what `layers` of the source say: the others are the target's, too.
pub(crate) async fn convert_layers(
    source: Arc<dyn BlockDevice>,
    target: &ConvertTarget,
    options: &ConvertOptions,
    layers: Option<Layered<'_>>,
    progress: impl Fn(Progress) + Send + Sync,
) -> Result<Converted, ConvertError> {
    let copy = Copy::new(source, target, options)?;
    let mut pieces = Pieces::new(&copy, options, layers.map(|layers| layers.images));
    let mut flight = InFlight::new();
    let requests = options.requests.clamp(1, MAX_REQUESTS);
    let (mut sum, mut done_bytes, mut last) = (Converted::default(), 0, None);
    loop {
        while flight.len() < requests {
            let Some(piece) = pieces.next().await? else { break };
            if piece.kind == Kind::Leave {
                sum.skipped_bytes += piece.range.len();
                done_bytes += piece.range.len();
                progress(Progress { done_bytes, total_bytes: copy.size_bytes });
                continue;
            }
            let (begun, next) = oneshot::channel();
            let turn = Turn { before: last.replace(next).filter(|_| options.in_order), begun };
            let due = pieces.pace.as_mut().filter(|_| piece.kind == Kind::Data);
            let due = due.map(|pace| pace.due(piece.range.len()));
            flight.push(copy.run(piece, turn, due, layers));
        }
        let Some(outcome) = flight.any().await else { break };
        let (range, outcome) = outcome?;
        sum.add(outcome);
        done_bytes += range.len();
        progress(Progress { done_bytes, total_bytes: copy.size_bytes });
    }
    // The last bytes need their time, too: a short copy is no faster than a long one.
    if let Some(pace) = &mut pieces.pace {
        pace.due(0).wait().await;
    }
    copy.flush().await?;
    sum.unreadable.sort_unstable();
    progress(Progress { done_bytes: copy.size_bytes, total_bytes: copy.size_bytes });
    Ok(sum)
}

impl Converted {
    fn add(&mut self, other: Self) {
        self.written_bytes += other.written_bytes;
        self.zeroed_bytes += other.zeroed_bytes;
        self.by_host_bytes += other.by_host_bytes;
        self.skipped_bytes += other.skipped_bytes;
        self.unreadable_bytes += other.unreadable_bytes;
        let room = MAX_UNREADABLE_RANGES - self.unreadable.len();
        self.unreadable.extend(other.unreadable.into_iter().take(room));
    }
}

/// Layers of a source that a copy is about.
#[derive(Clone, Copy)]
pub(crate) struct Layered<'a> {
    /// The topmost first.
    pub images: &'a [Image],
    /// The target, if it takes what they hold plainly out of their files.
    pub taker: Option<&'a Taker>,
}

/// What is done with a piece of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Read and written.
    Data,
    /// Zeroed without reading.
    Zero,
    /// Nothing.
    Leave,
}

#[derive(Clone, Copy, Debug)]
struct Piece {
    range: ByteRange,
    kind: Kind,
    /// The layer that holds the data plainly, counted from the top, where one does and is asked.
    holder: Option<usize>,
    /// The target reads as zeros there.
    target_is_zero: bool,
}

/// Cuts the source into pieces, in order.
struct Pieces<'a> {
    at: u64,
    copy: &'a Copy,
    source: Walk<'a>,
    target: Option<Walk<'a>>,
    layers: Option<Layers<'a>>,
    pace: Option<Pace>,
}

impl<'a> Pieces<'a> {
    fn new(copy: &'a Copy, options: &ConvertOptions, layers: Option<&'a [Image]>) -> Self {
        Self {
            at: 0,
            source: Walk::new(&*copy.source, copy.size_bytes),
            target: (!options.target_is_zero).then(|| Walk::new(copy.target(), copy.size_bytes)),
            layers: layers.map(Layers::new),
            pace: options.bytes_per_sec.map(Pace::new),
            copy,
        }
    }

    async fn next(&mut self) -> Result<Option<Piece>, ConvertError> {
        let at = self.at;
        if at >= self.copy.size_bytes {
            return Ok(None);
        }
        let (kind, holder, end) = self.source_kind(at).await?;
        let (target_is_zero, target_end) = self.target_zero(at).await?;
        let kind = match kind {
            Kind::Zero if target_is_zero && !self.copy.allocates() => Kind::Leave,
            kind => kind,
        };
        let unit = self.copy.unit_bytes();
        let chunk = CHUNK_BYTES.max(unit);
        let end = match kind {
            Kind::Data => end.min((at | (chunk - 1)).saturating_add(1)),
            Kind::Zero => end.min(target_end).min(at.saturating_add(ZERO_STEP_BYTES)),
            Kind::Leave => end.min(target_end),
        };
        let (kind, end) = self.copy.whole_units(at, kind, end);
        // Zeros in a chunk may be left out only if all of it is known to be zero.
        let target_is_zero = target_is_zero && target_end >= end;
        self.at = end;
        let holder = holder.filter(|_| kind == Kind::Data);
        Ok(Some(Piece { range: ByteRange::between(at, end), kind, holder, target_is_zero }))
    }

    /// What the source says of the bytes from `at` on, which layer holds them, and how far that goes.
    async fn source_kind(&mut self, at: u64) -> Result<(Kind, Option<usize>, u64), ConvertError> {
        let (mut most, mut holder) = (self.copy.size_bytes, None);
        if let Some(layers) = &mut self.layers {
            let found = layers.at(at).await;
            let said = found.map_err(|(range, source)| ConvertError::Extents { range, source })?;
            most = most.min(said.end);
            match said.by {
                None => return Ok((Kind::Leave, None, most)),
                Some((layer, LayerState::Data)) => holder = Some(layer),
                Some(_) => {}
            }
        }
        match self.source.at(at).await {
            Ok(stretch) => {
                let kind = if stretch.zero { Kind::Zero } else { Kind::Data };
                Ok((kind, holder, stretch.range.end().min(most)))
            }
            // Whatever it is: reading it will tell.
            Err(_) if self.copy.salvage => Ok((Kind::Data, None, most)),
            Err((range, source)) => Err(ConvertError::Extents { range, source }),
        }
    }

    /// Whether the target reads as zeros from `at` on, and how far that goes.
    async fn target_zero(&mut self, at: u64) -> Result<(bool, u64), ConvertError> {
        let Some(target) = &mut self.target else { return Ok((true, self.copy.size_bytes)) };
        // What cannot be asked is written.
        let stretch = target.at(at).await.ok();
        let unknown = (false, self.copy.size_bytes);
        Ok(stretch.map_or(unknown, |stretch| (stretch.zero, stretch.range.end())))
    }
}

/// Waits until the writes of the piece before have begun, and tells the next.
struct Turn {
    before: Option<oneshot::Receiver<()>>,
    begun: oneshot::Sender<()>,
}

impl Turn {
    async fn wait(self) {
        if let Some(before) = self.before {
            // One that failed has ended everything.
            let _gone = before.await;
        }
        // The last has no next. Who is woken comes after us: all run in one task, and we go on to write.
        let _none = self.begun.send(());
    }
}

/// Two disks and how one is copied into the other.
struct Copy {
    source: Arc<dyn BlockDevice>,
    target: ConvertTarget,
    size_bytes: u64,
    sparse_bytes: u64,
    salvage: bool,
}

impl Copy {
    fn new(
        source: Arc<dyn BlockDevice>,
        target: &ConvertTarget,
        options: &ConvertOptions,
    ) -> Result<Self, ConvertError> {
        let sparse_bytes = match options.sparse_bytes {
            0 => 0,
            some => some.clamp(512, CHUNK_BYTES).next_power_of_two(),
        };
        let size_bytes = source.limits().size_bytes;
        let target = target.clone();
        let copy = Self { source, target, size_bytes, sparse_bytes, salvage: options.salvage };
        let target_bytes = copy.target().limits().size_bytes;
        if target_bytes < size_bytes {
            return Err(ConvertError::TargetTooSmall { source_bytes: size_bytes, target_bytes });
        }
        Ok(copy)
    }

    fn target(&self) -> &dyn BlockDevice {
        match &self.target {
            ConvertTarget::Device(device) => &**device,
            ConvertTarget::Compressed { image, .. } => image,
        }
    }

    /// What is written as a whole, in bytes: a power of two.
    fn unit_bytes(&self) -> u64 {
        match &self.target {
            ConvertTarget::Device(_) => 1,
            ConvertTarget::Compressed { image, .. } => image.inner.cluster_bytes(),
        }
    }

    /// A piece from `at` to `end` cut to whole units. What is shorter than one is read as a whole unit: then it does
    /// not matter how its parts are stored.
    fn whole_units(&self, at: u64, kind: Kind, end: u64) -> (Kind, u64) {
        let unit = self.unit_bytes();
        let whole = if end >= self.size_bytes { end } else { end & !(unit - 1) };
        if whole > at {
            return (kind, whole);
        }
        (Kind::Data, at.saturating_add(unit).min(self.size_bytes))
    }

    /// Whether zeros take space in the target.
    fn allocates(&self) -> bool {
        self.sparse_bytes == 0
    }

    /// How many zeros in a row, aligned, are written as zeros. Images leave out clusters of zeros that come as data:
    /// where all is to be allocated, they have to come as zeros that stay allocated.
    fn zero_run_bytes(&self) -> u64 {
        match self.sparse_bytes {
            0 => self.target().limits().preferred_bytes.max(512).into(),
            some => some,
        }
    }

    async fn flush(&self) -> Result<(), ConvertError> {
        self.target().flush().await.map_err(ConvertError::Flush)
    }

    async fn run(
        &self,
        piece: Piece,
        turn: Turn,
        due: Option<pace::Due>,
        layers: Option<Layered<'_>>,
    ) -> Result<(ByteRange, Converted), ConvertError> {
        let mut outcome = Converted::default();
        if piece.kind == Kind::Zero {
            turn.wait().await;
            self.write_zeroes(piece.range).await?;
            outcome.zeroed_bytes = piece.range.len();
            return Ok((piece.range, outcome));
        }
        if let Some(due) = due {
            due.wait().await;
        }
        if let Some(Layered { images, taker: Some(taker) }) = layers
            && let Some(lent) = self.lent(piece, images).await?
        {
            turn.wait().await;
            let range = piece.range;
            let written = taker.take(range, &lent).await;
            outcome.by_host_bytes =
                written.map_err(|error| ConvertError::Write { range, source: error.into() })?;
            outcome.written_bytes = range.len();
            return Ok((range, outcome));
        }
        let content = self.read(piece.range, &mut outcome).await?;
        turn.wait().await;
        self.write(piece, &content, &mut outcome).await?;
        Ok((piece.range, outcome))
    }

    /// The bytes of a piece as the file of a layer has them, where the target can take them from there.
    async fn lent(&self, piece: Piece, layers: &[Image]) -> Result<Option<Lent>, ConvertError> {
        let Some(layer) = piece.holder.and_then(|layer| layers.get(layer)) else { return Ok(None) };
        let range = piece.range;
        let lent = layer.lend(range).await;
        lent.map_err(|error| ConvertError::Read { range, source: error.into() })
    }

    async fn read(
        &self,
        range: ByteRange,
        outcome: &mut Converted,
    ) -> Result<Segments, ConvertError> {
        match self.source.read(range).await {
            Ok(segments) => Ok(segments),
            Err(source) if !self.salvage => Err(ConvertError::Read { range, source }),
            Err(_) => salvage::read(&*self.source, range, outcome).await,
        }
    }

    async fn write(
        &self,
        piece: Piece,
        content: &Segments,
        outcome: &mut Converted,
    ) -> Result<(), ConvertError> {
        if let ConvertTarget::Compressed { image, level } = &self.target {
            outcome.written_bytes += piece.range.len();
            return compressed(image, *level, piece.range, content).await;
        }
        let mut writes = Vec::new();
        for (range, run) in runs::of(content, piece.range.start(), self.zero_run_bytes()) {
            match &run {
                Run::Data(_) => outcome.written_bytes += range.len(),
                Run::Zero if piece.target_is_zero && !self.allocates() => {
                    outcome.skipped_bytes += range.len();
                    continue;
                }
                Run::Zero => outcome.zeroed_bytes += range.len(),
            }
            writes.push(self.write_run(range, run));
        }
        try_join_all(writes).await.map(drop)
    }

    async fn write_run(&self, range: ByteRange, run: Run) -> Result<(), ConvertError> {
        match run {
            Run::Zero => self.write_zeroes(range).await,
            Run::Data(bytes) => {
                let written = self.target().write(range.start(), bytes, Durability::Deferred).await;
                written.map_err(|source| ConvertError::Write { range, source })
            }
        }
    }

    async fn write_zeroes(&self, range: ByteRange) -> Result<(), ConvertError> {
        let mode = ZeroMode { keep_allocated: self.allocates(), fast_only: false };
        let written = self.target().write_zeroes(range, mode, Durability::Deferred).await;
        written.map_err(|source| ConvertError::Write { range, source })
    }
}

/// Writes a content that begins on a cluster. A last cluster that is not the image's last is written as it is, because
/// what lies behind it stays.
async fn compressed(
    image: &Image,
    level: Option<u8>,
    range: ByteRange,
    content: &Segments,
) -> Result<(), ConvertError> {
    let failed = |source| ConvertError::Write { range, source };
    let bytes = match content.0.as_slice() {
        [Segment::Data(bytes)] => bytes.clone(),
        _ => Bytes::from(content.to_vec()),
    };
    let inner = &image.inner;
    let at_end = range.end() == image.limits().size_bytes;
    let odd = if at_end { 0 } else { range.end() % inner.cluster_bytes() };
    let whole = index(range.len() - odd);
    if whole > 0 {
        let written = inner.write_compressed(range.start(), bytes.slice(..whole), level).await;
        written.map_err(|error| failed(error.into()))?;
    }
    image.write(range.end() - odd, bytes.slice(whole..), Durability::Deferred).await.map_err(failed)
}

#[cfg(test)]
mod tests;
