//! `bitmap`: the persistent bitmaps of an image.

use anyhow::{Context, bail, ensure};
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};
use qcow2::{BitmapError, Image};

use crate::format::Format;
use crate::open::{self, Access, How, Named, Opened};
use crate::size::Size;
use crate::stop::Stop;

/// Add, remove, clear, enable, disable or merge persistent bitmaps
///
/// Actions are done in the order in which they are given. `info` lists the bitmaps of an image.
#[derive(Debug, Args)]
pub(crate) struct Options {
    #[command(flatten)]
    actions: Actions,

    /// The image whose bitmaps --merge takes, instead of FILE
    #[arg(short = 'b', long, value_name = "FILE")]
    source_file: Option<String>,

    /// Its format
    #[arg(short = 'F', long, value_name = "FMT")]
    source_format: Option<Format>,

    /// With --add: the bytes of the disk that a bit stands for [default: 64k]
    #[arg(short, long, value_name = "SIZE")]
    granularity: Option<Size>,

    /// The format of the image: qcow2
    #[arg(short, long, value_name = "FMT")]
    format: Option<Format>,

    /// FILE is a list of options: driver=qcow2,file.filename=PATH
    #[arg(long)]
    image_opts: bool,

    #[command(flatten)]
    access: Access,

    /// The image
    #[arg(value_name = "FILE")]
    file: String,

    /// The bitmap
    #[arg(value_name = "BITMAP")]
    bitmap: String,
}

/// QEMU's default for new bitmaps: a cluster, within these limits.
const GRANULARITY_BYTES: std::ops::RangeInclusive<u64> = 4096..=65536;

/// One step.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Action {
    Add,
    Remove,
    Clear,
    Enable,
    Disable,
    Merge(String),
}

impl Action {
    const fn name(&self) -> &'static str {
        match self {
            Self::Add => "add",
            Self::Remove => "remove",
            Self::Clear => "clear",
            Self::Enable => "enable",
            Self::Disable => "disable",
            Self::Merge(_) => "merge",
        }
    }
}

/// Steps in the order of the command line, which derived options do not keep.
#[derive(Clone, Debug, Default)]
struct Actions(Vec<Action>);

const FLAGS: [(Action, &str); 5] = [
    (Action::Add, "Make it, empty and enabled"),
    (Action::Remove, "Remove it"),
    (Action::Clear, "Make it say that nothing has changed"),
    (Action::Enable, "Record changes in it from now on"),
    (Action::Disable, "Record no more changes in it"),
];

impl Args for Actions {
    fn augment_args(command: Command) -> Command {
        let flags = FLAGS.iter().map(|(action, help)| {
            Arg::new(action.name())
                .long(action.name())
                .help(*help)
                .action(ArgAction::Append)
                .num_args(0)
                .default_missing_value("")
        });
        let merge = Arg::new("merge")
            .long("merge")
            .value_name("SOURCE")
            .help("Add to it what has changed according to another bitmap")
            .action(ArgAction::Append);
        command.args(flags).arg(merge)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Actions {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut found = Vec::new();
        for (action, _) in FLAGS {
            let places = matches.indices_of(action.name()).into_iter().flatten();
            found.extend(places.map(|place| (place, action.clone())));
        }
        let places = matches.indices_of("merge").into_iter().flatten();
        let sources = matches.get_many::<String>("merge").into_iter().flatten();
        found.extend(places.zip(sources).map(|(at, name)| (at, Action::Merge(name.clone()))));
        found.sort_by_key(|(place, _)| *place);
        Ok(Self(found.into_iter().map(|(_, action)| action).collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

pub(crate) async fn run(options: Options, stop: &Stop) -> anyhow::Result<u8> {
    check(&options)?;
    let named = Named::parse(&options.file, options.format, options.image_opts)?;
    let opened = open::open(&named, &How::writing(None), &options.access).await?;
    let source = match &options.source_file {
        None => None,
        Some(file) => {
            let named = Named::parse(file, options.source_format, false)?;
            let how = How { offers_sharing: false, ..How::reading(None, false) };
            Some(open::open(&named, &how, &options.access).await?)
        }
    };
    let done = stop.or(act(&options, &opened, source.as_ref())).await;
    let closed = opened.close().await;
    if let Some(source) = source {
        source.close().await?;
    }
    done?;
    closed?;
    Ok(0)
}

fn check(options: &Options) -> anyhow::Result<()> {
    let has = |wanted: &str| options.actions.0.iter().any(|action| action.name() == wanted);
    ensure!(
        !options.actions.0.is_empty(),
        "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge"
    );
    ensure!(options.granularity.is_none() || has("add"), "granularity only supported with --add");
    ensure!(
        options.source_format.is_none() || options.source_file.is_some(),
        "-F only supported with -b"
    );
    ensure!(
        options.source_file.is_none() || has("merge"),
        "Merge bitmap source file only supported with --merge"
    );
    Ok(())
}

async fn act(options: &Options, opened: &Opened, source: Option<&Opened>) -> anyhow::Result<()> {
    let image = image_of(opened)?;
    let source = source.map_or(Ok(image), image_of)?;
    let name = options.bitmap.as_str();
    for action in &options.actions.0 {
        let done = match action {
            Action::Add => image.add_bitmap(name, granularity(options, image), true).await,
            Action::Remove => image.remove_bitmap(name).await,
            Action::Clear => image.clear_bitmap(name).await,
            Action::Enable => image.enable_bitmap(name).await,
            Action::Disable => image.disable_bitmap(name).await,
            Action::Merge(from) => image.merge_bitmap(name, source, from).await,
        };
        let done = done.map_err(|error| match &error {
            qcow2::Error::Bitmap {
                file,
                name,
                reason: BitmapError::Inconsistent | BitmapError::ExtraData,
            } => {
                anyhow::anyhow!("{error} (qcow2 bitmap --remove {} {name:?})", file.display())
            }
            _ => error.into(),
        });
        done.with_context(|| format!("Operation {} on bitmap {name} failed", action.name()))?;
    }
    Ok(())
}

fn granularity(options: &Options, image: &Image) -> u64 {
    let cluster = image.info().cluster_bytes;
    let usual = cluster.clamp(*GRANULARITY_BYTES.start(), *GRANULARITY_BYTES.end());
    options.granularity.map_or(usual, |size| size.0)
}

fn image_of(opened: &Opened) -> anyhow::Result<&Image> {
    match opened.image() {
        Some(image) => Ok(image),
        None => bail!("{} has no bitmaps: only qcow2 images have", opened.place),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    #[test]
    fn actions_keep_the_order_of_the_command_line() {
        let line = [
            "bitmap",
            "--add",
            "--merge",
            "x",
            "--disable",
            "a",
            "--merge=y",
            "--clear",
            "b",
            "--add",
        ];
        let line = Line::try_parse_from(line).unwrap();
        let merge = |name: &str| Action::Merge(name.to_owned());
        let expected =
            [Action::Add, merge("x"), Action::Disable, merge("y"), Action::Clear, Action::Add];
        assert_eq!(line.options.actions.0, expected);
        assert_eq!((line.options.file.as_str(), line.options.bitmap.as_str()), ("a", "b"));
    }
}
