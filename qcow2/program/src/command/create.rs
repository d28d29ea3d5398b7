//! `create`: a new, empty image.

use std::path::Path;

use anyhow::{Context, anyhow, bail, ensure};
use qcow2::Image;

use crate::cache::Cache;
use crate::chain;
use crate::format::{self, Format};
use crate::making::{self, Plan, beside};
use crate::open::{self, Access, How, Named};
use crate::options::OptionList;
use crate::output::{print, text_of, warn};
use crate::place::Place;
use crate::settings::{self, Purpose};
use crate::size::Size;
use crate::stop::Stop;

/// Make a new, empty image
///
/// A file of this name that nobody has open is replaced. The image is durable when the command ends.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The format of the new image
    #[arg(short, long, value_name = "FMT", default_value = "raw")]
    format: Format,

    /// The image below: what is not written to the new image is read from it
    #[arg(short, long = "backing", value_name = "FILE")]
    backing: Option<String>,

    /// The format of the image below
    #[arg(short = 'F', long, value_name = "FMT")]
    backing_format: Option<String>,

    /// Do not look at the image below: it may be missing
    #[arg(short = 'u', long = "backing-unsafe")]
    without_backing: bool,

    /// Options of the format, NAME=VALUE[,...]; `-o help` lists them
    #[arg(short, long = "options", value_name = "OPTIONS")]
    options: Vec<String>,

    /// Print nothing but errors
    #[arg(short, long)]
    quiet: bool,

    #[command(flatten)]
    access: Access,

    /// The new image
    #[arg(value_name = "FILE", required_unless_present = "options")]
    file: Option<String>,

    /// The size of its disk in bytes, or with k, M, G, T, P or E; that of the image below where it is left out
    #[arg(value_name = "SIZE")]
    size: Option<Size>,
}

pub(crate) async fn run(options: Options, stop: &Stop) -> anyhow::Result<u8> {
    let mut list = OptionList::parse(&options.options)?;
    if list.wants_help() {
        print(&settings::help(options.format, Purpose::Create))?;
        return Ok(0);
    }
    options.format.for_making()?;
    let name = options.file.as_deref().context("Expecting image file name")?;
    let Place::File(file) = &Place::parse(name)? else {
        bail!("{name}: an export is its server's to make; convert -n writes to one");
    };
    let naming = || name.to_owned();
    settings::check(&list, options.format, Purpose::Create).with_context(naming)?;
    check_secrets(&options, &list).with_context(naming)?;
    let size = complete(&options, &mut list, file).await.with_context(naming)?;
    if !options.quiet {
        let told = settings::describe(&list, options.format);
        print(&format!("Formatting '{name}', fmt={} {told}\n", options.format))?;
    }
    let made = stop.or(make(file, &options, size, &list)).await;
    made.with_context(naming)?;
    Ok(0)
}

/// Refuses a passphrase for what is not encrypted: who gives one must not believe that it is. Secrets may be defined
/// and not used, as with qemu-img, which does not say so.
fn check_secrets(options: &Options, list: &OptionList) -> anyhow::Result<()> {
    if list.get("encrypt.format").is_some() {
        return Ok(());
    }
    let (has_objects, has_file) = options.access.secrets.given();
    ensure!(
        !has_file,
        "--passphrase-file is given, but the new image would not be encrypted: add -f qcow2 -o encrypt.format=luks, or \
         leave --passphrase-file out"
    );
    if has_objects {
        warn(
            "a secret is given, but the new image is not encrypted: -f qcow2 -o encrypt.format=luks does that",
        );
    }
    Ok(())
}

async fn make(path: &Path, options: &Options, size: u64, list: &OptionList) -> anyhow::Result<()> {
    let below = match list.get("backing_file") {
        Some(name) => chain::ids(&beside(path, name)).await,
        None => Vec::new(),
    };
    let plan = Plan {
        path,
        format: options.format,
        size_bytes: size,
        options: list,
        access: &options.access,
        cache: Cache::PAGES,
    };
    plan.make(&below).await?.keep().await
}

/// Puts what the letters say into the list, looks at the image below, and finds the size.
async fn complete(options: &Options, list: &mut OptionList, file: &Path) -> anyhow::Result<u64> {
    if let Some(backing) = &options.backing {
        list.set("backing_file", backing);
    }
    if let Some(format) = &options.backing_format {
        list.set("backing_fmt", format);
    }
    ensure!(
        list.get("backing_fmt").is_none() || list.get("backing_file").is_some(),
        "a backing format is given, but no backing file (-b)"
    );
    let named = match (list.get("size"), options.size) {
        (Some(_), Some(_)) => bail!("The image size must be specified only once"),
        (Some(size), None) => Some(settings::size("size", size)?),
        (None, size) => size.map(|size| size.0),
    };
    let mut size = named;
    if let Some(name) = list.get("backing_file") {
        let has_backing = options.format == Format::Qcow2;
        ensure!(has_backing, "Backing file not supported for file format '{}'", options.format);
        ensure!(!name.is_empty(), "Expected backing file name, got empty string");
        making::plain_path(name)?;
        let path = beside(file, name);
        ensure!(
            path != file,
            "Trying to create an image with the same filename as the backing file"
        );
        match list.get("backing_fmt") {
            None => return Err(without_format(&path)),
            Some(format) => drop(making::backing_format(format)?),
        }
        if !options.without_backing {
            let below = size_below(&path, list.get("backing_fmt"), &options.access).await?;
            size = size.or(Some(below));
            making::tell_of_distance(file, &path, &options.access);
        }
    }
    let size = size.context("Image creation needs a size parameter")?;
    if list.get("size").is_none() {
        list.set("size", size.to_string());
    }
    Ok(size)
}

/// Why a backing file needs its format said, unless something else is wrong with it.
fn without_format(path: &Path) -> anyhow::Error {
    if let Err(error) = std::fs::metadata(path) {
        return not_opened(&anyhow::Error::new(error).context(format::could_not_open(path)));
    }
    let found = match format::recognise(path) {
        Ok(format) => format!("; it is {format}"),
        Err(_) => String::new(),
    };
    anyhow!("Backing file specified without backing format (-F){found}")
}

fn not_opened(error: &anyhow::Error) -> anyhow::Error {
    anyhow!("{}\nCould not open backing image.", text_of(error))
}

async fn size_below(path: &Path, format: Option<&str>, access: &Access) -> anyhow::Result<u64> {
    let format: Option<Format> = format.map(str::parse).transpose().map_err(anyhow::Error::msg)?;
    if format == Some(Format::Qcow2) {
        // Without what lies below, and without a passphrase: only the size is asked for.
        let seen = Image::inspect(path).await;
        let seen = seen.map_err(|error| open::explained(error, path, &How::reading(None, true)));
        let seen = seen.map_err(|error| not_opened(&error))?;
        return match seen.faults.into_iter().next() {
            Some(fault) => Err(not_opened(&anyhow!("{}: {fault}", format::could_not_open(path)))),
            None => Ok(seen.info.size_bytes),
        };
    }
    let named = Named::file(path, format);
    let opened = open::open(&named, &How::reading(None, true), access).await;
    let opened = opened.map_err(|error| not_opened(&error))?;
    let size = opened.size_bytes();
    opened.close().await?;
    Ok(size)
}
