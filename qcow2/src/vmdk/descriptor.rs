//! The text that says which extents a VMDK image has. Nothing is opened here: what names lead to is not looked at.

use crate::error::VmdkError;
use crate::units::SECTOR_BYTES;

/// The most extents that a descriptor may name: each is an open file.
pub const MAX_VMDK_EXTENTS: usize = 4096;

/// What a descriptor without a parent says.
pub(super) const NO_PARENT: u32 = 0xffff_ffff;

/// The kinds of disks whose extents are what their lines say.
const KINDS: [&str; 15] = [
    "custom",
    "fullDevice",
    "monolithicFlat",
    "partitionedDevice",
    "seSparse",
    "twoGbMaxExtentFlat",
    "twoGbMaxExtentSparse",
    "vmfs",
    "vmfsEagerZeroedThick",
    "vmfsPassthroughRawDeviceMap",
    "vmfsPreallocated",
    "vmfsRDM",
    "vmfsRaw",
    "vmfsRawDeviceMap",
    "vmfsSparse",
];
/// Another one, by the name that only a later version gave it.
const THIN: &str = "vmfsThin";

/// A line of a descriptor: the next part of the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ExtentLine {
    pub bytes: u64,
    pub content: Content,
}

/// Where the bytes of an extent lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// Nowhere: they are zeros.
    Zeros,
    /// In a file as they are, from this offset on.
    Flat { name: String, at: u64 },
    /// In a file with grains of its own.
    Sparse { name: String },
}

/// The extents that a descriptor names, in the order of the disk.
///
/// # Errors
/// A delta, a kind of disk that is not read, and any extent line that is not understood: leaving it out would shift the
/// rest of the disk.
pub(super) fn parse(text: &[u8]) -> Result<Vec<ExtentLine>, VmdkError> {
    let end = text.iter().position(|byte| *byte == 0).unwrap_or(text.len());
    let text = String::from_utf8_lossy(text.get(..end).unwrap_or_default());
    let mut extents = Vec::new();
    let mut kind = "";
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if let Some((key, value)) = line.split_once('=') {
            match key.trim_end() {
                "createType" => kind = value.trim().trim_matches('"'),
                "parentCID" => {
                    let parent = u32::from_str_radix(value.trim(), 16);
                    if parent != Ok(NO_PARENT) {
                        return Err(VmdkError::Parent);
                    }
                }
                _ => {}
            }
        }
        if ["RW", "RDONLY", "NOACCESS"].iter().any(|access| is_word(line, access)) {
            if extents.len() == MAX_VMDK_EXTENTS {
                return Err(VmdkError::TooManyExtents(MAX_VMDK_EXTENTS));
            }
            extents.push(extent(line).ok_or(VmdkError::Line(number + 1))?);
        }
    }
    if kind != THIN && !KINDS.contains(&kind) {
        return Err(VmdkError::Kind(kind.to_owned()));
    }
    Ok(extents)
}

/// Whether a line begins with a word.
fn is_word(line: &str, word: &str) -> bool {
    line.strip_prefix(word)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with(char::is_whitespace))
}

/// `ACCESS SECTORS KIND ["NAME" [OFFSET]]`
fn extent(line: &str) -> Option<ExtentLine> {
    let (access, rest) = word(line)?;
    let (sectors, rest) = word(rest)?;
    let (kind, rest) = word(rest).unwrap_or((rest, ""));
    let bytes = sectors.parse::<u64>().ok()?.checked_mul(SECTOR_BYTES)?;
    let zeros = ExtentLine { bytes, content: Content::Zeros };
    // What may not be accessed takes up its place.
    if kind == "ZERO" || access == "NOACCESS" {
        return Some(zeros);
    }
    let (name, rest) = match rest.trim_start().strip_prefix('"') {
        Some(quoted) => quoted.split_once('"')?,
        None => word(rest)?,
    };
    if name.is_empty() || name.contains('\u{fffd}') {
        return None;
    }
    let name = name.to_owned();
    let content = match kind {
        "FLAT" | "VMFS" | "VMFSRAW" | "VMFSRDM" => {
            let offset = word(rest).map_or(Some(0), |(offset, _)| offset.parse::<u64>().ok())?;
            Content::Flat { name, at: offset.checked_mul(SECTOR_BYTES)? }
        }
        "SPARSE" | "VMFSSPARSE" | "SESPARSE" => Content::Sparse { name },
        _ => return None,
    };
    Some(ExtentLine { bytes, content })
}

/// The first word, and what follows it.
fn word(text: &str) -> Option<(&str, &str)> {
    let text = text.trim_start();
    let end = text.find(char::is_whitespace).unwrap_or(text.len());
    Some(text.split_at(end)).filter(|(word, _)| !word.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "# Disk DescriptorFile\nCID=1\nparentCID=ffffffff\ncreateType=\"custom\"\n";

    fn lines(text: &str) -> Result<Vec<ExtentLine>, VmdkError> {
        parse(format!("{HEAD}{text}\n\0\0RW x").as_bytes())
    }

    #[test]
    fn extents_are_what_their_lines_say() {
        let text = "RW 4 FLAT \"a b.vmdk\" 2\nRDONLY 1 VMFS plain\n  RW 2 SPARSE \"s\"\nRW 3 ZERO\n\
                    NOACCESS 8 FLAT\n# RW 9 ZERO\nddb.RW = \"1\"";
        let extent = |sectors: u64, content| ExtentLine { bytes: sectors * 512, content };
        let flat = |name: &str, at| Content::Flat { name: name.to_owned(), at };
        let wanted = vec![
            extent(4, flat("a b.vmdk", 1024)),
            extent(1, flat("plain", 0)),
            extent(2, Content::Sparse { name: "s".to_owned() }),
            extent(3, Content::Zeros),
            extent(8, Content::Zeros),
        ];
        assert_eq!(lines(text).unwrap(), wanted);
    }

    #[test]
    fn a_line_that_is_not_understood_is_no_line_to_leave_out() {
        for text in [
            "RW x FLAT \"a\" 0",
            "RW 4 FLAT \"a 0",
            "RW 4 FLAT \"a\" x",
            "RW 4 FLAT \"\" 0",
            "RW 4 FLAT",
            "RW 4 STRANGE \"a\"",
            "RW 99999999999999999999 ZERO",
            "RW 36028797018963968 ZERO",
            "RW",
        ] {
            let found = lines(&format!("RW 4 ZERO\n{text} "));
            assert!(matches!(found, Err(VmdkError::Line(6))), "{text}: {found:?}");
        }
        let found = parse(b"createType=\"custom\"\nRW 4 FLAT \"\xff\" 0");
        assert!(matches!(found, Err(VmdkError::Line(2))), "{found:?}");
    }

    #[test]
    fn deltas_strange_kinds_and_crowds_are_refused() {
        let found = parse(b"createType=\"custom\"\nparentCID=12345678");
        assert!(matches!(found, Err(VmdkError::Parent)));
        let found = parse(b"createType=\"nothing\"");
        assert!(matches!(found, Err(VmdkError::Kind(kind)) if kind == "nothing"));
        let found = lines(&"RW 1 ZERO\n".repeat(MAX_VMDK_EXTENTS + 1));
        assert!(matches!(found, Err(VmdkError::TooManyExtents(MAX_VMDK_EXTENTS))));
    }
}
