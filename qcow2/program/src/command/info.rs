//! `info`: what an image says of itself. Nothing below it is opened unless `--backing-chain` asks for it, and then what
//! opening the image would open.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use anyhow::{Context, ensure};
use block::HostFile;
use qcow2::{
    BackingFormat, ChainFile, ChainFiles, Compression, Image, ImageInfo, Inspection, OpenOptions,
    RecordedEncryption, Vmdk,
};

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
/// Nothing but the image itself is opened, and no passphrase is needed; with --backing-chain what lies below it is, as
/// far as references may be followed. Ends with 1 where a part of the image cannot be read; what can be is told all the
/// same.
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
    #[arg(short, long)]
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
    let named = Named::parse(&options.file, options.format, options.image_opts)?;
    let mut faults = Vec::new();
    let path = match &named.place {
        Place::File(path) => path,
        Place::Nbd { .. } => return Ok((vec![of_export(&named, &options.access).await?], faults)),
    };
    let how = named.how(&How::reading(None, options.force_share))?;
    let explained = |error: qcow2::Error| open::explained(error, path, &how);
    // Of files with tables only these are read.
    let opening = OpenOptions { direct: false, ..open::qcow2_options(&how, &options.access)? };
    let nodes = match named.format.map_or_else(|| format::recognise(path), Ok)? {
        Format::Raw => {
            let file = open::open_file(path, &how).await?;
            vec![of_disk(&file, path, file.len(), Format::Raw)?]
        }
        Format::Vmdk => {
            let file = open::open_file(path, &how).await?;
            let size = Vmdk::size_on(&file).await.map_err(explained)?;
            vec![of_disk(&file, path, size, Format::Vmdk)?]
        }
        Format::Qcow2 => {
            let mut files = ChainFiles::start(path, &opening).map_err(explained)?;
            let (mut nodes, mut name) = (Vec::new(), path.clone());
            while let Some(found) = files.next().await.map_err(explained)? {
                let node = of_layer(&found, &name, &how, &mut faults).await?;
                let below = node.full_backing_filename.clone();
                nodes.push(node);
                match below {
                    Some(below) if options.backing_chain => name = below.into(),
                    _ => break,
                }
            }
            nodes
        }
    };
    Ok((nodes, faults))
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

/// What is known of an open file; `name` is how it is told.
fn file_node(
    file: &HostFile,
    name: &Path,
    size: u64,
    format: &str,
    specific: Option<Specific>,
) -> anyhow::Result<Node> {
    let facts = std::fs::metadata(file.path()).with_context(|| could_not_open(name))?;
    // By its path, which may lead elsewhere by now.
    let same = file.id() == Some((facts.dev(), facts.ino()));
    ensure!(same, "{}: another file took its place", could_not_open(name));
    let is_device = facts.file_type().is_block_device();
    Ok(Node {
        actual_size: Some(if is_device { 0 } else { facts.blocks() * SECTOR_BYTES }),
        dirty_flag: Some(false),
        format_specific: specific,
        ..Node::new(name.display().to_string(), size, format)
    })
}

/// The node of the bytes of a file, below that of its format.
fn bytes_of(file: &HostFile, name: &Path) -> anyhow::Result<Vec<Child>> {
    let length = file.len().next_multiple_of(SECTOR_BYTES);
    Ok(vec![child(file_node(file, name, length, "file", Some(Specific::File(Nothing {})))?)])
}

/// A disk of a format of which only the size is told.
fn of_disk(file: &HostFile, name: &Path, size: u64, format: Format) -> anyhow::Result<Node> {
    let size = size.next_multiple_of(SECTOR_BYTES);
    let children = bytes_of(file, name)?;
    Ok(Node { children, ..file_node(file, name, size, format.name(), None)? })
}

/// A file of a chain, which is told by `name`.
async fn of_layer(
    found: &ChainFile,
    name: &Path,
    how: &How,
    faults: &mut Faults,
) -> anyhow::Result<Node> {
    let file = &found.file;
    let explained = |error: qcow2::Error| open::explained(error, name, how);
    match found.format {
        BackingFormat::Qcow2 => {
            let seen = Image::inspect_on(file).await.map_err(explained)?;
            of_qcow2(file, name, seen, faults)
        }
        BackingFormat::Raw => of_disk(file, name, file.len(), Format::Raw),
        BackingFormat::Vmdk => {
            let size = Vmdk::size_on(file).await.map_err(explained)?;
            of_disk(file, name, size, Format::Vmdk)
        }
    }
}

fn of_qcow2(
    file: &HostFile,
    path: &Path,
    seen: Inspection,
    faults: &mut Faults,
) -> anyhow::Result<Node> {
    let facts = Specific::Qcow2(Box::new(qcow2_facts(&seen)));
    let Inspection { info, snapshots, faults: found, .. } = seen;
    faults.extend(found);
    let (name, format) = match info.backing {
        Some(backing) => (Some(backing.name), backing.format),
        None => (None, None),
    };
    Ok(Node {
        children: bytes_of(file, path)?,
        snapshots: snapshots.iter().map(SnapshotFacts::of).collect(),
        full_backing_filename: name.as_deref().map(|name| full_name(path, name)),
        backing_filename: name,
        backing_filename_format: format,
        cluster_size: Some(info.cluster_bytes),
        dirty_flag: Some(info.is_dirty),
        encrypted: (info.encryption != RecordedEncryption::None).then_some(true),
        ..file_node(file, path, info.size_bytes, "qcow2", Some(facts))?
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
