//! How `--disk` spells a disk: its source, then options, with commas between. What the hub makes of it is not decided
//! here.

use std::str::FromStr;

/// `SOURCE[,key=NUMBER][,size=BYTES]`; a comma that belongs to the source is doubled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct DiskSpec {
    /// Where it is read.
    pub(super) source: String,
    /// The hypervisor's key.
    pub(super) key: Option<i64>,
    /// Its size.
    pub(super) size_bytes: Option<u64>,
}

/// Why a text does not spell a disk.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum DiskSpecError {
    /// Nothing before the first comma.
    #[error("it must begin with a source: file:/absolute/path, nbd:// or nbd+unix://")]
    NoSource,
    /// A word that is no option.
    #[error(
        "there is no option {0:?}; known are key=NUMBER and size=BYTES (a comma that belongs to the source is doubled)"
    )]
    Unknown(String),
    /// An option given twice.
    #[error("{0}= stands there twice")]
    Twice(&'static str),
    /// A key that is no number.
    #[error("{0:?} is no number for key=")]
    Key(String),
    /// A size that is none.
    #[error(
        "{0:?} is no size for size=: bytes, or a number with K, M, G or T behind it (1K is 1024)"
    )]
    Size(String),
}

impl FromStr for DiskSpec {
    type Err = DiskSpecError;

    fn from_str(text: &str) -> Result<Self, DiskSpecError> {
        let mut words = words(text).into_iter();
        let source = words.next().filter(|word| !word.is_empty()).ok_or(DiskSpecError::NoSource)?;
        let mut spec = Self { source, key: None, size_bytes: None };
        for word in words {
            match word.split_once('=') {
                Some(("key", _)) if spec.key.is_some() => return Err(DiskSpecError::Twice("key")),
                Some(("key", number)) => {
                    let key = number.parse().map_err(|_| DiskSpecError::Key(number.to_owned()))?;
                    spec.key = Some(key);
                }
                Some(("size", _)) if spec.size_bytes.is_some() => {
                    return Err(DiskSpecError::Twice("size"));
                }
                Some(("size", text)) => {
                    let size = size(text).ok_or_else(|| DiskSpecError::Size(text.to_owned()))?;
                    spec.size_bytes = Some(size);
                }
                _ => return Err(DiskSpecError::Unknown(word)),
            }
        }
        Ok(spec)
    }
}

/// Splits at single commas; of a doubled one, one stays.
fn words(text: &str) -> Vec<String> {
    let (mut words, mut word) = (Vec::new(), String::new());
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        if letter != ',' {
            word.push(letter);
        } else if letters.next_if_eq(&',').is_some() {
            word.push(',');
        } else {
            words.push(std::mem::take(&mut word));
        }
    }
    words.push(word);
    words
}

/// A number of bytes, with a binary suffix or without.
fn size(text: &str) -> Option<u64> {
    let (number, shift) = match text.char_indices().next_back()? {
        (at, 'K' | 'k') => (text.get(..at)?, 10),
        (at, 'M' | 'm') => (text.get(..at)?, 20),
        (at, 'G' | 'g') => (text.get(..at)?, 30),
        (at, 'T' | 't') => (text.get(..at)?, 40),
        _ => (text, 0),
    };
    // A sign is no digit, though `parse` would take one.
    if !number.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    number.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_may_name_its_key_and_size_and_have_doubled_commas_in_its_path() {
        let found: DiskSpec = "file:/a,,b=c,size=5,key=2016".parse().unwrap();
        assert_eq!(found.source, "file:/a,b=c");
        assert_eq!((found.key, found.size_bytes), (Some(2016), Some(5)));
        let plain: DiskSpec = "nbd://h:1/e?bitmap=b".parse().unwrap();
        assert_eq!((plain.key, plain.size_bytes), (None, None));
    }

    #[test]
    fn sizes_take_binary_suffixes_and_nothing_else() {
        for (text, bytes) in [("0", 0), ("7K", 7 << 10), ("3m", 3 << 20), ("2G", 2 << 30)] {
            assert_eq!(size(text), Some(bytes), "{text}");
        }
        assert_eq!(size("1T"), Some(1 << 40));
        for text in ["", "K", "big", "1.5G", "-1", "+1", "1GB", "16777216T", "1ü"] {
            assert_eq!(size(text), None, "{text}");
        }
    }

    #[test]
    fn what_is_no_option_is_refused_with_those_that_are() {
        for text in ["file:/a,b", "file:/a,sise=5", "file:/a,", "file:/a,,,b=c"] {
            let error = text.parse::<DiskSpec>().unwrap_err().to_string();
            assert!(error.contains("key=NUMBER and size=BYTES"), "{text}: {error}");
        }
        assert_eq!("".parse::<DiskSpec>(), Err(DiskSpecError::NoSource));
        assert_eq!("file:/a,key=1,key=2".parse::<DiskSpec>(), Err(DiskSpecError::Twice("key")));
        assert_eq!(
            "file:/a,size=big".parse::<DiskSpec>(),
            Err(DiskSpecError::Size("big".to_owned()))
        );
        assert_eq!("file:/a,key=x".parse::<DiskSpec>(), Err(DiskSpecError::Key("x".to_owned())));
    }
}
