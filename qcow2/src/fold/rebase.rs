//! Putting an image over another backing file. Where old and new one differ, the image takes the old bytes itself
//! first; then one header says where it lies.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::{BlockDevice, ByteRange, Durability, HostFile, Segments, ZeroMode, is_zero};
use bytes::Bytes;

use super::chain::{Chain, Writes};
use super::names::check;
use super::plan::{FoldPlan, LayerPlan};
use super::{FoldError, FoldOptions, Folded};
use crate::backing::Trail;
use crate::convert::ConvertError;
use crate::create::{BackingFormat, BackingName};
use crate::error::Error;
use crate::image::Image;
use crate::open::{OpenOptions, open_found, read_header};
use crate::progress::Progress;
use crate::units::index;
use crate::walk::{Layers, Walk};

/// How much is compared at once, in bytes.
const PIECE_BYTES: u64 = 4 << 20;

/// What an image is put over.
#[derive(Clone, Debug, Default)]
pub struct RebaseOptions {
    /// How it is opened; nothing else of it counts.
    pub copy: FoldOptions,
    /// The new backing file, named as the image is to record it; none at all otherwise.
    pub backing: Option<BackingName>,
    /// Record the name and nothing else: for a backing file that was moved. Over one that reads differently the image
    /// reads differently, too. Neither file need exist.
    pub unchecked: bool,
    /// Compress what the image takes from its old backing file.
    pub compress: bool,
}

/// Puts the image `top` over another backing file, so that it reads as before.
///
/// At every moment it does, whatever ends the work; what was copied by then stays. Its internal snapshots are left alone,
/// as by `qemu-img rebase`: where they hold nothing themselves they show the new backing file from then on.
///
/// # Errors
/// [`FoldError`]; calling again goes on.
pub async fn rebase(
    top: &Path,
    options: &RebaseOptions,
    progress: impl Fn(Progress) + Send + Sync,
) -> Result<Folded, FoldError> {
    check(top, options.backing.as_ref())?;
    let writing = OpenOptions { read_only: false, snapshot: None, ..options.copy.open.clone() };
    let file = writing.open_file(top, BackingFormat::Qcow2).await?;
    let mut folded = Folded::default();
    if !options.unchecked {
        let work = Rebase::open(top, &file, &writing, options).await?;
        work.image.inner.core.lock().expect_any_backing();
        let copied = work.run(Some(options.compress), &progress).await;
        let closed = work.close().await;
        folded = copied?;
        closed?;
    }
    Image::set_backing_on(&file, options.backing.as_ref()).await?;
    Ok(folded)
}

/// What [`rebase`] would do: it compares, and writes nothing.
///
/// # Errors
/// As [`rebase`], as far as it can be foreseen.
pub async fn plan_rebase(
    top: &Path,
    options: &RebaseOptions,
    progress: impl Fn(Progress) + Send + Sync,
) -> Result<FoldPlan, FoldError> {
    check(top, options.backing.as_ref())?;
    let reading = OpenOptions { read_only: true, snapshot: None, ..options.copy.open.clone() };
    let mut layers = Vec::new();
    let file = reading.open_file(top, BackingFormat::Qcow2).await?;
    let snapshots = read_header(&file).await?.snapshots;
    if !options.unchecked {
        let work = Rebase::open(top, &file, &reading, options).await?;
        let path = work.old_path.clone().unwrap_or_default();
        let copied = work.run(None, &progress).await;
        work.close().await?;
        let copied = copied?;
        let (data_bytes, zero_bytes) = (copied.written_bytes, copied.zeroed_bytes);
        layers.push(LayerPlan { path, data_bytes, zero_bytes });
    }
    Ok(FoldPlan {
        into: top.to_owned(),
        layers,
        relinked: vec![top.to_owned()],
        snapshots,
        ..FoldPlan::default()
    })
}

/// An image between its old and its new backing file.
struct Rebase {
    image: Image,
    old: Option<Arc<dyn BlockDevice>>,
    old_path: Option<PathBuf>,
    new: Option<Arc<dyn BlockDevice>>,
    /// The layers over the new backing file, where that is in the old chain: the image first.
    between: Vec<Image>,
    /// The unit in which the image takes bytes.
    unit_bytes: u64,
}

impl Rebase {
    async fn open(
        top: &Path,
        file: &HostFile,
        options: &OpenOptions,
        wanted: &RebaseOptions,
    ) -> Result<Self, FoldError> {
        let trail = Trail::start(top, &options.references)?.enter(top, file.id())?;
        let header = read_header(file).await?;
        let below = OpenOptions { read_only: true, ..options.clone() };
        let (mut old_path, mut old_found) = (None, None);
        let old = match &header.backing_name {
            None => None,
            Some(name) => {
                let format = header.extensions.backing_format.as_deref();
                let found = trail.resolve(top, name, format)?;
                old_path = Some(found.path.clone());
                old_found = Some(found.clone());
                Some(open_found(found, below.clone(), trail.clone()).await?)
            }
        };
        let mut new_path = None;
        let new = match &wanted.backing {
            None => None,
            Some(BackingName { path, format }) => {
                let found = trail.resolve(top, path.as_bytes(), Some(format.name().as_bytes()));
                let found = found.map_err(|source| match source {
                    Error::Path { path, source } => FoldError::NewBacking { file: path, source },
                    other => other.into(),
                })?;
                // Unlocked, so that an image that would lie over itself is told as that.
                let unlocked = OpenOptions { lock: false, ..below.clone() };
                Chain::follow(&found, trail.clone(), &unlocked).await?;
                new_path = Some(found.path.clone());
                Some(open_found(found, below.clone(), trail.clone()).await?)
            }
        };
        let image = Image::open_on(file.clone(), old.clone(), options.clone()).await?;
        let mut between = Vec::new();
        if let (Some(old), Some(new)) = (&old_found, &new_path) {
            let chain = Chain::follow(old, trail.clone(), &below).await?;
            if let Some(layers) = layers_between(&chain, new, &below).await? {
                between.push(image.clone());
                between.extend(layers);
            }
        }
        let unit_bytes = match wanted.compress {
            true => image.inner.cluster_bytes(),
            false => image.inner.info.subcluster_bytes,
        };
        Ok(Self { image, old, old_path, new, between, unit_bytes })
    }

    async fn close(self) -> Result<(), FoldError> {
        for below in self.between.iter().skip(1) {
            below.close().await?;
        }
        Ok(self.image.close().await?)
    }

    /// Goes over what the image says nothing about; `write` says whether to compress, or to count alone.
    async fn run(
        &self,
        write: Option<bool>,
        progress: &(impl Fn(Progress) + Send + Sync),
    ) -> Result<Folded, FoldError> {
        let total_bytes = self.image.limits().size_bytes;
        let mut folded = Folded::default();
        let own = std::slice::from_ref(&self.image);
        let mut layers = Layers::new(own);
        let mut chain = Layers::new(&self.between);
        let [mut old, mut new] = [&self.old, &self.new]
            .map(|device| device.as_deref().map(|d| Walk::new(d, total_bytes)));
        let mut at = 0;
        while at < total_bytes {
            progress(Progress { done_bytes: at, total_bytes });
            let extents = |(range, source)| ConvertError::Extents { range, source };
            let said = layers.at(at).await.map_err(extents)?;
            let mut end = said.end.min(total_bytes);
            let mut same = said.by.is_some();
            if !same && !self.between.is_empty() {
                let said = chain.at(at).await.map_err(extents)?;
                // A unit is taken as a whole: only whole ones are the same.
                let whole = said.end.min(total_bytes);
                let whole = if whole < end { whole - whole % self.unit_bytes } else { end };
                if said.by.is_none() && whole > at {
                    (same, end) = (true, whole);
                }
            }
            if !same {
                let (old_zero, old_end) = zero_at(&mut old, at, total_bytes).await?;
                let (new_zero, new_end) = zero_at(&mut new, at, total_bytes).await?;
                let known = old_end.min(new_end).min(end);
                let known = if known < end { known - known % self.unit_bytes } else { end };
                if old_zero && new_zero && known > at {
                    (same, end) = (true, known);
                }
            }
            if !same {
                end = end.min((at / PIECE_BYTES + 1) * PIECE_BYTES);
                self.take(ByteRange::between(at, end), write, &mut folded).await?;
            }
            at = end;
        }
        if write.is_some() {
            self.image.flush().await?;
        }
        progress(Progress { done_bytes: total_bytes, total_bytes });
        Ok(folded)
    }

    /// Whether a range is made of whole clusters: of some, subclusters may be the image's own.
    fn is_whole(&self, range: ByteRange) -> bool {
        range
            .widen(self.unit_bytes)
            .intersection(ByteRange::between(0, self.image.limits().size_bytes))
            == range
    }

    /// Compares a range, whose units the image says nothing about, and takes those that differ.
    async fn take(
        &self,
        range: ByteRange,
        write: Option<bool>,
        folded: &mut Folded,
    ) -> Result<(), FoldError> {
        let old = read(self.old.as_deref(), range).await?;
        let new = read(self.new.as_deref(), range).await?;
        let slice = |piece: ByteRange| {
            index(piece.start() - range.start())..index(piece.end() - range.start())
        };
        let mut runs: Vec<(ByteRange, bool)> = Vec::new();
        for piece in range.pieces(self.unit_bytes) {
            if old.get(slice(piece)) == new.get(slice(piece)) {
                continue;
            }
            let zero = old.get(slice(piece)).is_some_and(is_zero);
            match runs.last_mut() {
                Some((last, kind)) if *kind == zero && last.end() == piece.start() => {
                    *last = ByteRange::between(last.start(), piece.end());
                }
                _ => runs.push((piece, zero)),
            }
        }
        for (run, zero) in runs {
            let taken = if zero { &mut folded.zeroed_bytes } else { &mut folded.written_bytes };
            *taken += run.len();
            let bytes = old.slice(slice(run));
            match write {
                None => {}
                Some(_) if zero => {
                    let mode = ZeroMode::default();
                    self.image.write_zeroes(run, mode, Durability::Deferred).await?;
                }
                Some(true) if self.is_whole(run) => {
                    self.image.write_compressed(run.start(), bytes).await?;
                }
                Some(_) => {
                    self.image.write(run.start(), bytes, Durability::Deferred).await?;
                }
            }
        }
        Ok(())
    }
}

/// The layers of a chain down to above `new`, opened; `None` where `new` is not in it.
async fn layers_between(
    chain: &Chain,
    new: &Path,
    options: &OpenOptions,
) -> Result<Option<Vec<Image>>, FoldError> {
    Ok(match chain.position(new) {
        None => None,
        Some(0) => Some(Vec::new()),
        Some(base) => Some(chain.open(0, base, Writes::default(), options).await?.layers),
    })
}

/// Whether a device (or nothing) reads as zeros from `at` on, and how far that goes.
async fn zero_at(
    walk: &mut Option<Walk<'_>>,
    at: u64,
    total_bytes: u64,
) -> Result<(bool, u64), FoldError> {
    let Some(walk) = walk else { return Ok((true, total_bytes)) };
    let stretch = walk.at(at).await;
    let stretch = stretch.map_err(|(range, source)| ConvertError::Extents { range, source })?;
    Ok((stretch.zero, stretch.range.end()))
}

/// The bytes of a range of a device, and zeros behind its end.
async fn read(device: Option<&dyn BlockDevice>, range: ByteRange) -> Result<Bytes, FoldError> {
    let mut bytes = Segments::default();
    if let Some(device) = device {
        let inside = range.intersection(ByteRange::between(0, device.limits().size_bytes));
        if !inside.is_empty() {
            bytes = device.read(inside).await?;
        }
    }
    let mut bytes = bytes.to_vec();
    bytes.resize(index(range.len()), 0);
    Ok(Bytes::from(bytes))
}
