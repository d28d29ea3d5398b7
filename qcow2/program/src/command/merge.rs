//! `merge`: the oldest increments of a chain, folded into the image that they stand on.

use qcow2::MergeOptions;

use crate::cache::Cache;
use crate::folding;
use crate::format::Format;
use crate::open::{Access, Named};
use crate::output::print;
use crate::progress::Progress;
use crate::size::Size;
use crate::stop::Stop;

/// Fold the oldest increments of a chain into its base
///
/// The layers above the folded ones read as before at every moment, whatever ends the work; calling again goes on. The
/// folded layers themselves lose their meaning.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The format of the image: qcow2
    #[arg(short, long, value_name = "FMT")]
    format: Option<Format>,

    /// FILE is a list of options: driver=qcow2,file.filename=PATH
    #[arg(long)]
    image_opts: bool,

    /// The image that takes the increments [default: the lowest of the chain]
    #[arg(short, long, value_name = "BASE")]
    base: Option<String>,

    /// The last increment that is folded [default: the one over the base]
    #[arg(short, long, value_name = "LAYER")]
    last: Option<String>,

    /// Remove the files of the folded increments
    #[arg(long)]
    remove: bool,

    /// Say what would be done, and change nothing
    #[arg(long)]
    dry_run: bool,

    /// Show progress
    #[arg(short)]
    progress: bool,

    /// Print nothing but errors
    #[arg(short, long)]
    quiet: bool,

    /// The most bytes that are copied in a second
    #[arg(short, value_name = "RATE")]
    rate: Option<Size>,

    /// How the images are written: none, writeback, writethrough, directsync or unsafe
    #[arg(short = 't', value_name = "CACHE")]
    cache: Option<Cache>,

    #[command(flatten)]
    access: Access,

    /// The top of the chain
    #[arg(value_name = "FILE")]
    file: String,
}

pub(crate) async fn run(options: Options, stop: &Stop) -> anyhow::Result<u8> {
    let named = Named::parse(&options.file, options.format, options.image_opts)?;
    let top = folding::top(&named)?;
    let path = |name: &String| folding::layer(top, name);
    let work = MergeOptions {
        copy: folding::options(options.cache, &options.access, options.rate)?,
        base: options.base.as_ref().map(path),
        last: options.last.as_ref().map(path),
        remove: options.remove,
    };
    let explained = |error| folding::explained(error, top);
    if options.dry_run {
        let plan = async { qcow2::plan_merge(top, &work).await.map_err(explained) };
        print(&folding::describe(&stop.or(plan).await?))?;
        return Ok(0);
    }
    let progress = Progress::new(options.progress, options.quiet, 1);
    let told = |now: qcow2::Progress| progress.set(now.done_bytes, now.total_bytes);
    let work = async { qcow2::merge(top, &work, told).await.map_err(explained) };
    let done = stop.or(work).await;
    progress.end(done.is_ok());
    done?;
    if !options.quiet {
        print("Increments merged.\n")?;
    }
    Ok(0)
}
