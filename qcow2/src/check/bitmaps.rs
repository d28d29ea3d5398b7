//! Repairing bitmaps that keep an image from being written. What they said cannot be found again, so that repairing
//! means that nobody takes them for true any more; the disk is not touched.
//!
//! A directory that cannot be understood goes with all bitmaps in it, because only it tells where they are. A bitmap
//! whose table breaks the format becomes inconsistent: it can be removed, and the others stay.

use block::{ByteRange, HostFile};

use crate::bitmap::codec::{
    BitmapCluster, BitmapsExtension, DirectoryEntry, encode_directory, parse_directory,
};
use crate::check::compare::write_sectors;
use crate::check::report::CheckReport;
use crate::error::{Corruption, Error, Fault, TableKind};
use crate::header::Header;
use crate::mapping::from_big_endian;
use crate::switch::switch_header;
use crate::tally::{EntryPlace, Finding};
use crate::units::{HostOffset, SECTOR_BYTES};

/// Tables are read in pieces of so many bytes.
const PIECE_BYTES: u64 = 1 << 20;

/// Takes away what cannot be read, durably. Says whether anything was.
///
/// # Errors
/// [`Error::Host`], and what rewriting the header refuses.
pub(super) async fn mend_bitmaps(
    file: &HostFile,
    header: &mut Header,
    done: &mut CheckReport,
) -> Result<bool, Error> {
    let (extension, entries) = match read_directory(file, header).await? {
        Ok(None) => return Ok(false),
        Ok(Some(found)) => found,
        Err(Fault::Corrupt { at, what }) => {
            tracing::warn!(image = %file.path().display(), %what, "all bitmaps are removed");
            let mut new = header.clone();
            new.set_bitmaps(None);
            switch_header(file, header, &mut new).await?;
            *header = new;
            done.fixed(Finding::Unreadable { table: TableKind::BitmapDirectory, at, what });
            return Ok(true);
        }
        Err(fault) => return Err(fault.of(file.path())),
    };
    let mut marked = entries.clone();
    let mut zeroed = Vec::new();
    for entry in &mut marked {
        let wrong = bad_entries(file, header, entry).await?;
        match entry.check_size(header.geometry, header.size_bytes) {
            Err(Fault::Corrupt { at, what }) => {
                done.fixed(Finding::Unreadable { table: TableKind::Bitmap, at, what });
                entry.in_use = true;
            }
            Err(fault) => return Err(fault.of(file.path())),
            Ok(()) if wrong.is_empty() => {}
            Ok(()) => entry.in_use = true,
        }
        zeroed.extend(wrong);
    }
    // First nobody may believe what is about to change.
    let changed = write_directory(file, &extension, &entries, &marked).await?;
    for (entry, raw) in &zeroed {
        file.write(entry.at.0, vec![0; 8].into(), None).await?;
        done.fixed(Finding::ReservedBits { entry: *entry, raw: *raw });
    }
    file.sync().await?;
    Ok(changed || !zeroed.is_empty())
}

/// The flag of bitmaps, without what tells where they are.
const NO_EXTENSION: Fault =
    Fault::Corrupt { at: HostOffset(88), what: Corruption::BitmapsWithoutExtension };

type Directory = (BitmapsExtension, Vec<DirectoryEntry>);

/// The directory, where there is one; a fault where it is not one, or lies or leads where it cannot.
async fn read_directory(
    file: &HostFile,
    header: &Header,
) -> Result<Result<Option<Directory>, Fault>, Error> {
    let extension = match header.bitmaps() {
        Ok(Some(extension)) => extension,
        Ok(None) if header.has_bitmaps() && header.version >= 3 => return Ok(Err(NO_EXTENSION)),
        Ok(None) => return Ok(Ok(None)),
        Err(fault) => return Ok(Err(fault)),
    };
    let (at, len) = (extension.directory_at, extension.directory_bytes);
    let outside =
        |table, host| Fault::Corrupt { at: host, what: Corruption::BehindFile { table, host } };
    if !is_inside(file, at, len) {
        return Ok(Err(outside(TableKind::BitmapDirectory, at)));
    }
    if lies_over_tables(header, at, len) {
        let table = TableKind::BitmapDirectory;
        return Ok(Err(Fault::Corrupt {
            at,
            what: Corruption::OverlapsMetadata { table, host: at },
        }));
    }
    let bytes = file.read(ByteRange::between(at.0, at.0.saturating_add(len))).await?;
    let entries = match parse_directory(&bytes, &extension, header.geometry) {
        Ok(entries) => entries,
        Err(fault) => return Ok(Err(fault)),
    };
    let lost = entries.iter().find(|entry| !is_inside(file, entry.table_at, table_bytes(entry)));
    Ok(match lost {
        Some(entry) => Err(outside(TableKind::Bitmap, entry.table_at)),
        None => Ok(Some((extension, entries))),
    })
}

fn table_bytes(entry: &DirectoryEntry) -> u64 {
    u64::from(entry.table_entries) * 8
}

fn is_inside(file: &HostFile, at: HostOffset, len: u64) -> bool {
    at.0.checked_add(len).is_some_and(|end| end <= file.len())
}

/// Whether a piece lies over one of the tables that the header names.
fn lies_over_tables(header: &Header, at: HostOffset, len: u64) -> bool {
    let piece = ByteRange::between(at.0, at.0.saturating_add(len));
    let refcounts = header.refcount_table_clusters.saturating_mul(header.geometry.bytes());
    [(header.l1_at, header.l1_entries * 8), (header.refcount_table_at, refcounts)]
        .into_iter()
        .map(|(at, len)| ByteRange::between(at.0, at.0.saturating_add(len)))
        .any(|table| !table.intersection(piece).is_empty())
}

/// The entries of a bitmap table that name nothing that can be read.
async fn bad_entries(
    file: &HostFile,
    header: &Header,
    entry: &DirectoryEntry,
) -> Result<Vec<(EntryPlace, u64)>, Error> {
    let mut wrong = Vec::new();
    let start = entry.table_at.0;
    for piece in
        ByteRange::between(start, start.saturating_add(table_bytes(entry))).pieces(PIECE_BYTES)
    {
        let entries = from_big_endian(&file.read(piece).await?);
        for (place, raw) in (0u64..).zip(entries) {
            let fits = match BitmapCluster::decode(raw, header.geometry) {
                Ok(BitmapCluster::Stored(at)) => is_inside(file, at, 1),
                Ok(BitmapCluster::Zeros | BitmapCluster::Ones) => true,
                Err(_) => false,
            };
            if !fits {
                let at = HostOffset(piece.start() + place * 8);
                let index = (at.0 - start) / 8;
                wrong.push((EntryPlace { table: TableKind::Bitmap, at, index }, raw));
            }
        }
    }
    Ok(wrong)
}

/// Writes the sectors of the directory that changed, durably. Says whether any did.
async fn write_directory(
    file: &HostFile,
    extension: &BitmapsExtension,
    old: &[DirectoryEntry],
    new: &[DirectoryEntry],
) -> Result<bool, Error> {
    let (old, new) = (encode_directory(old), encode_directory(new));
    let unit = crate::units::index(SECTOR_BYTES);
    let pairs = (0u64..).zip(old.chunks(unit).zip(new.chunks(unit)));
    let sectors: Vec<u64> =
        pairs.filter(|(_, (old, new))| old != new).map(|(sector, _)| sector).collect();
    write_sectors(file, extension.directory_at, &new, &sectors).await?;
    file.sync().await?;
    Ok(!sectors.is_empty())
}
