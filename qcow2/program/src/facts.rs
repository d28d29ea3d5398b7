//! What `info` tells of an image, as a document and as lines. Where the facts come from is `command::info`'s.

use std::fmt::Write;
use std::time::UNIX_EPOCH;

use qcow2::{LuksCipher, LuksHash, LuksInfo, SlotInfo, Snapshot};
use serde::Serialize;

use crate::size::human;

/// An image, or a file that one stands on.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Node {
    pub(crate) children: Vec<Child>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) snapshots: Vec<SnapshotFacts>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) backing_filename_format: Option<String>,
    pub(crate) virtual_size: u64,
    pub(crate) filename: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) cluster_size: Option<u64>,
    pub(crate) format: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) actual_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) format_specific: Option<Specific>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) full_backing_filename: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) backing_filename: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) encrypted: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) dirty_flag: Option<bool>,
}

/// What an image stands on.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Child {
    pub(crate) name: &'static str,
    pub(crate) info: Node,
}

/// What only one format has.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "type", content = "data", rename_all = "lowercase")]
pub(crate) enum Specific {
    Qcow2(Box<Qcow2Facts>),
    File(Nothing),
}

/// A host file has nothing more to tell.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Nothing {}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Qcow2Facts {
    pub(crate) compat: &'static str,
    pub(crate) compression_type: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) lazy_refcounts: Option<bool>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) bitmaps: Vec<BitmapFacts>,
    pub(crate) refcount_bits: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) data_file: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) data_file_raw: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) encrypt: Option<EncryptionFacts>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) corrupt: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) extended_l2: Option<bool>,
}

#[derive(Clone, Debug, Serialize)]
pub(crate) struct BitmapFacts {
    pub(crate) flags: Vec<&'static str>,
    pub(crate) name: String,
    pub(crate) granularity: u64,
}

/// How guest data is encrypted.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "format", rename_all = "lowercase")]
pub(crate) enum EncryptionFacts {
    /// The mode of old.
    Aes,
    Luks(LuksFacts),
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct LuksFacts {
    pub(crate) ivgen_alg: &'static str,
    pub(crate) detached_header: bool,
    pub(crate) hash_alg: &'static str,
    pub(crate) cipher_alg: &'static str,
    pub(crate) uuid: String,
    pub(crate) cipher_mode: &'static str,
    pub(crate) slots: Vec<SlotFacts>,
    pub(crate) payload_offset: u64,
    pub(crate) master_key_iters: u32,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct SlotFacts {
    pub(crate) active: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) iters: Option<u32>,
    pub(crate) key_offset: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) stripes: Option<u32>,
}

impl EncryptionFacts {
    /// What a LUKS header tells.
    pub(crate) fn of(luks: &LuksInfo) -> Self {
        let slot = |slot: &SlotInfo| SlotFacts {
            active: slot.active,
            iters: slot.active.then_some(slot.rounds),
            key_offset: slot.key_offset,
            stripes: slot.active.then_some(LUKS_STRIPES),
        };
        Self::Luks(LuksFacts {
            ivgen_alg: luks.tweak,
            detached_header: false,
            hash_alg: match luks.hash {
                LuksHash::Sha1 => "sha1",
                LuksHash::Sha224 => "sha224",
                LuksHash::Sha256 => "sha256",
                LuksHash::Sha384 => "sha384",
                LuksHash::Sha512 => "sha512",
            },
            cipher_alg: match luks.cipher {
                LuksCipher::Aes128Xts => "aes-128",
                LuksCipher::Aes256Xts => "aes-256",
            },
            uuid: luks.uuid.clone(),
            cipher_mode: "xts",
            slots: luks.slots.iter().map(slot).collect(),
            payload_offset: luks.payload_offset,
            master_key_iters: luks.digest_rounds,
        })
    }

    fn write(&self, out: &mut String, indent: &str) -> std::fmt::Result {
        let luks = match self {
            Self::Aes => return writeln!(out, "{indent}format: aes"),
            Self::Luks(luks) => luks,
        };
        writeln!(out, "{indent}ivgen alg: {}", luks.ivgen_alg)?;
        writeln!(out, "{indent}detached header: {}", luks.detached_header)?;
        writeln!(out, "{indent}hash alg: {}", luks.hash_alg)?;
        writeln!(out, "{indent}cipher alg: {}", luks.cipher_alg)?;
        writeln!(out, "{indent}uuid: {}", luks.uuid)?;
        writeln!(out, "{indent}format: luks")?;
        writeln!(out, "{indent}cipher mode: {}", luks.cipher_mode)?;
        writeln!(out, "{indent}slots:")?;
        for (index, slot) in luks.slots.iter().enumerate() {
            writeln!(out, "{indent}    [{index}]:")?;
            writeln!(out, "{indent}        active: {}", slot.active)?;
            if let Some(iters) = slot.iters {
                writeln!(out, "{indent}        iters: {iters}")?;
            }
            writeln!(out, "{indent}        key offset: {}", slot.key_offset)?;
            if let Some(stripes) = slot.stripes {
                writeln!(out, "{indent}        stripes: {stripes}")?;
            }
        }
        writeln!(out, "{indent}payload offset: {}", luks.payload_offset)?;
        writeln!(out, "{indent}master key iters: {}", luks.master_key_iters)
    }
}

/// How often LUKS spreads a key before it stores it; no other number is in use.
const LUKS_STRIPES: u32 = 4000;

/// An internal snapshot, in `info` and in `snapshot -l`.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct SnapshotFacts {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) icount: Option<u64>,
    pub(crate) vm_clock_nsec: u64,
    pub(crate) name: String,
    pub(crate) date_sec: u32,
    pub(crate) date_nsec: u32,
    pub(crate) vm_clock_sec: u64,
    pub(crate) id: String,
    pub(crate) vm_state_size: u64,
}

impl SnapshotFacts {
    /// What the table of an image tells of a snapshot.
    pub(crate) fn of(snapshot: &Snapshot) -> Self {
        let taken = snapshot.taken.duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            icount: snapshot.icount,
            vm_clock_nsec: snapshot.vm_clock.subsec_nanos().into(),
            name: snapshot.name.clone(),
            date_sec: u32::try_from(taken.as_secs()).unwrap_or(u32::MAX),
            date_nsec: taken.subsec_nanos(),
            vm_clock_sec: snapshot.vm_clock.as_secs(),
            id: snapshot.id.clone(),
            vm_state_size: snapshot.vm_state_bytes,
        }
    }
}

impl Node {
    /// An image, or a file, of which no more is known.
    pub(crate) fn new(filename: String, virtual_size: u64, format: &str) -> Self {
        Self {
            children: Vec::new(),
            snapshots: Vec::new(),
            backing_filename_format: None,
            virtual_size,
            filename,
            cluster_size: None,
            format: format.to_owned(),
            actual_size: None,
            format_specific: None,
            full_backing_filename: None,
            backing_filename: None,
            encrypted: None,
            dirty_flag: None,
        }
    }

    /// The lines of `info`.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        // Writing into a string does not fail, here and below.
        let _ = self.write(&mut text, 0, "/");
        text
    }

    fn write(&self, out: &mut String, depth: usize, path: &str) -> std::fmt::Result {
        let indent = " ".repeat(depth * 4);
        // What an image stands on is no disk of its own.
        let [name, format, size] = match depth > 0 && self.children.is_empty() {
            false => ["image", "file format", "virtual size"],
            true => ["filename", "protocol type", "file length"],
        };
        writeln!(out, "{indent}{name}: {}", self.filename)?;
        writeln!(out, "{indent}{format}: {}", self.format)?;
        let bytes = self.virtual_size;
        writeln!(out, "{indent}{size}: {} ({bytes} bytes)", human(bytes))?;
        let actual = self.actual_size.map_or_else(|| "unavailable".to_owned(), human);
        writeln!(out, "{indent}disk size: {actual}")?;
        if self.encrypted == Some(true) {
            writeln!(out, "{indent}encrypted: yes")?;
        }
        if let Some(bytes) = self.cluster_size {
            writeln!(out, "{indent}cluster_size: {bytes}")?;
        }
        if self.dirty_flag == Some(true) {
            writeln!(out, "{indent}cleanly shut down: no")?;
        }
        self.write_backing(out, &indent)?;
        if !self.snapshots.is_empty() {
            writeln!(out, "{indent}Snapshot list:")?;
            out.push_str(&snapshot_table(&self.snapshots, &indent));
        }
        if let Some(Specific::Qcow2(facts)) = &self.format_specific {
            writeln!(out, "{indent}Format specific information:")?;
            facts.write(out, &format!("{indent}    "))?;
        }
        for child in &self.children {
            let path = format!("{path}{}", child.name);
            writeln!(out, "{indent}Child node '{path}':")?;
            child.info.write(out, depth + 1, &format!("{path}/"))?;
        }
        Ok(())
    }

    fn write_backing(&self, out: &mut String, indent: &str) -> std::fmt::Result {
        let Some(name) = &self.backing_filename else { return Ok(()) };
        write!(out, "{indent}backing file: {name}")?;
        match &self.full_backing_filename {
            None => write!(out, " (cannot determine actual path)")?,
            Some(full) if full != name => write!(out, " (actual path: {full})")?,
            Some(_) => {}
        }
        writeln!(out)?;
        match &self.backing_filename_format {
            Some(format) => writeln!(out, "{indent}backing file format: {format}"),
            None => Ok(()),
        }
    }
}

impl Qcow2Facts {
    fn write(&self, out: &mut String, indent: &str) -> std::fmt::Result {
        writeln!(out, "{indent}compat: {}", self.compat)?;
        writeln!(out, "{indent}compression type: {}", self.compression_type)?;
        if let Some(lazy) = self.lazy_refcounts {
            writeln!(out, "{indent}lazy refcounts: {lazy}")?;
        }
        if !self.bitmaps.is_empty() {
            writeln!(out, "{indent}bitmaps:")?;
        }
        for (index, bitmap) in self.bitmaps.iter().enumerate() {
            writeln!(out, "{indent}    [{index}]:")?;
            writeln!(out, "{indent}        flags:")?;
            for (index, flag) in bitmap.flags.iter().enumerate() {
                writeln!(out, "{indent}            [{index}]: {flag}")?;
            }
            writeln!(out, "{indent}        name: {}", bitmap.name)?;
            writeln!(out, "{indent}        granularity: {}", bitmap.granularity)?;
        }
        writeln!(out, "{indent}refcount bits: {}", self.refcount_bits)?;
        if let Some(file) = &self.data_file {
            writeln!(out, "{indent}data file: {file}")?;
        }
        if let Some(raw) = self.data_file_raw {
            writeln!(out, "{indent}data file raw: {raw}")?;
        }
        if let Some(encrypt) = &self.encrypt {
            writeln!(out, "{indent}encrypt:")?;
            encrypt.write(out, &format!("{indent}    "))?;
        }
        if let Some(corrupt) = self.corrupt {
            writeln!(out, "{indent}corrupt: {corrupt}")?;
        }
        match self.extended_l2 {
            Some(extended) => writeln!(out, "{indent}extended l2: {extended}"),
            None => Ok(()),
        }
    }
}

/// The table of `snapshot -l`, in local time.
pub(crate) fn snapshot_table(snapshots: &[SnapshotFacts], indent: &str) -> String {
    let mut table = format!(
        "{indent}{:<7} {:<16} {:>8} {:>19} {:>15} {:>10}\n",
        "ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"
    );
    for snapshot in snapshots {
        let date = jiff::Timestamp::from_second(i64::from(snapshot.date_sec))
            .map(|date| date.to_zoned(jiff::tz::TimeZone::system()))
            .map_or_else(|_| String::new(), |date| date.strftime("%Y-%m-%d %H:%M:%S").to_string());
        let secs = snapshot.vm_clock_sec;
        let clock = format!(
            "{:04}:{:02}:{:02}.{:03}",
            secs / 3600,
            secs / 60 % 60,
            secs % 60,
            snapshot.vm_clock_nsec / 1_000_000
        );
        let icount = snapshot.icount.map_or_else(|| "--".to_owned(), |icount| icount.to_string());
        let _ = writeln!(
            table,
            "{indent}{:<7} {:<16} {:>8} {date:>19} {clock:>15} {icount:>10}",
            snapshot.id,
            snapshot.name,
            human(snapshot.vm_state_size)
        );
    }
    table
}
