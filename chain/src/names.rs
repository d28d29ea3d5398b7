//! How virtual machines, moments and layers are spelled in file names and export names: pure functions from text to
//! text. Where the names go on disk is in `layout`; nothing here touches a file or reads a clock.

use std::fmt;

use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::Offset;
use serde::{Deserialize, Serialize};

/// The longest export name, in bytes: what a name had to fit into in the system that wrote them first.
pub const MAX_EXPORT_NAME_BYTES: usize = 63;

/// The longest part of a file name that stands for a virtual machine, in bytes. With everything around it (the
/// longest is the temporary file of a manifest) a name stays below the 255 bytes that file systems allow.
pub const MAX_COMPONENT_BYTES: usize = 160;

/// Stands between the kept beginning of a name and the hash of the whole; never appears in a name that was not cut.
const CUT: char = '~';

/// The characters of a hash behind [`CUT`], each worth five bits.
const HASH_CHARS: usize = 12;

/// What a cut name ends in, in bytes.
const TAIL_BYTES: usize = CUT.len_utf8() + HASH_CHARS;

/// Whether a layer stands alone or on a parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LayerKind {
    /// Everything that was on the disk.
    Full,
    /// What changed since the parent.
    Incremental,
}

impl LayerKind {
    /// The word in file names and export names.
    pub const fn suffix(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Incremental => "incr",
        }
    }
}

impl fmt::Display for LayerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Full => "full",
            Self::Incremental => "incremental",
        })
    }
}

/// The name under which one layer is served while it is written:
/// `backup-{context}-disk{n}-{full|incr}-{YYYYMMDDTHHMMSS}`.
///
/// At most [`MAX_EXPORT_NAME_BYTES`] bytes. The context appears as it is, spaces and any script included; only `/`,
/// `\`, `%`, `~` and control characters are written as `%XX`, because a name may also become the name of a file and
/// may not hold a NUL. Where it does not fit, its end becomes `~` and a hash of the whole context, cut at a character:
/// two contexts that begin alike still get two names.
pub fn export_name(context: &str, disk: u32, kind: LayerKind, timestamp: Timestamp) -> String {
    let tail = format!("-disk{disk}-{}-{}", kind.suffix(), compact_timestamp(timestamp));
    let room = MAX_EXPORT_NAME_BYTES.saturating_sub("backup-".len() + tail.len());
    let context =
        fit(context, room, |_, c| !c.is_control() && !matches!(c, '/' | '\\' | '%' | CUT));
    format!("backup-{context}{tail}")
}

/// Spells any text as a part of a file name, in ASCII: letters, digits, `-`, `_` and (not first) `.` stay, every other
/// byte becomes `%XX`.
///
/// At most [`MAX_COMPONENT_BYTES`] bytes, never empty, never `.` or `..`. [`decode_component`] gives the text back,
/// unless it was too long: then its end is `~` and a hash of the whole. Different texts get different names.
pub fn encode_component(text: &str) -> String {
    if text.is_empty() {
        return cut_tail(text);
    }
    fit(text, MAX_COMPONENT_BYTES, |at, c| {
        c.is_ascii_alphanumeric() || matches!(c, '-' | '_') || (c == '.' && at > 0)
    })
}

/// The text that [`encode_component`] spelled so; `None` where it was cut, or where it never made such a name.
pub fn decode_component(name: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(name.len());
    let mut rest = name.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        rest = after;
        if first == b'%' {
            let (digits, after) = rest.split_at_checked(2)?;
            bytes.push(hex(digits)?);
            rest = after;
        } else {
            bytes.push(first);
        }
    }
    let text = String::from_utf8(bytes).ok()?;
    (encode_component(&text) == name).then_some(text)
}

/// Reads two upper-case hexadecimal digits.
fn hex(digits: &[u8]) -> Option<u8> {
    digits.iter().try_fold(0_u8, |value, digit| {
        let digit = match digit {
            b'0'..=b'9' => digit - b'0',
            b'A'..=b'F' => digit - b'A' + 10,
            _ => return None,
        };
        Some((value << 4) | digit)
    })
}

/// `YYYYMMDDTHHMMSS` in UTC. A moment before 1970 counts as the first second of 1970, so that every name has the same
/// length and order; parts of a second are left out.
pub fn compact_timestamp(timestamp: Timestamp) -> String {
    let at = Offset::UTC.to_datetime(timestamp.max(Timestamp::UNIX_EPOCH));
    format!(
        "{:04}{:02}{:02}T{:02}{:02}{:02}",
        at.year(),
        at.month(),
        at.day(),
        at.hour(),
        at.minute(),
        at.second()
    )
}

/// The moment that [`compact_timestamp`] spelled so.
pub fn parse_timestamp(text: &str) -> Option<Timestamp> {
    let digits = |from: usize, to: usize| {
        let part = text.get(from..to)?;
        part.bytes().all(|b| b.is_ascii_digit()).then(|| part.parse::<i16>().ok()).flatten()
    };
    let small = |from: usize, to: usize| i8::try_from(digits(from, to)?).ok();
    if text.len() != 15 || text.as_bytes().get(8) != Some(&b'T') {
        return None;
    }
    let at = DateTime::new(
        digits(0, 4)?,
        small(4, 6)?,
        small(6, 8)?,
        small(9, 11)?,
        small(11, 13)?,
        small(13, 15)?,
        0,
    );
    let moment = Offset::UTC.to_timestamp(at.ok()?).ok()?;
    (moment >= Timestamp::UNIX_EPOCH).then_some(moment)
}

/// Escapes what `keep` does not allow (it is told where in the text a character stands); where the result has more than
/// `room` bytes, its end becomes the hash.
fn fit(text: &str, room: usize, keep: impl Fn(usize, char) -> bool) -> String {
    let head_bytes = room.saturating_sub(TAIL_BYTES);
    let mut name = String::new();
    let mut head_end = 0;
    for (at, c) in text.char_indices() {
        push_escaped(&mut name, c, keep(at, c));
        if name.len() <= head_bytes {
            head_end = name.len();
        }
        if name.len() > room {
            name.truncate(head_end);
            return name + &cut_tail(text);
        }
    }
    name
}

fn push_escaped(out: &mut String, c: char, keep: bool) {
    if keep {
        return out.push(c);
    }
    const DIGITS: [char; 16] =
        ['0', '1', '2', '3', '4', '5', '6', '7', '8', '9', 'A', 'B', 'C', 'D', 'E', 'F'];
    for byte in c.encode_utf8(&mut [0; 4]).bytes() {
        out.extend(['%', DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]]);
    }
}

/// [`CUT`] and the hash of `text`.
fn cut_tail(text: &str) -> String {
    // Without the letters that are mistaken for digits or for each other.
    const ALPHABET: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";
    let hash = fnv1a(text.as_bytes());
    let mut tail = String::with_capacity(TAIL_BYTES);
    tail.push(CUT);
    for position in 0..HASH_CHARS {
        let bits = (hash >> (5 * position)) & 31;
        tail.push(ALPHABET.get(usize::try_from(bits).unwrap_or(0)).map_or('0', |&b| char::from(b)));
    }
    tail
}

/// FNV-1a with 128 bits, folded to 64. Not a cryptographic hash: whoever builds two texts that share it is refused when
/// the second file is created, because nothing is ever written over.
///
/// Source: "The FNV Non-Cryptographic Hash Algorithm" (draft-eastlake-fnv), offset basis and prime for 128 bits.
fn fnv1a(bytes: &[u8]) -> u64 {
    const BASIS: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    let hash =
        bytes.iter().fold(BASIS, |hash, byte| (hash ^ u128::from(*byte)).wrapping_mul(PRIME));
    let folded = (hash ^ (hash >> 64)) & u128::from(u64::MAX);
    u64::try_from(folded).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    fn at(text: &str) -> Timestamp {
        parse_timestamp(text).unwrap()
    }

    #[test]
    fn an_export_name_that_fits_is_spelled_exactly() {
        let name =
            export_name("ctx-pgtest1-20251006-203401", 0, LayerKind::Full, at("20251007T143022"));
        assert_eq!(name, "backup-ctx-pgtest1-20251006-203401-disk0-full-20251007T143022");
        assert_eq!(name.len(), 61);
        assert_eq!(
            export_name("web 01", 1, LayerKind::Incremental, at("20251008T020000")),
            "backup-web 01-disk1-incr-20251008T020000"
        );
        let longest = "x".repeat(29);
        let name = export_name(&longest, 3, LayerKind::Full, at("20251008T020000"));
        assert_eq!(name, format!("backup-{longest}-disk3-full-20251008T020000"));
        assert_eq!(name.len(), 63);
    }

    #[test]
    fn contexts_that_begin_alike_get_different_export_names_when_cut() {
        let moment = at("20251008T020000");
        let a = export_name("ctx-production-database-primary-01-x", 0, LayerKind::Full, moment);
        let b = export_name("ctx-production-database-primary-02-x", 0, LayerKind::Full, moment);
        assert_ne!(a, b);
        assert_eq!((a.len(), b.len()), (63, 63));
        assert!(a.starts_with("backup-ctx-production-d~"), "{a}");
    }

    #[test]
    fn a_cut_never_splits_a_character() {
        let name = export_name(
            &"ü€𝄞".repeat(20),
            4_294_967_295,
            LayerKind::Incremental,
            at("20251008T020000"),
        );
        assert!(name.len() <= 63, "{name}");
        assert!(name.starts_with("backup-ü€~"), "{name}");
        assert!(name.ends_with("-disk4294967295-incr-20251008T020000"), "{name}");
    }

    #[test]
    fn names_that_mean_something_to_a_path_are_spelled_out() {
        assert_eq!(encode_component("."), "%2E");
        assert_eq!(encode_component(".."), "%2E.");
        assert_eq!(encode_component("../../etc"), "%2E.%2F..%2Fetc");
        assert_eq!(encode_component("a b/ü\0"), "a%20b%2F%C3%BC%00");
        assert_eq!(encode_component("web-01.example_net"), "web-01.example_net");
        let dotted = format!(".{}", "x".repeat(MAX_COMPONENT_BYTES - 1));
        assert!(encode_component(&dotted).len() <= MAX_COMPONENT_BYTES);
        assert!(encode_component(&dotted).starts_with("%2Ex"));
    }

    #[test]
    fn only_names_that_were_made_here_are_decoded() {
        for name in ["%", "%2", "%2e", "a b", "%41", "%FF", "x~0123456789ab", "", ".", "ü"] {
            assert_eq!(decode_component(name), None, "{name:?}");
        }
    }

    #[test]
    fn the_hash_gives_the_published_value() {
        // The published 128-bit value of "foobar" is 0x343e1662793c64bf6f0d3597ba446f18.
        assert_eq!(fnv1a(b"foobar"), 0x343e_1662_793c_64bf ^ 0x6f0d_3597_ba44_6f18);
    }

    #[test]
    fn a_timestamp_before_1970_and_one_of_the_last_year_keep_the_length() {
        assert_eq!(compact_timestamp(Timestamp::MIN), "19700101T000000");
        assert_eq!(compact_timestamp(Timestamp::MAX).len(), 15);
        for text in
            ["20251308T020000", "20251008 020000", "+0251008T020000", "2025", "19691231T235959"]
        {
            assert_eq!(parse_timestamp(text), None, "{text}");
        }
    }

    /// Text that looks like what people type, and text that nobody types; often too long.
    fn any_text() -> impl Strategy<Value = String> {
        prop_oneof![
            "[a-zA-Z0-9 ._/~%-]{0,40}",
            "\\PC{0,60}",
            proptest::collection::vec(any::<char>(), 0..80).prop_map(String::from_iter),
            ("[a-z]{1,3}", 0_usize..400).prop_map(|(unit, times)| unit.repeat(times)),
        ]
    }

    fn any_moment() -> impl Strategy<Value = Timestamp> {
        (0_i64..253_000_000_000).prop_map(|second| Timestamp::from_second(second).unwrap())
    }

    proptest! {
        #[test]
        fn a_component_is_safe_and_either_reversible_or_hashed(text in any_text()) {
            let name = encode_component(&text);
            prop_assert!(!name.is_empty() && name.len() <= MAX_COMPONENT_BYTES);
            prop_assert!(!name.starts_with('.'));
            prop_assert!(name.bytes().all(|b| b.is_ascii_graphic() && b != b'/' && b != b':' && b != b'\\'));
            match decode_component(&name) {
                Some(back) => prop_assert_eq!(back, text),
                None => prop_assert_eq!(name.rfind(CUT), Some(name.len() - TAIL_BYTES)),
            }
        }

        #[test]
        fn different_texts_get_different_names(texts in proptest::collection::hash_set(any_text(), 2..60)) {
            let moment = at("20251008T020000");
            let mut components = HashMap::new();
            let mut exports = HashMap::new();
            for text in &texts {
                prop_assert_eq!(components.insert(encode_component(text), text), None);
                let export = export_name(text, 0, LayerKind::Full, moment);
                prop_assert_eq!(exports.insert(export, text), None);
            }
        }

        #[test]
        fn texts_that_differ_only_behind_the_cut_get_different_names(
            head in "[a-zü]{200}", a in "[a-z0-9]{1,9}", b in "[a-z0-9]{1,9}",
        ) {
            prop_assume!(a != b);
            let (a, b) = (head.clone() + &a, head + &b);
            prop_assert_ne!(encode_component(&a), encode_component(&b));
            let moment = at("20251008T020000");
            let name = |text: &str| export_name(text, 7, LayerKind::Full, moment);
            prop_assert_ne!(name(&a), name(&b));
        }

        #[test]
        fn an_export_name_fits_and_tells_disk_kind_and_second(
            text in any_text(), disk: u32, full: bool, moment in any_moment(),
        ) {
            let kind = if full { LayerKind::Full } else { LayerKind::Incremental };
            let name = export_name(&text, disk, kind, moment);
            prop_assert!(name.len() <= MAX_EXPORT_NAME_BYTES);
            prop_assert!(name.chars().all(|c| !c.is_control() && c != '/' && c != '\\'));
            let tail = format!("-disk{disk}-{}-{}", kind.suffix(), compact_timestamp(moment));
            prop_assert!(name.starts_with("backup-") && name.ends_with(&tail));
        }

        #[test]
        fn a_timestamp_reads_back_and_sorts(a in any_moment(), b in any_moment()) {
            prop_assert_eq!(parse_timestamp(&compact_timestamp(a)), Some(a));
            prop_assert_eq!(compact_timestamp(a).cmp(&compact_timestamp(b)), a.cmp(&b));
        }
    }
}
