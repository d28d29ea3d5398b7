//! The image formats that the program knows, and which of them it recognises by itself. Opening is `open`'s.

use std::ffi::OsStr;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::str::FromStr;

use anyhow::{Context, bail};
use clap::builder::{PossibleValue, TypedValueParser, ValueParserFactory};

/// The first bytes of a qcow2 image.
const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";

/// An image format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    Qcow2,
    Raw,
    /// Only read.
    Vmdk,
}

impl Format {
    /// A format that images can be made in.
    ///
    /// # Errors
    /// Formats that are only read.
    pub(crate) fn for_making(self) -> anyhow::Result<Self> {
        match self {
            Self::Qcow2 | Self::Raw => Ok(self),
            Self::Vmdk => bail!("Format '{self}' does not support image creation: it is only read"),
        }
    }

    /// The name on the command line and in results.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
            Self::Vmdk => "vmdk",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "qcow2" => Ok(Self::Qcow2),
            // QEMU's drivers of files are formats by name, too: that of the bytes as they are.
            "raw" | "file" | "host_device" => Ok(Self::Raw),
            "vmdk" => Ok(Self::Vmdk),
            _ => Err(format!("Unknown file format '{text}': qcow2, raw and vmdk are known")),
        }
    }
}

impl ValueParserFactory for Format {
    type Parser = FormatParser;

    fn value_parser() -> FormatParser {
        FormatParser
    }
}

/// Reads a format from the command line, and tells the shell which there are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FormatParser;

impl TypedValueParser for FormatParser {
    type Value = Format;

    fn parse_ref(
        &self,
        command: &clap::Command,
        arg: Option<&clap::Arg>,
        value: &OsStr,
    ) -> Result<Format, clap::Error> {
        Format::from_str.parse_ref(command, arg, value)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        let all = [Format::Qcow2, Format::Raw, Format::Vmdk];
        Some(Box::new(all.into_iter().map(|format| PossibleValue::new(format.name()))))
    }
}

/// Recognises qcow2. Anything else must be named: a guest could write a header into a raw disk, and would be believed.
///
/// # Errors
/// A file that cannot be read, and one that is no qcow2 image.
pub(crate) fn recognise(path: &Path) -> anyhow::Result<Format> {
    let mut magic = [0; QCOW2_MAGIC.len()];
    // Whoever opens a FIFO waits for its other end.
    let kind = std::fs::metadata(path).with_context(|| could_not_open(path))?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        bail!("{}: it is neither a regular file nor a block device", could_not_open(path));
    }
    let mut file = File::open(path).with_context(|| could_not_open(path))?;
    match file.read_exact(&mut magic) {
        Ok(()) if magic == QCOW2_MAGIC => Ok(Format::Qcow2),
        Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => {
            Err(error).with_context(|| could_not_open(path))
        }
        _ => bail!(
            "{}: it is no qcow2 image, and other formats are not guessed, because a guest chooses \
             the first bytes of a raw disk; say -f raw (or vmdk) if it is one",
            could_not_open(path)
        ),
    }
}

/// How an error about opening begins.
pub(crate) fn could_not_open(path: &Path) -> String {
    format!("Could not open '{}'", path.display())
}
