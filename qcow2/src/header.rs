//! The header: the first cluster of an image with its fields, extensions and backing name. Bytes come in, bytes go
//! out; fields and extensions that are not known survive every change.

mod extensions;
mod rewrite;
#[cfg(test)]
mod tests;

use crate::bitmap::codec::BitmapsExtension;
use crate::entry::EntryFormat;
use crate::error::{Corruption, Fault, Feature, TableKind};
use crate::snapshot::MAX_SNAPSHOTS;
use crate::units::{ClusterGeometry, HostOffset, MAX_CLUSTER_BITS, index};

pub(crate) use extensions::{Extensions, LuksPointer, feature_names};
pub(crate) use rewrite::Stages;

/// The longest L1 table that QEMU opens, in bytes.
pub const MAX_L1_BYTES: u64 = 32 << 20;
/// The longest refcount table that QEMU opens, in bytes.
pub const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// The longest name of a backing file, in bytes.
pub const MAX_BACKING_NAME_BYTES: usize = 1023;

/// `QFI\xfb`.
const MAGIC: u32 = 0x5146_49fb;
/// The fields of a version 2 header, in bytes.
const V2_BYTES: usize = 72;
/// The fields of every version 3 header, in bytes.
const FIXED_BYTES: usize = 104;

/// Bits of `incompatible_features`.
pub(crate) const DIRTY: u64 = 1;
pub(crate) const CORRUPT: u64 = 1 << 1;
pub(crate) const EXTERNAL_DATA: u64 = 1 << 2;
pub(crate) const COMPRESSION_TYPE: u64 = 1 << 3;
pub(crate) const EXTENDED_L2: u64 = 1 << 4;
/// Bit of `compatible_features`.
pub(crate) const LAZY_REFCOUNTS: u64 = 1;
/// Bits of `autoclear_features`.
pub(crate) const BITMAPS: u64 = 1;
pub(crate) const RAW_EXTERNAL_DATA: u64 = 1 << 1;

/// Values of `crypt_method`.
pub(crate) const CRYPT_NONE: u32 = 0;
pub(crate) const CRYPT_LUKS: u32 = 2;

/// The largest disk that an image with these clusters can have, in bytes: its L1 table has a limit, and files and
/// devices end at 2^63 - 1.
pub(crate) fn largest_disk_bytes(geometry: ClusterGeometry) -> u64 {
    (MAX_L1_BYTES / 8).saturating_mul(geometry.l2_coverage()).min(i64::MAX.unsigned_abs())
}

/// The header of an image. The fields are the truth; [`Header::sector`] and [`Header::rewrite`] bring them to disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// The version of the format: 2 or 3.
    pub version: u32,
    /// The cluster size.
    pub geometry: ClusterGeometry,
    /// The size of the virtual disk in bytes.
    pub size_bytes: u64,
    /// How guest data is encrypted: 0 not at all, 1 the old way with AES-CBC, 2 with LUKS.
    pub crypt_method: u32,
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
    /// The incompatible feature bits; all of them are known.
    pub incompatible: u64,
    /// The compatible feature bits, known or not.
    pub compatible: u64,
    /// The autoclear feature bits, known or not.
    pub autoclear: u64,
    /// The name of the backing file, as recorded.
    pub backing_name: Option<Vec<u8>>,
    /// The extensions.
    pub extensions: Extensions,
    /// The fields behind the fixed ones: a byte of compression type, then what later versions may have added.
    beyond: Vec<u8>,
    /// The length of the fields on disk.
    header_bytes: usize,
    /// Where the backing name lies on disk.
    backing_at: usize,
    /// The header on disk as far as it matters, in whole sectors.
    disk: Vec<u8>,
}

impl Header {
    /// The header of a new version 3 image that has no tables yet, with 16 bit refcounts.
    pub(crate) fn new(geometry: ClusterGeometry, size_bytes: u64) -> Self {
        Self {
            version: 3,
            geometry,
            size_bytes,
            crypt_method: CRYPT_NONE,
            l1_at: HostOffset(0),
            l1_entries: 0,
            refcount_table_at: HostOffset(0),
            refcount_table_clusters: 0,
            refcount_order: 4,
            snapshots: 0,
            snapshots_at: HostOffset(0),
            incompatible: 0,
            compatible: 0,
            autoclear: 0,
            backing_name: None,
            extensions: Extensions {
                feature_names: Some(feature_names()),
                ..Extensions::default()
            },
            beyond: Vec::new(),
            header_bytes: FIXED_BYTES,
            backing_at: 0,
            disk: Vec::new(),
        }
    }

    /// How many bytes of the file [`Header::parse`] needs, told by its first sector.
    ///
    /// # Errors
    /// As [`Header::parse`] for the magic number, the version and the cluster size.
    pub(crate) fn needed_bytes(sector: &[u8]) -> Result<u64, Fault> {
        version_and_geometry(sector).map(|(_, geometry)| geometry.bytes())
    }

    /// Reads a header from the first cluster of a file. `cluster` may be shorter than a cluster where the file is.
    ///
    /// What it says of itself is checked, what it says of the rest of the file is not: see [`Header::check`].
    ///
    /// # Errors
    /// [`Fault::Corrupt`] where a field breaks the format, [`Fault::Unsupported`] for what only later versions do.
    ///
    /// Source: qcow2 specification, "Header".
    pub(crate) fn parse(cluster: &[u8]) -> Result<Self, Fault> {
        let (version, geometry) = version_and_geometry(cluster)?;
        let cluster = cluster.get(..index(geometry.bytes())).unwrap_or(cluster);
        let fixed = if version == 2 { V2_BYTES } else { FIXED_BYTES };
        let fields = cluster.get(..fixed).ok_or(truncated("the header"))?;
        let header_bytes = header_bytes(fields, version, geometry)?;
        let beyond = cluster.get(fixed..header_bytes).ok_or(truncated("the header"))?.to_vec();
        // Behind the fields of version 2 all are zero.
        let u32_at = |at: usize| be_u32(fields, at);
        let u64_at = |at: usize| be_u64(fields, at);
        let backing_at = u64_at(8);
        let name_len = u64::from(u32_at(16));
        let backing_name = backing_name(cluster, header_bytes, backing_at, name_len)?;
        // An offset ends the extensions even where no name lies there.
        let end = if backing_at == 0 { cluster.len() } else { index(backing_at) };
        let (extensions, extensions_end) = Extensions::parse(cluster, header_bytes, end)?;
        let name_end = backing_name.as_ref().map_or(0, |name| index(backing_at) + name.len());
        let used = extensions_end.max(name_end).next_multiple_of(512);
        let geometry = if u64_at(72) & EXTENDED_L2 == 0 {
            geometry
        } else {
            let small = || field("cluster_bits", u64::from(geometry.bits()), 20);
            geometry.extended().ok_or_else(small)?
        };
        let header = Self {
            version,
            geometry,
            size_bytes: u64_at(24),
            crypt_method: u32_at(32),
            l1_at: HostOffset(u64_at(40)),
            l1_entries: u64::from(u32_at(36)),
            refcount_table_at: HostOffset(u64_at(48)),
            refcount_table_clusters: u64::from(u32_at(56)),
            refcount_order: if version == 2 { 4 } else { u32_at(96) },
            snapshots: u32_at(60),
            snapshots_at: HostOffset(u64_at(64)),
            incompatible: u64_at(72),
            compatible: u64_at(80),
            autoclear: u64_at(88),
            backing_name,
            extensions,
            beyond,
            header_bytes,
            backing_at: index(backing_at),
            disk: cluster.get(..used).unwrap_or(cluster).to_vec(),
        };
        header.check_features()?;
        Ok(header)
    }

    /// How L1 and L2 entries are read and written.
    pub(crate) fn entry_format(&self) -> EntryFormat {
        EntryFormat {
            geometry: self.geometry,
            version: self.version,
            external_data: self.has_data_file(),
        }
    }

    /// Whether refcounts may be wrong.
    pub(crate) fn is_dirty(&self) -> bool {
        self.incompatible & DIRTY != 0
    }

    /// Whether there are bitmaps that are to be kept up to date.
    pub(crate) fn has_bitmaps(&self) -> bool {
        self.autoclear & BITMAPS != 0
    }

    /// Whether the image says that it is broken.
    pub(crate) fn is_corrupt(&self) -> bool {
        self.incompatible & CORRUPT != 0
    }

    /// Whether guest data lies in a file of its own.
    pub(crate) fn has_data_file(&self) -> bool {
        self.incompatible & EXTERNAL_DATA != 0
    }

    /// Whether the external data file reads like the disk.
    pub(crate) fn is_data_file_raw(&self) -> bool {
        self.has_data_file() && self.autoclear & RAW_EXTERNAL_DATA != 0
    }

    /// Whether L2 entries have subclusters.
    pub(crate) fn has_extended_l2(&self) -> bool {
        self.incompatible & EXTENDED_L2 != 0
    }

    /// Whether refcounts may stay behind while the dirty bit is set.
    pub(crate) fn has_lazy_refcounts(&self) -> bool {
        self.compatible & LAZY_REFCOUNTS != 0
    }

    /// How clusters are compressed: 0 deflate, 1 zstd.
    pub(crate) fn compression_type(&self) -> u8 {
        self.beyond.first().copied().unwrap_or(0)
    }

    /// Records how clusters are compressed, with the feature bit that belongs to it.
    pub(crate) fn set_compression_type(&mut self, kind: u8) {
        if self.beyond.is_empty() {
            self.beyond = vec![0; 8];
        }
        self.beyond[0] = kind;
        self.set_incompatible(COMPRESSION_TYPE, kind != 0);
    }

    /// Whether there are fields that only later versions of the format know.
    pub(crate) fn has_unknown_fields(&self) -> bool {
        self.beyond.iter().skip(8).any(|byte| *byte != 0)
    }

    /// Sets or clears incompatible feature bits.
    pub(crate) fn set_incompatible(&mut self, bits: u64, on: bool) {
        self.incompatible = if on { self.incompatible | bits } else { self.incompatible & !bits };
    }

    /// The first sector as it must be before anything in the image changes, where that is another one: without the
    /// autoclear bits of data that we do not keep up to date, and dirty where refcounts may stay behind.
    pub(crate) fn sector_for_changing(&self) -> Option<Vec<u8>> {
        let mut changing = self.clone();
        changing.begin_changing();
        (changing != *self).then(|| changing.sector())
    }

    /// Notes that [`Header::sector_for_changing`] is on disk.
    pub(crate) fn begin_changing(&mut self) {
        self.clear_autoclear();
        if self.has_lazy_refcounts() {
            self.set_incompatible(DIRTY, true);
        }
    }

    /// Notes that the autoclear bits of data that we do not keep up to date are off on disk.
    pub(crate) fn clear_autoclear(&mut self) {
        // Raw data stays raw: clusters of an external file never move. Bitmaps are kept up to date.
        let kept = if self.has_data_file() { RAW_EXTERNAL_DATA } else { 0 };
        let kept = kept | if self.extensions.bitmaps.is_some() { BITMAPS } else { 0 };
        self.autoclear &= kept;
    }

    /// Where the bitmaps are listed, where the image has bitmaps that other programs left in order.
    ///
    /// # Errors
    /// [`Corruption::BitmapField`].
    pub(crate) fn bitmaps(&self) -> Result<Option<BitmapsExtension>, Fault> {
        let data = self.extensions.bitmaps.as_deref();
        let data = data.filter(|_| self.version >= 3 && self.autoclear & BITMAPS != 0);
        data.map(|data| BitmapsExtension::parse(data, HostOffset(0), self.geometry)).transpose()
    }

    /// Records another list of bitmaps, or none.
    pub(crate) fn set_bitmaps(&mut self, to: Option<BitmapsExtension>) {
        let on = if to.is_some() { BITMAPS } else { 0 };
        self.autoclear = self.autoclear & !BITMAPS | on;
        self.extensions.bitmaps = to.map(|extension| extension.encode().to_vec());
    }

    /// Records another place for the refcount table.
    pub(crate) fn move_refcount_table(&mut self, at: HostOffset, clusters: u32) {
        self.refcount_table_at = at;
        self.refcount_table_clusters = u64::from(clusters);
    }

    /// Checks what the header says of a file of `file_bytes` bytes: where tables lie, and that they have no more than
    /// their limits.
    ///
    /// # Errors
    /// [`Fault::Corrupt`] and [`Fault::Unsupported`], with the field's offset.
    pub(crate) fn check(&self, file_bytes: u64) -> Result<(), Fault> {
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
        if self.autoclear & BITMAPS != 0 && self.extensions.bitmaps.is_none() {
            let what = Corruption::BitmapsWithoutExtension;
            return Err(Fault::Corrupt { at: HostOffset(88), what });
        }
        self.bitmaps()?;
        let raw = self.autoclear & RAW_EXTERNAL_DATA != 0;
        if raw && (!self.has_data_file() || self.backing_name.is_some()) {
            return Err(Fault::Corrupt { at: HostOffset(88), what: Corruption::RawData });
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

    /// Refuses features that are not known and combinations that the format forbids.
    fn check_features(&self) -> Result<(), Fault> {
        let known = DIRTY | CORRUPT | EXTERNAL_DATA | COMPRESSION_TYPE | EXTENDED_L2;
        let unknown: Vec<_> = (0..64)
            .filter(|bit| self.incompatible & !known & (1 << bit) != 0)
            .map(|bit| self.extensions.name(bit))
            .collect();
        if !unknown.is_empty() {
            return Err(Fault::Unsupported(Feature::Unknown(unknown.join(", "))));
        }
        if self.refcount_order > 6 {
            return Err(field("refcount_order", u64::from(self.refcount_order), 96));
        }
        if self.crypt_method > CRYPT_LUKS {
            return Err(Fault::Unsupported(Feature::Encryption(self.crypt_method)));
        }
        if self.extensions.luks.is_some() && self.crypt_method != CRYPT_LUKS {
            return Err(field("crypt_method", u64::from(self.crypt_method), 32));
        }
        match (self.incompatible & COMPRESSION_TYPE != 0, self.compression_type()) {
            (false, 0) | (true, 1) => Ok(()),
            (true, kind @ 2..) => Err(Fault::Unsupported(Feature::CompressionType(kind))),
            (_, kind) => Err(field("compression_type", u64::from(kind), 104)),
        }
    }
}

fn version_and_geometry(cluster: &[u8]) -> Result<(u32, ClusterGeometry), Fault> {
    let start = cluster.get(..24).ok_or(truncated("the header"))?;
    if be_u32(start, 0) != MAGIC {
        return Err(Fault::Corrupt { at: HostOffset(0), what: Corruption::NoMagic });
    }
    let version = be_u32(start, 4);
    if version != 2 && version != 3 {
        return Err(Fault::Unsupported(Feature::Version(version)));
    }
    let bits = be_u32(start, 20);
    match ClusterGeometry::new(bits) {
        Some(geometry) => Ok((version, geometry)),
        None if bits > MAX_CLUSTER_BITS && bits < 64 => {
            Err(Fault::Unsupported(Feature::ClusterBits(bits)))
        }
        None => Err(field("cluster_bits", u64::from(bits), 20)),
    }
}

/// The length of the fields: extensions start behind them.
fn header_bytes(fields: &[u8], version: u32, geometry: ClusterGeometry) -> Result<usize, Fault> {
    if version == 2 {
        return Ok(V2_BYTES);
    }
    let bytes = u64::from(be_u32(fields, 100));
    if bytes < FIXED_BYTES as u64 || bytes % 8 != 0 || bytes > geometry.bytes() {
        return Err(field("header_length", bytes, 100));
    }
    Ok(index(bytes))
}

fn backing_name(
    cluster: &[u8],
    header_bytes: usize,
    at: u64,
    len: u64,
) -> Result<Option<Vec<u8>>, Fault> {
    if at == 0 {
        return Ok(None);
    }
    let refused =
        || Fault::Corrupt { at: HostOffset(8), what: Corruption::BackingName { at, len } };
    let end = at.checked_add(len).ok_or_else(refused)?;
    if len > MAX_BACKING_NAME_BYTES as u64 || at < header_bytes as u64 {
        return Err(refused());
    }
    let name = cluster.get(index(at)..index(end)).ok_or_else(refused)?;
    Ok((len > 0).then(|| name.to_vec()))
}

/// A field of a header; 0 behind its end.
fn be_u32(bytes: &[u8], at: usize) -> u32 {
    let field = bytes.get(at..).and_then(|rest| rest.first_chunk());
    field.map_or(0, |field| u32::from_be_bytes(*field))
}

fn be_u64(bytes: &[u8], at: usize) -> u64 {
    let field = bytes.get(at..).and_then(|rest| rest.first_chunk());
    field.map_or(0, |field| u64::from_be_bytes(*field))
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
