//! `info`: what an image says of itself. Nothing below it is opened unless `--backing-chain` asks for it.

use std::collections::BTreeSet;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use anyhow::{Context, bail};
use block::HostFile;
use qcow2::{Compression, Image, ImageInfo, Inspection, RecordedEncryption};

use crate::facts::{
    BitmapFacts, Child, EncryptionFacts, Node, Nothing, Qcow2Facts, SnapshotFacts, Specific,
};
use crate::format::{self, Format, could_not_open};
use crate::making::{SECTOR_BYTES, beside};
use crate::open::{self, Access, How, Named};
use crate::output::{Output, print, print_json, report};
use crate::place::Place;
use crate::stop::Stop;

/// Say what an image is: format, sizes, backing file, snapshots, bitmaps
///
/// Nothing but the image itself is opened, and no passphrase is needed. Ends with 1 where a part of the image cannot
/// be read; what can be is told all the same.
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
    let (nodes, faults) = stop.or(chain(&options)).await?;
    match (options.output, nodes.as_slice()) {
        (Output::Human, nodes) => {
            let texts: Vec<_> = nodes.iter().map(Node::text).collect();
            print(&texts.join("\n"))?;
        }
        (Output::Json, [node]) if !options.backing_chain => print_json(node)?,
        (Output::Json, nodes) => print_json(&nodes)?,
    }
    let code = u8::from(!faults.is_empty());
    faults.into_iter().map(anyhow::Error::new).for_each(|fault| report(&fault));
    Ok(code)
}

type Faults = Vec<qcow2::Error>;

async fn chain(options: &Options) -> anyhow::Result<(Vec<Node>, Faults)> {
    let mut named = Named::parse(&options.file, options.format, options.image_opts)?;
    let mut seen = BTreeSet::new();
    let (mut nodes, mut faults) = (Vec::new(), Vec::new());
    loop {
        if !seen.insert(named.place.to_string()) {
            bail!("Backing file '{}' creates an infinite loop.", named.place);
        }
        let node = inspect(&named, options, &mut faults).await?;
        let next = match (&node.full_backing_filename, &node.backing_filename) {
            _ if !options.backing_chain => None,
            (Some(full), _) => Some((full.clone(), node.backing_filename_format.clone())),
            (None, Some(name)) => {
                bail!("Could not determine absolute backing filename of '{name}'")
            }
            (None, None) => None,
        };
        nodes.push(node);
        let Some((name, format)) = next else { return Ok((nodes, faults)) };
        let format = format.as_deref().map(str::parse).transpose().map_err(anyhow::Error::msg)?;
        named = Named::parse(&name, format, false)?;
    }
}

async fn inspect(named: &Named, options: &Options, faults: &mut Faults) -> anyhow::Result<Node> {
    let path = match &named.place {
        Place::File(path) => path,
        Place::Nbd { .. } => return of_export(named, &options.access).await,
    };
    let how = named.how(&How::reading(None, options.force_share))?;
    match named.format.map_or_else(|| format::recognise(path), Ok)? {
        Format::Qcow2 => of_qcow2(path, &how, faults).await,
        other => of_disk(path, other, &how, &options.access).await,
    }
}

async fn of_disk(path: &Path, format: Format, how: &How, access: &Access) -> anyhow::Result<Node> {
    let opened = open::open(&Named::file(path, Some(format)), how, access).await?;
    let size = opened.size_bytes().next_multiple_of(SECTOR_BYTES);
    opened.close().await?;
    let length = match format {
        Format::Raw => size,
        _ => std::fs::metadata(path)?.len().next_multiple_of(SECTOR_BYTES),
    };
    let file = file_node(path, length, "file", Some(Specific::File(Nothing {})))?;
    Ok(Node { children: vec![child(file)], ..file_node(path, size, format.name(), None)? })
}

async fn of_export(named: &Named, access: &Access) -> anyhow::Result<Node> {
    let opened = open::open(named, &How::reading(None, true), access).await?;
    let node = |format: &str| Node::new(named.place.to_string(), opened.size_bytes(), format);
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

async fn of_qcow2(path: &Path, how: &How, faults: &mut Faults) -> anyhow::Result<Node> {
    let options = block::OpenOptions {
        read_only: true,
        direct: false,
        lock: !how.shared,
        ..block::OpenOptions::default()
    };
    let file = HostFile::open(path, options).await;
    let file = file.map_err(|error| open::explained(error, path, how))?;
    let seen = Image::inspect_on(&file).await;
    let seen = seen.map_err(|error| open::explained(error, path, how))?;
    let facts = Specific::Qcow2(Box::new(qcow2_facts(&seen)));
    let Inspection { info, snapshots, file_bytes, faults: found, .. } = seen;
    faults.extend(found);
    let length = file_bytes.next_multiple_of(SECTOR_BYTES);
    let file = file_node(path, length, "file", Some(Specific::File(Nothing {})))?;
    let (name, format) = match info.backing {
        Some(backing) => (Some(backing.name), backing.format),
        None => (None, None),
    };
    Ok(Node {
        children: vec![child(file)],
        snapshots: snapshots.iter().map(SnapshotFacts::of).collect(),
        full_backing_filename: name.as_deref().map(|name| full_name(path, name)),
        backing_filename: name,
        backing_filename_format: format,
        cluster_size: Some(info.cluster_bytes),
        dirty_flag: Some(info.is_dirty),
        encrypted: (info.encryption != RecordedEncryption::None).then_some(true),
        ..file_node(path, info.size_bytes, "qcow2", Some(facts))?
    })
}

fn qcow2_facts(seen: &Inspection) -> Qcow2Facts {
    let info: &ImageInfo = &seen.info;
    let is_version_3 = info.version > 2;
    let bitmaps = seen.bitmaps.iter().map(|bitmap| BitmapFacts {
        flags: [(bitmap.in_use, "in-use"), (bitmap.auto, "auto")]
            .into_iter()
            .filter_map(|(set, name)| set.then_some(name))
            .collect(),
        name: bitmap.name.clone(),
        granularity: bitmap.granularity_bytes,
    });
    Qcow2Facts {
        compat: if is_version_3 { "1.1" } else { "0.10" },
        compression_type: match info.compression {
            Compression::Zstd => "zstd",
            _ => "zlib",
        },
        lazy_refcounts: is_version_3.then_some(info.lazy_refcounts),
        bitmaps: bitmaps.collect(),
        refcount_bits: info.refcount_bits,
        data_file: info.data_file.as_ref().and_then(|file| file.name.clone()),
        data_file_raw: info.data_file.as_ref().map(|file| file.raw),
        encrypt: match (&seen.luks, info.encryption) {
            (Some(luks), _) => Some(EncryptionFacts::of(luks)),
            (None, RecordedEncryption::LegacyAes) => Some(EncryptionFacts::Aes),
            (None, _) => None,
        },
        corrupt: is_version_3.then_some(info.is_corrupt),
        extended_l2: is_version_3.then_some(info.extended_l2),
    }
}

/// A backing name seen from where the program runs: relative ones lie beside the image.
fn full_name(path: &Path, name: &str) -> String {
    let is_plain = !name.split('/').next().is_some_and(|first| first.contains(':'));
    match is_plain {
        true => beside(path, name).display().to_string(),
        false => name.to_owned(),
    }
}
