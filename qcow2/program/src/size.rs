//! Sizes as people write and read them: `64k`, `1.5G`, `196 KiB`. What a size is for, and its limits, are the caller's.

use std::str::FromStr;

/// The largest size that is accepted: offsets of files are signed.
pub(crate) const MAX_SIZE_BYTES: u64 = i64::MAX.unsigned_abs();

/// A number of bytes from the command line. `k`, `M`, `G`, `T`, `P` and `E` multiply by powers of 1024, `b` by one; a
/// fraction needs one of them; `0x` begins a number without any.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Size(pub(crate) u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "{text:?} is no size: write bytes, or a number with k, M, G, T, P or E behind it"
            )
        };
        let bytes = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
            Some(digits) if digits.bytes().all(|digit| digit.is_ascii_hexdigit()) => {
                u128::from_str_radix(digits, 16).map_err(|_| wrong())?
            }
            Some(_) => return Err(wrong()),
            None => decimal(text).ok_or_else(wrong)?,
        };
        match u64::try_from(bytes) {
            Ok(bytes) if bytes <= MAX_SIZE_BYTES => Ok(Self(bytes)),
            _ => {
                Err(format!("{text} is more than the {MAX_SIZE_BYTES} bytes that a file can have"))
            }
        }
    }
}

/// Digits, perhaps a fraction, perhaps a suffix. Exact up to the last byte, halves are rounded up.
fn decimal(text: &str) -> Option<u128> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let (unit, scaled) = match suffix {
        "" => (1, false),
        "b" | "B" => (1, false),
        "k" | "K" => (1 << 10, true),
        "m" | "M" => (1 << 20, true),
        "g" | "G" => (1 << 30, true),
        "t" | "T" => (1 << 40, true),
        "p" | "P" => (1 << 50, true),
        "e" | "E" => (1_u128 << 60, true),
        _ => return None,
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() || fraction.contains('.') {
        return None;
    }
    let whole: u128 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
    let digits = fraction.trim_end_matches('0');
    if digits.is_empty() {
        return whole.checked_mul(unit);
    }
    // More digits than these change no byte of an exbibyte.
    let digits = digits.get(..18).unwrap_or(digits);
    let ten = 10_u128.checked_pow(u32::try_from(digits.len()).ok()?)?;
    let part = digits.parse::<u128>().ok()?.checked_mul(unit)?;
    scaled.then_some(())?;
    whole.checked_mul(unit)?.checked_add((part + ten / 2) / ten)
}

/// A size for people, with three significant digits: `196 KiB`, `1.5 GiB`.
pub(crate) fn human(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    let mut divisor = 1_u64;
    let mut unit = UNITS.iter();
    let mut name = unit.next().copied().unwrap_or_default();
    // 1000 of a unit are written as 0.977 of the next.
    while u128::from(bytes) >= u128::from(divisor) * 1000 {
        let Some(next) = unit.next() else { break };
        (divisor, name) = (divisor << 10, next);
    }
    format!("{} {name}B", three_digits(bytes, divisor))
}

/// `bytes / divisor`, below 1000, as C's `%.3g` writes it.
fn three_digits(bytes: u64, divisor: u64) -> String {
    let (bytes, divisor) = (u128::from(bytes), u128::from(divisor));
    // The most places behind the point that leave three digits, seen after rounding.
    for places in (0..=3_u32).rev() {
        let scale = 10_u128.pow(places);
        let scaled = round_half_even(bytes * scale, divisor);
        if scaled >= 1000 {
            continue;
        }
        let (whole, part) = (scaled / scale, scaled % scale);
        let text = match places {
            0 => return whole.to_string(),
            _ => format!("{whole}.{part:0width$}", width = places as usize),
        };
        return text.trim_end_matches('0').trim_end_matches('.').to_owned();
    }
    "1e+03".to_owned()
}

fn round_half_even(number: u128, divisor: u128) -> u128 {
    let (whole, rest) = (number / divisor, number % divisor);
    match (rest * 2).cmp(&divisor) {
        std::cmp::Ordering::Less => whole,
        std::cmp::Ordering::Equal => whole + whole % 2,
        std::cmp::Ordering::Greater => whole + 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_their_suffixes() {
        let read = |text: &str| text.parse::<Size>().map(|size| size.0);
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("512b", 512),
            ("64k", 65536),
            ("64K", 65536),
            ("1.5G", 3 << 29),
            ("1.k", 1024),
            (".5M", 1 << 19),
            ("0x10000", 65536),
            ("2T", 2 << 40),
            ("7E", 7 << 60),
            ("1.00000000001k", 1024),
        ] {
            assert_eq!(read(text), Ok(bytes), "{text}");
        }
        for text in [
            "", ".", "k", "1kk", "1 k", "-1", "+1", "1.5", "1.5b", "0x", "0x1k", "1.2.3k", "8E",
            "1kiB",
        ] {
            assert!(read(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_written_with_three_digits() {
        for (bytes, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (1024, "1 KiB"),
            (200_704, "196 KiB"),
            (2_297_856, "2.19 MiB"),
            (1 << 30, "1 GiB"),
            (10 << 40, "10 TiB"),
            (1_023_590, "1e+03 KiB"),
            (i64::MAX.unsigned_abs(), "8 EiB"),
        ] {
            assert_eq!(human(bytes), text);
        }
    }
}
