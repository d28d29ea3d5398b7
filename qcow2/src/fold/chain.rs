//! A chain as folding needs it: which files it has, and part of it opened layer by layer over a base that may be
//! written. An ordinary opening gives the topmost image only, with everything below it read-only.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::{BlockDevice, RawDevice};

use super::FoldError;
use crate::backing::{Found, Trail};
use crate::create::BackingFormat;
use crate::error::Error;
use crate::image::Image;
use crate::lend::Taker;
use crate::open::{OpenOptions, open_chain, open_found, read_header};

/// A layer of a chain.
#[derive(Clone, Debug)]
pub(super) struct Layer {
    pub path: PathBuf,
    pub format: BackingFormat,
    /// The size of its disk, where it is qcow2.
    pub size_bytes: Option<u64>,
    /// How many internal snapshots it has.
    pub snapshots: u32,
    /// Where the reference to it led; the topmost has none.
    found: Option<Found>,
    /// What was passed on the way here.
    trail: Trail,
}

/// The files of a chain, the topmost first. All but the last are qcow2.
#[derive(Clone, Debug)]
pub(super) struct Chain {
    pub layers: Vec<Layer>,
}

/// Layers over a base, opened.
pub(super) struct Stack {
    /// Those above the base, the topmost first.
    pub layers: Vec<Image>,
    pub base: Arc<dyn BlockDevice>,
    /// The base, where it takes data out of the files of others.
    pub taker: Option<Taker>,
}

/// What of a stack is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Writes {
    pub top: bool,
    pub base: bool,
}

impl Chain {
    /// Follows the backing names from `top` to the end.
    ///
    /// # Errors
    /// As opening the chain.
    pub(super) async fn trace(top: &Path, options: &OpenOptions) -> Result<Self, Error> {
        let trail = Trail::start(top, &options.references)?;
        Self::follow(top, BackingFormat::Qcow2, trail, options).await
    }

    /// As [`Chain::trace`], from an image that `trail` led to.
    pub(super) async fn follow(
        top: &Path,
        format: BackingFormat,
        mut trail: Trail,
        options: &OpenOptions,
    ) -> Result<Self, Error> {
        let reading = options.to_read();
        let (mut path, mut format) = (top.to_owned(), format);
        let (mut layers, mut found): (Vec<Layer>, Option<Found>) = (Vec::new(), None);
        loop {
            layers.push(Layer {
                path: path.clone(),
                format,
                size_bytes: None,
                snapshots: 0,
                found: found.take(),
                trail: trail.clone(),
            });
            if format != BackingFormat::Qcow2 {
                return Ok(Self { layers });
            }
            let file = match layers.last().and_then(|layer| layer.found.as_ref()) {
                Some(found) => found.open(&reading).await?,
                None => reading.open_file(&path).await?,
            };
            trail = trail.enter(&path, file.id())?;
            let header = read_header(&file).await?;
            if let Some(layer) = layers.last_mut() {
                layer.size_bytes = Some(header.size_bytes);
                layer.snapshots = header.snapshots;
            }
            let Some(name) = &header.backing_name else { return Ok(Self { layers }) };
            let recorded = header.extensions.backing_format.as_deref();
            let next = trail.resolve(&path, name, recorded)?;
            (path, format) = (next.path.clone(), next.format);
            found = Some(next);
        }
    }

    /// Where a file stands in the chain: 0 is the top.
    pub(super) fn position(&self, path: &Path) -> Option<usize> {
        let wanted = std::fs::canonicalize(path).ok()?;
        self.layers.iter().position(|layer| {
            std::fs::canonicalize(&layer.path).is_ok_and(|resolved| resolved == wanted)
        })
    }

    /// As [`Chain::position`], for a file that must be below the top.
    pub(super) fn below(&self, path: &Path) -> Result<usize, FoldError> {
        self.position(path).filter(|position| *position > 0).ok_or_else(|| FoldError::NotInChain {
            file: self.top().to_owned(),
            base: path.to_owned(),
        })
    }

    pub(super) fn top(&self) -> &Path {
        self.layers.first().map_or(Path::new(""), |layer| &layer.path)
    }

    /// Opens the layers from `first` down to `base`, which are positions.
    ///
    /// # Errors
    /// As opening images; [`FoldError::ReadOnlyFormat`].
    pub(super) async fn open(
        &self,
        first: usize,
        base: usize,
        writes: Writes,
        options: &OpenOptions,
    ) -> Result<Stack, FoldError> {
        let reading = OpenOptions { read_only: true, snapshot: None, ..options.clone() };
        let writing = OpenOptions { read_only: false, ..reading.clone() };
        let (Some(above), Some(bottom)) = (self.layers.get(first..base), self.layers.get(base))
        else {
            return Err(FoldError::NoBacking { file: self.top().to_owned() });
        };
        let for_base = if writes.base { &writing } else { &reading };
        let (base, taker) = open_base(bottom, for_base).await?;
        let mut stack = Stack { layers: Vec::new(), base, taker };
        for (number, layer) in above.iter().enumerate().rev() {
            let options = if number == 0 && writes.top { &writing } else { &reading };
            let below = Some(stack.top());
            let image = match &layer.found {
                Some(found) => {
                    let file = found.open(options).await?;
                    Image::open_on(file, below, options.clone()).await?
                }
                None => Image::open_with_backing(&layer.path, below, options.clone()).await?,
            };
            stack.layers.insert(0, image);
        }
        Ok(stack)
    }
}

async fn open_base(
    layer: &Layer,
    options: &OpenOptions,
) -> Result<(Arc<dyn BlockDevice>, Option<Taker>), FoldError> {
    let (path, trail) = (layer.path.clone(), layer.trail.clone());
    match (layer.format, &layer.found) {
        (BackingFormat::Qcow2, found) => {
            let image = open_chain(path, found.clone(), options.clone(), trail).await?;
            Ok((Arc::new(image.clone()), Some(Taker::Image(image))))
        }
        (BackingFormat::Raw, found) if !options.read_only => {
            let file = match found {
                Some(found) => found.open(options).await?,
                None => options.open_file(&path).await?,
            };
            let device = RawDevice::new(file);
            Ok((Arc::clone(&device) as _, Some(Taker::Raw(device))))
        }
        (BackingFormat::Raw | BackingFormat::Vmdk, Some(found)) if options.read_only => {
            Ok((open_found(found.clone(), options.clone(), trail).await?, None))
        }
        (format, _) => Err(FoldError::ReadOnlyFormat { file: path, format }),
    }
}

impl Stack {
    /// The topmost device.
    pub(super) fn top(&self) -> Arc<dyn BlockDevice> {
        match self.layers.first() {
            Some(image) => Arc::new(image.clone()),
            None => Arc::clone(&self.base),
        }
    }

    /// Closes everything, the topmost first, and gives the first error.
    pub(super) async fn close(self) -> Result<(), FoldError> {
        let mut result = Ok(());
        for image in &self.layers {
            result = result.and(image.close().await);
        }
        result.and(self.base.close().await).map_err(FoldError::Device)
    }
}
