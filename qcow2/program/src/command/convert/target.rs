//! Where `convert` writes to: a file that it makes, one that is there, or an export.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail, ensure};
use block::BlockDevice;
use qcow2::{ConvertTarget, Image};

use super::Options;
use crate::cache::Cache;
use crate::chain;
use crate::format::Format;
use crate::making::{self, Below, Filling, Plan};
use crate::open::{self, How, Named, Opened};
use crate::options::OptionList;
use crate::place::Place;
use crate::target::{Target, file_id};

/// An open target.
pub(super) struct Output {
    device: Arc<dyn BlockDevice>,
    image: Option<Image>,
    name: String,
    /// The files, if they are new.
    made: Vec<Target>,
    is_zero: bool,
}

impl Output {
    /// Opens the target, making it first unless it is there, for a disk of `size_bytes` bytes.
    ///
    /// # Errors
    /// What keeps it from being made, and a disk that is too small.
    pub(super) async fn open(
        options: &Options,
        list: &OptionList,
        name: &str,
        sources: &[Opened],
        size_bytes: u64,
    ) -> anyhow::Result<Self> {
        let output = match (options.no_create, Place::parse(name)) {
            (true, _) | (false, Ok(Place::Nbd { .. })) => {
                existing(options, list, name, sources).await?
            }
            (false, Ok(Place::File(path))) => {
                let ids = chain::ids_of(sources).await;
                made(options, list, &path, &ids, size_bytes).await?
            }
            (false, Err(error)) => return Err(error),
        };
        let keeps_bitmaps = output.image.as_ref().is_some_and(|image| image.info().version > 2);
        ensure!(
            !options.bitmaps || keeps_bitmaps,
            "Format '{}' of {name} does not support bitmaps",
            options.output_format
        );
        if let (true, Some(image)) = (options.compress, &output.image) {
            super::check_level(options, image.info().compression)?;
        }
        let has = output.device.limits().size_bytes;
        if has < size_bytes {
            bail!("output file is smaller than input file: {name} has {has} bytes of {size_bytes}");
        }
        Ok(output)
    }

    /// Whether it is new, and so reads as zeros.
    pub(super) fn is_zero(&self) -> bool {
        self.is_zero
    }

    /// The image, where it is a qcow2 one.
    pub(super) fn image(&self) -> Option<&Image> {
        self.image.as_ref()
    }

    /// What the engine writes to.
    ///
    /// # Errors
    /// Compression for what has none.
    pub(super) fn target(&self, options: &Options) -> anyhow::Result<ConvertTarget> {
        match (options.compress, &self.image) {
            (false, _) => Ok(ConvertTarget::Device(Arc::clone(&self.device))),
            (true, Some(image)) => Ok(ConvertTarget::Compressed {
                image: image.clone(),
                level: options.compression_level,
            }),
            (true, None) => bail!("Compression not supported for this file format"),
        }
    }

    /// Closes the target, and keeps it if it is new.
    ///
    /// # Errors
    /// Then the copy is not complete.
    pub(super) async fn finish(self) -> anyhow::Result<()> {
        let closed = self.device.close().await;
        closed.with_context(|| format!("error while closing {}", self.name))?;
        self.made.into_iter().try_for_each(Target::keep)
    }
}

async fn existing(
    options: &Options,
    list: &OptionList,
    name: &str,
    sources: &[Opened],
) -> anyhow::Result<Output> {
    let format = (!options.target_image_opts).then_some(options.output_format);
    let named = Named::parse(name, format, options.target_image_opts)?;
    if let Some(path) = named.place.path() {
        let reads = chain::ids_of(sources).await;
        let is_source = file_id(path).is_some_and(|id| reads.contains(&id));
        ensure!(!is_source, "{name}: it is one of the images that are read");
    } else {
        let plain = options.output_format == Format::Raw && options.options.is_empty();
        ensure!(
            plain && options.backing.is_none() && list.get("backing_file").is_none(),
            "{name}: an NBD export is a disk: -O raw, without -o and -B"
        );
    }
    let opened = open::open(&named, &How::writing(options.cache), &options.access).await?;
    let device = opened.device();
    ensure!(!device.limits().read_only, "{name} is read-only");
    let image = opened.image().cloned();
    Ok(Output { device, image, name: name.to_owned(), made: Vec::new(), is_zero: false })
}

async fn made(
    options: &Options,
    list: &OptionList,
    path: &Path,
    sources: &[(u64, u64)],
    size_bytes: u64,
) -> anyhow::Result<Output> {
    let format = options.output_format;
    let name = path.display().to_string();
    // Before any file is touched.
    ensure!(
        !options.bitmaps || making::keeps_bitmaps(format, list),
        "Format '{format}' of {name} does not support bitmaps"
    );
    // Below the target is what the user names: it is opened before anything is made.
    let below = Below::open(path, list, &options.access).await?;
    let cache = options.cache.unwrap_or(Cache::DIRECT);
    let ids = [sources.to_vec(), below.ids().await].concat();
    let plan = Plan { path, format, size_bytes, options: list, access: &options.access, cache };
    let cannot = || format!("{name}: error while converting {format}");
    let made = plan.make(&ids).await.with_context(cannot)?;
    let (filling, files) =
        made.open(below.device(), &options.access, cache).await.with_context(cannot)?;
    let Filling { device, image, is_zero } = filling;
    Ok(Output { device, image, name, made: files, is_zero })
}
