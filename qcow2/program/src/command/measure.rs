//! `measure`: how large a new image would be.

use anyhow::{bail, ensure};
use qcow2::{
    BitmapSize, Image, LuksCipher, MeasureOptions, MeasureTarget, Measured, RecordedBitmap,
};
use serde::Serialize;

use crate::format::Format;
use crate::making;
use crate::open::{self, Access, How, Named};
use crate::options::{OptionList, switch};
use crate::output::{Output, print, print_json};
use crate::settings::{self, Purpose};
use crate::size::Size;
use crate::stop::Stop;

/// Say how large a new image would be
///
/// Of an empty disk (--size), or of what another image holds. Compression is not taken into account.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// How to write the result
    #[arg(long, value_name = "OFMT", default_value = "human")]
    output: Output,

    /// The format of the new image
    #[arg(
        short = 'O',
        long = "target-format",
        alias = "output-format",
        value_name = "FMT",
        default_value = "raw"
    )]
    output_format: Format,

    /// Options of the new image, NAME=VALUE[,...]
    #[arg(short, long = "options", value_name = "OPTIONS")]
    options: Vec<String>,

    /// The size of the disk, where there is no FILE
    #[arg(short, long, value_name = "SIZE", conflicts_with = "file")]
    size: Option<Size>,

    /// The format of FILE; qcow2 is recognised, everything else is said
    #[arg(short, long, value_name = "FMT")]
    format: Option<Format>,

    /// FILE is a list of options: driver=qcow2,file.filename=PATH
    #[arg(long)]
    image_opts: bool,

    /// The internal snapshot of FILE that is meant, by its id or name
    #[arg(short = 'l', long, value_name = "SNAPSHOT")]
    snapshot: Option<String>,

    /// Read FILE although another program may be writing it
    #[arg(short = 'U', long)]
    force_share: bool,

    #[command(flatten)]
    access: Access,

    /// The image whose disk would be in it
    #[arg(value_name = "FILE", required_unless_present_any = ["size", "options"])]
    file: Option<String>,
}

/// The result.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Sizes {
    #[serde(skip_serializing_if = "Option::is_none")]
    bitmaps: Option<u64>,
    required: u64,
    fully_allocated: u64,
}

impl Sizes {
    fn text(&self) -> String {
        let bitmaps = self.bitmaps.map(|bytes| format!("bitmaps size: {bytes}\n"));
        format!(
            "required size: {}\nfully allocated size: {}\n{}",
            self.required,
            self.fully_allocated,
            bitmaps.unwrap_or_default()
        )
    }
}

pub(crate) async fn run(options: Options, stop: &Stop) -> anyhow::Result<u8> {
    let list = OptionList::parse(&options.options)?;
    if list.wants_help() {
        print(&settings::help(options.output_format, Purpose::Create))?;
        return Ok(0);
    }
    settings::check(&list, options.output_format, Purpose::Create)?;
    let measured = stop.or(measure(&options, &list)).await?;
    let sizes = Sizes {
        bitmaps: measured.bitmaps_bytes,
        required: measured.required_bytes,
        fully_allocated: measured.fully_allocated_bytes,
    };
    match options.output {
        Output::Human => print(&sizes.text())?,
        Output::Json => print_json(&sizes)?,
    }
    Ok(0)
}

async fn measure(options: &Options, list: &OptionList) -> anyhow::Result<Measured> {
    let Some(file) = &options.file else {
        let asks = options.image_opts || options.format.is_some() || options.snapshot.is_some();
        ensure!(!asks, "--image-opts, -f, and -l require a filename argument.");
        let named = list.get("size").map(|size| settings::size("size", size)).transpose()?;
        let Some(size) = options.size.map(|size| size.0).or(named) else {
            bail!("Either --size N or one filename must be specified.");
        };
        return Ok(qcow2::measure_size(size, &target(options, list)?)?);
    };
    let named = Named::parse(file, options.format, options.image_opts)?;
    let how = How::reading(None, options.force_share).snapshot(options.snapshot.clone());
    let opened = open::open(&named, &how, &options.access).await?;
    let mut target = target(options, list)?;
    if let (MeasureTarget::Qcow2(target), Some(image)) = (&mut target, opened.image()) {
        let both_have = image.info().version > 2 && is_version_3(list);
        if both_have {
            let recorded = Image::inspect(image.path()).await?.bitmaps;
            target.bitmaps = Some(recorded.iter().map(size_of).collect());
        }
    }
    let measured = qcow2::measure(&*opened.device(), &target).await;
    opened.close().await?;
    Ok(measured?)
}

fn size_of(bitmap: &RecordedBitmap) -> BitmapSize {
    BitmapSize { name_bytes: bitmap.name.len() as u64, granularity_bytes: bitmap.granularity_bytes }
}

fn is_version_3(list: &OptionList) -> bool {
    !matches!(list.get("compat"), Some("0.10" | "v2"))
}

fn target(options: &Options, list: &OptionList) -> anyhow::Result<MeasureTarget> {
    if options.output_format.for_making()? == Format::Raw {
        return Ok(MeasureTarget::Raw);
    }
    let mut target = MeasureOptions::default();
    if let Some(size) = list.get("cluster_size") {
        target.cluster_bytes = making::cluster_bytes(size)?;
    }
    if let Some(bits) = list.get("refcount_bits") {
        target.refcount_bits = making::refcount_bits(bits)?;
    }
    if let Some(extended) = list.get("extended_l2") {
        target.extended_l2 = switch("extended_l2", extended)?;
    }
    if list.get("encrypt.format") == Some("luks") {
        let small = list.get("encrypt.cipher-alg") == Some("aes-128");
        let cipher = if small { LuksCipher::Aes128Xts } else { LuksCipher::Aes256Xts };
        target.luks_header_bytes = cipher.header_bytes();
    }
    target.backing = list.get("backing_file").is_some();
    target.allocate_data = matches!(list.get("preallocation"), Some("full" | "falloc"));
    Ok(MeasureTarget::Qcow2(target))
}
