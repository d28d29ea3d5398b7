use proptest::prelude::*;

use super::*;
use crate::refcount::MetaWrite;

const BACKING_FORMAT: u32 = 0xe279_2aca;

fn push(bytes: &mut Vec<u8>, kind: u32, data: &[u8]) {
    bytes.extend_from_slice(&kind.to_be_bytes());
    bytes.extend_from_slice(&u32::try_from(data.len()).unwrap().to_be_bytes());
    bytes.extend_from_slice(data);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
}

/// A header as another program may have written it.
struct Foreign {
    version: u32,
    cluster_bits: u32,
    header_bytes: usize,
    extensions: Vec<(u32, Vec<u8>)>,
    backing: Option<Vec<u8>>,
}

impl Foreign {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.header_bytes];
        bytes[..4].copy_from_slice(&MAGIC.to_be_bytes());
        bytes[4..8].copy_from_slice(&self.version.to_be_bytes());
        bytes[20..24].copy_from_slice(&self.cluster_bits.to_be_bytes());
        bytes[24..32].copy_from_slice(&(1u64 << 20).to_be_bytes());
        if self.version > 2 {
            bytes[96..100].copy_from_slice(&4u32.to_be_bytes());
            let len = u32::try_from(self.header_bytes).unwrap();
            bytes[100..104].copy_from_slice(&len.to_be_bytes());
            for (at, byte) in bytes.iter_mut().enumerate().skip(112) {
                *byte = u8::try_from(at % 250).unwrap() + 1;
            }
        }
        for (kind, data) in &self.extensions {
            push(&mut bytes, *kind, data);
        }
        push(&mut bytes, 0, &[]);
        if let Some(name) = &self.backing {
            let at = bytes.len() as u64;
            bytes[8..16].copy_from_slice(&at.to_be_bytes());
            bytes[16..20].copy_from_slice(&u32::try_from(name.len()).unwrap().to_be_bytes());
            bytes.extend_from_slice(name);
        }
        bytes
    }
}

fn disk(foreign: &Foreign) -> Vec<u8> {
    let mut bytes = foreign.bytes();
    bytes.resize(1 << foreign.cluster_bits, 0);
    bytes
}

fn apply(disk: &mut [u8], write: &MetaWrite, sectors: impl Fn(usize) -> bool) {
    let at = index(write.at.0);
    for (n, sector) in write.bytes.chunks(512).enumerate() {
        if sectors(n) {
            disk[at + n * 512..][..sector.len()].copy_from_slice(sector);
        }
    }
}

/// What a header means, apart from where its parts lie.
fn meaning(header: &Header) -> Header {
    let mut same = header.clone();
    same.extensions.feature_names = None;
    let used = same.beyond.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    same.beyond.truncate(used);
    Header { header_bytes: 0, backing_at: 0, disk: Vec::new(), ..same }
}

/// Performs the stages of a change; at every cut, with any of the sectors of a stage on disk, the header is the old or
/// the new one.
fn switch(disk: &mut [u8], old: &Header, new: &mut Header) -> Header {
    let stages = old.rewrite(new).unwrap();
    let mut changed = false;
    for stage in stages {
        assert_eq!(stage.len(), 1);
        let write = &stage[0];
        let sectors = write.bytes.len().div_ceil(512);
        for torn in 0..8u32 {
            let mut cut = disk.to_vec();
            apply(&mut cut, write, |n| torn >> (n % 3) & 1 == 1);
            let found = Header::parse(&cut).unwrap();
            // What was zero between fields and extensions may hold remains until the last stage.
            let fits = |wanted: &Header| {
                let (mut found, wanted) = (meaning(&found), meaning(wanted));
                found.beyond.truncate(wanted.beyond.len());
                found == wanted
            };
            assert!(fits(old) || fits(new), "torn {torn} of {sectors} sectors");
            assert!(!changed || fits(new), "back to the old header");
        }
        apply(disk, write, |_| true);
        changed |= write.at.0 == 0;
    }
    let found = Header::parse(disk).unwrap();
    assert_eq!(meaning(&found), meaning(new));
    // What memory says of the disk is what lies there.
    assert!(found.disk[..] == new.disk[..found.disk.len()], "what memory says of the disk");
    assert_eq!(found.extensions.feature_names, new.extensions.feature_names);
    found
}

#[test]
fn unknown_extensions_and_fields_survive_every_change() {
    for header_bytes in [104, 112, 128, 160] {
        let unknown = (0x1234_5678, b"not for us".to_vec());
        let foreign = Foreign {
            version: 3,
            cluster_bits: 16,
            header_bytes,
            extensions: vec![(BACKING_FORMAT, b"raw".to_vec()), unknown.clone()],
            backing: Some(b"below.img".to_vec()),
        };
        let mut bytes = disk(&foreign);
        let old = Header::parse(&bytes).unwrap();
        assert_eq!(old.extensions.unknown, std::slice::from_ref(&unknown));
        let mut new = old.clone();
        new.backing_name = Some(b"other.img".to_vec());
        new.extensions.bitmaps = Some(vec![1; 24]);
        new.set_compression_type(1);
        let now = switch(&mut bytes, &old, &mut new);
        assert_eq!(now.extensions.unknown, [unknown]);
        assert_eq!(now.backing_name.as_deref(), Some(&b"other.img"[..]));
        assert_eq!(now.compression_type(), 1);
        if header_bytes > 112 {
            assert_eq!(bytes[112..header_bytes], foreign.bytes()[112..header_bytes]);
        }
    }
}

#[test]
fn a_change_of_fields_is_one_write_of_one_sector() {
    let foreign = Foreign {
        version: 3,
        cluster_bits: 16,
        header_bytes: 112,
        extensions: vec![(BACKING_FORMAT, b"qcow2".to_vec()), (77, vec![7; 3000])],
        backing: Some(vec![b'x'; 1023]),
    };
    let mut bytes = disk(&foreign);
    let old = Header::parse(&bytes).unwrap();
    let mut new = old.clone();
    new.size_bytes = 12345 << 9;
    new.l1_at = HostOffset(7 << 16);
    let stages = old.rewrite(&mut new).unwrap();
    assert_eq!(stages.len(), 1);
    assert_eq!(stages[0].len(), 1);
    assert_eq!((stages[0][0].at, stages[0][0].bytes.len()), (HostOffset(0), 512));
    switch(&mut bytes, &old, &mut old.clone());
    assert_eq!(bytes, disk(&foreign), "nothing changed, nothing written but the same");
}

#[test]
fn a_version_2_header_becomes_version_3_and_back() {
    let foreign = Foreign {
        version: 2,
        cluster_bits: 16,
        header_bytes: 72,
        extensions: vec![(BACKING_FORMAT, b"qcow2".to_vec()), (99, b"kept".to_vec())],
        backing: Some(b"base.qcow2".to_vec()),
    };
    let mut bytes = disk(&foreign);
    let old = Header::parse(&bytes).unwrap();
    assert_eq!((old.version, old.refcount_order, old.incompatible), (2, 4, 0));
    let mut new = old.clone();
    new.version = 3;
    new.extensions.feature_names = Some(feature_names());
    new.compatible |= LAZY_REFCOUNTS;
    let now = switch(&mut bytes, &old, &mut new);
    assert!(now.has_lazy_refcounts());
    let mut back = now.clone();
    back.version = 2;
    back.compatible = 0;
    back.extensions.feature_names = None;
    let last = switch(&mut bytes, &now, &mut back);
    assert_eq!(last.extensions.unknown, [(99, b"kept".to_vec())]);
    assert_eq!(last.backing_name, old.backing_name);
}

#[test]
fn a_header_that_cannot_be_switched_safely_is_refused_by_its_size() {
    let foreign = Foreign {
        version: 3,
        cluster_bits: 9,
        header_bytes: 112,
        extensions: vec![(99, vec![1; 300])],
        backing: None,
    };
    let old = Header::parse(&disk(&foreign)).unwrap();
    let mut new = old.clone();
    new.backing_name = Some(vec![b'n'; 200]);
    let refused = old.rewrite(&mut new);
    assert!(matches!(refused, Err(Fault::Unsupported(Feature::HeaderTooLarge { limit: 512, .. }))));
}

#[test]
fn what_a_header_may_not_say_is_refused_by_name() {
    let plain = Foreign {
        version: 3,
        cluster_bits: 16,
        header_bytes: 112,
        extensions: Vec::new(),
        backing: None,
    };
    let parse = |patch: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = disk(&plain);
        patch(&mut bytes);
        Header::parse(&bytes).map(|_| ())
    };
    let is_field = |result: Result<(), Fault>, name: &str| match result {
        Err(Fault::Corrupt { what: Corruption::HeaderField { field, .. }, .. }) => field == name,
        _ => false,
    };
    assert_eq!(parse(&|_| ()), Ok(()));
    assert!(is_field(parse(&|b| b[104] = 1), "compression_type"), "type without bit");
    assert!(is_field(parse(&|b| b[79] = 8), "compression_type"), "bit without type");
    assert_eq!(
        parse(&|b| (b[79], b[104]) = (8, 9)),
        Err(Fault::Unsupported(Feature::CompressionType(9)))
    );
    assert_eq!(parse(&|b| (b[79], b[104]) = (8, 1)), Ok(()));
    assert!(is_field(parse(&|b| b[103] = 111), "header_length"));
    assert!(is_field(parse(&|b| b[103] = 96), "header_length"));
    assert!(is_field(parse(&|b| b[99] = 7), "refcount_order"));
    assert_eq!(parse(&|b| b[35] = 3), Err(Fault::Unsupported(Feature::Encryption(3))));
    assert_eq!(parse(&|b| b[7] = 4), Err(Fault::Unsupported(Feature::Version(4))));
    assert!(matches!(
        parse(&|b| (b[15], b[19]) = (100, 4)),
        Err(Fault::Corrupt { what: Corruption::BackingName { .. }, .. })
    ));
    let small = Foreign { cluster_bits: 13, ..plain };
    let mut bytes = disk(&small);
    bytes[79] = 16;
    assert!(is_field(Header::parse(&bytes).map(|_| ()), "cluster_bits"), "extended L2");
}

#[test]
fn an_unknown_feature_is_refused_by_the_name_that_the_image_gives() {
    let mut table = vec![0, 9];
    table.extend_from_slice(b"time\xfftravel");
    table.resize(48, 0);
    let foreign = Foreign {
        version: 3,
        cluster_bits: 16,
        header_bytes: 112,
        extensions: vec![(0x6803_f857, table)],
        backing: None,
    };
    let mut bytes = disk(&foreign);
    bytes[78] = 2;
    let refused = Header::parse(&bytes);
    let Err(Fault::Unsupported(Feature::Unknown(text))) = refused else { panic!("{refused:?}") };
    assert_eq!(text, "\"time\u{fffd}travel\" (bit 9)");
}

fn any_extensions() -> impl Strategy<Value = Vec<(u32, Vec<u8>)>> {
    let data = prop_oneof![
        3 => prop::collection::vec(any::<u8>(), 0..40),
        1 => prop::collection::vec(any::<u8>(), 0..900),
    ];
    prop::collection::vec((1u32..9, data), 0..4)
}

#[derive(Clone, Debug)]
enum Change {
    Backing(Option<Vec<u8>>),
    Bitmaps(Option<u8>),
    DataFile(Option<Vec<u8>>),
    Size(u64),
}

fn any_change() -> impl Strategy<Value = Change> {
    let name = |len| prop::option::of(prop::collection::vec(b'a'..=b'z', 1..len));
    prop_oneof![
        name(1023).prop_map(Change::Backing),
        name(40).prop_map(Change::Backing),
        prop::option::of(any::<u8>()).prop_map(Change::Bitmaps),
        name(600).prop_map(Change::DataFile),
        any::<u64>().prop_map(Change::Size),
    ]
}

proptest! {
    #[test] // Whatever is cut or torn, the header on disk is the old or the new one; unknown extensions stay.
    fn every_change_of_a_header_is_all_or_nothing(
        extensions in any_extensions(),
        backing in prop::option::of(prop::collection::vec(b'a'..=b'z', 1..500)),
        names: bool,
        changes in prop::collection::vec(any_change(), 1..12),
    ) {
        let mut extensions = extensions;
        if names {
            extensions.insert(0, (0x6803_f857, feature_names()));
        }
        let foreign =
            Foreign { version: 3, cluster_bits: 14, header_bytes: 112, extensions, backing };
        let mut bytes = disk(&foreign);
        let mut old = Header::parse(&bytes).unwrap();
        let unknown = old.extensions.unknown.clone();
        for change in changes {
            let mut new = old.clone();
            match change {
                Change::Backing(name) => new.backing_name = name,
                Change::DataFile(name) => new.extensions.data_file = name,
                Change::Size(size) => new.size_bytes = size,
                Change::Bitmaps(at) => new.extensions.bitmaps = at.map(|at| vec![at; 24]),
            }
            switch(&mut bytes, &old, &mut new);
            // Go on with what memory says, as an open image does.
            old = new;
            prop_assert_eq!(&old.extensions.unknown, &unknown);
        }
    }

    #[test] // Arbitrary bytes behind a valid start are refused or read, and written back they mean the same.
    fn arbitrary_headers_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..1500), fix: bool) {
        let foreign = Foreign {
            version: 3, cluster_bits: 10, header_bytes: 112, extensions: Vec::new(), backing: None,
        };
        let mut all = foreign.bytes();
        all.truncate(if fix { 112 } else { 24 });
        all.extend_from_slice(&bytes);
        if let Ok(header) = Header::parse(&all) {
            let _refused = header.check(all.len() as u64);
            if let Ok(again) = header.encode() {
                let again = Header::parse(&again).unwrap();
                prop_assert_eq!(meaning(&again), meaning(&header));
            }
        }
    }
}

#[test]
fn an_extension_that_has_no_room_for_its_own_length_is_refused() {
    let mut cluster = vec![0; 512];
    cluster[112..123].copy_from_slice(&[0, 0, 0, 99, 0, 0, 0, 3, 7, 7, 7]);
    for end in 128..=136 {
        let parsed = Extensions::parse(&cluster, 112, end);
        assert_eq!(parsed.is_ok(), end == 128 || end == 136, "{end}: {parsed:?}");
    }
}

#[test]
fn the_name_of_a_format_is_short() {
    for len in [0, 15, 16, 17] {
        let mut cluster = vec![0; 512];
        let mut extension = Vec::new();
        push(&mut extension, BACKING_FORMAT, &vec![b'q'; len]);
        cluster[112..112 + extension.len()].copy_from_slice(&extension);
        let parsed = Extensions::parse(&cluster, 112, 512);
        assert_eq!(parsed.is_ok(), len < 16, "{len}: {parsed:?}");
    }
}
