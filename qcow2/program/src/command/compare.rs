//! `compare`: whether two disks hold the same.

use std::sync::Arc;

use block::BlockDevice;
use qcow2::{CompareError, CompareOptions, Comparison};

use crate::cache::Cache;
use crate::format::Format;
use crate::open::{self, Access, How, Named, Opened};
use crate::output::{print, report};
use crate::progress::Progress;
use crate::stop::{Interrupted, Stop};

/// Say whether two images hold the same
///
/// Ends with 0 where they do, 1 where they differ, 2 where one could not be opened (or the command line is wrong), 3
/// where it is unknown what is allocated, and 4 where one could not be read.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The format of the first image; qcow2 is recognised, everything else is said
    #[arg(short, long = "a-format", alias = "format", value_name = "FMT")]
    format: Option<Format>,

    /// The format of the second image
    #[arg(short = 'F', long = "b-format", value_name = "FMT")]
    second_format: Option<Format>,

    /// Both names are lists of options: driver=qcow2,file.filename=PATH
    #[arg(long)]
    image_opts: bool,

    /// How the images are read: none, writeback, writethrough, directsync or unsafe
    #[arg(short = 'T', long = "cache", value_name = "CACHE")]
    source_cache: Option<Cache>,

    /// Show progress
    #[arg(short, long)]
    progress: bool,

    /// Print nothing but errors
    #[arg(short, long)]
    quiet: bool,

    /// Sizes, and what is allocated, must be the same, too
    #[arg(short, long)]
    strict: bool,

    /// Read them although other programs may be writing them
    #[arg(short = 'U', long)]
    force_share: bool,

    #[command(flatten)]
    access: Access,

    /// The first image
    #[arg(value_name = "FILE1")]
    first: String,

    /// The second image
    #[arg(value_name = "FILE2")]
    second: String,
}

const DIFFERENT: u8 = 1;
const NOT_OPENED: u8 = 2;
const NO_EXTENTS: u8 = 3;
const NOT_READ: u8 = 4;

pub(crate) async fn run(options: Options, stop: &Stop) -> anyhow::Result<u8> {
    let [first, second] = match stop.or(open_both(&options)).await {
        Ok(opened) => opened,
        Err(error) if error.is::<Interrupted>() => return Err(error),
        Err(error) => {
            report(&error);
            return Ok(NOT_OPENED);
        }
    };
    let sizes = [first.size_bytes(), second.size_bytes()];
    let progress = Progress::new(options.progress, options.quiet, 2);
    let work = async {
        let images = [first.image().cloned(), second.image().cloned()];
        let options =
            CompareOptions { strict: options.strict, images, ..CompareOptions::default() };
        let disks: [Arc<dyn BlockDevice>; 2] = [first.device(), second.device()];
        // The outcome is an answer even where it is a failure.
        let told = |now: qcow2::Progress| progress.set(now.done_bytes, now.total_bytes);
        anyhow::Ok(qcow2::compare(disks, &options, told).await)
    };
    let outcome = stop.or(work).await;
    progress.end(matches!(outcome, Ok(Ok(_))));
    let closed = first.close().await.and(second.close().await);
    let code = match outcome? {
        Ok(found) => {
            if !options.quiet {
                print(&tell(found, sizes))?;
            }
            if found.is_equal() { 0 } else { DIFFERENT }
        }
        Err(error) => {
            let (disk, code) = match &error {
                CompareError::Extents { disk, .. } => (*disk, NO_EXTENTS),
                CompareError::Read { disk, .. } => (*disk, NOT_READ),
                _ => (0, NOT_READ),
            };
            let name = if disk == 0 { &options.first } else { &options.second };
            report(&anyhow::Error::new(error).context(name.clone()));
            return Ok(code);
        }
    };
    closed.map(|()| code)
}

async fn open_both(options: &Options) -> anyhow::Result<[Opened; 2]> {
    let how = How::reading(options.source_cache, options.force_share);
    let first = Named::parse(&options.first, options.format, options.image_opts)?;
    let second = Named::parse(&options.second, options.second_format, options.image_opts)?;
    Ok([
        open::open(&first, &how, &options.access).await?,
        open::open(&second, &how, &options.access).await?,
    ])
}

/// What scripts look for.
fn tell(found: Comparison, sizes: [u64; 2]) -> String {
    let shorter = sizes[0].min(sizes[1]);
    let warning = "Warning: Image size mismatch!\n";
    match found {
        Comparison::Equal => "Images are identical.\n".to_owned(),
        Comparison::EqualButForSize { .. } => format!("{warning}Images are identical.\n"),
        Comparison::SizesDiffer { .. } => "Strict mode: Image size mismatch!\n".to_owned(),
        Comparison::AllocationDiffers { offset } => {
            format!("Strict mode: Offset {offset} block status mismatch!\n")
        }
        Comparison::ContentDiffers { offset } => {
            let warning = if offset >= shorter { warning } else { "" };
            format!("{warning}Content mismatch at offset {offset}!\n")
        }
        other => format!("{other:?}\n"),
    }
}
