//! The manifest beside a layer: what it is, what it stands on, and a checksum over every byte that says so. Reading and
//! writing are pure here; `durable` puts the bytes on disk.

use std::collections::BTreeMap;
use std::path::Path;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use uuid::Uuid;

use crate::error::{Error, ManifestRule};
use crate::fingerprint::Fingerprint;
use crate::layout::is_layer_name;
use crate::names::LayerKind;

/// The version of the manifest that this program writes and reads.
pub const VERSION: u64 = 1;

/// The longest manifest, in bytes.
pub const MAX_MANIFEST_BYTES: usize = 256 << 10;

/// What is known of a sealed layer.
///
/// On disk: `{"version": 1, "crc32": "01234567", "layer": {…}}`. The checksum (CRC-32 as in zip, eight lower-case hex
/// digits) covers the text of `layer` exactly as it stands in the file, so that any flipped bit is found, also one
/// that JSON would not mind. Fields that this version does not know are kept in [`Manifest::extra`] and written
/// again: a newer program may add some without changing the version. What stands around `layer` is fixed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// The backup that the layer belongs to, as the hub calls it.
    pub backup_id: String,
    /// The job that wrote it, as the hub calls it.
    pub job_id: String,
    /// The name of the virtual machine, as people know it.
    pub vm_name: String,
    /// What file names and export names call the virtual machine.
    pub vm_context: String,
    /// Which disk of the virtual machine, from 0.
    pub disk_index: u32,
    /// The hypervisor's own key of the disk.
    pub disk_key: Option<i64>,
    /// Whether the layer stands alone.
    pub kind: LayerKind,
    /// 0 for a full, then one more for each layer of the chain. Orders a chain whatever the clock did.
    pub sequence: u32,
    /// The identity of the layer.
    pub layer_uuid: Uuid,
    /// The file's own name.
    pub file: String,
    /// The layer below.
    pub parent: Option<ParentLink>,
    /// The moment that the backup was planned for.
    pub created_at: Timestamp,
    /// The moment that it was sealed, by the hub's clock.
    pub sealed_at: Option<Timestamp>,
    /// The size of the disk, in bytes.
    pub size_bytes: u64,
    /// The length of the file, in bytes.
    pub file_bytes: u64,
    /// The space that the file takes, in bytes.
    pub allocated_bytes: u64,
    /// What crossed the wire for it, in bytes.
    pub bytes_transferred: u64,
    /// Where the next incremental begins, in the words of the source.
    pub change_id: Option<String>,
    /// Checksums by which a replaced file is recognised.
    pub fingerprint: Fingerprint,
    /// Fields of a newer program.
    #[serde(flatten)]
    pub extra: BTreeMap<String, serde_json::Value>,
}

/// The layer that another one stands on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParentLink {
    /// Its file name, in the same directory.
    pub file: String,
    /// Its identity.
    pub layer_uuid: Uuid,
}

/// Only what every version has.
#[derive(Deserialize)]
struct Versioned {
    version: u64,
}

/// Version 1, whole.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Envelope<'a> {
    #[serde(rename = "version")]
    _version: u64,
    crc32: String,
    #[serde(borrow)]
    layer: &'a RawValue,
}

impl Manifest {
    /// The text of the manifest.
    ///
    /// # Errors
    /// [`ManifestRule::TooLong`]; the rules of [`Manifest::parse`], if the fields contradict each other.
    pub fn to_bytes(&self) -> Result<Vec<u8>, ManifestRule> {
        self.check()?;
        let layer = serde_json::to_string_pretty(self).map_err(ManifestRule::Fields)?;
        let crc32 = checksum(&layer);
        let text = format!(
            "{{\n\"version\": {VERSION},\n\"crc32\": \"{crc32}\",\n\"layer\": {layer}\n}}\n"
        );
        if text.len() > MAX_MANIFEST_BYTES {
            return Err(ManifestRule::TooLong { limit: MAX_MANIFEST_BYTES });
        }
        Ok(text.into_bytes())
    }

    /// Reads a manifest and believes nothing of it: length, version, checksum, fields, and that they fit together.
    ///
    /// # Errors
    /// The first [`ManifestRule`] that the text breaks.
    pub fn parse(bytes: &[u8]) -> Result<Self, ManifestRule> {
        if bytes.len() > MAX_MANIFEST_BYTES {
            return Err(ManifestRule::TooLong { limit: MAX_MANIFEST_BYTES });
        }
        let Versioned { version } = serde_json::from_slice(bytes).map_err(ManifestRule::NotJson)?;
        if version != VERSION {
            return Err(ManifestRule::Version { found: version });
        }
        let Envelope { crc32, layer, .. } =
            serde_json::from_slice(bytes).map_err(ManifestRule::NotJson)?;
        let computed = checksum(layer.get());
        if computed != crc32 {
            return Err(ManifestRule::Checksum { recorded: crc32, computed });
        }
        let manifest: Self = serde_json::from_str(layer.get()).map_err(ManifestRule::Fields)?;
        manifest.check()?;
        Ok(manifest)
    }

    /// As [`Manifest::parse`], for the manifest beside the layer `layer_name`; errors name `file`.
    pub(crate) fn parse_beside(bytes: &[u8], file: &Path, layer_name: &str) -> Result<Self, Error> {
        let broken = |rule| Error::Manifest { file: file.to_path_buf(), rule };
        let manifest = Self::parse(bytes).map_err(broken)?;
        if manifest.file != layer_name {
            return Err(broken(ManifestRule::OtherFile { recorded: manifest.file }));
        }
        Ok(manifest)
    }

    /// What holds for every manifest, wherever it lies.
    fn check(&self) -> Result<(), ManifestRule> {
        if !is_layer_name(&self.file) {
            return Err(ManifestRule::OtherFile { recorded: self.file.clone() });
        }
        if let Some(parent) = &self.parent
            && (!is_layer_name(&parent.file) || parent.file == self.file)
        {
            return Err(ManifestRule::ParentName { recorded: parent.file.clone() });
        }
        let fits = match self.kind {
            LayerKind::Full => self.parent.is_none() && self.sequence == 0,
            LayerKind::Incremental => self.parent.is_some() && self.sequence > 0,
        };
        if fits { Ok(()) } else { Err(ManifestRule::Position) }
    }
}

fn checksum(layer: &str) -> String {
    format!("{:08x}", crc32fast::hash(layer.as_bytes()))
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(crate) fn sample() -> Manifest {
        Manifest {
            backup_id: "backup-web-20251007T143022-1".to_owned(),
            job_id: "job-1".to_owned(),
            vm_name: "web 01".to_owned(),
            vm_context: "web 01".to_owned(),
            disk_index: 0,
            disk_key: Some(2000),
            kind: LayerKind::Incremental,
            sequence: 1,
            layer_uuid: Uuid::from_u128(7),
            file: "backup-web-20251008T143022-incr.qcow2".to_owned(),
            parent: Some(ParentLink {
                file: "backup-web-20251007T143022-full.qcow2".to_owned(),
                layer_uuid: Uuid::from_u128(6),
            }),
            created_at: Timestamp::from_second(1_760_000_000).unwrap(),
            sealed_at: None,
            size_bytes: 1 << 40,
            file_bytes: 1 << 30,
            allocated_bytes: 1 << 30,
            bytes_transferred: 123,
            change_id: Some("52 de/4".to_owned()),
            fingerprint: Fingerprint::default(),
            extra: BTreeMap::new(),
        }
    }

    /// `sample()` with another text for its description, and a checksum that fits.
    fn with_layer(change: impl FnOnce(&mut serde_json::Value)) -> Result<Manifest, ManifestRule> {
        let mut layer = serde_json::to_value(sample()).unwrap();
        change(&mut layer);
        let layer = layer.to_string();
        let crc32 = checksum(&layer);
        let text = format!("{{\"version\":1,\"crc32\":\"{crc32}\",\"layer\":{layer}}}");
        Manifest::parse(text.as_bytes())
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let whole = sample().to_bytes().unwrap();
        for at in 0..whole.len() {
            for bit in 0..8 {
                let mut bytes = whole.clone();
                bytes[at] ^= 1 << bit;
                assert!(Manifest::parse(&bytes).is_err(), "bit {bit} of byte {at}");
            }
        }
    }

    #[test]
    fn every_truncation_is_found() {
        let whole = sample().to_bytes().unwrap();
        let text_len = whole.trim_ascii_end().len();
        for len in 0..text_len {
            assert!(Manifest::parse(&whole[..len]).is_err(), "{len} bytes");
        }
    }

    #[test]
    fn an_unknown_version_is_named_whatever_else_it_holds() {
        let text = br#"{"version": 2, "sha256": "00", "layers": []}"#;
        assert!(matches!(Manifest::parse(text), Err(ManifestRule::Version { found: 2 })));
    }

    #[test]
    fn nothing_may_be_added_around_the_description() {
        let text = String::from_utf8(sample().to_bytes().unwrap()).unwrap();
        let more = text.replacen("{\n", "{\n\"note\": 1,\n", 1);
        assert!(matches!(Manifest::parse(more.as_bytes()), Err(ManifestRule::NotJson(_))));
        let twice = text.clone() + &text;
        assert!(matches!(Manifest::parse(twice.as_bytes()), Err(ManifestRule::NotJson(_))));
    }

    #[test]
    fn a_changed_description_shows_in_the_checksum() {
        let text = String::from_utf8(sample().to_bytes().unwrap()).unwrap();
        let changed = text.replace("job-1", "job-2");
        let rule = Manifest::parse(changed.as_bytes()).unwrap_err();
        assert!(matches!(rule, ManifestRule::Checksum { .. }), "{rule}");
    }

    #[test]
    fn a_missing_field_is_named() {
        for field in ["backup_id", "kind", "layer_uuid", "size_bytes", "fingerprint", "created_at"]
        {
            let rule = with_layer(|layer| {
                layer.as_object_mut().unwrap().remove(field);
            });
            let Err(ManifestRule::Fields(error)) = rule else { panic!("{field}: {rule:?}") };
            assert!(error.to_string().contains(field), "{error}");
        }
    }

    #[test]
    fn names_that_leave_the_directory_are_refused() {
        for name in
            ["../x.qcow2", "/x.qcow2", "a/x.qcow2", "", ".", "..", ".x.qcow2", "x\0.qcow2", "x.raw"]
        {
            let rule = with_layer(|layer| layer["parent"]["file"] = name.into());
            assert!(matches!(rule, Err(ManifestRule::ParentName { .. })), "{name:?}: {rule:?}");
            let rule = with_layer(|layer| layer["file"] = name.into());
            assert!(matches!(rule, Err(ManifestRule::OtherFile { .. })), "{name:?}: {rule:?}");
        }
        let rule = with_layer(|layer| layer["parent"]["file"] = layer["file"].clone());
        assert!(matches!(rule, Err(ManifestRule::ParentName { .. })), "{rule:?}");
    }

    #[test]
    fn kind_parent_and_sequence_must_agree() {
        for (kind, parent, sequence) in [
            ("full", true, 0),
            ("full", false, 1),
            ("incremental", false, 1),
            ("incremental", true, 0),
        ] {
            let rule = with_layer(|layer| {
                layer["kind"] = kind.into();
                layer["sequence"] = sequence.into();
                if !parent {
                    layer["parent"] = serde_json::Value::Null;
                }
            });
            assert!(matches!(rule, Err(ManifestRule::Position)), "{kind} {parent} {sequence}");
        }
    }

    #[test]
    fn fields_of_a_newer_program_survive_a_rewrite() {
        let manifest = with_layer(|layer| {
            layer["merged_from"] = serde_json::json!({"layers": [1, 2], "why": "retention"});
        })
        .unwrap();
        let again = Manifest::parse(&manifest.to_bytes().unwrap()).unwrap();
        assert_eq!(again.extra["merged_from"]["layers"][1], 2);
        assert_eq!(again, manifest);
    }

    #[test]
    fn an_over_long_manifest_is_neither_written_nor_read() {
        let mut manifest = sample();
        manifest.vm_name = "x".repeat(MAX_MANIFEST_BYTES);
        assert!(matches!(manifest.to_bytes(), Err(ManifestRule::TooLong { .. })));
        let spaces = vec![b' '; MAX_MANIFEST_BYTES + 1];
        assert!(matches!(Manifest::parse(&spaces), Err(ManifestRule::TooLong { .. })));
    }

    fn any_manifest() -> impl Strategy<Value = Manifest> {
        let texts = (any::<String>(), any::<String>(), any::<String>(), any::<Option<String>>());
        let numbers = (any::<u32>(), any::<Option<i64>>(), any::<[u64; 4]>(), any::<[u128; 2]>());
        let second = -1_000_000_000_i64..253_000_000_000;
        (texts, numbers, second, 0..u32::MAX).prop_map(|(texts, numbers, second, sequence)| {
            let (file, parent_file) = ("a.qcow2".to_owned(), "b.qcow2".to_owned());
            let parent =
                ParentLink { file: parent_file, layer_uuid: Uuid::from_u128(numbers.3[1]) };
            Manifest {
                backup_id: texts.0,
                job_id: texts.1,
                vm_name: texts.2.clone(),
                vm_context: texts.2,
                disk_index: numbers.0,
                disk_key: numbers.1,
                kind: if sequence == 0 { LayerKind::Full } else { LayerKind::Incremental },
                sequence,
                layer_uuid: Uuid::from_u128(numbers.3[0]),
                file,
                parent: (sequence > 0).then_some(parent),
                created_at: Timestamp::new(second, 123_456_789).unwrap(),
                sealed_at: (sequence % 2 == 0).then(|| Timestamp::from_second(second).unwrap()),
                size_bytes: numbers.2[0],
                file_bytes: numbers.2[1],
                allocated_bytes: numbers.2[2],
                bytes_transferred: numbers.2[3],
                change_id: texts.3,
                fingerprint: Fingerprint::default(),
                extra: BTreeMap::new(),
            }
        })
    }

    proptest! {
        #[test]
        fn a_manifest_reads_back_as_it_was_written(manifest in any_manifest()) {
            prop_assert_eq!(Manifest::parse(&manifest.to_bytes().unwrap()).unwrap(), manifest);
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in "\\PC{0,80}", bytes: Vec<u8>) {
            prop_assert!(Manifest::parse(text.as_bytes()).is_err());
            prop_assert!(Manifest::parse(&bytes).is_err());
        }
    }
}
