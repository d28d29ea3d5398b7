//! `rebase`: another backing file for an image.

use anyhow::{Context, ensure};
use qcow2::{BackingName, RebaseOptions};

use crate::cache::Cache;
use crate::folding;
use crate::format::Format;
use crate::making;
use crate::open::{Access, Named};
use crate::output::print;
use crate::progress::Progress;
use crate::stop::Stop;

/// Put an image over another backing file
///
/// The image reads as before: what the new backing file holds differently is copied into it first. With -u only the
/// name is written down. Internal snapshots are left alone, as by qemu-img: where they hold nothing themselves they show
/// the new backing file afterwards.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The format of the image: qcow2
    #[arg(short, long, value_name = "FMT")]
    format: Option<Format>,

    /// FILE is a list of options: driver=qcow2,file.filename=PATH
    #[arg(long)]
    image_opts: bool,

    /// The new backing file, by its path seen from the image; "" for none
    #[arg(short, long, value_name = "BACKING")]
    backing: Option<String>,

    /// The format of the new backing file
    #[arg(short = 'F', long, value_name = "FMT")]
    backing_format: Option<String>,

    /// Write down the name and copy nothing: for a backing file that was moved
    #[arg(short = 'u', long = "backing-unsafe")]
    unsafe_mode: bool,

    /// Compress what is copied
    #[arg(short, long)]
    compress: bool,

    /// Say what would be done, and change nothing
    #[arg(long)]
    dry_run: bool,

    /// Show progress
    #[arg(short, long)]
    progress: bool,

    /// Print nothing but errors
    #[arg(short, long)]
    quiet: bool,

    /// How the image is written: none, writeback, writethrough, directsync or unsafe
    #[arg(short = 't', long, value_name = "CACHE")]
    cache: Option<Cache>,

    /// Taken for qemu-img's sake: backing files are read in the way that -t says
    #[arg(short = 'T', long = "backing-cache", value_name = "CACHE")]
    source_cache: Option<Cache>,

    /// Taken for qemu-img's sake: backing files are shared with other readers in any case
    #[arg(short = 'U', long)]
    force_share: bool,

    #[command(flatten)]
    access: Access,

    /// The image
    #[arg(value_name = "FILE")]
    file: String,
}

pub(crate) async fn run(options: Options, stop: &Stop) -> anyhow::Result<u8> {
    ensure!(
        options.unsafe_mode || options.backing.is_some(),
        "Must specify backing file (-b) or use unsafe mode (-u)"
    );
    let named = Named::parse(&options.file, options.format, options.image_opts)?;
    ensure!(
        !options.compress || matches!(named.format, None | Some(Format::Qcow2)),
        "Compression not supported for this file format"
    );
    let top = folding::top(&named)?;
    let work = RebaseOptions {
        copy: folding::options(&named, options.cache, &options.access, None)?,
        backing: backing(&options)?,
        unchecked: options.unsafe_mode,
        compress: options.compress,
    };
    let explained = |error| folding::explained(error, top);
    let progress = Progress::new(options.progress, options.quiet, 2);
    let told = |now: qcow2::Progress| progress.set(now.done_bytes, now.total_bytes);
    if options.dry_run {
        let plan = async { qcow2::plan_rebase(top, &work, told).await.map_err(explained) };
        let plan = stop.or(plan).await;
        progress.end(plan.is_ok());
        print(&folding::describe(&plan?))?;
        return Ok(0);
    }
    let work = async { qcow2::rebase(top, &work, told).await.map_err(explained) };
    let done = stop.or(work).await;
    progress.end(done.is_ok());
    done?;
    Ok(0)
}

fn backing(options: &Options) -> anyhow::Result<Option<BackingName>> {
    let Some(name) = options.backing.as_deref().filter(|name| !name.is_empty()) else {
        return Ok(None);
    };
    making::plain_path(name)?;
    let format = options.backing_format.as_deref().with_context(|| {
        format!("Could not change the backing file to '{name}': backing format must be specified")
    })?;
    Ok(Some(BackingName { path: name.to_owned(), format: making::backing_format(format)? }))
}
