//! Where the partitions of a disk lie: MBR with logical partitions, and GPT. Pure but for the sectors that `find` reads;
//! what is in a partition is not looked at.

use std::collections::HashSet;

use block::{BlockDevice, ByteRange, DeviceError};

/// The sizes that sectors of disks have, in bytes, as GPT counts in them.
const SECTOR_BYTES: [u64; 2] = [512, 4096];
/// What an MBR counts in, in bytes.
const MBR_SECTOR_BYTES: u64 = 512;
/// The first logical partition.
const FIRST_LOGICAL: u32 = 5;
/// The most logical partitions that are followed.
const MAX_LOGICAL: u32 = 128;
/// The longest table of a GPT that is read, in bytes. The usual one has 16 KiB.
const MAX_TABLE_BYTES: u64 = 1 << 20;

/// Why a partition is not found.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PartitionError {
    /// Neither an MBR nor a GPT is there.
    #[error("the disk has no partition table")]
    NoTable,
    /// The MBR says that a GPT follows, and neither copy of it is whole.
    #[error("both copies of the GPT are broken")]
    BrokenGpt,
    /// The table has no such partition.
    #[error("the disk has no partition {0}")]
    Missing(u32),
    /// The partition is there to hold logical ones, counted from 5 on, and is no disk.
    #[error("partition {0} is an extended one, which only holds those from 5 on")]
    Extended(u32),
    /// The partition, or what leads to it, lies outside of the disk.
    #[error(
        "partition {number} lies at {start}, {len} bytes long, on a disk of {size_bytes} bytes"
    )]
    Outside {
        /// Which.
        number: u32,
        /// Where it begins, in bytes.
        start: u64,
        /// Its length in bytes.
        len: u64,
        /// The size of the disk.
        size_bytes: u64,
    },
    /// The chain of logical partitions comes back to a record that it has passed.
    #[error(
        "the chain of logical partitions comes back to the record at {at}, which it has passed"
    )]
    Ring {
        /// Where, in bytes.
        at: u64,
    },
    /// The table cannot be read.
    #[error("cannot read the partition table: {0}")]
    Read(#[from] DeviceError),
}

/// Finds a partition, counted from 1; logical ones of an MBR from 5.
///
/// # Errors
/// [`PartitionError`].
pub async fn find(device: &dyn BlockDevice, number: u32) -> Result<ByteRange, PartitionError> {
    let sector = read(device, 0, MBR_SECTOR_BYTES).await?.ok_or(PartitionError::NoTable)?;
    let entries = mbr(&sector).ok_or(PartitionError::NoTable)?;
    if entries.iter().any(|entry| entry.kind == PROTECTIVE) {
        return gpt(device, number).await;
    }
    let entry = match number.checked_sub(1).and_then(|index| usize::try_from(index).ok()) {
        Some(index @ 0..4) => entries.get(index).copied().filter(|entry| !entry.is_empty()),
        Some(_) => match entries.iter().find(|entry| entry.is_extended()) {
            Some(extended) => logical(device, number, extended.start()).await?,
            None => None,
        },
        None => None,
    };
    let entry = entry.ok_or(PartitionError::Missing(number))?;
    if entry.is_extended() {
        return Err(PartitionError::Extended(number));
    }
    inside(device, number, entry.start(), entry.len())
}

/// The range of a partition that lies on the device.
fn inside(
    device: &dyn BlockDevice,
    number: u32,
    start: u64,
    len: u64,
) -> Result<ByteRange, PartitionError> {
    let size_bytes = device.limits().size_bytes;
    let range = ByteRange::new(start, len).filter(|range| range.end() <= size_bytes);
    range.ok_or(PartitionError::Outside { number, start, len, size_bytes })
}

/// Reads bytes; `None` where the device ends before them.
async fn read(device: &dyn BlockDevice, at: u64, len: u64) -> Result<Option<Vec<u8>>, DeviceError> {
    match ByteRange::new(at, len).filter(|range| range.end() <= device.limits().size_bytes) {
        Some(range) => Ok(Some(device.read(range).await?.to_vec())),
        None => Ok(None),
    }
}

/// The type of the entry that keeps old programs off a disk with a GPT.
const PROTECTIVE: u8 = 0xee;

/// An entry of an MBR, in sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct MbrEntry {
    kind: u8,
    first: u32,
    count: u32,
}

impl MbrEntry {
    fn is_empty(self) -> bool {
        self.kind == 0 || self.count == 0
    }

    fn is_extended(self) -> bool {
        matches!(self.kind, 0x05 | 0x0f | 0x85) && !self.is_empty()
    }

    fn start(self) -> u64 {
        u64::from(self.first) * MBR_SECTOR_BYTES
    }

    fn len(self) -> u64 {
        u64::from(self.count) * MBR_SECTOR_BYTES
    }
}

/// The four entries of a boot record; `None` where it is none.
fn mbr(sector: &[u8]) -> Option<[MbrEntry; 4]> {
    if sector.get(510..512)? != [0x55, 0xaa] {
        return None;
    }
    let mut entries = [MbrEntry { kind: 0, first: 0, count: 0 }; 4];
    for (entry, raw) in entries.iter_mut().zip(sector.get(446..510)?.chunks_exact(16)) {
        *entry = MbrEntry { kind: *raw.get(4)?, first: u32_at(raw, 8)?, count: u32_at(raw, 12)? };
    }
    Some(entries)
}

/// Follows the chain of logical partitions that begins at `base`.
async fn logical(
    device: &dyn BlockDevice,
    number: u32,
    base: u64,
) -> Result<Option<MbrEntry>, PartitionError> {
    let mut at = base;
    // Not where they lie tells a ring: records need not stand in the order of the disk.
    let mut passed = HashSet::new();
    for current in FIRST_LOGICAL..FIRST_LOGICAL + MAX_LOGICAL {
        let Some(sector) = read(device, at, MBR_SECTOR_BYTES).await? else { return Ok(None) };
        if !passed.insert(at) {
            return Err(PartitionError::Ring { at });
        }
        let Some([entry, next, ..]) = mbr(&sector) else { return Ok(None) };
        if current == number {
            // Counted from the record that tells of it.
            let first = u64::from(entry.first) + at / MBR_SECTOR_BYTES;
            let first = u32::try_from(first).map_err(|_| PartitionError::Missing(number))?;
            return Ok(Some(MbrEntry { first, ..entry }).filter(|entry| !entry.is_empty()));
        }
        if !next.is_extended() {
            return Ok(None);
        }
        at = base + next.start();
    }
    Ok(None)
}

/// What the header of a GPT says of its table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct GptHeader {
    table_at: u64,
    count: u32,
    entry_bytes: u32,
    table_crc: u32,
}

/// Finds a partition of a GPT, by its copy at the beginning or else that at the end.
///
/// Source: UEFI specification, "GUID Partition Table (GPT) Disk Layout".
async fn gpt(device: &dyn BlockDevice, number: u32) -> Result<ByteRange, PartitionError> {
    let size_bytes = device.limits().size_bytes;
    for sector_bytes in SECTOR_BYTES {
        let last = (size_bytes / sector_bytes).saturating_sub(1);
        for at in [1, last] {
            let place = at.saturating_mul(sector_bytes);
            let Some(sector) = read(device, place, sector_bytes).await? else { continue };
            let Some(header) = gpt_header(&sector, at, sector_bytes) else { continue };
            let len = u64::from(header.count) * u64::from(header.entry_bytes);
            if len > MAX_TABLE_BYTES {
                continue;
            }
            let Some(table) = read(device, header.table_at, len).await? else { continue };
            if crc32(&table) != header.table_crc {
                continue;
            }
            let (start, len) = gpt_entry(&table, &header, number, sector_bytes)
                .ok_or(PartitionError::Missing(number))?;
            return inside(device, number, start, len);
        }
    }
    Err(PartitionError::BrokenGpt)
}

/// The header in a sector, where it is whole and says that it lies there.
fn gpt_header(sector: &[u8], at: u64, sector_bytes: u64) -> Option<GptHeader> {
    if sector.get(..8)? != b"EFI PART" {
        return None;
    }
    let header_bytes = usize::try_from(u32_at(sector, 12)?).ok()?;
    if header_bytes < 92 {
        return None;
    }
    let mut header = sector.get(..header_bytes)?.to_vec();
    header.get_mut(16..20)?.fill(0);
    if crc32(&header) != u32_at(sector, 16)? || u64_at(sector, 24)? != at {
        return None;
    }
    let entry_bytes = u32_at(sector, 84)?;
    let count = u32_at(sector, 80)?;
    let table_at = u64_at(sector, 72)?.checked_mul(sector_bytes)?;
    let table_crc = u32_at(sector, 88)?;
    (entry_bytes >= 128).then_some(GptHeader { table_at, count, entry_bytes, table_crc })
}

/// Begin and length of a partition, in bytes.
fn gpt_entry(
    table: &[u8],
    header: &GptHeader,
    number: u32,
    sector_bytes: u64,
) -> Option<(u64, u64)> {
    let index = usize::try_from(number.checked_sub(1)?).ok()?;
    let entry = table.chunks_exact(usize::try_from(header.entry_bytes).ok()?).nth(index)?;
    if entry.get(..16)?.iter().all(|byte| *byte == 0) {
        return None;
    }
    let (first, last) = (u64_at(entry, 32)?, u64_at(entry, 40)?);
    let sectors = last.checked_sub(first)?.checked_add(1)?;
    Some((first.checked_mul(sector_bytes)?, sectors.checked_mul(sector_bytes)?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

/// The CRC-32 of Ethernet, by which a GPT knows whether it is whole. Tables are small, and read when an export is opened.
fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, byte: &u8| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            crc >> 1 ^ if crc & 1 == 1 { 0xedb8_8320 } else { 0 }
        })
    };
    !bytes.iter().fold(u32::MAX, step)
}

#[cfg(test)]
mod tests {
    use super::*;
    use block::MemoryDevice;
    use proptest::prelude::*;

    fn entry(disk: &mut [u8], record: usize, index: usize, kind: u8, first: u32, count: u32) {
        let at = record * 512 + 446 + index * 16;
        disk[at + 4] = kind;
        disk[at + 8..at + 12].copy_from_slice(&first.to_le_bytes());
        disk[at + 12..at + 16].copy_from_slice(&count.to_le_bytes());
        disk[record * 512 + 510..record * 512 + 512].copy_from_slice(&[0x55, 0xaa]);
    }

    async fn found(disk: &[u8], number: u32) -> Result<(u64, u64), String> {
        let device = MemoryDevice::read_only(disk.to_vec());
        let range = find(&*device, number).await.map_err(|error| error.to_string())?;
        Ok((range.start() / 512, range.len() / 512))
    }

    #[tokio::test]
    async fn primary_and_logical_partitions_of_an_mbr_are_found() {
        let mut disk = vec![0; 1000 * 512];
        entry(&mut disk, 0, 0, 0x83, 10, 20);
        entry(&mut disk, 0, 1, 0x05, 100, 800);
        entry(&mut disk, 0, 3, 0x83, 950, 51);
        entry(&mut disk, 100, 0, 0x83, 5, 50);
        entry(&mut disk, 100, 1, 0x05, 200, 100);
        entry(&mut disk, 300, 0, 0x83, 7, 40);
        // A ring.
        entry(&mut disk, 300, 1, 0x05, 0, 100);
        assert_eq!(found(&disk, 1).await, Ok((10, 20)));
        assert_eq!(found(&disk, 5).await, Ok((105, 50)));
        assert_eq!(found(&disk, 6).await, Ok((307, 40)));
        for (number, why) in [
            (0, "no partition 0"),
            (2, "an extended one"),
            (3, "no partition 3"),
            (4, "lies at"),
            (7, "comes back to the record at 51200,"),
            (4000, "comes back"),
        ] {
            assert!(found(&disk, number).await.unwrap_err().contains(why), "{number}");
        }
        assert!(found(&[0; 5000], 1).await.unwrap_err().contains("no partition table"));
        assert!(found(&[0; 50], 1).await.unwrap_err().contains("no partition table"));
    }

    #[tokio::test]
    async fn records_of_logical_partitions_that_lie_in_any_order_are_followed_to_their_end() {
        let mut disk = vec![0; 1000 * 512];
        entry(&mut disk, 0, 0, 0x05, 100, 800);
        for (record, next) in [(100, Some(400)), (500, Some(100)), (200, None)] {
            entry(&mut disk, record, 0, 0x83, 1, 50);
            if let Some(next) = next {
                entry(&mut disk, record, 1, 0x05, next, 51);
            }
        }
        for (number, start) in [(5, 101), (6, 501), (7, 201)] {
            assert_eq!(found(&disk, number).await, Ok((start, 50)));
        }
        assert!(found(&disk, 8).await.unwrap_err().contains("no partition 8"));
        // A record that names itself.
        entry(&mut disk, 200, 1, 0x05, 100, 51);
        assert!(found(&disk, 8).await.unwrap_err().contains("comes back"));
    }

    /// A GPT with one partition from sector 40 to 59, in both copies.
    fn gpt_disk(sector: usize) -> Vec<u8> {
        let mut disk = vec![0; 100 * sector];
        entry(&mut disk, 0, 0, 0xee, 1, 99);
        let mut table = vec![0; 512];
        table[128..144].fill(9);
        table[160..168].copy_from_slice(&40_u64.to_le_bytes());
        table[168..176].copy_from_slice(&59_u64.to_le_bytes());
        for (at, table_at) in [(1_u64, 2_u64), (99, 90)] {
            let mut header = vec![0; 92];
            header[..8].copy_from_slice(b"EFI PART");
            header[12..16].copy_from_slice(&92_u32.to_le_bytes());
            header[24..32].copy_from_slice(&at.to_le_bytes());
            header[72..80].copy_from_slice(&table_at.to_le_bytes());
            header[80..84].copy_from_slice(&4_u32.to_le_bytes());
            header[84..88].copy_from_slice(&128_u32.to_le_bytes());
            header[88..92].copy_from_slice(&crc32(&table).to_le_bytes());
            let crc = crc32(&header);
            header[16..20].copy_from_slice(&crc.to_le_bytes());
            let place = |sectors: u64| usize::try_from(sectors).unwrap() * sector;
            disk[place(at)..place(at) + 92].copy_from_slice(&header);
            disk[place(table_at)..place(table_at) + 512].copy_from_slice(&table);
        }
        disk
    }

    #[tokio::test]
    async fn a_gpt_is_read_by_either_copy_and_in_either_sector_size() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
        for sector in [512, 4096] {
            let unit = u64::try_from(sector / 512).unwrap();
            let mut disk = gpt_disk(sector);
            assert_eq!(found(&disk, 2).await, Ok((40 * unit, 20 * unit)));
            assert!(found(&disk, 1).await.unwrap_err().contains("no partition 1"));
            assert!(found(&disk, 5).await.unwrap_err().contains("no partition 5"));
            disk[2 * sector + 130] ^= 1;
            assert_eq!(found(&disk, 2).await, Ok((40 * unit, 20 * unit)));
            disk[99 * sector + 40] ^= 1;
            assert!(found(&disk, 2).await.unwrap_err().contains("both copies"));
        }
    }

    proptest! {
        #[test]
        fn no_table_panics_or_leaves_the_disk(
            flips in proptest::collection::vec((0_usize..20_000, any::<u8>()), 0..40),
            number in 0_u32..9,
            is_gpt in any::<bool>(),
        ) {
            let mut disk = gpt_disk(512);
            if !is_gpt {
                entry(&mut disk, 0, 0, 0x05, 20, 50);
                entry(&mut disk, 20, 0, 0x83, 1, 10);
            }
            let len = disk.len();
            for (at, value) in flips {
                disk[at % len] = value;
            }
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let device = MemoryDevice::read_only(disk);
            if let Ok(range) = runtime.block_on(find(&*device, number)) {
                prop_assert!(range.end() <= device.limits().size_bytes);
            }
        }
    }
}
