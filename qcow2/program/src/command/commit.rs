//! `commit`: what an image holds, moved into the one below.

use qcow2::CommitOptions;

use crate::cache::Cache;
use crate::folding;
use crate::format::Format;
use crate::open::{Access, Named};
use crate::output::print;
use crate::progress::Progress;
use crate::size::Size;
use crate::stop::Stop;

/// Move what an image holds into its backing file
///
/// The image reads as before at every moment, whatever ends the work; calling again goes on. Then it is emptied. Other
/// images over the same backing file change what they show, and so do internal snapshots of the image where they hold
/// nothing themselves.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The format of the image: qcow2
    #[arg(short, long, value_name = "FMT")]
    format: Option<Format>,

    /// FILE is a list of options: driver=qcow2,file.filename=PATH
    #[arg(long)]
    image_opts: bool,

    /// The layer that takes everything above it; FILE is not emptied then [default: the one below FILE]
    #[arg(short, long, value_name = "BASE")]
    base: Option<String>,

    /// Do not empty FILE: it is no longer needed
    #[arg(short, long)]
    drop: bool,

    /// Say what would be done, and change nothing
    #[arg(long)]
    dry_run: bool,

    /// Show progress
    #[arg(short, long)]
    progress: bool,

    /// Print nothing but errors
    #[arg(short, long)]
    quiet: bool,

    /// The most bytes that are copied in a second
    #[arg(short, long, value_name = "RATE")]
    rate: Option<Size>,

    /// How the images are written: none, writeback, writethrough, directsync or unsafe
    #[arg(short = 't', long, value_name = "CACHE")]
    cache: Option<Cache>,

    #[command(flatten)]
    access: Access,

    /// The image
    #[arg(value_name = "FILE")]
    file: String,
}

pub(crate) async fn run(options: Options, stop: &Stop) -> anyhow::Result<u8> {
    let named = Named::parse(&options.file, options.format, options.image_opts)?;
    let top = folding::top(&named)?;
    let work = CommitOptions {
        copy: folding::options(&named, options.cache, &options.access, options.rate)?,
        base: options.base.as_deref().map(|base| folding::layer(top, base)),
        keep_top: options.drop || options.base.is_some(),
    };
    let explained = |error| folding::explained(error, top);
    if options.dry_run {
        let plan = async { qcow2::plan_commit(top, &work).await.map_err(explained) };
        print(&folding::describe(&stop.or(plan).await?))?;
        return Ok(0);
    }
    let progress = Progress::new(options.progress, options.quiet, 1);
    let told = |now: qcow2::Progress| progress.set(now.done_bytes, now.total_bytes);
    let work = async { qcow2::commit(top, &work, told).await.map_err(explained) };
    let done = stop.or(work).await;
    progress.end(done.is_ok());
    done?;
    if !options.quiet {
        print("Image committed.\n")?;
    }
    Ok(0)
}
