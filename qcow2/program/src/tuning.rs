//! Options of `--image-opts` that change how fast or in how much memory QEMU works, and nothing of what an image holds:
//! they may be given and do nothing here, with a value that QEMU takes. What names a file or a lock is not among them.

use anyhow::bail;

use crate::options::switch;
use crate::size::Size;

/// What an option takes.
#[derive(Clone, Copy)]
enum Value {
    Switch,
    Number,
    Size,
    /// One of these words.
    Word(&'static [&'static str]),
    Text,
}

const OVERLAPS: Value = Value::Word(&["none", "constant", "cached", "all"]);

/// Sorted by who takes them: every layer, qcow2, files.
const OPTIONS: [(&str, Value); 35] = [
    ("active", Value::Switch),
    ("auto-read-only", Value::Switch),
    ("cache.direct", Value::Switch),
    ("cache.no-flush", Value::Switch),
    ("detect-zeroes", Value::Word(&["off", "on", "unmap"])),
    ("discard", Value::Word(&["ignore", "off", "on", "unmap"])),
    ("node-name", Value::Text),
    ("cache-clean-interval", Value::Number),
    ("cache-size", Value::Size),
    ("discard-no-unref", Value::Switch),
    ("l2-cache-entry-size", Value::Size),
    ("l2-cache-size", Value::Size),
    ("lazy-refcounts", Value::Switch),
    ("overlap-check", OVERLAPS),
    ("overlap-check.active-l1", Value::Switch),
    ("overlap-check.active-l2", Value::Switch),
    ("overlap-check.bitmap-directory", Value::Switch),
    ("overlap-check.inactive-l1", Value::Switch),
    ("overlap-check.inactive-l2", Value::Switch),
    ("overlap-check.main-header", Value::Switch),
    ("overlap-check.refcount-block", Value::Switch),
    ("overlap-check.refcount-table", Value::Switch),
    ("overlap-check.snapshot-table", Value::Switch),
    ("overlap-check.template", OVERLAPS),
    ("pass-discard-other", Value::Switch),
    ("pass-discard-request", Value::Switch),
    ("pass-discard-snapshot", Value::Switch),
    ("refcount-cache-size", Value::Size),
    ("encrypt.format", Value::Word(&["luks", "aes"])),
    ("aio", Value::Word(&["threads", "native", "io_uring"])),
    ("aio-max-batch", Value::Number),
    ("drop-cache", Value::Switch),
    ("pr-manager", Value::Text),
    ("x-check-cache-dropped", Value::Switch),
    // Of a file below: it is opened as the image needs it.
    ("file.read-only", Value::Switch),
];

/// Whether an option is known and does nothing.
///
/// # Errors
/// A value that QEMU does not take either.
pub(crate) fn is_tuning(name: &str, value: &str) -> anyhow::Result<bool> {
    let find = |wanted: &str| OPTIONS.iter().find(|(known, _)| *known == wanted);
    let of_data_file = name.strip_prefix("data-file.").unwrap_or(name);
    let of_file = of_data_file.strip_prefix("file.").unwrap_or(of_data_file);
    let Some((_, takes)) = find(of_data_file).or_else(|| find(of_file)) else {
        return Ok(false);
    };
    match takes {
        Value::Switch => {
            switch(name, value)?;
        }
        Value::Number if value.parse::<u64>().is_err() => {
            bail!("Parameter '{name}' expects a number, not '{value}'")
        }
        Value::Size if value.parse::<Size>().is_err() => {
            bail!("Parameter '{name}' expects a size, not '{value}'")
        }
        Value::Word(words) if !words.contains(&value) => {
            bail!("Parameter '{name}' expects one of {}, not '{value}'", words.join(", "))
        }
        Value::Number | Value::Size | Value::Word(_) | Value::Text => {}
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_that_do_nothing_are_known_by_name_and_value() {
        for (name, value) in [
            ("discard", "unmap"),
            ("cache.direct", "on"),
            ("file.cache.direct", "off"),
            ("file.aio", "io_uring"),
            ("data-file.file.aio", "native"),
            ("l2-cache-size", "1M"),
            ("overlap-check", "all"),
            ("overlap-check.inactive-l2", "on"),
            ("file.read-only", "on"),
            ("cache-clean-interval", "5"),
        ] {
            assert!(is_tuning(name, value).unwrap(), "{name}");
        }
        for name in ["cache.foo", "overlap-check.foo", "pass-discard-foo", "foo", "file.foo"] {
            assert!(!is_tuning(name, "on").unwrap(), "{name}");
        }
        for (name, value) in [
            ("discard", "foo"),
            ("cache.direct", "foo"),
            ("file.aio", "foo"),
            ("l2-cache-size", "foo"),
            ("overlap-check", "foo"),
            ("cache-clean-interval", "foo"),
        ] {
            let error = is_tuning(name, value).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("foo"), "{error}");
        }
    }
}
