//! Changing what an image is without changing its disk: the version, the width of refcounts, lazy refcounts, the names
//! of backing and data file. One write of the header switches, where need be with a whole new state of the metadata.

use std::path::Path;

use block::HostFile;

use crate::backing::has_protocol;
use crate::change::ChangeError;
use crate::create::{BackingName, Version};
use crate::error::{Error, Fault, Feature};
use crate::header::{
    BITMAPS, DIRTY, Header, LAZY_REFCOUNTS, MAX_BACKING_NAME_BYTES, RAW_EXTERNAL_DATA,
    feature_names,
};
use crate::image::Image;
use crate::open::parse_header;
use crate::refcount::RefcountWidth;
use crate::republish::{Expand, Present};
use crate::switch::switch_header;

/// What an image is to become. What is `None` stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AmendOptions {
    /// The version of the format. Version 2 takes what version 2 has: zeros over a backing file are written out, also
    /// those of snapshots; without one they become unallocated.
    pub version: Option<Version>,
    /// The width of refcounts in bits.
    pub refcount_bits: Option<u32>,
    /// Whether refcounts may stay behind while the image is open for writing.
    pub lazy_refcounts: Option<bool>,
    /// The backing file: another one, or none. The content of the disk is not kept.
    pub backing: Option<Option<BackingName>>,
    /// The name of the external data file, of an image that has one.
    pub data_file: Option<String>,
    /// `Some(false)`: the external data file need not read like the disk any more.
    pub data_file_raw: Option<bool>,
}

impl Image {
    /// Changes what the image is, durably: after a crash it is the old one or the new one.
    ///
    /// Another backing or data file counts from the next opening on.
    ///
    /// # Errors
    /// [`Error::Change`] for what cannot be, [`Error::Unsupported`] where names do not fit the header or refcounts get
    /// too narrow, [`Error::Request`] where the image is open for reading only, [`Error::Host`].
    pub async fn amend(&self, options: &AmendOptions) -> Result<(), Error> {
        let inner = &self.inner;
        if inner.limits().read_only {
            return Err(Error::Request(block::DeviceError::ReadOnly));
        }
        let _alone = inner.structure.lock().await;
        let header = inner.core.lock().header.clone();
        let mut wanted = header.clone();
        options.apply(&mut wanted).map_err(|what| inner.refuse(what))?;
        if wanted.version == header.version && wanted.refcount_order == header.refcount_order {
            return inner
                .change_header(|header| options.apply(header).map_err(|what| inner.refuse(what)))
                .await;
        }
        self.republish_as(options).await
    }

    /// Records another backing file, or none, in an image that nobody has open. Nothing is read of the old one, the new
    /// one or the disk: where they differ, the disk changes its content.
    ///
    /// # Errors
    /// [`Error::Change`] for a name that cannot be, [`Error::Corrupt`], [`Error::Unsupported`] and [`Error::Host`]: the
    /// image is what it was then.
    pub async fn set_backing(path: &Path, backing: Option<&BackingName>) -> Result<(), Error> {
        let file = HostFile::open(path, block::OpenOptions::writing()).await?;
        Self::set_backing_on(&file, backing).await
    }

    /// As [`Image::set_backing`], in a file that is open already.
    ///
    /// # Errors
    /// As [`Image::set_backing`].
    pub async fn set_backing_on(
        file: &HostFile,
        backing: Option<&BackingName>,
    ) -> Result<(), Error> {
        let old = parse_header(file).await?;
        if old.is_corrupt() {
            return Err(Fault::Unsupported(Feature::WritingCorrupt).of(file.path()));
        }
        let mut new = old.clone();
        let refused = |what| Error::Change { file: file.path().to_owned(), what };
        set_backing(&mut new, backing).map_err(refused)?;
        // What we do not know may be about what changes here. Bitmaps tell of the disk as it was written.
        new.autoclear &= BITMAPS | RAW_EXTERNAL_DATA;
        switch_header(file, &old, &mut new).await
    }

    /// Puts a whole new state of the metadata in place.
    async fn republish_as(&self, options: &AmendOptions) -> Result<(), Error> {
        let inner = &self.inner;
        let core = std::sync::Arc::clone(&inner.core);
        inner
            .republish(|present| {
                let mut state = present.unchanged();
                let refuse = |what| inner.refuse(what);
                options.apply(&mut state.header).map_err(refuse)?;
                if state.header.version < 3 && present.header.version >= 3 {
                    check_snapshots(present).map_err(refuse)?;
                    let same = state.header.backing_name == present.header.backing_name;
                    let below = if same { core.lock().backing_bytes } else { Some(u64::MAX) };
                    state.expand = Some(Expand {
                        below_bytes: below.unwrap_or(0),
                        compression_type: present.header.compression_type(),
                    });
                }
                let order = state.header.refcount_order;
                state.width = RefcountWidth::new(order).unwrap_or(state.width);
                Ok(state)
            })
            .await
    }
}

impl AmendOptions {
    fn apply(&self, header: &mut Header) -> Result<(), ChangeError> {
        if let Some(bits) = self.refcount_bits {
            if !bits.is_power_of_two() || bits > 64 {
                return Err(ChangeError::RefcountBits(bits));
            }
            header.refcount_order = bits.trailing_zeros();
        }
        if self.version == Some(Version::V3) && header.version < 3 {
            header.version = 3;
            header.extensions.feature_names.get_or_insert_with(feature_names);
        }
        match self.lazy_refcounts {
            Some(true) => header.compatible |= LAZY_REFCOUNTS,
            Some(false) => header.compatible &= !LAZY_REFCOUNTS,
            None => {}
        }
        match self.data_file_raw {
            Some(true) if !header.is_data_file_raw() => return Err(ChangeError::MakeRaw),
            Some(false) => header.autoclear &= !RAW_EXTERNAL_DATA,
            _ => {}
        }
        if let Some(name) = &self.data_file {
            if !header.has_data_file() {
                return Err(ChangeError::NoDataFile);
            }
            check_name(name)?;
            header.extensions.data_file = Some(name.as_bytes().to_vec());
        }
        if let Some(backing) = &self.backing {
            set_backing(header, backing.as_ref())?;
        }
        if self.version == Some(Version::V2) && header.version > 2 {
            downgrade(header)?;
        }
        if header.version < 3 && self.lazy_refcounts == Some(true) {
            return Err(ChangeError::NotInVersion2 { what: "lazy refcounts" });
        }
        if header.version < 3 && header.refcount_order != 4 {
            return Err(ChangeError::NotInVersion2 { what: "refcounts that have not 16 bits" });
        }
        Ok(())
    }
}

fn downgrade(header: &mut Header) -> Result<(), ChangeError> {
    for (is, what) in [
        (header.has_data_file(), "an external data file"),
        (header.has_extended_l2(), "extended L2 entries"),
        // QEMU goes on, and leaves bitmaps behind that nobody may use any more.
        (header.has_bitmaps(), "bitmaps"),
        (header.has_unknown_fields(), "fields from a later version"),
    ] {
        if is {
            return Err(ChangeError::NotInVersion2 { what });
        }
    }
    header.version = 2;
    // Of clusters that are compressed in a way of version 3 there is none, or expanding finds it.
    header.set_compression_type(0);
    header.set_incompatible(DIRTY, false);
    header.compatible = 0;
    header.autoclear = 0;
    header.extensions.feature_names = None;
    // Of no use since somebody wrote without it.
    header.extensions.bitmaps = None;
    Ok(())
}

/// In version 2 snapshots are of the size of the disk, and the length of their state has 32 bits.
fn check_snapshots(present: &Present) -> Result<(), ChangeError> {
    let size_bytes = present.header.size_bytes;
    let fits = present.snapshots.entries.iter().all(|entry| {
        entry.disk_bytes.unwrap_or(size_bytes) == size_bytes
            && u32::try_from(entry.vm_state_bytes).is_ok()
    });
    let what = "snapshots of another size or with 4 GiB of state";
    if fits { Ok(()) } else { Err(ChangeError::NotInVersion2 { what }) }
}

fn set_backing(header: &mut Header, backing: Option<&BackingName>) -> Result<(), ChangeError> {
    if backing.is_some() && header.is_data_file_raw() {
        return Err(ChangeError::BackingFileOfRawData);
    }
    if let Some(backing) = backing {
        check_name(&backing.path)?;
    }
    header.backing_name = backing.map(|backing| backing.path.as_bytes().to_vec());
    header.extensions.backing_format =
        backing.map(|backing| backing.format.name().as_bytes().to_vec());
    Ok(())
}

fn check_name(name: &str) -> Result<(), ChangeError> {
    let limit = MAX_BACKING_NAME_BYTES;
    if name.is_empty() || name.len() > limit || name.contains('\0') {
        return Err(ChangeError::Name { len: name.len(), limit });
    }
    if has_protocol(name) {
        return Err(ChangeError::Protocol(name.to_owned()));
    }
    Ok(())
}
