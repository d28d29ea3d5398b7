//! The bitmaps of an image as they lie on disk: the header extension, the directory, the entries of a bitmap table.
//! Bytes come in and go out; nothing here reads a file or knows which bits are set.
//!
//! Source: qcow2 specification, "Bitmaps extension", "Bitmap directory", "Bitmap table".

use std::collections::HashSet;

use crate::error::{Corruption, Fault, TableKind};
use crate::fields::HOST_OFFSET;
use crate::units::{ClusterGeometry, HOST_OFFSET_END, HostOffset, index};

/// The most bitmaps in an image.
pub const MAX_BITMAPS: u32 = 65_535;
/// The longest name of a bitmap, in bytes.
pub const MAX_BITMAP_NAME_BYTES: usize = 1023;
/// The longest bitmap directory, in bytes.
pub const MAX_BITMAP_DIRECTORY_BYTES: u64 = 1024 * MAX_BITMAPS as u64;
/// The largest bitmap, in bytes of bits: more would not be opened elsewhere.
pub const MAX_BITMAP_BYTES: u64 = 512 << 20;
/// The longest bitmap table, in entries.
pub const MAX_BITMAP_TABLE_ENTRIES: u64 = 1 << 27;
/// The finest granularity of a bitmap: 512 bytes.
pub const MIN_BITMAP_GRANULARITY_BITS: u32 = 9;
/// The coarsest granularity of a bitmap: 2 GiB.
pub const MAX_BITMAP_GRANULARITY_BITS: u32 = 31;

/// The type of bitmap that records changes; the format knows no other.
const DIRTY_TRACKING: u8 = 1;
/// The fields of a directory entry before its extra data and its name, in bytes.
const ENTRY_BYTES: usize = 24;

/// Bits of a directory entry's `flags`.
const IN_USE: u32 = 1;
const AUTO: u32 = 1 << 1;
const EXTRA_DATA_COMPATIBLE: u32 = 1 << 2;
const RESERVED_FLAGS: u32 = !(IN_USE | AUTO | EXTRA_DATA_COMPATIBLE);

/// Bits of a bitmap table entry.
const ALL_ONES: u64 = 1;
const TABLE_RESERVED: u64 = !(HOST_OFFSET | ALL_ONES);

/// The content of the bitmaps header extension: where the directory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BitmapsExtension {
    /// The entries of the directory.
    pub count: u32,
    /// The length of the directory in bytes.
    pub directory_bytes: u64,
    /// Where the directory starts.
    pub directory_at: HostOffset,
}

impl BitmapsExtension {
    /// The length of its data in bytes.
    pub(crate) const BYTES: usize = 24;

    /// Reads the data of the extension, which lies at `at`.
    ///
    /// # Errors
    /// [`Corruption::BitmapField`] for a field that breaks the format or a limit.
    pub(crate) fn parse(
        data: &[u8],
        at: HostOffset,
        geometry: ClusterGeometry,
    ) -> Result<Self, Fault> {
        if data.len() != Self::BYTES {
            return Err(bad("the length of the extension", data.len() as u64, at, 0));
        }
        let found = Self {
            count: be_u32(data, 0),
            directory_bytes: be_u64(data, 8),
            directory_at: HostOffset(be_u64(data, 16)),
        };
        if found.count == 0 || found.count > MAX_BITMAPS {
            return Err(bad("nb_bitmaps", u64::from(found.count), at, 0));
        }
        if be_u32(data, 4) != 0 {
            return Err(bad("a reserved field", u64::from(be_u32(data, 4)), at, 4));
        }
        let least = u64::from(found.count) * (ENTRY_BYTES as u64 + 8);
        if found.directory_bytes < least || found.directory_bytes > MAX_BITMAP_DIRECTORY_BYTES {
            return Err(bad("bitmap_directory_size", found.directory_bytes, at, 8));
        }
        if !is_place(found.directory_at, found.directory_bytes, geometry) {
            return Err(bad("bitmap_directory_offset", found.directory_at.0, at, 16));
        }
        Ok(found)
    }

    /// The data of the extension.
    pub(crate) fn encode(&self) -> [u8; Self::BYTES] {
        let mut data = [0; Self::BYTES];
        data[0..4].copy_from_slice(&self.count.to_be_bytes());
        data[8..16].copy_from_slice(&self.directory_bytes.to_be_bytes());
        data[16..24].copy_from_slice(&self.directory_at.0.to_be_bytes());
        data
    }
}

/// A bitmap as the directory describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DirectoryEntry {
    /// The name: 1 to 1023 bytes, unique, most often UTF-8.
    pub name: Vec<u8>,
    /// Where the bitmap table starts.
    pub table_at: HostOffset,
    /// The entries of the bitmap table.
    pub table_entries: u32,
    /// The base-2 logarithm of the bytes of the disk that a bit stands for.
    pub granularity_bits: u32,
    /// It was not saved: what is stored may miss changes.
    pub in_use: bool,
    /// Every change of the disk is to be recorded in it.
    pub auto: bool,
    /// Whoever does not know the extra data may use the bitmap all the same.
    pub extra_is_compatible: bool,
    /// Data whose meaning nobody has defined yet; kept as it is.
    pub extra: Vec<u8>,
}

impl DirectoryEntry {
    /// Whether its content may be read: it was saved, and holds nothing that would change its meaning.
    pub(crate) fn is_usable(&self) -> bool {
        !self.in_use && !self.is_foreign()
    }

    /// Whether it holds extra data that must be known to use it.
    pub(crate) fn is_foreign(&self) -> bool {
        !self.extra.is_empty() && !self.extra_is_compatible
    }

    /// Its length in the directory, in bytes.
    pub(crate) fn encoded_bytes(&self) -> usize {
        (ENTRY_BYTES + self.extra.len() + self.name.len()).next_multiple_of(8)
    }

    /// Refuses a bitmap whose table is not that of a disk of `size_bytes`. Only one that was not saved may be.
    ///
    /// # Errors
    /// [`Corruption::BitmapField`].
    pub(crate) fn check_size(
        &self,
        geometry: ClusterGeometry,
        size_bytes: u64,
    ) -> Result<(), Fault> {
        let needed = table_entries(geometry, size_bytes, self.granularity_bits);
        if self.in_use || u64::from(self.table_entries) == needed {
            return Ok(());
        }
        Err(bad("bitmap_table_size", u64::from(self.table_entries), self.table_at, 0))
    }

    /// Reads the entry at the start of `bytes`, which lies at `at`.
    fn parse(bytes: &[u8], at: HostOffset, geometry: ClusterGeometry) -> Result<Self, Fault> {
        let truncated =
            Fault::Corrupt { at, what: Corruption::Truncated { what: "a bitmap directory entry" } };
        let fields = bytes.get(..ENTRY_BYTES).ok_or_else(|| truncated.clone())?;
        let flags = be_u32(fields, 12);
        let granularity_bits = u32::from(fields[17]);
        let name_len = usize::from(u16::from_be_bytes([fields[18], fields[19]]));
        let extra_len = index(u64::from(be_u32(fields, 20)));
        let table_at = HostOffset(be_u64(fields, 0));
        let table_entries = be_u32(fields, 8);
        let table_bytes = u64::from(table_entries) * 8;
        if table_entries == 0
            || u64::from(table_entries) > MAX_BITMAP_TABLE_ENTRIES
            || u64::from(table_entries) * geometry.bytes() > MAX_BITMAP_BYTES
        {
            return Err(bad("bitmap_table_size", u64::from(table_entries), at, 8));
        }
        if !is_place(table_at, table_bytes, geometry) {
            return Err(bad("bitmap_table_offset", table_at.0, at, 0));
        }
        if flags & RESERVED_FLAGS != 0 {
            return Err(bad("flags", u64::from(flags), at, 12));
        }
        if fields[16] != DIRTY_TRACKING {
            return Err(bad("type", u64::from(fields[16]), at, 16));
        }
        if !(MIN_BITMAP_GRANULARITY_BITS..=MAX_BITMAP_GRANULARITY_BITS).contains(&granularity_bits)
        {
            return Err(bad("granularity_bits", u64::from(granularity_bits), at, 17));
        }
        if name_len == 0 || name_len > MAX_BITMAP_NAME_BYTES {
            return Err(bad("name_size", name_len as u64, at, 18));
        }
        let extra = bytes.get(ENTRY_BYTES..).and_then(|rest| rest.get(..extra_len));
        let extra = extra.ok_or_else(|| truncated.clone())?;
        let name = bytes[ENTRY_BYTES + extra_len..].get(..name_len).ok_or(truncated)?;
        Ok(Self {
            name: name.to_vec(),
            table_at,
            table_entries,
            granularity_bits,
            in_use: flags & IN_USE != 0,
            auto: flags & AUTO != 0,
            extra_is_compatible: flags & EXTRA_DATA_COMPATIBLE != 0,
            extra: extra.to_vec(),
        })
    }

    fn flags(&self) -> u32 {
        let flag = |on: bool, bit: u32| if on { bit } else { 0 };
        flag(self.in_use, IN_USE)
            | flag(self.auto, AUTO)
            | flag(self.extra_is_compatible, EXTRA_DATA_COMPATIBLE)
    }

    fn encode_into(&self, bytes: &mut Vec<u8>) {
        let name_len = u16::try_from(self.name.len()).unwrap_or(u16::MAX);
        let extra_len = u32::try_from(self.extra.len()).unwrap_or(u32::MAX);
        bytes.extend_from_slice(&self.table_at.0.to_be_bytes());
        bytes.extend_from_slice(&self.table_entries.to_be_bytes());
        bytes.extend_from_slice(&self.flags().to_be_bytes());
        bytes.push(DIRTY_TRACKING);
        bytes.push(u8::try_from(self.granularity_bits).unwrap_or(u8::MAX));
        bytes.extend_from_slice(&name_len.to_be_bytes());
        bytes.extend_from_slice(&extra_len.to_be_bytes());
        bytes.extend_from_slice(&self.extra);
        bytes.extend_from_slice(&self.name);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }
}

/// Reads the directory that `extension` points at. Entries come in the order of the directory.
///
/// # Errors
/// [`Corruption::BitmapField`] for a field that breaks the format or a limit, [`Corruption::BitmapName`] for a name
/// that comes twice, [`Corruption::Truncated`] for bytes that are no whole directory.
pub(crate) fn parse_directory(
    bytes: &[u8],
    extension: &BitmapsExtension,
    geometry: ClusterGeometry,
) -> Result<Vec<DirectoryEntry>, Fault> {
    let start = extension.directory_at;
    let whole = bytes.get(..index(extension.directory_bytes)).ok_or(Fault::Corrupt {
        at: start,
        what: Corruption::Truncated { what: "the bitmap directory" },
    })?;
    let (mut entries, mut names, mut at) = (Vec::new(), HashSet::new(), 0);
    for _ in 0..extension.count {
        let here = HostOffset(start.0.saturating_add(at as u64));
        let entry = DirectoryEntry::parse(whole.get(at..).unwrap_or_default(), here, geometry)?;
        if !names.insert(entry.name.clone()) {
            let name = String::from_utf8_lossy(&entry.name).into_owned();
            return Err(Fault::Corrupt { at: here, what: Corruption::BitmapName { name } });
        }
        at += entry.encoded_bytes();
        entries.push(entry);
    }
    if at != whole.len() {
        return Err(bad("bitmap_directory_size", extension.directory_bytes, start, 0));
    }
    Ok(entries)
}

/// The bytes of a directory.
pub(crate) fn encode_directory<'a>(
    entries: impl IntoIterator<Item = &'a DirectoryEntry>,
) -> Vec<u8> {
    let mut bytes = Vec::new();
    for entry in entries {
        entry.encode_into(&mut bytes);
    }
    bytes
}

/// Where the bits for a part of the disk are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BitmapCluster {
    /// None is set.
    Zeros,
    /// All are set.
    Ones,
    /// They lie in this cluster.
    Stored(HostOffset),
}

impl BitmapCluster {
    /// Reads an entry of a bitmap table.
    ///
    /// # Errors
    /// [`Corruption::ReservedBits`], [`Corruption::Unaligned`].
    pub(crate) fn decode(raw: u64, geometry: ClusterGeometry) -> Result<Self, Corruption> {
        let table = TableKind::Bitmap;
        let offset = raw & HOST_OFFSET;
        if raw & TABLE_RESERVED != 0 || (offset != 0 && raw & ALL_ONES != 0) {
            return Err(Corruption::ReservedBits { table, raw });
        }
        if !geometry.is_aligned(offset) {
            return Err(Corruption::Unaligned { table, raw });
        }
        Ok(match (offset, raw & ALL_ONES) {
            (0, 0) => Self::Zeros,
            (0, _) => Self::Ones,
            (at, _) => Self::Stored(HostOffset(at)),
        })
    }

    /// The entry of a bitmap table.
    pub(crate) fn encode(self) -> u64 {
        match self {
            Self::Zeros => 0,
            Self::Ones => ALL_ONES,
            Self::Stored(at) => at.0,
        }
    }
}

/// The bytes of bits that a disk of `size_bytes` needs.
pub(crate) const fn bitmap_bytes(size_bytes: u64, granularity_bits: u32) -> u64 {
    size_bytes.div_ceil(1 << granularity_bits).div_ceil(8)
}

/// The entries of the table of a bitmap over a disk of `size_bytes`.
pub(crate) const fn table_entries(
    geometry: ClusterGeometry,
    size_bytes: u64,
    granularity_bits: u32,
) -> u64 {
    geometry.clusters(bitmap_bytes(size_bytes, granularity_bits))
}

/// Whether a structure can lie there: on a cluster behind the header, at an offset that entries can name.
fn is_place(at: HostOffset, bytes: u64, geometry: ClusterGeometry) -> bool {
    let end = at.0.checked_add(bytes);
    at.0 != 0 && geometry.is_aligned(at.0) && end.is_some_and(|end| end <= HOST_OFFSET_END)
}

fn bad(field: &'static str, value: u64, at: HostOffset, within: u64) -> Fault {
    let at = HostOffset(at.0.saturating_add(within));
    Fault::Corrupt { at, what: Corruption::BitmapField { field, value } }
}

/// A field of a structure whose length was checked; 0 behind its end.
fn be_u32(bytes: &[u8], at: usize) -> u32 {
    let field = bytes.get(at..).and_then(|rest| rest.first_chunk());
    field.map_or(0, |field| u32::from_be_bytes(*field))
}

fn be_u64(bytes: &[u8], at: usize) -> u64 {
    let field = bytes.get(at..).and_then(|rest| rest.first_chunk());
    field.map_or(0, |field| u64::from_be_bytes(*field))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn geometry() -> ClusterGeometry {
        ClusterGeometry::of_bytes(4096).unwrap()
    }

    fn any_entry() -> impl Strategy<Value = DirectoryEntry> {
        let name = prop::collection::vec(any::<u8>(), 1..40);
        let extra = prop::collection::vec(any::<u8>(), 0..20);
        let place = (1u64..1 << 40, 1u32..1000, 9u32..=31);
        (name, extra, place, any::<(bool, bool, bool)>()).prop_map(|(name, extra, place, flags)| {
            DirectoryEntry {
                name,
                table_at: HostOffset(place.0 * 4096),
                table_entries: place.1,
                granularity_bits: place.2,
                in_use: flags.0,
                auto: flags.1,
                extra_is_compatible: flags.2,
                extra,
            }
        })
    }

    fn extension(entries: &[DirectoryEntry]) -> BitmapsExtension {
        BitmapsExtension {
            count: u32::try_from(entries.len()).unwrap(),
            directory_bytes: encode_directory(entries).len() as u64,
            directory_at: HostOffset(8192),
        }
    }

    fn one() -> DirectoryEntry {
        DirectoryEntry {
            name: b"b".to_vec(),
            table_at: HostOffset(4096),
            table_entries: 1,
            granularity_bits: 16,
            in_use: false,
            auto: true,
            extra_is_compatible: false,
            extra: Vec::new(),
        }
    }

    proptest! {
        #[test]
        fn a_directory_reads_back_as_it_was_written(
            entries in prop::collection::vec(any_entry(), 1..10)
        ) {
            let names: HashSet<_> = entries.iter().map(|entry| &entry.name).collect();
            prop_assume!(names.len() == entries.len());
            let bytes = encode_directory(&entries);
            let found = parse_directory(&bytes, &extension(&entries), geometry()).unwrap();
            prop_assert_eq!(found, entries);
        }

        #[test]
        fn no_bytes_make_the_parsers_panic(
            bytes in prop::collection::vec(any::<u8>(), 0..300),
            count in 1u32..10,
        ) {
            let extension = BitmapsExtension {
                count,
                directory_bytes: bytes.len() as u64,
                directory_at: HostOffset(8192),
            };
            let _: Result<_, _> = parse_directory(&bytes, &extension, geometry());
            let _: Result<_, _> = BitmapsExtension::parse(&bytes, HostOffset(0), geometry());
        }

        #[test]
        fn a_table_entry_reads_back_or_is_refused(raw in any::<u64>(), shift in 0u32..64) {
            let raw = raw >> shift;
            if let Ok(entry) = BitmapCluster::decode(raw, geometry()) {
                prop_assert_eq!(entry.encode(), raw);
            }
        }
    }

    #[test]
    fn the_extension_reads_back_and_every_bad_field_is_named() {
        let good = extension(&[one()]);
        let parse = |data: &[u8]| BitmapsExtension::parse(data, HostOffset(112), geometry());
        assert_eq!(parse(&good.encode()), Ok(good));
        let cases: [(usize, u8, &str); 6] = [
            (3, 0, "nb_bitmaps"),
            (1, 1, "nb_bitmaps"),
            (4, 1, "a reserved field"),
            (15, 0, "bitmap_directory_size"),
            (11, 9, "bitmap_directory_size"),
            (23, 1, "bitmap_directory_offset"),
        ];
        for (at, byte, wanted) in cases {
            let mut data = good.encode();
            data[at] = byte;
            let Err(Fault::Corrupt { what: Corruption::BitmapField { field, .. }, .. }) =
                parse(&data)
            else {
                panic!("byte {at} = {byte} was taken");
            };
            assert_eq!(field, wanted);
        }
        assert!(parse(&good.encode()[..23]).is_err());
    }

    #[test]
    fn every_bad_field_of_a_directory_entry_is_named() {
        let good = encode_directory(&[one()]);
        let cases: [(usize, u8, &str); 9] = [
            (7, 1, "bitmap_table_offset"),
            (0, 1, "bitmap_table_offset"),
            (11, 0, "bitmap_table_size"),
            (8, 0x10, "bitmap_table_size"),
            (15, 8, "flags"),
            (16, 2, "type"),
            (17, 8, "granularity_bits"),
            (17, 32, "granularity_bits"),
            (19, 0, "name_size"),
        ];
        for (at, byte, wanted) in cases {
            let mut bytes = good.clone();
            bytes[at] = byte;
            let found = parse_directory(&bytes, &extension(&[one()]), geometry());
            let Err(Fault::Corrupt { what: Corruption::BitmapField { field, .. }, .. }) = found
            else {
                panic!("byte {at} = {byte}: {found:?}");
            };
            assert_eq!(field, wanted);
        }
    }

    #[test]
    fn names_that_come_twice_and_directories_that_end_early_are_refused() {
        let twice = [one(), one()];
        let found = parse_directory(&encode_directory(&twice), &extension(&twice), geometry());
        assert!(matches!(found, Err(Fault::Corrupt { what: Corruption::BitmapName { .. }, .. })));
        let mut long = extension(&[one()]);
        long.directory_bytes += 8;
        let mut bytes = encode_directory(&[one()]);
        assert!(parse_directory(&bytes, &long, geometry()).is_err(), "shorter than it says");
        bytes.resize(bytes.len() + 8, 0);
        assert!(parse_directory(&bytes, &long, geometry()).is_err(), "longer than its entries");
    }

    #[test]
    fn a_table_that_does_not_fit_the_disk_is_refused_unless_it_was_not_saved() {
        // A cluster of 4096 bytes has 32768 bits: 2 GiB of disk at 64 KiB each.
        assert_eq!(one().check_size(geometry(), 2 << 30), Ok(()));
        assert!(one().check_size(geometry(), (2 << 30) + 1).is_err());
        let unsaved = DirectoryEntry { in_use: true, ..one() };
        assert_eq!(unsaved.check_size(geometry(), 1 << 40), Ok(()));
    }
}
