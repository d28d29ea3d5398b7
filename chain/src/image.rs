//! The door to the image format: making, opening and stacking the files of a chain. What a chain is, and which files
//! may be in it, has been decided before.

use std::path::Path;
use std::sync::Arc;

use block::BlockDevice;
use qcow2::{BackingFormat, CreateOptions, Image, OpenOptions};

use crate::error::{Error, LayerRule};
use crate::plan::LayerPlan;
use crate::verify::Sealed;

/// Makes the empty image of a planned layer.
pub(crate) async fn create(file: &Path, plan: &LayerPlan) -> Result<(), Error> {
    let mut options = CreateOptions::new(plan.size_bytes);
    if let Some(name) = &plan.backing_name {
        options = options.backing(name.clone(), BackingFormat::Qcow2);
    }
    Image::create(file, &options).await.map_err(|source| failed(file, source))
}

/// Opens the image of a new layer for writing, on the point below it.
pub(crate) async fn open_for_writing(
    file: &Path,
    below: Option<Arc<dyn BlockDevice>>,
) -> Result<Image, Error> {
    Image::open_with_backing(file, below, OpenOptions::writing())
        .await
        .map_err(|source| failed(file, source))
}

/// Opens sealed layers, from the full upwards, for reading; `None` where there are none.
///
/// Each image is opened on the one before it, not on what its header names: that is only compared.
pub(crate) async fn open_chain(
    root: &Path,
    layers: &[Sealed],
) -> Result<Option<Arc<dyn BlockDevice>>, Error> {
    let mut top: Option<Arc<dyn BlockDevice>> = None;
    for layer in layers {
        let file = root.join(&layer.path);
        let image = Image::open_with_backing(&file, top, OpenOptions::reading())
            .await
            .map_err(|source| failed(&file, source))?;
        let recorded = layer.manifest.parent.as_ref().map(|parent| parent.file.clone());
        check(&image, layer.manifest.size_bytes, recorded)
            .map_err(|rule| Error::Layer { file, rule })?;
        top = Some(Arc::new(image));
    }
    Ok(top)
}

/// Compares what an image says of itself with what is recorded.
pub(crate) fn check(
    image: &Image,
    size_bytes: u64,
    backing: Option<String>,
) -> Result<(), LayerRule> {
    let info = image.info();
    let (found, recorded) = (info.size_bytes, size_bytes);
    if found != recorded {
        return Err(LayerRule::DiskSize { recorded, found });
    }
    let found = info.backing.map(|backing| backing.name);
    if found != backing {
        return Err(LayerRule::Backing { recorded: backing, found });
    }
    Ok(())
}

fn failed(file: &Path, source: qcow2::Error) -> Error {
    Error::Image { file: file.to_path_buf(), source: Box::new(source) }
}
