//! Writing headers: the bytes of a new one, and the steps that turn one on disk into another so that a power cut finds
//! the old one or the new one. Who performs the steps, and when, is decided elsewhere.

use super::{FIXED_BYTES, Header, MAGIC, V2_BYTES};
use crate::error::{Fault, Feature};
use crate::refcount::MetaWrite;
use crate::units::{HostOffset, SECTOR_BYTES, index};

/// A sector as a length in memory.
const SECTOR: usize = 512;

/// The writes that switch a header: stages in order, with a sync behind each. The last but for the clearing of what
/// nobody reads is one write of the first sector.
pub(crate) type Stages = Vec<Vec<MetaWrite>>;

/// Where the parts of a header lie.
struct Composed {
    bytes: Vec<u8>,
    /// The end of the extensions.
    extensions_end: usize,
}

impl Header {
    /// The bytes of a whole header: fields, extensions, backing name. Feature names are left out where the cluster is
    /// too small for them.
    ///
    /// # Errors
    /// [`Feature::HeaderTooLarge`].
    pub(crate) fn encode(&self) -> Result<Vec<u8>, Fault> {
        let fields_bytes = self.natural_bytes();
        let whole = self.compose(fields_bytes, true, None);
        Ok(whole.or_else(|_| self.compose(fields_bytes, false, None))?.bytes)
    }

    /// The same without feature names and without backing name: how little the header needs.
    pub(crate) fn least_bytes(&self) -> usize {
        let mut bytes = self.fields(self.natural_bytes(), 0);
        self.extensions.push(&mut bytes, false);
        bytes.len()
    }

    /// The first sector with the fields as they are in memory; extensions and backing name as they are on disk.
    pub(crate) fn sector(&self) -> Vec<u8> {
        let mut sector = self.disk.get(..SECTOR).unwrap_or(&self.disk).to_vec();
        sector.resize(SECTOR, 0);
        let fields = self.fields(self.header_bytes, self.backing_at());
        let len = fields.len().min(SECTOR);
        sector[..len].copy_from_slice(&fields[..len]);
        sector
    }

    /// The steps that make `new` of this header, which is the one on disk; `new` is the one on disk afterwards.
    ///
    /// # Errors
    /// [`Feature::HeaderTooLarge`], also where only the room for doing it safely is missing.
    pub(crate) fn rewrite(&self, new: &mut Self) -> Result<Stages, Fault> {
        let same = self.version == new.version
            && self.extensions == new.extensions
            && self.beyond == new.beyond
            && self.backing_name == new.backing_name;
        if same {
            let sector = new.sector();
            new.disk.resize(new.disk.len().max(SECTOR), 0);
            new.disk[..SECTOR].copy_from_slice(&sector);
            return Ok(vec![first_sector(sector)]);
        }
        // Feature names are the first to go, also where they leave too little room for getting there.
        self.steps_to(new, true).or_else(|_| self.steps_to(new, false))
    }

    /// [`Header::rewrite`], with or without feature names in the end.
    fn steps_to(&self, new: &mut Self, names: bool) -> Result<Stages, Fault> {
        let fields_bytes = new.natural_bytes();
        let plain = whole_sectors(new.compose(fields_bytes, names, None)?.bytes);
        let tail_end = plain.len();
        let tail = plain.get(SECTOR..).unwrap_or_default();
        let mut stages = Stages::new();
        if !tail.is_empty() && self.disk.get(SECTOR..tail_end) != Some(tail) {
            // Between the fields of the first sector and extensions further behind there is nothing.
            if tail_end > self.header_bytes.max(SECTOR) && self.disk.len() > SECTOR {
                match self.bridge(new, names, tail_end) {
                    Some(bridge) => stages.extend(bridge),
                    None => return self.leap(new),
                }
            }
            stages.push(vec![MetaWrite { at: HostOffset(SECTOR_BYTES), bytes: tail.to_vec() }]);
        }
        stages.push(first_sector(plain.clone()));
        new.settle(plain, fields_bytes);
        Ok(stages)
    }

    /// A state between the two that needs nothing behind the first sector but a copy of the backing name where neither
    /// has anything: the new header without feature names. `None` where it does not fit.
    fn bridge(&self, new: &Self, names: bool, tail_end: usize) -> Option<Stages> {
        if !names && new.extensions.feature_names.is_some() {
            return None;
        }
        let free = self.disk.len().max(tail_end);
        let between = new.compose(new.natural_bytes(), false, Some(free)).ok()?;
        if between.extensions_end > SECTOR {
            return None;
        }
        let mut stages = Stages::new();
        if let Some(name) = between.bytes.get(free..).filter(|name| !name.is_empty()) {
            let at = HostOffset(free as u64);
            stages.push(vec![MetaWrite { at, bytes: name.to_vec() }]);
        }
        stages.push(first_sector(between.bytes));
        Some(stages)
    }

    /// Many extensions: they go behind all that is in use now, and the length of the fields is what leads to them.
    fn leap(&self, new: &mut Self) -> Result<Stages, Fault> {
        let start = self.disk.len().max(SECTOR);
        let too_large = Fault::Unsupported(Feature::HeaderTooLarge {
            bytes: start as u64,
            limit: new.geometry.bytes(),
        });
        if new.version < 3 {
            return Err(too_large);
        }
        let whole = new.compose(start, true, None).or_else(|_| new.compose(start, false, None))?;
        let whole = whole_sectors(whole.bytes);
        let tail = whole.get(start..).ok_or(too_large)?.to_vec();
        let stages = vec![
            vec![MetaWrite { at: HostOffset(start as u64), bytes: tail }],
            first_sector(whole.clone()),
            vec![MetaWrite { at: HostOffset(SECTOR_BYTES), bytes: vec![0; start - SECTOR] }],
        ];
        new.settle(whole, start);
        Ok(stages)
    }

    fn settle(&mut self, bytes: Vec<u8>, header_bytes: usize) {
        self.header_bytes = header_bytes;
        self.backing_at = index(super::be_u64(&bytes, 8));
        self.disk = bytes;
    }

    /// The length of the fields that this header needs.
    fn natural_bytes(&self) -> usize {
        if self.version < 3 {
            return V2_BYTES;
        }
        let used = self.beyond.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        FIXED_BYTES + used.max(8).next_multiple_of(8)
    }

    fn backing_at(&self) -> u64 {
        if self.backing_name.is_some() { self.backing_at as u64 } else { 0 }
    }

    /// A header whose extensions start at `fields_bytes` and whose backing name starts at `name_at`, or behind them.
    fn compose(
        &self,
        fields_bytes: usize,
        names: bool,
        name_at: Option<usize>,
    ) -> Result<Composed, Fault> {
        let mut bytes = self.fields(fields_bytes, 0);
        self.extensions.push(&mut bytes, names);
        let extensions_end = bytes.len();
        if let Some(name) = &self.backing_name {
            let at = name_at.unwrap_or(extensions_end).max(extensions_end);
            bytes.resize(at, 0);
            bytes.extend_from_slice(name);
            bytes[8..16].copy_from_slice(&(at as u64).to_be_bytes());
        }
        let limit = self.geometry.bytes();
        if bytes.len() as u64 > limit {
            let bytes = bytes.len() as u64;
            return Err(Fault::Unsupported(Feature::HeaderTooLarge { bytes, limit }));
        }
        Ok(Composed { bytes, extensions_end })
    }

    /// The fields, `len` bytes long.
    fn fields(&self, len: usize, backing_at: u64) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(SECTOR);
        let narrow = |value: u64| u32::try_from(value).unwrap_or(u32::MAX).to_be_bytes();
        let name_len = self.backing_name.as_ref().map_or(0, Vec::len) as u64;
        bytes.extend_from_slice(&MAGIC.to_be_bytes());
        bytes.extend_from_slice(&self.version.to_be_bytes());
        bytes.extend_from_slice(&backing_at.to_be_bytes());
        bytes.extend_from_slice(&narrow(name_len));
        bytes.extend_from_slice(&self.geometry.bits().to_be_bytes());
        bytes.extend_from_slice(&self.size_bytes.to_be_bytes());
        bytes.extend_from_slice(&self.crypt_method.to_be_bytes());
        bytes.extend_from_slice(&narrow(self.l1_entries));
        bytes.extend_from_slice(&self.l1_at.0.to_be_bytes());
        bytes.extend_from_slice(&self.refcount_table_at.0.to_be_bytes());
        bytes.extend_from_slice(&narrow(self.refcount_table_clusters));
        bytes.extend_from_slice(&self.snapshots.to_be_bytes());
        bytes.extend_from_slice(&self.snapshots_at.0.to_be_bytes());
        if self.version >= 3 {
            bytes.extend_from_slice(&self.incompatible.to_be_bytes());
            bytes.extend_from_slice(&self.compatible.to_be_bytes());
            bytes.extend_from_slice(&self.autoclear.to_be_bytes());
            bytes.extend_from_slice(&self.refcount_order.to_be_bytes());
            bytes.extend_from_slice(&narrow(len as u64));
            bytes.extend_from_slice(&self.beyond);
        }
        bytes.resize(len, 0);
        bytes
    }
}

/// Padded, so that nothing that was there before stays in a last sector.
fn whole_sectors(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.resize(bytes.len().next_multiple_of(SECTOR), 0);
    bytes
}

fn first_sector(mut bytes: Vec<u8>) -> Vec<MetaWrite> {
    bytes.resize(SECTOR, 0);
    vec![MetaWrite { at: HostOffset(0), bytes }]
}
