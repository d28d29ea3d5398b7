//! `dd`: a range of an image, in blocks, into a new one.

use std::sync::Arc;

use anyhow::{Context, anyhow, bail, ensure};
use block::ByteRange;
use qcow2::{ConvertOptions, ConvertTarget};

use crate::cache::Cache;
use crate::chain;
use crate::format::Format;
use crate::making::Plan;
use crate::open::{self, Access, How, Named, Opened};
use crate::options::OptionList;
use crate::output::warn;
use crate::place::Place;
use crate::size::Size;
use crate::splice::Splice;
use crate::stop::Stop;
use crate::target::Target;

/// Copy a range of an image into a new one, counted in blocks
///
/// Operands: if=INPUT of=OUTPUT [bs=BYTES] [count=BLOCKS] [skip=BLOCKS]; bs is 512 unless said. What is copied is read
/// in large pieces, whatever bs says.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The format of the input; qcow2 is recognised, everything else is said
    #[arg(short, long, value_name = "FMT")]
    format: Option<Format>,

    /// The format of the output
    #[arg(short = 'O', long, value_name = "FMT", default_value = "raw")]
    output_format: Format,

    /// INPUT is a list of options: driver=qcow2,file.filename=PATH
    #[arg(long)]
    image_opts: bool,

    /// Read the input although another program may be writing it
    #[arg(short = 'U', long)]
    force_share: bool,

    #[command(flatten)]
    access: Access,

    /// if=, of=, bs=, count= and skip=
    #[arg(value_name = "OPERAND", required = true)]
    operands: Vec<String>,
}

/// The operands, read.
#[derive(Debug, PartialEq, Eq)]
struct Operands {
    input: String,
    output: String,
    block_bytes: u64,
    count: Option<u64>,
    skip: u64,
}

impl Operands {
    fn parse(operands: &[String]) -> anyhow::Result<Self> {
        let (mut input, mut output) = (None, None);
        let (mut block_bytes, mut count, mut skip) = (512, None, 0);
        for operand in operands {
            let unknown = || anyhow!("unrecognized operand {operand}");
            let (name, value) = operand.split_once('=').ok_or_else(unknown)?;
            let size = || -> anyhow::Result<u64> {
                let size: Size =
                    value.parse().map_err(|why| anyhow!("Invalid {name} specified: {why}"))?;
                Ok(size.0)
            };
            match name {
                "if" => input = Some(value.to_owned()),
                "of" => output = Some(value.to_owned()),
                "bs" => block_bytes = size()?,
                "count" => count = Some(size()?),
                "skip" => skip = size()?,
                _ => return Err(unknown()),
            }
        }
        let valid = (1..=i32::MAX.unsigned_abs().into()).contains(&block_bytes);
        ensure!(valid, "Invalid bs specified. Must be between 1 and {}.", i32::MAX);
        let (Some(input), Some(output)) = (input, output) else {
            bail!("Must specify both input and output files");
        };
        Ok(Self { input, output, block_bytes, count, skip })
    }

    /// What is copied of an input of so many bytes; the second says whether `skip` leads behind its end.
    fn range(&self, input_bytes: u64) -> (ByteRange, bool) {
        let counted = self.count.map(|count| count.saturating_mul(self.block_bytes));
        let end = counted.map_or(input_bytes, |counted| counted.min(input_bytes));
        let start = self.skip.saturating_mul(self.block_bytes);
        (ByteRange::between(start.min(end), end), start > end)
    }
}

pub(crate) async fn run(options: Options, stop: &Stop) -> anyhow::Result<u8> {
    let operands = Operands::parse(&options.operands)?;
    let named = Named::parse(&operands.input, options.format, options.image_opts)?;
    let how = How::reading(None, options.force_share);
    let input = open::open(&named, &how, &options.access).await?;
    let copied = stop.or(copy(&input, &operands, &options)).await;
    copied.and(input.close().await)?;
    Ok(0)
}

async fn copy(input: &Opened, operands: &Operands, options: &Options) -> anyhow::Result<()> {
    let Place::File(path) = Place::parse(&operands.output)? else {
        bail!("{}: dd makes new files; convert -n writes to an export", operands.output);
    };
    let (range, is_behind) = operands.range(input.size_bytes());
    if is_behind {
        warn(&format!("{}: cannot skip to specified offset", operands.input));
    }
    let plan = Plan {
        path: &path,
        format: options.output_format,
        size_bytes: range.len(),
        options: &OptionList::default(),
        access: &options.access,
        cache: Cache::DIRECT,
    };
    let sources = chain::ids_of(std::slice::from_ref(input)).await;
    let made = plan.make(&sources).await;
    let made =
        made.with_context(|| format!("{}: error while creating output image", path.display()))?;
    let (output, files) = made.open(None, &options.access, Cache::DIRECT).await?;
    let source = Arc::new(Splice::new().then(input.device(), range, 1));
    let target = ConvertTarget::Device(Arc::clone(&output.device));
    let copied = qcow2::convert(source, &target, &ConvertOptions::default(), |_| {}).await;
    let closed = output.device.close().await.context("error while closing the output image");
    copied?;
    closed?;
    files.into_iter().try_for_each(Target::keep)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(operands: &[&str]) -> anyhow::Result<Operands> {
        Operands::parse(&operands.iter().map(|operand| (*operand).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn count_limits_the_input_and_skip_comes_off_its_start() {
        let range = |operands: &[&str], input| {
            let mut all = vec!["if=a", "of=b"];
            all.extend(operands);
            parse(&all).unwrap().range(input)
        };
        assert_eq!(range(&[], 1000), (ByteRange::between(0, 1000), false));
        assert_eq!(range(&["bs=1k", "count=2"], 10_240), (ByteRange::between(0, 2048), false));
        assert_eq!(
            range(&["bs=1k", "count=2", "skip=1"], 10_240),
            (ByteRange::between(1024, 2048), false)
        );
        assert_eq!(range(&["skip=3"], 1000), (ByteRange::between(1000, 1000), true));
        assert_eq!(range(&["bs=2M", "skip=7E"], 1000), (ByteRange::between(1000, 1000), true));
    }

    #[test]
    fn operands_that_mean_nothing_are_refused() {
        for operands in [
            &["if=a"][..],
            &["if=a", "of=b", "seek=1"],
            &["if=a", "of=b", "x"],
            &["if=a", "of=b", "bs=0"],
        ] {
            assert!(parse(operands).is_err(), "{operands:?}");
        }
    }
}
