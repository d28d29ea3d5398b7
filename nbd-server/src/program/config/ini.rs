//! The syntax of configuration files: sections, keys and values with the lines they stand on. Pure; what keys mean is
//! told in `read`.

use super::fault::Fault;

/// A section with what stands in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Section {
    pub(super) name: String,
    pub(super) line: usize,
    pub(super) entries: Vec<Entry>,
}

/// A key with its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) key: String,
    pub(super) value: String,
    pub(super) line: usize,
}

/// A file, taken apart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Document {
    pub(super) sections: Vec<Section>,
    /// What is wrong, with the line.
    pub(super) faults: Vec<(usize, Fault)>,
    /// The last line, where it has no end: somebody may still be writing it.
    pub(super) unfinished: Option<usize>,
}

/// Takes a file apart, as GLib's key files are, which the reference server reads. Goes on behind a broken line.
///
/// Source: nbd-server(5), "DESCRIPTION".
pub(super) fn parse(bytes: &[u8]) -> Document {
    let mut document = Document::default();
    let mut last = 0;
    for (number, line) in (1..).zip(bytes.split(|byte| *byte == b'\n')) {
        if line.is_empty() {
            continue;
        }
        last = number;
        if let Err(fault) = take_line(&mut document.sections, number, line) {
            document.faults.push((number, fault));
        }
    }
    if bytes.last().is_some_and(|byte| *byte != b'\n') {
        document.unfinished = Some(last);
    }
    document
}

fn take_line(sections: &mut Vec<Section>, line: usize, bytes: &[u8]) -> Result<(), Fault> {
    let text = std::str::from_utf8(bytes).map_err(|_| Fault::Utf8)?;
    if text.contains('\0') {
        return Err(Fault::Nul);
    }
    let text = text.strip_suffix('\r').unwrap_or(text);
    let text = text.trim_start_matches(|c: char| c.is_ascii_whitespace());
    if text.is_empty() || text.starts_with('#') {
        return Ok(());
    }
    if let Some(rest) = text.strip_prefix('[') {
        let name = header(rest)?.to_owned();
        sections.push(Section { name, line, entries: Vec::new() });
        return Ok(());
    }
    let (key, value) = text.split_once('=').ok_or(Fault::NoEquals)?;
    let key = key.trim_end();
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if key.is_empty() || !key.chars().all(is_name) {
        return Err(Fault::KeyName(key.to_owned()));
    }
    let value = unescape(value.trim_start_matches(|c: char| c.is_ascii_whitespace()))?;
    let section = sections.last_mut().ok_or(Fault::NoSection)?;
    section.entries.push(Entry { key: key.to_owned(), value, line });
    Ok(())
}

/// The name in a header, given what stands behind its `[`.
fn header(rest: &str) -> Result<&str, Fault> {
    let (name, behind) = rest.split_once(']').ok_or(Fault::Header)?;
    let is_fine = |c: char| !c.is_control() && c != '[';
    if name.is_empty() || !name.chars().all(is_fine) || !behind.trim().is_empty() {
        return Err(Fault::Header);
    }
    Ok(name)
}

fn unescape(value: &str) -> Result<String, Fault> {
    let mut text = String::with_capacity(value.len());
    let mut rest = value.chars();
    while let Some(next) = rest.next() {
        if next != '\\' {
            text.push(next);
            continue;
        }
        text.push(match rest.next() {
            Some('s') => ' ',
            Some('n') => '\n',
            Some('t') => '\t',
            Some('r') => '\r',
            Some('\\') => '\\',
            _ => return Err(Fault::Escape),
        });
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn flat(text: &str) -> Vec<String> {
        let document = parse(text.as_bytes());
        assert_eq!(document.faults, [], "{text}");
        let entry = |entry: &Entry| format!("{}:{}={}", entry.line, entry.key, entry.value);
        let section = |section: &Section| {
            let head = format!("{}:[{}]", section.line, section.name);
            std::iter::once(head).chain(section.entries.iter().map(entry)).collect::<Vec<_>>()
        };
        document.sections.iter().flat_map(section).collect()
    }

    #[test]
    fn sections_and_keys_are_read_with_their_lines() {
        let text = "# first\n\n[generic]\r\n\tport = 10809\n\n  # indented\n[a b] \nexportname=/x =y\\s\\\\\nflush  =true";
        let expected =
            ["3:[generic]", "4:port=10809", "7:[a b]", "8:exportname=/x =y \\", "9:flush=true"];
        assert_eq!(flat(text), expected);
        assert_eq!(parse(text.as_bytes()).unfinished, Some(9));
        assert_eq!(parse(b"[generic]\n").unfinished, None);
    }

    #[test]
    fn what_is_broken_is_found_with_its_line_and_the_rest_is_read() {
        let text = b"early = 1\n[ge\n[a]x\n[generic]\nport\n=1\nk y = 1\nv = \\q\n\xff = 1\nz = a\0b\nport = 1\n";
        let document = parse(text);
        let lines: Vec<usize> = document.faults.iter().map(|(line, _)| *line).collect();
        assert_eq!(lines, [1, 2, 3, 5, 6, 7, 8, 9, 10]);
        assert_eq!(document.faults[0].1, Fault::NoSection);
        assert_eq!(document.sections.len(), 1);
        assert_eq!(document.sections[0].entries.len(), 1);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let lines = bytes.split(|byte| *byte == b'\n').count();
            let document = parse(&bytes);
            prop_assert!(document.faults.iter().all(|(line, _)| (1..=lines).contains(line)));
        }

        #[test]
        fn what_is_written_is_read_back(value in "[^\\x00-\\x1f\\x7f \\\\][^\\x00-\\x1f\\x7f\\\\]{0,40}") {
            let document = parse(format!("[a]\n k = {value}\n").as_bytes());
            prop_assert_eq!(&document.faults, &[]);
            prop_assert_eq!(&document.sections[0].entries[0].value, &value);
        }
    }
}
