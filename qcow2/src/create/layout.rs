//! Where everything goes in a new image: header, refcount table, refcount blocks, L1 table, LUKS header, L2 tables and
//! data in this order. It makes the bytes of any piece of it; writing them is the driver's.

use block::ByteRange;

use super::options::{CreateOptions, Preallocation, Version};
use crate::entry::{Cluster, Hosted, L1Entry, L2Entry};
use crate::error::InvalidOption;
use crate::header::{
    CRYPT_LUKS, EXTENDED_L2, EXTERNAL_DATA, Header, LAZY_REFCOUNTS, LuksPointer,
    MAX_REFCOUNT_TABLE_BYTES, RAW_EXTERNAL_DATA,
};
use crate::refcount::{RefcountWidth, big_endian};
use crate::units::{ClusterGeometry, HostCluster, HostOffset, Run, index};

/// A new image.
pub(super) struct Layout {
    pub geometry: ClusterGeometry,
    pub header: Header,
    pub header_bytes: Vec<u8>,
    pub preallocation: Preallocation,
    width: RefcountWidth,
    table_clusters: u64,
    blocks: u64,
    l1_clusters: u64,
    luks_bytes: Vec<u8>,
    luks_clusters: u64,
    tables: u64,
    /// The clusters of the disk that are mapped.
    mapped: u64,
    /// What is mapped reads as zeros by its entries, because its bytes would be decrypted.
    zero_entries: bool,
}

impl Layout {
    pub(super) fn new(options: &CreateOptions, luks_bytes: Vec<u8>) -> Result<Self, InvalidOption> {
        let geometry = options.geometry()?;
        let bits = options.refcount_bits;
        let width =
            RefcountWidth::new(bits.trailing_zeros()).ok_or(InvalidOption::RefcountBits(bits))?;
        let preallocation = options.preallocated();
        let l1_entries = geometry.l1_entries(options.size_bytes);
        let mapped = match preallocation {
            Preallocation::Off => 0,
            _ => geometry.clusters(options.size_bytes),
        };
        let mut layout = Self {
            geometry,
            header: Header::new(geometry, options.size_bytes),
            header_bytes: Vec::new(),
            preallocation,
            width,
            table_clusters: 1,
            blocks: 1,
            l1_clusters: geometry.clusters(l1_entries * 8),
            luks_clusters: geometry.clusters(luks_bytes.len() as u64),
            luks_bytes,
            tables: mapped.div_ceil(geometry.l2_entries()),
            mapped,
            zero_entries: options.encryption.is_some(),
        };
        let has_data_file = options.data_file.is_some();
        layout.count_refcounts(has_data_file)?;
        layout.header.l1_entries = l1_entries;
        layout.fill_header(options)?;
        Ok(layout)
    }

    /// Finds how many refcount blocks, and clusters of refcount table, count everything and themselves.
    fn count_refcounts(&mut self, has_data_file: bool) -> Result<(), InvalidOption> {
        let per_block = self.width.per_block(self.geometry);
        let data = if has_data_file { 0 } else { self.mapped };
        let others = 1 + self.l1_clusters + self.luks_clusters + self.tables + data;
        loop {
            let used = others + self.table_clusters + self.blocks;
            let table = self.geometry.clusters(self.blocks * 8).max(self.table_clusters);
            let blocks = used.div_ceil(per_block).max(self.blocks);
            if (table, blocks) == (self.table_clusters, self.blocks) {
                break;
            }
            (self.table_clusters, self.blocks) = (table, blocks);
        }
        let bytes = self.table_clusters * self.geometry.bytes();
        if bytes > MAX_REFCOUNT_TABLE_BYTES {
            let limit_bytes = MAX_REFCOUNT_TABLE_BYTES;
            return Err(InvalidOption::RefcountTable { bytes, limit_bytes });
        }
        Ok(())
    }

    fn fill_header(&mut self, options: &CreateOptions) -> Result<(), InvalidOption> {
        let (l1_at, table_at) = (self.l1_table().start(), self.refcount_table().start());
        let luks = self.luks();
        let header = &mut self.header;
        header.version = options.version.number();
        // A disk without bytes has no table: it is nowhere, as in QEMU's images.
        header.l1_at = HostOffset(if header.l1_entries == 0 { 0 } else { l1_at });
        header.refcount_table_at = HostOffset(table_at);
        header.refcount_table_clusters = self.table_clusters;
        header.refcount_order = self.width.order();
        header.set_incompatible(EXTENDED_L2, options.extended_l2);
        header.compatible = if options.lazy_refcounts { LAZY_REFCOUNTS } else { 0 };
        if options.version == Version::V2 {
            header.extensions.feature_names = None;
        } else {
            header.set_compression_type(options.compression.type_byte());
        }
        if let Some(file) = &options.data_file {
            header.set_incompatible(EXTERNAL_DATA, true);
            header.autoclear = if file.raw { RAW_EXTERNAL_DATA } else { 0 };
            header.extensions.data_file = Some(file.path.as_bytes().to_vec());
        }
        if !luks.is_empty() {
            header.crypt_method = CRYPT_LUKS;
            let at = HostOffset(luks.start());
            let bytes = self.luks_bytes.len() as u64;
            header.extensions.luks = Some(LuksPointer { at, bytes });
        }
        if let Some(backing) = &options.backing {
            header.backing_name = Some(backing.path.as_bytes().to_vec());
            header.extensions.backing_format = Some(backing.format.name().as_bytes().to_vec());
        }
        let room = index(self.geometry.bytes()).saturating_sub(header.least_bytes());
        self.header_bytes = header.encode().map_err(|_| match &options.backing {
            Some(name) => InvalidOption::BackingName { len: name.path.len(), limit: room },
            None => InvalidOption::HeaderTooLarge { limit: index(self.geometry.bytes()) },
        })?;
        Ok(())
    }

    /// The clusters of metadata, from the start of the file.
    pub(super) fn metadata_clusters(&self) -> u64 {
        1 + self.table_clusters + self.blocks + self.l1_clusters + self.luks_clusters + self.tables
    }

    /// The clusters of the file that are in use.
    pub(super) fn used_clusters(&self) -> u64 {
        let data = if self.header.has_data_file() { 0 } else { self.mapped };
        self.metadata_clusters() + data
    }

    pub(super) fn refcount_table(&self) -> ByteRange {
        self.range(1, self.table_clusters)
    }

    pub(super) fn refcount_blocks(&self) -> ByteRange {
        self.range(1 + self.table_clusters, self.blocks)
    }

    pub(super) fn l1_table(&self) -> ByteRange {
        self.range(1 + self.table_clusters + self.blocks, self.l1_clusters)
    }

    pub(super) fn luks(&self) -> ByteRange {
        self.range(1 + self.table_clusters + self.blocks + self.l1_clusters, self.luks_clusters)
    }

    pub(super) fn l2_tables(&self) -> ByteRange {
        self.range(self.metadata_clusters() - self.tables, self.tables)
    }

    fn range(&self, start: u64, count: u64) -> ByteRange {
        self.geometry.host_range(Run { start: HostCluster(start), count })
    }

    pub(super) fn refcount_table_piece(&self, piece: ByteRange) -> Vec<u8> {
        let (start, blocks) = (self.refcount_table().start(), self.refcount_blocks());
        table(piece, start, |entry| {
            let at = blocks.start() + entry * self.geometry.bytes();
            if entry < self.blocks { at } else { 0 }
        })
    }

    /// Blocks lie one behind the other, and so do their refcounts.
    pub(super) fn refcount_block_piece(&self, piece: ByteRange) -> Vec<u8> {
        let mut bytes = vec![0; index(piece.len())];
        let per_cluster = self.width.per_block(self.geometry);
        let clusters = |bytes: u64| bytes / self.geometry.bytes() * per_cluster;
        let first = clusters(piece.start() - self.refcount_blocks().start());
        let end = self.used_clusters().min(first + clusters(piece.len()));
        for cluster in first..end {
            self.width.set(&mut bytes, cluster - first, 1);
        }
        bytes
    }

    pub(super) fn l1_piece(&self, piece: ByteRange) -> Vec<u8> {
        let tables = self.l2_tables().start();
        table(piece, self.l1_table().start(), |entry| {
            let at = HostOffset(tables + entry * self.geometry.bytes());
            if entry < self.tables { L1Entry::Table(Hosted::exclusive(at)).encode() } else { 0 }
        })
    }

    pub(super) fn luks_piece(&self, piece: ByteRange) -> Vec<u8> {
        let skip = index(piece.start() - self.luks().start());
        let mut bytes = self.luks_bytes.get(skip..).unwrap_or_default().to_vec();
        bytes.resize(index(piece.len()), 0);
        bytes
    }

    /// Every cluster of the disk has one of the file that nobody has written.
    pub(super) fn l2_piece(&self, piece: ByteRange) -> Vec<u8> {
        let data = match self.header.has_data_file() {
            true => 0,
            false => self.metadata_clusters() * self.geometry.bytes(),
        };
        let format = self.header.entry_format();
        let words = format.words() as u64;
        // Subclusters are left to the first write, so that a backing file shows through; zeros stand where the bytes
        // of the file would be decrypted to something else.
        let zero = if self.zero_entries { format.all() } else { 0 };
        let alloc = if self.zero_entries || self.geometry.is_extended() { 0 } else { format.all() };
        table(piece, self.l2_tables().start(), |word| {
            let cluster = word / words;
            if cluster >= self.mapped {
                return 0;
            }
            let at = HostOffset(data + cluster * self.geometry.bytes());
            let entry = Cluster { host: Some(Hosted::exclusive(at)), alloc, zero };
            let [first, second] = format.encode(L2Entry::Cluster(entry));
            if word % words == 0 { first } else { second }
        })
    }
}

/// A piece of a table of 64-bit words that begins at `start`.
fn table(piece: ByteRange, start: u64, word: impl Fn(u64) -> u64) -> Vec<u8> {
    let first = (piece.start() - start) / 8;
    let words: Vec<u64> = (first..first + piece.len() / 8).map(word).collect();
    big_endian(&words)
}
