//! The header: the first cluster of an image with its fields, extensions and backing name. Bytes come in, bytes go
//! out; unknown fields and extensions survive because changes patch the bytes that were read.

use crate::entry::EntryFormat;
use crate::error::{Corruption, Fault, Feature, TableKind};
use crate::snapshot::MAX_SNAPSHOTS;
use crate::units::{ClusterGeometry, HostOffset, MAX_CLUSTER_BITS, SECTOR_BYTES, index};

/// The longest L1 table that QEMU opens, in bytes.
pub const MAX_L1_BYTES: u64 = 32 << 20;
/// The longest refcount table that QEMU opens, in bytes.
pub const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// The longest name of a backing file, in bytes.
pub const MAX_BACKING_NAME_BYTES: usize = 1023;

/// `QFI\xfb`.
const MAGIC: u32 = 0x5146_49fb;
/// The fields of every version 3 header, in bytes.
const FIXED_BYTES: usize = 104;
/// The fields of the headers that we write: one more, for the compression type, padded.
const WRITTEN_BYTES: usize = 112;

const EXTENSION_END: u32 = 0;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXTENSION_FEATURE_NAMES: u32 = 0x6803_f857;
const EXTENSION_BITMAPS: u32 = 0x2385_2875;
const EXTENSION_ENCRYPTION: u32 = 0x0537_be77;

/// Bits of `incompatible_features`.
const DIRTY: u64 = 1;
const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;
const COMPRESSION_TYPE: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;
/// Bit of `autoclear_features`.
const BITMAPS: u64 = 1;

/// The names that we write into the feature name table: class, bit, name.
const FEATURE_NAMES: [(u8, u8, &str); 7] = [
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
];
const FEATURE_NAME_BYTES: usize = 48;

/// The largest disk that an image with these clusters can have, in bytes: its L1 table has a limit, and files and
/// devices end at 2^63 - 1.
pub(crate) fn largest_disk_bytes(geometry: ClusterGeometry) -> u64 {
    (MAX_L1_BYTES / 8).saturating_mul(geometry.l2_coverage()).min(i64::MAX.unsigned_abs())
}

/// The header of an image, as read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// The version of the format.
    pub version: u32,
    /// The cluster size.
    pub geometry: ClusterGeometry,
    /// The size of the virtual disk in bytes.
    pub size_bytes: u64,
    /// Where the L1 table starts.
    pub l1_at: HostOffset,
    /// The entries of the L1 table.
    pub l1_entries: u64,
    /// Where the refcount table starts.
    pub refcount_table_at: HostOffset,
    /// The clusters of the refcount table.
    pub refcount_table_clusters: u64,
    /// The base-2 logarithm of the width of a refcount in bits.
    pub refcount_order: u32,
    /// The number of internal snapshots.
    pub snapshots: u32,
    /// Where the snapshot table starts.
    pub snapshots_at: HostOffset,
    /// How guest data is encrypted: 0 for not at all, 1 for legacy AES, 2 for LUKS.
    pub crypt_method: u32,
    /// Where the encryption header starts, and its length in bytes.
    pub encryption_header: Option<(u64, u64)>,
    /// The incompatible feature bits; all of them are known.
    pub incompatible: u64,
    /// The compatible feature bits, known or not.
    pub compatible: u64,
    /// The autoclear feature bits, known or not.
    pub autoclear: u64,
    /// The name of the backing file, as recorded.
    pub backing_name: Option<Vec<u8>>,
    /// The format of the backing file, as recorded.
    pub backing_format: Option<Vec<u8>>,
    /// The types and lengths in bytes of all extensions, in order.
    pub extensions: Vec<(u32, u32)>,
    /// The first sector as read: what a change patches.
    sector: Vec<u8>,
}

impl Header {
    /// How many bytes of the file [`Header::parse`] needs, told by its first sector.
    ///
    /// # Errors
    /// As [`Header::parse`] for the magic number, the version and the cluster size.
    pub(crate) fn needed_bytes(sector: &[u8]) -> Result<u64, Fault> {
        geometry(sector).map(ClusterGeometry::bytes)
    }

    /// Reads a header from the first cluster of a file of `file_bytes` bytes.
    ///
    /// `cluster` may be shorter than a cluster where the file is.
    ///
    /// # Errors
    /// [`Fault::Corrupt`] where a field breaks the format, [`Fault::Unsupported`] for what only later versions do.
    ///
    /// Source: qcow2 specification, "Header".
    pub(crate) fn parse(cluster: &[u8], file_bytes: u64) -> Result<Self, Fault> {
        let geometry = geometry(cluster)?;
        let cluster = cluster.get(..index(geometry.bytes())).unwrap_or(cluster);
        let fields = cluster.get(..FIXED_BYTES).ok_or(truncated("the header"))?;
        let u32_at = |at: usize| be_u32(fields, at);
        let u64_at = |at: usize| be_u64(fields, at);

        let header_bytes = u64::from(u32_at(100));
        if header_bytes < FIXED_BYTES as u64
            || header_bytes % 8 != 0
            || header_bytes > geometry.bytes()
        {
            return Err(field("header_length", header_bytes, 100));
        }
        if index(header_bytes) > cluster.len() {
            return Err(truncated("the header"));
        }
        let backing_name = backing_name(cluster, u64_at(8), u64::from(u32_at(16)))?;
        let end = if backing_name.is_some() { index(u64_at(8)) } else { cluster.len() };
        let extensions = Extensions::parse(cluster, index(header_bytes), end)?;
        let compression = cluster.get(FIXED_BYTES).copied().filter(|_| header_bytes > 104);
        let incompatible = u64_at(72);
        known_features(incompatible, u32_at(32), compression.unwrap_or(0), &extensions)?;

        let header = Self {
            version: u32_at(4),
            geometry,
            size_bytes: u64_at(24),
            l1_at: HostOffset(u64_at(40)),
            l1_entries: u64::from(u32_at(36)),
            refcount_table_at: HostOffset(u64_at(48)),
            refcount_table_clusters: u64::from(u32_at(56)),
            refcount_order: u32_at(96),
            snapshots: u32_at(60),
            snapshots_at: HostOffset(u64_at(64)),
            crypt_method: u32_at(32),
            encryption_header: extensions.encryption,
            incompatible,
            compatible: u64_at(80),
            autoclear: u64_at(88),
            backing_name,
            backing_format: extensions.backing_format,
            extensions: extensions.all,
            sector: cluster.get(..index(SECTOR_BYTES)).unwrap_or(cluster).to_vec(),
        };
        header.check(file_bytes, extensions.bitmaps)?;
        Ok(header)
    }

    /// How L1 and L2 entries are read and written.
    pub(crate) fn entry_format(&self) -> EntryFormat {
        EntryFormat {
            geometry: self.geometry,
            version: self.version,
            external_data: self.incompatible & EXTERNAL_DATA != 0,
        }
    }

    /// Whether refcounts may be wrong.
    pub(crate) fn is_dirty(&self) -> bool {
        self.incompatible & DIRTY != 0
    }

    /// Whether the image says that it is broken.
    pub(crate) fn is_corrupt(&self) -> bool {
        self.incompatible & CORRUPT != 0
    }

    /// The first sector with all autoclear bits off (all of them describe data that we do not keep up to date), where
    /// one is on.
    pub(crate) fn sector_without_autoclear(&self) -> Option<Vec<u8>> {
        let mut cleared = self.clone();
        cleared.clear_autoclear();
        (self.autoclear != 0).then_some(cleared.sector)
    }

    /// Notes that the autoclear bits are off on disk.
    pub(crate) fn clear_autoclear(&mut self) {
        self.autoclear = 0;
        self.patch(88, &[0; 8]);
    }

    /// Records another place for the refcount table.
    pub(crate) fn move_refcount_table(&mut self, at: HostOffset, clusters: u32) {
        self.refcount_table_at = at;
        self.refcount_table_clusters = u64::from(clusters);
        self.patch(48, &at.0.to_be_bytes());
        self.patch(56, &clusters.to_be_bytes());
    }

    /// The bytes of the first sector (or of the fixed fields, where the file is shorter): what a change must write.
    pub(crate) fn sector(&self) -> &[u8] {
        &self.sector
    }

    fn patch(&mut self, at: usize, bytes: &[u8]) {
        if let Some(place) = self.sector.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    }

    fn check(&self, file_bytes: u64, has_bitmaps: bool) -> Result<(), Fault> {
        if self.refcount_order > 6 {
            return Err(field("refcount_order", u64::from(self.refcount_order), 96));
        }
        let l1_bytes = self.l1_entries * 8;
        if l1_bytes > MAX_L1_BYTES {
            return Err(too_large(TableKind::L1, l1_bytes, MAX_L1_BYTES));
        }
        let needed = self.geometry.l1_entries(self.size_bytes);
        if self.l1_entries < needed {
            let what = Corruption::L1TooShort { entries: self.l1_entries, needed };
            return Err(Fault::Corrupt { at: HostOffset(36), what });
        }
        self.check_place(TableKind::L1, self.l1_at, l1_bytes, file_bytes, 40)?;
        let table_bytes = self.refcount_table_clusters * self.geometry.bytes();
        if table_bytes > MAX_REFCOUNT_TABLE_BYTES {
            return Err(too_large(TableKind::RefcountTable, table_bytes, MAX_REFCOUNT_TABLE_BYTES));
        }
        if table_bytes == 0 {
            return Err(field("refcount_table_clusters", 0, 56));
        }
        let place = self.refcount_table_at;
        self.check_place(TableKind::RefcountTable, place, table_bytes, file_bytes, 48)?;
        if self.snapshots > MAX_SNAPSHOTS {
            return Err(field("nb_snapshots", u64::from(self.snapshots), 60));
        }
        if self.snapshots > 0 && !self.geometry.is_aligned(self.snapshots_at.0) {
            return Err(field("snapshots_offset", self.snapshots_at.0, 64));
        }
        if self.autoclear & BITMAPS != 0 && !has_bitmaps {
            let what = Corruption::BitmapsWithoutExtension;
            return Err(Fault::Corrupt { at: HostOffset(88), what });
        }
        Ok(())
    }

    /// A table must start on a cluster behind the header and, but for the last cluster, lie in the file.
    fn check_place(
        &self,
        table: TableKind,
        at: HostOffset,
        bytes: u64,
        file_bytes: u64,
        field_at: u64,
    ) -> Result<(), Fault> {
        if bytes == 0 {
            return Ok(());
        }
        let file_end = self.geometry.clusters(file_bytes).saturating_mul(self.geometry.bytes());
        let inside = at.0.checked_add(bytes).is_some_and(|end| end <= file_end);
        if at.0 == 0 || !self.geometry.is_aligned(at.0) || !inside {
            let what = Corruption::TablePlace { table, value: at.0 };
            return Err(Fault::Corrupt { at: HostOffset(field_at), what });
        }
        Ok(())
    }
}

/// What a new image's header says.
pub(crate) struct NewHeader<'a> {
    pub geometry: ClusterGeometry,
    pub size_bytes: u64,
    pub l1_at: HostOffset,
    pub l1_entries: u32,
    pub refcount_table_at: HostOffset,
    pub refcount_table_clusters: u32,
    pub refcount_order: u32,
    /// The name and the format of the backing file.
    pub backing: Option<(&'a str, &'a str)>,
}

impl NewHeader<'_> {
    /// The bytes of the header with its extensions and the backing name. The feature name table is left out where
    /// the cluster is too small for it.
    ///
    /// # Errors
    /// The room for the backing name in bytes, where that is too small.
    pub(crate) fn encode(&self) -> Result<Vec<u8>, usize> {
        let room = index(self.geometry.bytes());
        let mut bytes = self.fields();
        if let Some((_, format)) = self.backing {
            push_extension(&mut bytes, EXTENSION_BACKING_FORMAT, format.as_bytes());
        }
        let name = self.backing.map_or("", |(name, _)| name);
        let names_bytes = 8 + FEATURE_NAMES.len() * FEATURE_NAME_BYTES;
        if bytes.len() + names_bytes + 8 + name.len() <= room {
            push_extension(&mut bytes, EXTENSION_FEATURE_NAMES, &feature_names());
        }
        push_extension(&mut bytes, EXTENSION_END, &[]);
        let name_room = room.saturating_sub(bytes.len()).min(MAX_BACKING_NAME_BYTES);
        if name.len() > name_room {
            return Err(name_room);
        }
        if self.backing.is_some() {
            let at = bytes.len() as u64;
            bytes[8..16].copy_from_slice(&at.to_be_bytes());
            let len = u32::try_from(name.len()).map_err(|_| name_room)?;
            bytes[16..20].copy_from_slice(&len.to_be_bytes());
            bytes.extend_from_slice(name.as_bytes());
        }
        Ok(bytes)
    }

    fn fields(&self) -> Vec<u8> {
        let mut bytes = vec![0; WRITTEN_BYTES];
        bytes[0..4].copy_from_slice(&MAGIC.to_be_bytes());
        bytes[4..8].copy_from_slice(&3u32.to_be_bytes());
        bytes[20..24].copy_from_slice(&self.geometry.bits().to_be_bytes());
        bytes[24..32].copy_from_slice(&self.size_bytes.to_be_bytes());
        bytes[36..40].copy_from_slice(&self.l1_entries.to_be_bytes());
        bytes[40..48].copy_from_slice(&self.l1_at.0.to_be_bytes());
        bytes[48..56].copy_from_slice(&self.refcount_table_at.0.to_be_bytes());
        bytes[56..60].copy_from_slice(&self.refcount_table_clusters.to_be_bytes());
        bytes[96..100].copy_from_slice(&self.refcount_order.to_be_bytes());
        bytes[103] = u8::try_from(WRITTEN_BYTES).unwrap_or(0);
        bytes
    }
}

/// The header extensions that matter now, and a list of all.
#[derive(Default)]
struct Extensions {
    all: Vec<(u32, u32)>,
    backing_format: Option<Vec<u8>>,
    feature_names: Vec<(u8, u8, String)>,
    bitmaps: bool,
    encryption: Option<(u64, u64)>,
}

impl Extensions {
    /// Source: qcow2 specification, "Header extensions".
    fn parse(cluster: &[u8], start: usize, end: usize) -> Result<Self, Fault> {
        let mut found = Self::default();
        let mut at = start;
        // The end marker may be missing where the space ends.
        while let Some(head) = cluster.get(at..at + 8).filter(|_| at + 8 <= end) {
            let kind = be_u32(head, 0);
            let len = be_u32(head, 4);
            if kind == EXTENSION_END {
                break;
            }
            let data_at = at + 8;
            let past_end = || Fault::Corrupt {
                at: HostOffset(at as u64),
                what: Corruption::ExtensionPastEnd { kind, len: u64::from(len) },
            };
            let data_end = data_at.checked_add(index(u64::from(len))).ok_or_else(past_end)?;
            let data = cluster.get(data_at..data_end.min(end)).ok_or_else(past_end)?;
            if data_end > end {
                return Err(past_end());
            }
            found.take(kind, data);
            found.all.push((kind, len));
            at = data_end.next_multiple_of(8);
        }
        Ok(found)
    }

    fn take(&mut self, kind: u32, data: &[u8]) {
        match kind {
            EXTENSION_BACKING_FORMAT => self.backing_format = Some(data.to_vec()),
            EXTENSION_BITMAPS => self.bitmaps = true,
            EXTENSION_ENCRYPTION => self.encryption = Some((be_u64(data, 0), be_u64(data, 8))),
            EXTENSION_FEATURE_NAMES => {
                for entry in data.chunks_exact(FEATURE_NAME_BYTES) {
                    let text = entry[2..].split(|byte| *byte == 0).next().unwrap_or_default();
                    let text = String::from_utf8_lossy(text).into_owned();
                    self.feature_names.push((entry[0], entry[1], text));
                }
            }
            _ => {}
        }
    }

    fn name(&self, bit: u32) -> String {
        let named =
            self.feature_names.iter().find(|(class, b, _)| *class == 0 && u32::from(*b) == bit);
        match named {
            Some((_, _, name)) if !name.is_empty() => format!("{name:?} (bit {bit})"),
            _ => format!("bit {bit}"),
        }
    }
}

fn geometry(cluster: &[u8]) -> Result<ClusterGeometry, Fault> {
    let start = cluster.get(..24).ok_or(truncated("the header"))?;
    if be_u32(start, 0) != MAGIC {
        return Err(Fault::Corrupt { at: HostOffset(0), what: Corruption::NoMagic });
    }
    let version = be_u32(start, 4);
    if version != 3 {
        return Err(Fault::Unsupported(Feature::Version(version)));
    }
    let bits = be_u32(start, 20);
    match ClusterGeometry::new(bits) {
        Some(geometry) => Ok(geometry),
        None if bits > MAX_CLUSTER_BITS && bits < 64 => {
            Err(Fault::Unsupported(Feature::ClusterBits(bits)))
        }
        None => Err(field("cluster_bits", u64::from(bits), 20)),
    }
}

fn known_features(
    incompatible: u64,
    crypt_method: u32,
    compression: u8,
    extensions: &Extensions,
) -> Result<(), Fault> {
    let known = DIRTY | CORRUPT | EXTERNAL_DATA | COMPRESSION_TYPE | EXTENDED_L2;
    let unknown: Vec<_> = (0..64)
        .filter(|bit| incompatible & !known & (1 << bit) != 0)
        .map(|bit| extensions.name(bit))
        .collect();
    if !unknown.is_empty() {
        return Err(Fault::Unsupported(Feature::Unknown(unknown.join(", "))));
    }
    // Legacy AES and LUKS are refused or opened by what reads guest data.
    if crypt_method > 2 {
        return Err(Fault::Unsupported(Feature::Encryption(crypt_method)));
    }
    if incompatible & EXTERNAL_DATA != 0 {
        return Err(Fault::Unsupported(Feature::ExternalDataFile));
    }
    if incompatible & EXTENDED_L2 != 0 {
        return Err(Fault::Unsupported(Feature::ExtendedL2));
    }
    match (incompatible & COMPRESSION_TYPE != 0, compression) {
        (false, 0) => Ok(()),
        (true, 1..) => Err(Fault::Unsupported(Feature::CompressionType(compression))),
        _ => Err(field("compression_type", u64::from(compression), 104)),
    }
}

fn backing_name(cluster: &[u8], at: u64, len: u64) -> Result<Option<Vec<u8>>, Fault> {
    if at == 0 || len == 0 {
        return Ok(None);
    }
    let refused =
        || Fault::Corrupt { at: HostOffset(8), what: Corruption::BackingName { at, len } };
    let end = at.checked_add(len).ok_or_else(refused)?;
    if len > MAX_BACKING_NAME_BYTES as u64 || at < FIXED_BYTES as u64 {
        return Err(refused());
    }
    cluster.get(index(at)..index(end)).map(|name| Some(name.to_vec())).ok_or_else(refused)
}

fn push_extension(bytes: &mut Vec<u8>, kind: u32, data: &[u8]) {
    bytes.extend_from_slice(&kind.to_be_bytes());
    bytes.extend_from_slice(&u32::try_from(data.len()).unwrap_or(0).to_be_bytes());
    bytes.extend_from_slice(data);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
}

fn feature_names() -> Vec<u8> {
    let mut bytes = Vec::new();
    for (class, bit, name) in FEATURE_NAMES {
        let start = bytes.len();
        bytes.extend_from_slice(&[class, bit]);
        bytes.extend_from_slice(name.as_bytes());
        bytes.resize(start + FEATURE_NAME_BYTES, 0);
    }
    bytes
}

/// A field of a header; 0 behind its end.
fn be_u32(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..)
        .and_then(|rest| rest.first_chunk())
        .map_or(0, |field| u32::from_be_bytes(*field))
}

fn be_u64(bytes: &[u8], at: usize) -> u64 {
    bytes
        .get(at..)
        .and_then(|rest| rest.first_chunk())
        .map_or(0, |field| u64::from_be_bytes(*field))
}

fn field(field: &'static str, value: u64, at: u64) -> Fault {
    Fault::Corrupt { at: HostOffset(at), what: Corruption::HeaderField { field, value } }
}

fn truncated(what: &'static str) -> Fault {
    Fault::Corrupt { at: HostOffset(0), what: Corruption::Truncated { what } }
}

fn too_large(table: TableKind, bytes: u64, limit: u64) -> Fault {
    Fault::Unsupported(Feature::TableTooLarge { table, bytes, limit })
}
