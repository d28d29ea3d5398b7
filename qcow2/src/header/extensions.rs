//! Header extensions: typed lengths of bytes behind the header's fields. What is known is taken apart; what is not is
//! kept byte for byte.

use super::{be_u32, be_u64};
use crate::error::{Corruption, Fault};
use crate::units::{HostOffset, index};

const END: u32 = 0;
const BACKING_FORMAT: u32 = 0xe279_2aca;
const FEATURE_NAMES: u32 = 0x6803_f857;
const BITMAPS: u32 = 0x2385_2875;
const LUKS: u32 = 0x0537_be77;
const DATA_FILE: u32 = 0x4441_5441;

/// An entry of the feature name table: class, bit and 46 bytes of name.
const FEATURE_NAME_BYTES: usize = 48;
/// The names that we write into the feature name table: class, bit, name.
const NAMES: [(u8, u8, &str); 8] = [
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
];

/// Where the LUKS header of an encrypted image lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LuksPointer {
    pub at: HostOffset,
    pub bytes: u64,
}

/// All header extensions of an image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Extensions {
    /// Where bitmaps are listed, as recorded: `bitmap` reads it.
    pub bitmaps: Option<Vec<u8>>,
    /// The LUKS header.
    pub luks: Option<LuksPointer>,
    /// The format of the backing file, as recorded.
    pub backing_format: Option<Vec<u8>>,
    /// The name of the external data file, as recorded. It means nothing without the feature bit.
    pub data_file: Option<Vec<u8>>,
    /// The extensions of unknown type, in order.
    pub unknown: Vec<(u32, Vec<u8>)>,
    /// The feature name table, as recorded.
    pub feature_names: Option<Vec<u8>>,
}

impl Extensions {
    /// Reads the extensions in `cluster[start..end]`, and says where their end marker ends.
    ///
    /// # Errors
    /// [`Corruption::ExtensionPastEnd`], [`Corruption::ExtensionContent`].
    ///
    /// Source: qcow2 specification, "Header extensions".
    pub(super) fn parse(cluster: &[u8], start: usize, end: usize) -> Result<(Self, usize), Fault> {
        let mut found = Self::default();
        let mut at = start;
        let end = end.min(cluster.len());
        // The end marker may be missing where the space ends.
        while let Some(head) = cluster.get(at..at + 8).filter(|_| at + 8 <= end) {
            let kind = be_u32(head, 0);
            let len = be_u32(head, 4);
            let past_end = || Fault::Corrupt {
                at: HostOffset(at as u64),
                what: Corruption::ExtensionPastEnd { kind, len: u64::from(len) },
            };
            let data_at = at + 8;
            let data_end = data_at.checked_add(index(u64::from(len))).filter(|to| *to <= end);
            let data_end = data_end.ok_or_else(past_end)?;
            // The end has no data, but QEMU opens no image where it says that it has more than there is room for.
            if kind == END {
                return Ok((found, data_at));
            }
            let data = cluster.get(data_at..data_end).ok_or_else(past_end)?;
            found.take(kind, data).map_err(|rule| Fault::Corrupt {
                at: HostOffset(at as u64),
                what: Corruption::ExtensionContent { kind, rule },
            })?;
            at = data_end.next_multiple_of(8);
        }
        // QEMU opens no image in which one begins and there is no room for its type and length.
        if at < end {
            let rule = "there is no room for its type and length";
            let what = Corruption::ExtensionContent { kind: END, rule };
            return Err(Fault::Corrupt { at: HostOffset(at as u64), what });
        }
        Ok((found, at.min(end)))
    }

    fn take(&mut self, kind: u32, data: &[u8]) -> Result<(), &'static str> {
        match kind {
            // No format has so long a name, and QEMU opens no image in which one had.
            BACKING_FORMAT if data.len() >= 16 => return Err("it must have fewer than 16 bytes"),
            BACKING_FORMAT => self.backing_format = Some(data.to_vec()),
            DATA_FILE => self.data_file = Some(data.to_vec()),
            FEATURE_NAMES => self.feature_names = Some(data.to_vec()),
            BITMAPS => self.bitmaps = Some(data.to_vec()),
            LUKS => {
                if data.len() != 16 {
                    return Err("it must have 16 bytes");
                }
                self.luks =
                    Some(LuksPointer { at: HostOffset(be_u64(data, 0)), bytes: be_u64(data, 8) });
            }
            _ => self.unknown.push((kind, data.to_vec())),
        }
        Ok(())
    }

    /// Appends all extensions and the end marker: what often changes first, feature names (if `names`) last.
    pub(super) fn push(&self, bytes: &mut Vec<u8>, names: bool) {
        if let Some(data) = &self.bitmaps {
            push(bytes, BITMAPS, data);
        }
        if let Some(pointer) = self.luks {
            let mut data = pointer.at.0.to_be_bytes().to_vec();
            data.extend_from_slice(&pointer.bytes.to_be_bytes());
            push(bytes, LUKS, &data);
        }
        if let Some(format) = &self.backing_format {
            push(bytes, BACKING_FORMAT, format);
        }
        if let Some(name) = &self.data_file {
            push(bytes, DATA_FILE, name);
        }
        for (kind, data) in &self.unknown {
            push(bytes, *kind, data);
        }
        if let Some(table) = self.feature_names.as_ref().filter(|_| names) {
            push(bytes, FEATURE_NAMES, table);
        }
        push(bytes, END, &[]);
    }

    /// How messages call an incompatible feature bit.
    pub(super) fn name(&self, bit: u32) -> String {
        let table = self.feature_names.as_deref().unwrap_or_default();
        // The last one may be cut off behind its text.
        let named = table.chunks(FEATURE_NAME_BYTES).find_map(|entry| match entry {
            [0, number, name @ ..] if u32::from(*number) == bit => {
                let text = name.split(|byte| *byte == 0).next().unwrap_or_default();
                (!text.is_empty()).then(|| String::from_utf8_lossy(text).into_owned())
            }
            _ => None,
        });
        match named {
            Some(name) => format!("{name:?} (bit {bit})"),
            None => format!("bit {bit}"),
        }
    }
}

/// The feature name table of the images that we make.
pub(crate) fn feature_names() -> Vec<u8> {
    let mut bytes = Vec::new();
    for (class, bit, name) in NAMES {
        let start = bytes.len();
        bytes.extend_from_slice(&[class, bit]);
        bytes.extend_from_slice(name.as_bytes());
        bytes.resize(start + FEATURE_NAME_BYTES, 0);
    }
    bytes
}

fn push(bytes: &mut Vec<u8>, kind: u32, data: &[u8]) {
    bytes.extend_from_slice(&kind.to_be_bytes());
    bytes.extend_from_slice(&u32::try_from(data.len()).unwrap_or(0).to_be_bytes());
    bytes.extend_from_slice(data);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
}
