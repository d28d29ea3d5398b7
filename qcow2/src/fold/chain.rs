//! A chain as folding needs it: which files it has, and part of it opened layer by layer over a base that may be
//! written. An ordinary opening gives the topmost image only, with everything below it read-only.

use std::os::unix::fs::MetadataExt;
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
    /// Which file it is: device and inode, where files have them.
    id: Option<(u64, u64)>,
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
        Self::follow_from(top.to_owned(), BackingFormat::Qcow2, None, trail, options).await
    }

    /// As [`Chain::trace`], from an image that `trail` led to.
    pub(super) async fn follow(
        top: &Found,
        trail: Trail,
        options: &OpenOptions,
    ) -> Result<Self, Error> {
        Self::follow_from(top.path.clone(), top.format, Some(top.clone()), trail, options).await
    }

    async fn follow_from(
        mut path: PathBuf,
        mut format: BackingFormat,
        mut found: Option<Found>,
        mut trail: Trail,
        options: &OpenOptions,
    ) -> Result<Self, Error> {
        let reading = options.to_read();
        let mut layers: Vec<Layer> = Vec::new();
        loop {
            layers.push(Layer {
                path: path.clone(),
                format,
                size_bytes: None,
                snapshots: 0,
                id: None,
                found: found.take(),
                trail: trail.clone(),
            });
            if format != BackingFormat::Qcow2 {
                return Ok(Self { layers });
            }
            let file = match layers.last().and_then(|layer| layer.found.as_ref()) {
                Some(found) => found.open(&reading).await?,
                None => reading.open_file(&path, format).await?,
            };
            trail = trail.enter(&path, file.id())?;
            let header = read_header(&file).await?;
            if let Some(layer) = layers.last_mut() {
                layer.id = file.id();
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

    /// Opens the layers from `first` down to `base`, which are positions. A base that is written and is raw is made as
    /// long as the layer `first`.
    ///
    /// Once the files of the layers are open, and locked, nobody can put them over others any more; the chain has to be
    /// what it was when it was traced.
    ///
    /// # Errors
    /// As opening images; [`FoldError::ReadOnlyFormat`]; [`FoldError::Moved`], and nothing has been written.
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
        let mut files = Vec::new();
        for (number, layer) in above.iter().enumerate() {
            let options = if number == 0 && writes.top { &writing } else { &reading };
            let file = match &layer.found {
                Some(found) => found.open(options).await?,
                None => options.open_file(&layer.path, layer.format).await?,
            };
            if file.id() != layer.id {
                return Err(FoldError::Moved { file: layer.path.clone() });
            }
            files.push((file, options));
        }
        self.check_still(base, &reading).await?;
        let for_base = if writes.base { &writing } else { &reading };
        if let (true, Some(needed)) = (writes.base, above.first().and_then(|top| top.size_bytes)) {
            bottom.make_room(needed, for_base).await?;
        }
        let (base, taker) = open_base(bottom, for_base).await?;
        let mut stack = Stack { layers: Vec::new(), base, taker };
        for (file, options) in files.into_iter().rev() {
            let below = Some(stack.top());
            let image = Image::open_on(file, below, options.clone()).await?;
            stack.layers.insert(0, image);
        }
        Ok(stack)
    }

    /// Refuses a chain whose names lead elsewhere than when it was traced, as far as `base`.
    async fn check_still(&self, base: usize, reading: &OpenOptions) -> Result<(), FoldError> {
        let Some(top) = self.layers.first() else { return Ok(()) };
        // We hold locks ourselves.
        let unlocked = OpenOptions { lock: false, ..reading.clone() };
        let (path, found) = (top.path.clone(), top.found.clone());
        let now = Self::follow_from(path, top.format, found, top.trail.clone(), &unlocked).await?;
        let same = |(old, new): (&Layer, &Layer)| {
            old.path == new.path && old.format == new.format && old.id == new.id
        };
        let pairs = self.layers.iter().zip(&now.layers).take(base + 1);
        let agreeing = pairs.take_while(|pair| same(*pair)).count();
        if agreeing > base {
            return Ok(());
        }
        let file = self.layers.get(agreeing.saturating_sub(1)).unwrap_or(top).path.clone();
        Err(FoldError::Moved { file })
    }
}

impl Layer {
    /// Removes its file, but not what somebody has put in its place since.
    pub(super) fn remove(&self) -> Result<(), FoldError> {
        let cannot = |source| FoldError::Remove { file: self.path.clone(), source };
        let now = std::fs::symlink_metadata(&self.path).map_err(cannot)?;
        if self.id != Some((now.dev(), now.ino())) {
            return Err(cannot(std::io::Error::other("another file has taken its place")));
        }
        std::fs::remove_file(&self.path).map_err(cannot)
    }

    /// Makes a raw file as long as it has to be, before anybody asks how long it is.
    async fn make_room(&self, needed_bytes: u64, writing: &OpenOptions) -> Result<(), FoldError> {
        if self.format != BackingFormat::Raw {
            return Ok(());
        }
        let file = match &self.found {
            Some(found) => found.open(writing).await?,
            None => writing.open_file(&self.path, self.format).await?,
        };
        if file.len() < needed_bytes && !file.is_fixed_len() {
            file.set_len(needed_bytes).await.map_err(Error::Host)?;
            file.sync().await.map_err(Error::Host)?;
        }
        Ok(())
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
                None => options.open_file(&path, layer.format).await?,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::create::CreateOptions;

    #[tokio::test]
    async fn a_layer_is_removed_and_what_took_its_place_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let small = CreateOptions::new(1 << 20);
        Image::create(&at("base"), &small).await.unwrap();
        let over = small.clone().backing("base", BackingFormat::Qcow2);
        Image::create(&at("top"), &over).await.unwrap();
        let chain = Chain::trace(&at("top"), &OpenOptions::reading()).await.unwrap();
        let layer = &chain.layers[1];
        for put in ["a file", "a link"] {
            std::fs::rename(at("base"), at("aside")).unwrap();
            match put {
                "a file" => std::fs::copy(at("aside"), at("base")).map(drop).unwrap(),
                _ => std::os::unix::fs::symlink(at("aside"), at("base")).unwrap(),
            }
            let refused = layer.remove();
            assert!(matches!(refused, Err(FoldError::Remove { .. })), "{put}: {refused:?}");
            assert!(at("base").exists() && at("aside").exists(), "{put}");
            std::fs::rename(at("aside"), at("base")).unwrap();
        }
        layer.remove().unwrap();
        assert!(!at("base").exists());
    }
}
