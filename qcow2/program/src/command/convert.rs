//! `convert`: the disk of one image, or of several in a row, in another one.

mod bitmaps;
mod target;

use std::num::NonZeroU64;
use std::sync::Arc;

use anyhow::{Context, bail, ensure};
use block::{BlockDevice, ByteRange};
use qcow2::{Compression, ConvertOptions, Converted};

use crate::cache::Cache;
use crate::format::Format;
use crate::making::{self, SECTOR_BYTES};
use crate::open::{self, Access, How, Named, Opened};
use crate::options::OptionList;
use crate::output::{print, warn};
use crate::progress::Progress;
use crate::settings::{self, Purpose};
use crate::size::Size;
use crate::splice::Splice;
use crate::stop::Stop;
use target::Output;

/// Copy the disk of an image into a new one of any format
///
/// Several images become one, one behind the other. Zeros are left out where the target can leave them out, and what
/// the target knows to be zero is not written. A new file is removed again if the copy does not come to its end; when
/// the command ends well, the copy is durable.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The format of the sources; qcow2 is recognised, everything else is said
    #[arg(short, long = "source-format", alias = "format", value_name = "FMT")]
    format: Option<Format>,

    /// The format of the target
    #[arg(short = 'O', long, alias = "target-format", value_name = "FMT", default_value = "raw")]
    output_format: Format,

    /// Options of the target, NAME=VALUE[,...]; `-o help` lists them
    #[arg(short, long = "options", alias = "target-options", value_name = "OPTIONS")]
    options: Vec<String>,

    /// Make the target over this image, which has to hold what the one below the source holds; with -n the target is
    /// over it already
    #[arg(short = 'B', long, value_name = "FILE")]
    backing: Option<String>,

    /// The format of the image below the target
    #[arg(short = 'F', long, value_name = "FMT")]
    backing_format: Option<String>,

    /// The internal snapshot that is copied, by its id or name
    #[arg(short = 'l', long, alias = "source-snapshot", value_name = "SNAPSHOT")]
    snapshot: Option<String>,

    /// Write to a target that is there, and is as large as the source at least
    #[arg(short = 'n', long)]
    no_create: bool,

    /// So many zeros in a row are left out, 512 to 16M; 0 allocates everything
    #[arg(short = 'S', long = "sparse-size", value_name = "SIZE")]
    sparse: Option<Size>,

    /// Compress, on all processors
    #[arg(short, long)]
    compress: bool,

    /// With -c: from 1 (fast) to 9 for zlib and 19 for zstd (small) [default: what is usual]
    #[arg(long, value_name = "N", requires = "compress")]
    compression_level: Option<u8>,

    /// Copy the persistent bitmaps of the source, too
    #[arg(long)]
    bitmaps: bool,

    /// With --bitmaps: leave out those that were not saved in the source
    #[arg(long, requires = "bitmaps")]
    skip_broken_bitmaps: bool,

    /// Show progress
    #[arg(short, long)]
    progress: bool,

    /// Print nothing but errors
    #[arg(short, long)]
    quiet: bool,

    /// How the target is written: none, writeback, writethrough, directsync or unsafe; durable at the end in each
    #[arg(short = 't', long = "target-cache", value_name = "CACHE")]
    cache: Option<Cache>,

    /// How the sources are read
    #[arg(short = 'T', long, value_name = "CACHE")]
    source_cache: Option<Cache>,

    /// How many pieces are copied at once
    #[arg(short = 'm', long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=64), default_value_t = 8)]
    parallel: u8,

    /// Let pieces be written in any order
    #[arg(short = 'W', long = "oob-writes")]
    out_of_order: bool,

    /// Taken for qemu-img's sake: what need not be read is not read in any case
    #[arg(short = 'C', long = "copy-range-offloading", conflicts_with_all = ["sparse", "salvage"])]
    copy_offloading: bool,

    /// The most bytes that are copied in a second
    #[arg(short = 'r', long, value_name = "RATE")]
    rate: Option<Size>,

    /// Go on where a source cannot be read, with zeros
    #[arg(long)]
    salvage: bool,

    /// With -n: take the target for zeros without asking it
    #[arg(long, requires = "no_create")]
    target_is_zero: bool,

    /// The sources are lists of options: driver=qcow2,file.filename=PATH
    #[arg(long, alias = "source-image-opts")]
    image_opts: bool,

    /// With -n: the target is a list of options
    #[arg(long, requires = "no_create")]
    target_image_opts: bool,

    /// Read the sources although other programs may be writing them
    #[arg(short = 'U', long)]
    force_share: bool,

    #[command(flatten)]
    access: Access,

    /// The sources, and behind them the target
    #[arg(value_name = "FILE", required = true)]
    files: Vec<String>,
}

pub(crate) async fn run(options: Options, stop: &Stop) -> anyhow::Result<u8> {
    let mut list = OptionList::parse(&options.options)?;
    if list.wants_help() {
        print(&settings::help(options.output_format, Purpose::Create))?;
        return Ok(0);
    }
    let (target, sources) = match options.files.split_last() {
        Some((target, sources)) if !sources.is_empty() => (target, sources),
        _ => bail!("Must specify image file name, and behind it that of the target"),
    };
    check(&options, &mut list, sources.len())?;
    let progress = Progress::new(options.progress, options.quiet, 1);
    let done = stop.or(convert(&options, &list, sources, target, &progress)).await;
    progress.end(done.is_ok());
    let converted = done?;
    if !options.quiet {
        tell_unreadable(&converted);
    }
    Ok(0)
}

/// Refuses what contradicts itself, and puts what the letters say into the list.
fn check(options: &Options, list: &mut OptionList, sources: usize) -> anyhow::Result<()> {
    ensure!(
        !options.no_create || options.options.is_empty(),
        "-o has no effect when skipping image creation"
    );
    if let Some(Size(bytes)) = options.sparse {
        ensure!(
            bytes.is_multiple_of(SECTOR_BYTES) && bytes <= 16 << 20,
            "Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up to 16777216. \
             Select 0 to allocate everything."
        );
    }
    if let Some(backing) = options.backing.as_ref().filter(|_| !options.no_create) {
        list.set("backing_file", backing);
    }
    if let Some(format) = options.backing_format.as_ref().filter(|_| !options.no_create) {
        list.set("backing_fmt", format);
    }
    settings::check(list, options.output_format, Purpose::Create)?;
    ensure!(
        sources == 1 || !is_over_backing(options, list),
        "Having a backing file for the target makes no sense when concatenating multiple input images"
    );
    ensure!(
        list.get("backing_file").is_none() || list.get("backing_fmt").is_some(),
        "Use of backing file requires explicit backing format"
    );
    if options.compress {
        ensure!(
            options.output_format == Format::Qcow2,
            "Compression not supported for this file format"
        );
        let kind = match list.get("compression_type") {
            Some(name) => making::compression(name)?,
            None => qcow2::CreateOptions::new(0).compression,
        };
        if !options.no_create {
            check_level(options, kind)?;
        }
        ensure!(!options.copy_offloading, "Cannot enable copy offloading when -c is used");
        ensure!(
            list.get("encrypt.format").is_none(),
            "Compression and encryption not supported at the same time"
        );
        let preallocation = list.get("preallocation").unwrap_or("off");
        ensure!(
            preallocation == "off",
            "Compression and preallocation not supported at the same time"
        );
        ensure!(
            list.get("data_file").is_none(),
            "Compression and an external data file not supported at the same time"
        );
    }
    ensure!(!options.bitmaps || sources == 1, "Copying bitmaps only possible with single source");
    ensure!(
        options.snapshot.is_none() || sources == 1,
        "No support for concatenating multiple snapshot"
    );
    Ok(())
}

/// Refuses a level that a way to compress does not have.
fn check_level(options: &Options, kind: Compression) -> anyhow::Result<()> {
    let highest = kind.max_level();
    let valid = options.compression_level.is_none_or(|level| (1..=highest).contains(&level));
    ensure!(valid, "Invalid compression level: {kind} goes from 1 to {highest}");
    Ok(())
}

async fn convert(
    options: &Options,
    list: &OptionList,
    sources: &[String],
    target: &str,
    progress: &Progress,
) -> anyhow::Result<Converted> {
    let how =
        How::reading(options.source_cache, options.force_share).snapshot(options.snapshot.clone());
    let mut opened = Vec::new();
    for source in sources {
        let named = Named::parse(source, options.format, options.image_opts)?;
        opened.push(open::open(&named, &how, &options.access).await?);
    }
    let source = joined(&opened);
    let size_bytes = source.limits().size_bytes;
    let bitmaps = match (options.bitmaps, opened.first()) {
        (true, Some(source)) => bitmaps::of(source, options.skip_broken_bitmaps).await?,
        _ => Vec::new(),
    };
    let output = Output::open(options, list, target, &opened, size_bytes).await?;
    let mut engine = engine(options, list, &opened);
    engine.target_is_zero |= output.is_zero();
    let told = |now: qcow2::Progress| progress.set(now.done_bytes, now.total_bytes);
    let converted = qcow2::convert(source, &output.target(options)?, &engine, told).await;
    let converted = converted.with_context(|| format!("error while converting to {target}"))?;
    if let Some(source) = opened.first().and_then(Opened::image) {
        bitmaps::copy(&bitmaps, source, output.image()).await?;
    }
    output.finish().await?;
    for source in opened {
        source.close().await?;
    }
    Ok(converted)
}

/// All sources as one disk.
fn joined(opened: &[Opened]) -> Arc<dyn BlockDevice> {
    if let [only] = opened {
        return only.device();
    }
    let whole = opened.iter().fold(Splice::new(), |whole, part| {
        whole.then(part.device(), ByteRange::between(0, part.size_bytes()), SECTOR_BYTES)
    });
    Arc::new(whole)
}

/// Whether what lies below the source lies below the target, too.
fn is_over_backing(options: &Options, list: &OptionList) -> bool {
    options.backing.is_some() || list.get("backing_file").is_some()
}

fn engine(options: &Options, list: &OptionList, opened: &[Opened]) -> ConvertOptions {
    let over_backing = is_over_backing(options, list);
    let mut engine = ConvertOptions {
        target_is_zero: options.target_is_zero,
        layer: opened.first().and_then(Opened::image).filter(|_| over_backing).cloned(),
        requests: options.parallel.into(),
        in_order: !options.out_of_order,
        bytes_per_sec: options.rate.and_then(|rate| NonZeroU64::new(rate.0)),
        salvage: options.salvage,
        ..ConvertOptions::default()
    };
    if let Some(Size(bytes)) = options.sparse {
        engine.sparse_bytes = bytes;
    }
    engine
}

fn tell_unreadable(converted: &Converted) {
    for range in &converted.unreadable {
        warn(&format!("error while reading {range}: it is zeros in the copy"));
    }
    if converted.unreadable_bytes > 0 {
        warn(&format!("{} bytes could not be read", converted.unreadable_bytes));
    }
}
