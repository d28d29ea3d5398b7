//! `snapshot`: the internal snapshots of an image.

use anyhow::{Context, ensure};
use qcow2::Image;

use crate::facts::{SnapshotFacts, snapshot_table};
use crate::format::Format;
use crate::open::{self, Access, How, Named};
use crate::output::print;
use crate::stop::Stop;

/// List, make, apply or delete internal snapshots
///
/// Each takes effect as a whole or, where power goes, not at all.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// List them
    #[arg(short, long, group = "action")]
    list: bool,

    /// Keep the disk as it is now, under this name
    #[arg(short, long, value_name = "SNAPSHOT", group = "action")]
    create: Option<String>,

    /// Make the disk what it was, by id, or else by name; what it is now is lost
    #[arg(short, long, value_name = "SNAPSHOT", group = "action")]
    apply: Option<String>,

    /// Forget one, by name alone
    #[arg(short, long, value_name = "SNAPSHOT", group = "action")]
    delete: Option<String>,

    /// The format of the image: qcow2
    #[arg(short, long, value_name = "FMT")]
    format: Option<Format>,

    /// Print nothing but errors
    #[arg(short, long)]
    quiet: bool,

    /// FILE is a list of options: driver=qcow2,file.filename=PATH
    #[arg(long)]
    image_opts: bool,

    /// With -l: read the image although another program may be writing it
    #[arg(short = 'U', long)]
    force_share: bool,

    #[command(flatten)]
    access: Access,

    /// The image
    #[arg(value_name = "FILE")]
    file: String,
}

pub(crate) async fn run(options: Options, stop: &Stop) -> anyhow::Result<u8> {
    let changes = [&options.create, &options.apply, &options.delete].iter().any(|it| it.is_some());
    ensure!(!(changes && options.force_share), "-U is for reading: an image in use is not changed");
    let how = match changes {
        true => How::writing(None),
        false => How::reading(None, options.force_share),
    };
    let named = Named::parse(&options.file, options.format, options.image_opts)?;
    let opened = open::open(&named, &how, &options.access).await?;
    let done = match opened.image() {
        Some(image) => stop.or(act(image, &options)).await,
        None => Err(anyhow::anyhow!("{} is raw, and has no snapshots", options.file)),
    };
    let closed = opened.close().await;
    done?;
    closed?;
    Ok(0)
}

async fn act(image: &Image, options: &Options) -> anyhow::Result<()> {
    let is_asked = options.create.is_some() || options.apply.is_some() || options.delete.is_some();
    if options.list || !is_asked {
        let snapshots: Vec<_> = image.snapshots().await?.iter().map(SnapshotFacts::of).collect();
        if !snapshots.is_empty() {
            print(&format!("Snapshot list:\n{}", snapshot_table(&snapshots, "")))?;
        }
    }
    if let Some(name) = &options.create {
        let made = image.create_snapshot(name).await;
        made.with_context(|| format!("Could not create snapshot '{name}'"))?;
    }
    if let Some(name) = &options.apply {
        let applied = image.apply_snapshot(name).await;
        applied.with_context(|| format!("Could not apply snapshot '{name}'"))?;
    }
    if let Some(name) = &options.delete {
        let deleted = image.delete_snapshot_named(name).await;
        deleted.with_context(|| format!("Could not delete snapshot '{name}'"))?;
    }
    Ok(())
}
