//! `info`: what an image says of itself. Nothing below it is opened unless `--backing-chain` asks for it.

use std::collections::BTreeSet;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use anyhow::{Context, bail};

use crate::facts::{Child, Node, Nothing, Qcow2Facts, Specific};
use crate::format::{self, Format, could_not_open};
use crate::making::SECTOR_BYTES;
use crate::open::{self, Access, How, Named};
use crate::output::{Output, print, print_json};
use crate::place::Place;
use crate::stop::Stop;

/// Say what an image is: format, sizes, backing file, snapshots, bitmaps
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The format of the image; qcow2 is recognised, everything else is said
    #[arg(short, long, value_name = "FMT")]
    format: Option<Format>,

    /// FILE is a list of options: driver=qcow2,file.filename=PATH
    #[arg(long)]
    image_opts: bool,

    /// Read it although another program may be writing it
    #[arg(short = 'U', long)]
    force_share: bool,

    /// Every image of the chain, from the top down
    #[arg(long)]
    backing_chain: bool,

    /// How to write the result
    #[arg(long, value_name = "OFMT", default_value = "human")]
    output: Output,

    #[command(flatten)]
    access: Access,

    /// The image
    #[arg(value_name = "FILE")]
    file: String,
}

pub(crate) async fn run(options: Options, stop: &Stop) -> anyhow::Result<u8> {
    let nodes = stop.or(chain(&options)).await?;
    match (options.output, nodes.as_slice()) {
        (Output::Human, nodes) => {
            let texts: Vec<_> = nodes.iter().map(Node::text).collect();
            print(&texts.join("\n"))?;
        }
        (Output::Json, [node]) if !options.backing_chain => print_json(node)?,
        (Output::Json, nodes) => print_json(&nodes)?,
    }
    Ok(0)
}

async fn chain(options: &Options) -> anyhow::Result<Vec<Node>> {
    let mut named = Named::parse(&options.file, options.format, options.image_opts)?;
    let mut seen = BTreeSet::new();
    let mut nodes = Vec::new();
    loop {
        if !seen.insert(named.place.to_string()) {
            bail!("Backing file '{}' creates an infinite loop.", named.place);
        }
        let node = inspect(&named, options).await?;
        let next = match (&node.full_backing_filename, &node.backing_filename) {
            _ if !options.backing_chain => None,
            (Some(full), _) => Some((full.clone(), node.backing_filename_format.clone())),
            (None, Some(name)) => {
                bail!("Could not determine absolute backing filename of '{name}'")
            }
            (None, None) => None,
        };
        nodes.push(node);
        let Some((name, format)) = next else { return Ok(nodes) };
        let format = format.as_deref().map(str::parse).transpose().map_err(anyhow::Error::msg)?;
        named = Named::parse(&name, format, false)?;
    }
}

async fn inspect(named: &Named, options: &Options) -> anyhow::Result<Node> {
    let path = match &named.place {
        Place::File(path) => path,
        Place::Nbd { .. } => return of_export(named, &options.access).await,
    };
    let how = How::reading(None, options.force_share);
    match named.format.map_or_else(|| format::recognise(path), Ok)? {
        Format::Raw => {
            let opened =
                open::open(&Named::file(path, Some(Format::Raw)), &how, &options.access).await?;
            let size = opened.size_bytes().next_multiple_of(SECTOR_BYTES);
            opened.close().await?;
            let file = file_node(path, size, "file", Some(Specific::File(Nothing {})))?;
            Ok(Node { children: vec![child(file)], ..file_node(path, size, "raw", None)? })
        }
        Format::Qcow2 => of_qcow2(path, &how, &options.access).await,
    }
}

async fn of_export(named: &Named, access: &Access) -> anyhow::Result<Node> {
    let opened = open::open(named, &How::reading(None, true), access).await?;
    let node = |format: &str| Node {
        actual_size: None,
        dirty_flag: None,
        ..Node::new(named.place.to_string(), opened.size_bytes(), format)
    };
    let whole = Node { children: vec![child(node("nbd"))], ..node("raw") };
    opened.close().await?;
    Ok(whole)
}

fn child(info: Node) -> Child {
    Child { name: "file", info }
}

fn file_node(
    path: &Path,
    size: u64,
    format: &str,
    specific: Option<Specific>,
) -> anyhow::Result<Node> {
    let facts = std::fs::metadata(path).with_context(|| could_not_open(path))?;
    let is_device = facts.file_type().is_block_device();
    Ok(Node {
        actual_size: Some(if is_device { 0 } else { facts.blocks() * SECTOR_BYTES }),
        dirty_flag: Some(false),
        format_specific: specific,
        ..Node::new(path.display().to_string(), size, format)
    })
}

async fn of_qcow2(path: &Path, how: &How, access: &Access) -> anyhow::Result<Node> {
    let image = open::open_qcow2(path, how, access).await?;
    let info = image.info();
    let facts = Qcow2Facts {
        compat: if info.version == 2 { "0.10" } else { "1.1" },
        compression_type: "zlib",
        lazy_refcounts: (info.version > 2).then_some(false),
        bitmaps: Vec::new(),
        refcount_bits: info.refcount_bits,
        data_file: None,
        data_file_raw: None,
        corrupt: (info.version > 2).then_some(info.is_corrupt),
        extended_l2: (info.version > 2).then_some(false),
    };
    let length = std::fs::metadata(path)?.len().next_multiple_of(SECTOR_BYTES);
    let file = file_node(path, length, "file", Some(Specific::File(Nothing {})))?;
    let (name, format) = match info.backing {
        Some(backing) => (Some(backing.name), backing.format),
        None => (None, None),
    };
    Ok(Node {
        children: vec![child(file)],
        full_backing_filename: name.as_deref().map(|name| full_name(path, name)),
        backing_filename: name,
        backing_filename_format: format,
        cluster_size: Some(info.cluster_bytes),
        dirty_flag: Some(info.is_dirty),
        ..file_node(path, info.size_bytes, "qcow2", Some(Specific::Qcow2(facts)))?
    })
}

/// A backing name seen from where the program runs: relative ones lie beside the image.
fn full_name(path: &Path, name: &str) -> String {
    let is_plain = !name.split('/').next().is_some_and(|first| first.contains(':'));
    match is_plain {
        true => crate::making::beside(path, name).display().to_string(),
        false => name.to_owned(),
    }
}
