//! `resize`: another size for a disk.

use std::path::Path;

use anyhow::{Context, bail, ensure};
use block::{ByteRange, HostFile};
use qcow2::{Image, Preallocation, ResizeOptions};

use crate::format::{self, Format};
use crate::making::{self, SECTOR_BYTES};
use crate::open::{self, Access, How, Named};
use crate::output::{print, warn};
use crate::size::{MAX_SIZE_BYTES, Size};
use crate::stop::{Interrupted, Stop};

/// Change the size of a disk
///
/// What a disk gains reads as zeros. What it loses is gone, also for the guest: make its file systems smaller before.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The format of the image; qcow2 is recognised, everything else is said
    #[arg(short, long, value_name = "FMT")]
    format: Option<Format>,

    /// FILE is a list of options: driver=qcow2,file.filename=PATH
    #[arg(long)]
    image_opts: bool,

    /// What of a larger disk is made in advance: off, metadata, falloc or full
    #[arg(long, value_name = "MODE", default_value = "off")]
    preallocation: String,

    /// Print nothing but errors
    #[arg(short, long)]
    quiet: bool,

    /// Let the disk become smaller
    #[arg(long)]
    shrink: bool,

    #[command(flatten)]
    access: Access,

    /// The image
    #[arg(value_name = "FILE")]
    file: String,

    /// The new size; with + or - before it, the difference
    #[arg(value_name = "[+|-]SIZE", allow_hyphen_values = true)]
    size: String,
}

pub(crate) async fn run(options: Options, stop: &Stop) -> anyhow::Result<u8> {
    let preallocation = making::preallocation(&options.preallocation)?;
    let named = Named::parse(&options.file, options.format, options.image_opts)?;
    let Some(path) = named.place.path() else {
        bail!("{}: the size of an export is its server's matter", options.file);
    };
    let how = named.how(&How::writing(None))?;
    match named.format.map_or_else(|| format::recognise(path), Ok)? {
        Format::Qcow2 => {
            let image = open::open_qcow2(path, &how, &options.access).await?;
            let done = resize_qcow2(&image, &options, preallocation, stop).await;
            let closed = block::BlockDevice::close(&image).await;
            done?;
            closed.context("error while closing the image")?;
        }
        Format::Raw => resize_raw(path, &how, &options, preallocation, stop).await?,
        Format::Vmdk => bail!("{}: vmdk images are only read", options.file),
    }
    if !options.quiet {
        print("Image resized.\n")?;
    }
    Ok(0)
}

/// The new size, after it has been judged against the old one.
fn new_size(options: &Options, now: u64, preallocation: Preallocation) -> anyhow::Result<u64> {
    let (sign, digits) = match options.size.split_at_checked(1) {
        Some((sign @ ("+" | "-"), digits)) => (sign, digits),
        _ => ("", options.size.as_str()),
    };
    let Size(size) = digits.parse().map_err(anyhow::Error::msg)?;
    let size = match sign {
        "+" => now.checked_add(size).filter(|size| *size <= MAX_SIZE_BYTES),
        "-" => Some(now.saturating_sub(size)),
        _ => Some(size),
    };
    let size = size.context("the disk would be larger than a file can be")?;
    ensure!(size > 0, "New image size must be positive");
    ensure!(
        size > now || preallocation == Preallocation::Off,
        "Preallocation can only be used for growing images"
    );
    if size < now && !options.shrink {
        bail!(
            "Use the --shrink option to perform a shrink operation. What lies behind the new end would be lost: make \
             sure that nothing there is in use, in the guest neither"
        );
    }
    Ok(size)
}

async fn resize_qcow2(
    image: &Image,
    options: &Options,
    preallocation: Preallocation,
    stop: &Stop,
) -> anyhow::Result<()> {
    let size = new_size(options, image.info().size_bytes, preallocation)?;
    ensure!(size.is_multiple_of(SECTOR_BYTES), "The new size must be a multiple of 512");
    let options = ResizeOptions { allow_shrinking: options.shrink, preallocation };
    let done = stop.or(image.resize(size, &options)).await;
    if done.as_ref().is_err_and(|error| error.is::<Interrupted>()) {
        image.undo_resize(size).await?;
    }
    done
}

async fn resize_raw(
    path: &Path,
    how: &How,
    options: &Options,
    preallocation: Preallocation,
    stop: &Stop,
) -> anyhow::Result<()> {
    let host = block::OpenOptions { lock: !how.shared, ..block::OpenOptions::writing() };
    let file = HostFile::open(path, host).await;
    let file = file.map_err(|error| open::explained(error, path, how))?;
    ensure!(!file.is_fixed_len(), "{}: a device keeps its size", path.display());
    let now = file.len();
    let size = new_size(options, now, preallocation)?;
    file.set_len(size).await?;
    let gained = ByteRange::between(now.min(size), size);
    let made = making::preallocate_raw(&file, gained, preallocation, || stop.check()).await;
    if made.is_err()
        && let Err(error) = file.set_len(now).await
    {
        warn(&format!("{}: it stays larger than it was: {error}", path.display()));
    }
    file.sync().await?;
    made
}
