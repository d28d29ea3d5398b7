//! `merge`: the oldest increments of a chain, folded into the image that they stand on. What others would lose by it
//! is refused here; how it is found out is the library's.

use std::fmt::Write;

use anyhow::bail;
use qcow2::{MergeLosses, MergeOptions};

use crate::cache::Cache;
use crate::folding;
use crate::format::Format;
use crate::open::{Access, Named};
use crate::output::{print, warn};
use crate::progress::Progress;
use crate::size::Size;
use crate::stop::Stop;

/// Fold the oldest increments of a chain into its base
///
/// The layers above the folded ones read as before at every moment, whatever ends the work; calling again goes on. The
/// folded layers themselves lose their meaning, and other images over them or over the base change what they show:
/// where such images are in the folders of the chain, or --remove would take internal snapshots or bitmaps away, they
/// are named and nothing is done without --force. Images in other folders are not seen. What was killed before --remove
/// had removed the folded files leaves them behind: they are named so the next time, belong to no chain any more, and
/// are to be deleted by hand, not by --force.
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

    /// Merge although other images, internal snapshots or bitmaps are lost by it
    #[arg(long)]
    force: bool,

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

    /// The top of the chain
    #[arg(value_name = "FILE")]
    file: String,
}

pub(crate) async fn run(options: Options, stop: &Stop) -> anyhow::Result<u8> {
    let named = Named::parse(&options.file, options.format, options.image_opts)?;
    let top = folding::top(&named)?;
    let path = |name: &String| folding::layer(top, name);
    let work = MergeOptions {
        copy: folding::options(&named, options.cache, &options.access, options.rate)?,
        base: options.base.as_ref().map(path),
        last: options.last.as_ref().map(path),
        remove: options.remove,
    };
    let explained = |error| folding::explained(error, top);
    let losses = async { qcow2::merge_losses(top, &work).await.map_err(explained) };
    let losses = lines(&stop.or(losses).await?, options.remove);
    if options.dry_run {
        let plan = async { qcow2::plan_merge(top, &work).await.map_err(explained) };
        let mut text = folding::describe(&stop.or(plan).await?);
        for line in &losses {
            let needs = if line.is_serious { "Needs --force: " } else { "" };
            // Writing into a string does not fail.
            let _ = writeln!(text, "{needs}{}", line.text);
        }
        print(&text)?;
        return Ok(0);
    }
    accept(&losses, options.force)?;
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

/// One thing that others lose.
struct Line {
    text: String,
    /// Whether it is lost for good, so that it takes a word more.
    is_serious: bool,
}

fn lines(losses: &MergeLosses, remove: bool) -> Vec<Line> {
    let mut lines = Vec::new();
    for path in &losses.dependents {
        let text = format!(
            "{} is over one of the images that change: it would show something else, or not open any more",
            folding::shown(path)
        );
        lines.push(Line { text, is_serious: true });
    }
    for layer in &losses.layers {
        let path = folding::shown(&layer.path);
        let would = if remove { "would be removed with it" } else { "stays behind in it" };
        for (what, names) in [("snapshot", &layer.snapshots), ("bitmap", &layer.bitmaps)] {
            for name in names {
                let text = format!("{what} '{name}' of {path} {would}");
                lines.push(Line { text, is_serious: remove });
            }
        }
    }
    lines
}

/// Says what is lost, and refuses where it is much.
fn accept(losses: &[Line], force: bool) -> anyhow::Result<()> {
    let serious: Vec<&str> =
        losses.iter().filter(|line| line.is_serious).map(|line| line.text.as_str()).collect();
    if !serious.is_empty() && !force {
        bail!("nothing was merged (--force does it all the same): {}", serious.join("; "));
    }
    losses.iter().for_each(|line| warn(&line.text));
    Ok(())
}
