//! `amend`: other options for an image that is there.

use anyhow::{Context, bail, ensure};
use qcow2::{AmendOptions, Image, KeyChange, ResizeOptions, Slots};

use crate::cache::Cache;
use crate::format::Format;
use crate::making;
use crate::open::{self, Access, How, Named};
use crate::options::{OptionList, switch};
use crate::output::print;
use crate::settings::{self, Purpose};
use crate::stop::Stop;

/// Change the options of an image
///
/// Each change takes effect as a whole or not at all.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The options, NAME=VALUE[,...]; `-o help` lists them
    #[arg(short, long = "options", value_name = "OPTIONS", required = true)]
    options: Vec<String>,

    /// The format of the image: qcow2
    #[arg(short, long, value_name = "FMT")]
    format: Option<Format>,

    /// FILE is a list of options: driver=qcow2,file.filename=PATH
    #[arg(long)]
    image_opts: bool,

    /// Taken for qemu-img's sake: there is little to wait for
    #[arg(short, long)]
    progress: bool,

    /// Print nothing but errors
    #[arg(short, long)]
    quiet: bool,

    /// How the image is written: none, writeback, writethrough, directsync or unsafe
    #[arg(short = 't', long, value_name = "CACHE")]
    cache: Option<Cache>,

    /// Allow what may make an encrypted image unreadable
    #[arg(long)]
    force: bool,

    #[command(flatten)]
    access: Access,

    /// The image
    #[arg(value_name = "FILE")]
    file: Option<String>,
}

pub(crate) async fn run(options: Options, stop: &Stop) -> anyhow::Result<u8> {
    let list = OptionList::parse(&options.options)?;
    let format = options.format.unwrap_or(Format::Qcow2);
    ensure!(format == Format::Qcow2, "Format driver '{format}' does not support option amendment");
    if list.wants_help() {
        print(&settings::help(format, Purpose::Amend))?;
        return Ok(0);
    }
    let file = options.file.as_deref().context("Expecting one image file name")?;
    settings::check(&list, format, Purpose::Amend)?;
    let changes = changes(&list)?;
    let named = Named::parse(file, options.format, options.image_opts)?;
    let opened = open::open(&named, &How::writing(options.cache), &options.access).await?;
    let done = match opened.image() {
        Some(image) => stop.or(amend(image, &changes, &list, &options, &named.secrets)).await,
        None => Err(anyhow::anyhow!(
            "Format driver '{}' does not support option amendment",
            opened.format
        )),
    };
    let closed = opened.close().await;
    done?;
    closed?;
    Ok(0)
}

async fn amend(
    image: &Image,
    changes: &AmendOptions,
    list: &OptionList,
    options: &Options,
    opened_by: &[String],
) -> anyhow::Result<()> {
    if let Some(state) = list.get("encrypt.state") {
        change_keys(image, state, list, options, opened_by).await?;
    }
    if *changes != AmendOptions::default() {
        image.amend(changes).await?;
    }
    if let Some(size) = list.get("size") {
        let size = settings::size("size", size)?;
        let resized = image.resize(size, &ResizeOptions::default()).await;
        resized.context("size (resize --shrink makes a disk smaller)")?;
    }
    Ok(())
}

/// Adds a passphrase, or removes what a slot or a passphrase opens.
async fn change_keys(
    image: &Image,
    state: &str,
    list: &OptionList,
    options: &Options,
    opened_by: &[String],
) -> anyhow::Result<()> {
    let secrets = &options.access.secrets;
    let slot = list.get("encrypt.keyslot").map(|slot| settings::number("encrypt.keyslot", slot));
    let slot = slot.transpose()?.map(usize::try_from).transpose()?;
    let old = list.get("encrypt.old-secret").map(|id| secrets.passphrase(Some(id))).transpose()?;
    let force = options.force;
    if state == "inactive" {
        let slots = match (slot, old) {
            (Some(slot), None) => Slots::One(slot),
            (None, Some(old)) => Slots::OpenedBy(old),
            _ => bail!("encrypt.state=inactive needs encrypt.keyslot or encrypt.old-secret"),
        };
        return Ok(image.change_keys(&KeyChange::Remove { slots, force }).await?);
    }
    ensure!(state == "active", "encrypt.state is active or inactive, not '{state}'");
    let added = list.get("encrypt.new-secret").context("encrypt.new-secret is needed")?;
    let added = secrets.passphrase(Some(added))?;
    let cost = list.get("encrypt.iter-time").map(making::key_cost).transpose()?;
    let mut outcome = Err(anyhow::anyhow!("no secret is given that opens the image"));
    for existing in secrets.named(opened_by)?.into_iter().filter(|known| *known != added) {
        let (added, cost) = (added.clone(), cost.unwrap_or_default());
        let change = KeyChange::Add { existing, added, slot, cost, force };
        match image.change_keys(&change).await {
            Ok(()) => return Ok(()),
            Err(error) => outcome = Err(error.into()),
        }
    }
    outcome
}

/// What the library is told.
fn changes(list: &OptionList) -> anyhow::Result<AmendOptions> {
    let mut changes = AmendOptions::default();
    for (name, value) in list.iter() {
        match name {
            "compat" => changes.version = Some(making::version(value)?),
            "refcount_bits" => changes.refcount_bits = Some(making::refcount_bits(value)?),
            "lazy_refcounts" => changes.lazy_refcounts = Some(switch(name, value)?),
            "data_file" => {
                making::plain_path(value)?;
                changes.data_file = Some(value.to_owned());
            }
            "data_file_raw" => changes.data_file_raw = Some(switch(name, value)?),
            "backing_file" | "backing_fmt" => {
                bail!("Cannot amend the backing file: rebase does (rebase -u only writes it down)");
            }
            "size" => {}
            _ if name.starts_with("encrypt.") => {
                ensure!(list.get("encrypt.state").is_some(), "{name} needs encrypt.state");
            }
            _ => bail!("'{name}' cannot be changed here"),
        }
    }
    Ok(changes)
}
