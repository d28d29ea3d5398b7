//! `map`: where the bytes of a disk come from, through all layers of its chain.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use block::ByteRange;
use qcow2::MapExtent;

use crate::chain;
use crate::format::{self, Format};
use crate::open::{self, Access, How, Named, Opened};
use crate::output::{Output, print};
use crate::size::Size;
use crate::stop::Stop;

/// Say where the bytes of a disk lie
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The format of the image; qcow2 is recognised, everything else is said
    #[arg(short, long, value_name = "FMT")]
    format: Option<Format>,

    /// FILE is a list of options: driver=qcow2,file.filename=PATH
    #[arg(long)]
    image_opts: bool,

    /// Where to begin
    #[arg(short, long, value_name = "OFFSET", default_value = "0")]
    start_offset: Size,

    /// How much to look at
    #[arg(short = 'l', long, value_name = "LENGTH")]
    max_length: Option<Size>,

    /// Read it although another program may be writing it
    #[arg(short = 'U', long)]
    force_share: bool,

    /// How to write the result
    #[arg(long, value_name = "OFMT", default_value = "human")]
    output: Output,

    #[command(flatten)]
    access: Access,

    /// The image
    #[arg(value_name = "FILE")]
    file: String,
}

/// A line of the result.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    range: ByteRange,
    depth: usize,
    present: bool,
    zero: bool,
    data: bool,
    compressed: bool,
    offset: Option<u64>,
    file: String,
}

impl Entry {
    /// Whether `next` goes on where this ends, in the same way.
    fn goes_on(&self, next: &Self) -> bool {
        let expected = self.offset.map(|offset| offset + self.range.len());
        let same =
            Self { range: next.range, offset: expected, file: next.file.clone(), ..self.clone() };
        same == *next && self.file == next.file && self.range.end() == next.range.start()
    }

    fn json(&self) -> String {
        let offset = self.offset.map(|offset| format!(", \"offset\": {offset}"));
        format!(
            "{{ \"start\": {}, \"length\": {}, \"depth\": {}, \"present\": {}, \"zero\": {}, \"data\": {}, \
             \"compressed\": {}{}}}",
            self.range.start(),
            self.range.len(),
            self.depth,
            self.present,
            self.zero,
            self.data,
            self.compressed,
            offset.unwrap_or_default()
        )
    }
}

pub(crate) async fn run(options: Options, stop: &Stop) -> anyhow::Result<u8> {
    let named = Named::parse(&options.file, options.format, options.image_opts)?;
    let how = How::reading(None, options.force_share);
    let opened = open::open(&named, &how, &options.access).await?;
    let entries = stop.or(entries(&opened, &options)).await;
    opened.close().await?;
    let entries = entries?;
    match options.output {
        Output::Json => print(&document(&entries))?,
        Output::Human => {
            print(&table(&entries))?;
            if let Some(hidden) = entries.iter().find(|entry| entry.data && entry.offset.is_none())
            {
                let is_vmdk = format::recognise(Path::new(&hidden.file)).is_err();
                ensure!(
                    !is_vmdk,
                    "{}: where in a vmdk file bytes lie is not told; --output=json tells what it holds",
                    hidden.file
                );
                bail!("File contains external, encrypted or compressed clusters.");
            }
        }
    }
    Ok(0)
}

fn document(entries: &[Entry]) -> String {
    let lines: Vec<_> = entries.iter().map(Entry::json).collect();
    format!("[{}]\n", lines.join(",\n"))
}

/// Only what holds bytes that can be found in a file; ends where one cannot.
fn table(entries: &[Entry]) -> String {
    let mut text = format!("{:<16}{:<16}{:<16}{}\n", "Offset", "Length", "Mapped to", "File");
    for entry in entries.iter().filter(|entry| entry.data) {
        let Some(offset) = entry.offset else { break };
        if !entry.zero {
            let [start, length, offset] =
                [entry.range.start(), entry.range.len(), offset].map(hexadecimal);
            // Writing into a string does not fail.
            let _ = writeln!(text, "{start:<16}{length:<16}{offset:<16}{}", entry.file);
        }
    }
    text
}

/// As C writes `%#x`: zero has no prefix.
fn hexadecimal(number: u64) -> String {
    if number == 0 { "0".to_owned() } else { format!("{number:#x}") }
}

async fn entries(opened: &Opened, options: &Options) -> anyhow::Result<Vec<Entry>> {
    let size = opened.size_bytes();
    let start = options.start_offset.0.min(size);
    let end = options.max_length.map_or(size, |length| start.saturating_add(length.0).min(size));
    let mut rest = ByteRange::between(start, end);
    let names = match opened.image() {
        Some(image) => names(image.path()).await,
        None => Vec::new(),
    };
    let mut entries: Vec<Entry> = Vec::new();
    while !rest.is_empty() {
        let found = match opened.image() {
            Some(image) => {
                let found = image.map_chain(rest).await;
                let found = found.context("Could not read file metadata")?;
                found.into_iter().map(|extent| of_extent(extent, &names)).collect()
            }
            None => of_disk(opened, rest).await?,
        };
        let last = found.last().map(|entry: &Entry| entry.range.end());
        let last = last.context("the image does not say where the rest of its bytes are")?;
        for entry in found {
            match entries.last_mut() {
                Some(before) if before.goes_on(&entry) => {
                    before.range = ByteRange::between(before.range.start(), entry.range.end());
                }
                _ => entries.push(entry),
            }
        }
        rest = ByteRange::between(last, end);
    }
    Ok(entries)
}

fn of_extent(extent: MapExtent, names: &[(PathBuf, String)]) -> Entry {
    let known = names.iter().find(|(path, _)| *path == extent.layer);
    let file = known.map_or_else(|| extent.layer.display().to_string(), |(_, name)| name.clone());
    Entry {
        range: extent.range,
        depth: extent.depth,
        present: extent.present,
        zero: extent.zero,
        data: extent.data,
        compressed: extent.compressed,
        offset: extent.host,
        file,
    }
}

/// A raw disk: what lies where is plain.
async fn of_disk(opened: &Opened, range: ByteRange) -> anyhow::Result<Vec<Entry>> {
    let extents = opened.device().extents(range).await.context("Could not read file metadata")?;
    let is_plain = opened.format == Format::Raw;
    let entries = extents.into_iter().map(|extent| Entry {
        range: extent.range,
        depth: 0,
        present: extent.allocated || is_plain,
        zero: extent.zero,
        data: extent.allocated || !extent.zero,
        compressed: false,
        offset: is_plain.then_some(extent.range.start()),
        file: opened.place.to_string(),
    });
    Ok(entries.collect())
}

/// The layers of a chain: as they are on the host, and as they are named, seen from here.
async fn names(top: &Path) -> Vec<(PathBuf, String)> {
    let mut names = vec![(top.to_owned(), top.display().to_string())];
    for file in chain::files(top).await {
        if let Ok(resolved) = file.canonicalize() {
            names.push((resolved, file.display().to_string()));
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(start: u64, end: u64, offset: Option<u64>) -> Entry {
        Entry {
            range: ByteRange::between(start, end),
            depth: 0,
            present: true,
            zero: false,
            data: true,
            compressed: false,
            offset,
            file: "a".to_owned(),
        }
    }

    #[test]
    fn runs_go_on_only_where_their_bytes_do() {
        assert!(entry(0, 10, Some(5)).goes_on(&entry(10, 20, Some(15))));
        assert!(entry(0, 10, None).goes_on(&entry(10, 20, None)));
        assert!(!entry(0, 10, Some(5)).goes_on(&entry(10, 20, Some(16))));
        assert!(!entry(0, 10, Some(5)).goes_on(&Entry { depth: 1, ..entry(10, 20, Some(15)) }));
        assert!(
            !entry(0, 10, None).goes_on(&Entry { file: "b".to_owned(), ..entry(10, 20, None) })
        );
    }
}
