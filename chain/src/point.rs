//! Points in time: a sealed layer with everything below it, opened as one read-only device.

use std::path::Path;
use std::sync::Arc;

use block::BlockDevice;

use crate::error::{Error, LayerRule};
use crate::image;
use crate::repository::Repository;

impl Repository {
    /// Opens the disk as it was when `layer` was sealed, for reading. Other layers on it may be written meanwhile.
    ///
    /// Every layer from the full upwards is compared with its manifest first, and only files of this repository are
    /// opened, whatever the images name.
    ///
    /// # Errors
    /// As [`Repository::chain_of`]; [`Error::Image`] for an image that cannot be opened.
    pub async fn open_point(&self, layer: &Path) -> Result<Arc<dyn BlockDevice>, Error> {
        let layers = self.sealed_chain(layer).await?;
        let missing = || Error::Layer { file: self.root().join(layer), rule: LayerRule::Missing };
        image::open_chain(self.root(), &layers).await?.ok_or_else(missing)
    }
}
