//! The snapshot table: what an image says of its internal snapshots, as bytes and as values. What a snapshot refers to
//! is walked elsewhere, and nothing here does I/O.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::error::{Corruption, Fault, Feature, TableKind};
use crate::header::{MAX_L1_BYTES, largest_disk_bytes};
use crate::units::{ClusterGeometry, HostOffset, index};

/// The most internal snapshots of an image: QEMU's limit.
pub const MAX_SNAPSHOTS: u32 = 65536;
/// The longest snapshot table that QEMU opens, in bytes.
pub const MAX_SNAPSHOT_TABLE_BYTES: u64 = 64 << 20;
/// The longest extra data of a snapshot that QEMU opens, in bytes.
pub const MAX_SNAPSHOT_EXTRA_BYTES: u32 = 1024;
/// The longest id or name of a new snapshot, in bytes: what QEMU's tools list without cutting it.
pub const MAX_SNAPSHOT_NAME_BYTES: usize = 255;

/// The fields that every entry begins with, in bytes.
const FIXED_BYTES: usize = 40;
/// The extra data that we know and write: size of the VM state, size of the disk, icount.
const KNOWN_EXTRA_BYTES: usize = 24;
/// What stands for "no icount".
const NO_ICOUNT: u64 = u64::MAX;

/// An internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// What names it uniquely; usually a number. Bytes that are no UTF-8 are replaced.
    pub id: String,
    /// The name that its maker gave it; need not be unique. Bytes that are no UTF-8 are replaced.
    pub name: String,
    /// When it was taken.
    pub taken: SystemTime,
    /// How long the guest had been running then.
    pub vm_clock: Duration,
    /// The size of the virtual machine's state that was saved with it, in bytes; 0 for a snapshot of the disk alone.
    pub vm_state_bytes: u64,
    /// The size of the virtual disk in bytes. Where the table does not tell it, that of the image.
    pub disk_bytes: u64,
    /// The instruction count of record and replay, where it was in use.
    pub icount: Option<u64>,
}

/// An entry of the snapshot table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SnapshotEntry {
    /// Where its L1 table starts.
    pub l1_at: HostOffset,
    /// The entries of its L1 table.
    pub l1_entries: u32,
    pub id: Vec<u8>,
    pub name: Vec<u8>,
    pub date_secs: u32,
    pub date_nanos: u32,
    pub vm_clock_nanos: u64,
    pub vm_state_bytes: u64,
    /// The size of the disk in bytes, where the entry tells it.
    pub disk_bytes: Option<u64>,
    /// The instruction count, where the entry tells one.
    pub icount: Option<u64>,
    /// Extra data behind what is known here, kept byte for byte.
    pub unknown: Vec<u8>,
}

/// What [`decode`] makes of the bytes that it was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Decoded {
    /// All entries, and the length of the table in bytes without padding behind it.
    Table { entries: Vec<SnapshotEntry>, len: u64 },
    /// The table goes on: at least so many bytes from its start are needed.
    Needs(u64),
}

/// Reads a table of `count` entries that starts at `at` in the file.
///
/// `bytes` may end anywhere; the caller comes back with more. Never asks for more than the limit of the table.
///
/// # Errors
/// [`Corruption::SnapshotField`], [`Corruption::SnapshotText`], and [`Feature::TableTooLarge`] for a table above
/// [`MAX_SNAPSHOT_TABLE_BYTES`].
///
/// Source: qcow2 specification, "Snapshots".
pub(crate) fn decode(bytes: &[u8], count: u32, at: HostOffset) -> Result<Decoded, Fault> {
    let mut entries = Vec::new();
    let mut end = 0usize;
    for number in 0..count.min(MAX_SNAPSHOTS) {
        let start = end.next_multiple_of(8);
        let place = HostOffset(at.0.saturating_add(start as u64));
        let Some(fields) = bytes.get(start..start + FIXED_BYTES) else {
            check_len(start + FIXED_BYTES)?;
            return Ok(Decoded::Needs((start + FIXED_BYTES) as u64));
        };
        let lens = Lens::decode(fields, number, place)?;
        end = start + FIXED_BYTES + lens.variable();
        check_len(end)?;
        let Some(variable) = bytes.get(start + FIXED_BYTES..end) else {
            return Ok(Decoded::Needs(end as u64));
        };
        let entry = SnapshotEntry::decode(fields, variable, lens);
        for (what, text) in [("id", &entry.id), ("name", &entry.name)] {
            if text.contains(&0) {
                let what = Corruption::SnapshotText { entry: number, what };
                return Err(Fault::Corrupt { at: place, what });
            }
        }
        entries.push(entry);
    }
    Ok(Decoded::Table { entries, len: end as u64 })
}

/// What can be read of a table that breaks the format: its entries up to the first that does not end in `bytes`, and
/// up to the limits. Extra data above its limit is cut, and so are texts at a NUL, as QEMU does. And the length of what was read, in bytes.
pub(crate) fn salvage(bytes: &[u8], count: u32) -> (Vec<SnapshotEntry>, u64) {
    let mut entries = Vec::new();
    let (mut end, mut len, mut whole) = (0usize, 0usize, 0);
    for _ in 0..count.min(MAX_SNAPSHOTS) {
        let start = end.next_multiple_of(8);
        let Some(fields) = bytes.get(start..start.saturating_add(FIXED_BYTES)) else { break };
        let (at, extra) = (start + FIXED_BYTES, index(u64::from(be_u32(fields, 36))));
        let id_len = usize::from(be_u16(fields, 12));
        let text_len = id_len + usize::from(be_u16(fields, 14));
        let Some(text_at) = at.checked_add(extra) else { break };
        end = text_at.saturating_add(text_len);
        let Some(texts) = bytes.get(text_at..end) else { break };
        let kept = extra.min(index(u64::from(MAX_SNAPSHOT_EXTRA_BYTES)));
        let variable = [bytes.get(at..at + kept).unwrap_or_default(), texts].concat();
        let lens = Lens { extra: kept, id: id_len, name: text_len - id_len };
        let mut entry = SnapshotEntry::decode(fields, &variable, lens);
        for text in [&mut entry.id, &mut entry.name] {
            let nul = text.iter().position(|byte| *byte == 0).unwrap_or(text.len());
            text.truncate(nul);
        }
        len = len.next_multiple_of(8) + FIXED_BYTES + KNOWN_EXTRA_BYTES + kept + text_len;
        if check_len(len).is_err() {
            break;
        }
        entries.push(entry);
        whole = end as u64;
    }
    (entries, whole)
}

/// The bytes of a table.
///
/// # Errors
/// [`Feature::TableTooLarge`] above [`MAX_SNAPSHOT_TABLE_BYTES`], [`Feature::TooManySnapshots`].
pub(crate) fn encode(entries: &[SnapshotEntry]) -> Result<Vec<u8>, Fault> {
    if entries.len() > index(u64::from(MAX_SNAPSHOTS)) {
        return Err(Fault::Unsupported(Feature::TooManySnapshots { limit: MAX_SNAPSHOTS }));
    }
    let mut bytes = Vec::new();
    for entry in entries {
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        entry.encode(&mut bytes)?;
        check_len(bytes.len())?;
    }
    Ok(bytes)
}

/// The position of the snapshot that `wanted` names: by id first, then by name.
pub(crate) fn find(entries: &[SnapshotEntry], wanted: &str) -> Option<usize> {
    let by_id = entries.iter().position(|entry| entry.id == wanted.as_bytes());
    by_id.or_else(|| find_named(entries, wanted))
}

/// The position of the oldest snapshot of a name.
pub(crate) fn find_named(entries: &[SnapshotEntry], name: &str) -> Option<usize> {
    entries.iter().position(|entry| entry.name == name.as_bytes())
}

/// An id that no snapshot has: one above the highest number.
pub(crate) fn new_id(entries: &[SnapshotEntry]) -> Vec<u8> {
    let highest = entries.iter().map(|entry| leading_number(&entry.id)).max().unwrap_or(0);
    // No id that a program made comes near the end; one by hand may, and then any free number will do.
    let mut id = highest.checked_add(1).unwrap_or(1);
    while entries.iter().any(|entry| entry.id == id.to_string().as_bytes()) {
        id += 1;
    }
    id.to_string().into_bytes()
}

/// The lengths of the parts of an entry that vary, in bytes.
#[derive(Clone, Copy)]
struct Lens {
    extra: usize,
    id: usize,
    name: usize,
}

impl Lens {
    fn decode(fields: &[u8], entry: u32, at: HostOffset) -> Result<Self, Fault> {
        let extra = be_u32(fields, 36);
        if extra > MAX_SNAPSHOT_EXTRA_BYTES {
            let field = "extra_data_size";
            let what = Corruption::SnapshotField { entry, field, value: u64::from(extra) };
            return Err(Fault::Corrupt { at: HostOffset(at.0.saturating_add(36)), what });
        }
        Ok(Self {
            extra: index(u64::from(extra)),
            id: usize::from(be_u16(fields, 12)),
            name: usize::from(be_u16(fields, 14)),
        })
    }

    const fn variable(self) -> usize {
        self.extra + self.id + self.name
    }
}

impl SnapshotEntry {
    /// `fields` and `variable` have the lengths that they must.
    fn decode(fields: &[u8], variable: &[u8], lens: Lens) -> Self {
        let (extra, text) = variable.split_at(lens.extra.min(variable.len()));
        let (id, name) = text.split_at(lens.id.min(text.len()));
        let told = |at: usize| (extra.len() >= at + 8).then(|| be_u64(extra, at));
        Self {
            l1_at: HostOffset(be_u64(fields, 0)),
            l1_entries: be_u32(fields, 8),
            id: id.to_vec(),
            name: name.to_vec(),
            date_secs: be_u32(fields, 16),
            date_nanos: be_u32(fields, 20),
            vm_clock_nanos: be_u64(fields, 24),
            vm_state_bytes: told(0).unwrap_or_else(|| u64::from(be_u32(fields, 32))),
            disk_bytes: told(8),
            icount: told(16).filter(|icount| *icount != NO_ICOUNT),
            unknown: extra.get(KNOWN_EXTRA_BYTES..).unwrap_or_default().to_vec(),
        }
    }

    /// Every entry gets the extra data of version 3, as QEMU writes it in both versions. An entry that does not tell
    /// the size of its disk keeps telling no size only where nothing stands behind it, so callers give it one before.
    fn encode(&self, bytes: &mut Vec<u8>) -> Result<(), Fault> {
        let too_long = || Fault::Unsupported(Feature::SnapshotNameTooLong { limit: 65535 });
        let id_len = u16::try_from(self.id.len()).map_err(|_| too_long())?;
        let name_len = u16::try_from(self.name.len()).map_err(|_| too_long())?;
        let extra_len = u32::try_from(KNOWN_EXTRA_BYTES + self.unknown.len()).unwrap_or(u32::MAX);
        bytes.extend_from_slice(&self.l1_at.0.to_be_bytes());
        bytes.extend_from_slice(&self.l1_entries.to_be_bytes());
        bytes.extend_from_slice(&id_len.to_be_bytes());
        bytes.extend_from_slice(&name_len.to_be_bytes());
        bytes.extend_from_slice(&self.date_secs.to_be_bytes());
        bytes.extend_from_slice(&self.date_nanos.to_be_bytes());
        bytes.extend_from_slice(&self.vm_clock_nanos.to_be_bytes());
        // Who knows 32 bits only must see no state rather than a part of one.
        let short_state = u32::try_from(self.vm_state_bytes).unwrap_or(0);
        bytes.extend_from_slice(&short_state.to_be_bytes());
        bytes.extend_from_slice(&extra_len.to_be_bytes());
        bytes.extend_from_slice(&self.vm_state_bytes.to_be_bytes());
        bytes.extend_from_slice(&self.disk_bytes.unwrap_or(0).to_be_bytes());
        bytes.extend_from_slice(&self.icount.unwrap_or(NO_ICOUNT).to_be_bytes());
        bytes.extend_from_slice(&self.unknown);
        bytes.extend_from_slice(&self.id);
        bytes.extend_from_slice(&self.name);
        Ok(())
    }

    /// Checks that its disk has a possible size, and its L1 table a size and a place that a table can have in a file of
    /// `file_bytes` bytes.
    ///
    /// # Errors
    /// [`Corruption::TablePlace`] and [`Corruption::SnapshotDisk`] at the L1 table's place,
    /// [`Feature::TableTooLarge`].
    pub(crate) fn check(&self, geometry: ClusterGeometry, file_bytes: u64) -> Result<(), Fault> {
        let table = TableKind::SnapshotL1;
        let limit_bytes = largest_disk_bytes(geometry);
        if let Some(bytes) = self.disk_bytes.filter(|bytes| *bytes > limit_bytes) {
            let what = Corruption::SnapshotDisk { bytes, limit_bytes };
            return Err(Fault::Corrupt { at: self.l1_at, what });
        }
        let bytes = u64::from(self.l1_entries) * 8;
        if bytes > MAX_L1_BYTES {
            let limit = MAX_L1_BYTES;
            return Err(Fault::Unsupported(Feature::TableTooLarge { table, bytes, limit }));
        }
        if bytes == 0 {
            return Ok(());
        }
        let file_end = geometry.clusters(file_bytes).saturating_mul(geometry.bytes());
        let inside = self.l1_at.0.checked_add(bytes).is_some_and(|end| end <= file_end);
        if self.l1_at.0 == 0 || !geometry.is_aligned(self.l1_at.0) || !inside {
            let what = Corruption::TablePlace { table, value: self.l1_at.0 };
            return Err(Fault::Corrupt { at: self.l1_at, what });
        }
        Ok(())
    }

    /// The entry for people and programs; `disk_bytes` is the size of the image's disk.
    pub(crate) fn describe(&self, disk_bytes: u64) -> Snapshot {
        let since = Duration::from_secs(u64::from(self.date_secs))
            + Duration::from_nanos(u64::from(self.date_nanos));
        Snapshot {
            id: String::from_utf8_lossy(&self.id).into_owned(),
            name: String::from_utf8_lossy(&self.name).into_owned(),
            taken: UNIX_EPOCH + since,
            vm_clock: Duration::from_nanos(self.vm_clock_nanos),
            vm_state_bytes: self.vm_state_bytes,
            disk_bytes: self.disk_bytes.unwrap_or(disk_bytes),
            icount: self.icount,
        }
    }
}

/// The number that an id starts with; 0 where it starts with none.
fn leading_number(id: &[u8]) -> u64 {
    let digits = id.iter().take_while(|byte| byte.is_ascii_digit());
    digits.fold(0u64, |number, digit| {
        number.saturating_mul(10).saturating_add(u64::from(digit - b'0'))
    })
}

fn check_len(bytes: usize) -> Result<(), Fault> {
    let (bytes, limit) = (bytes as u64, MAX_SNAPSHOT_TABLE_BYTES);
    if bytes > limit {
        let table = TableKind::Snapshots;
        return Err(Fault::Unsupported(Feature::TableTooLarge { table, bytes, limit }));
    }
    Ok(())
}

fn be_u16(bytes: &[u8], at: usize) -> u16 {
    let field = bytes.get(at..).and_then(|rest| rest.first_chunk());
    field.map_or(0, |field| u16::from_be_bytes(*field))
}

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

    fn entry(id: &str, name: &str) -> SnapshotEntry {
        SnapshotEntry {
            l1_at: HostOffset(0x50000),
            l1_entries: 3,
            id: id.into(),
            name: name.into(),
            date_secs: 1_700_000_000,
            date_nanos: 5,
            vm_clock_nanos: 7,
            vm_state_bytes: 0,
            disk_bytes: Some(1 << 30),
            icount: None,
            unknown: Vec::new(),
        }
    }

    fn table(bytes: &[u8], count: u32) -> Vec<SnapshotEntry> {
        match decode(bytes, count, HostOffset(0)).unwrap() {
            Decoded::Table { entries, .. } => entries,
            Decoded::Needs(more) => panic!("needs {more} bytes"),
        }
    }

    #[test]
    fn an_entry_of_version_2_has_no_extra_data() {
        let mut bytes = encode(&[entry("1", "one")]).unwrap();
        bytes.drain(40..64);
        bytes[32..40].copy_from_slice(&[0, 0, 0, 9, 0, 0, 0, 0]);
        let [read] = table(&bytes, 1).try_into().unwrap();
        assert_eq!((read.vm_state_bytes, read.disk_bytes), (9, None));
        assert_eq!(read.describe(512).disk_bytes, 512);
    }

    #[test]
    fn an_id_or_name_with_a_nul_and_too_much_extra_data_are_corruption() {
        let bytes = encode(&[entry("1", "a"), entry("2", "b\0c")]).unwrap();
        let fault = decode(&bytes, 2, HostOffset(0x1000)).unwrap_err();
        let what = Corruption::SnapshotText { entry: 1, what: "name" };
        assert_eq!(fault, Fault::Corrupt { at: HostOffset(0x1000 + 72), what });
        let mut bytes = encode(&[entry("1", "a")]).unwrap();
        bytes[36..40].copy_from_slice(&1025u32.to_be_bytes());
        let fault = decode(&bytes, 1, HostOffset(0)).unwrap_err();
        assert!(matches!(fault, Fault::Corrupt { what: Corruption::SnapshotField { .. }, .. }));
    }

    #[test]
    fn a_table_above_its_limit_is_refused_before_it_is_read() {
        let long = SnapshotEntry { name: vec![b'n'; 65535], ..entry("1", "") };
        let bytes = encode(&vec![long.clone(); 1000]).unwrap();
        assert!(encode(&vec![long; 1024]).is_err());
        let mut more = bytes.clone();
        while let Ok(Decoded::Needs(_)) = decode(&more, 65536, HostOffset(0)) {
            more.extend_from_slice(&bytes);
        }
        let limit = MAX_SNAPSHOT_TABLE_BYTES;
        let fault = decode(&more, 65536, HostOffset(0)).unwrap_err();
        assert!(
            matches!(fault, Fault::Unsupported(Feature::TableTooLarge { limit: l, .. }) if l == limit)
        );
    }

    #[test]
    fn new_ids_are_above_all_numbers_and_never_taken() {
        assert_eq!(new_id(&[]), b"1");
        assert_eq!(new_id(&[entry("7", ""), entry("3x", ""), entry("name", "")]), b"8");
        let last = u64::MAX.to_string();
        assert_eq!(new_id(&[entry(&last, ""), entry("1", "")]), b"2");
    }

    #[test]
    fn ids_are_found_before_names() {
        let entries = [entry("1", "2"), entry("2", "b")];
        assert_eq!(find(&entries, "2"), Some(1));
        assert_eq!(find(&entries, "b"), Some(1));
        assert_eq!(find(&entries, "c"), None);
    }

    #[test]
    fn the_place_of_an_l1_table_is_checked() {
        let geometry = ClusterGeometry::of_bytes(65536).unwrap();
        let check = |at, entries| {
            let entry =
                SnapshotEntry { l1_at: HostOffset(at), l1_entries: entries, ..entry("1", "") };
            entry.check(geometry, 0x60000)
        };
        assert_eq!(check(0x50000, 8192), Ok(()));
        assert_eq!(check(0x50000, 0), Ok(()));
        for (at, entries) in [(0, 1), (0x50200, 1), (0x60000, 1), (0x50000, 8193), (!0xffff, 9000)]
        {
            assert!(check(at, entries).is_err(), "{at:#x} {entries}");
        }
        assert!(matches!(check(0x50000, u32::MAX), Err(Fault::Unsupported(_))));
        let entry = SnapshotEntry { disk_bytes: Some(1 << 63), ..entry("1", "") };
        assert!(matches!(entry.check(geometry, 0x60000), Err(Fault::Corrupt { .. })));
    }

    proptest! {
        #[test]
        fn tables_survive_a_round_trip_and_any_cut(
            texts in prop::collection::vec(("[a-z0-9]{0,20}", "[ -~]{0,40}", prop::collection::vec(any::<u8>(), 0..30)), 0..6),
            numbers in any::<(u32, u32, u32, u64, u64, u64)>(),
            cut in any::<prop::sample::Index>(),
        ) {
            let entries: Vec<_> = texts.iter().map(|(id, name, unknown)| SnapshotEntry {
                l1_at: HostOffset(numbers.3),
                l1_entries: numbers.0,
                date_secs: numbers.1,
                date_nanos: numbers.2,
                vm_clock_nanos: numbers.4,
                vm_state_bytes: numbers.5,
                disk_bytes: Some(numbers.3),
                unknown: unknown.clone(),
                ..entry(id, name)
            }).collect();
            let bytes = encode(&entries).unwrap();
            let count = u32::try_from(entries.len()).unwrap();
            let len = bytes.len() as u64;
            let read = decode(&bytes, count, HostOffset(0));
            prop_assert_eq!(read, Ok(Decoded::Table { entries, len }));
            if !bytes.is_empty() {
                let cut = cut.index(bytes.len());
                match decode(&bytes[..cut], count, HostOffset(0)) {
                    Ok(Decoded::Needs(more)) => prop_assert!(more > cut as u64 && more <= len),
                    other => prop_assert!(false, "{:?}", other),
                }
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400), count in 0u32..9) {
            let _any = decode(&bytes, count, HostOffset(u64::MAX - 8));
        }
    }
}
