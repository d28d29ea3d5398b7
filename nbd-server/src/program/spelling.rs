//! What was probably meant by a name that is not known. Which names there are is told where they are read.

/// The name that differs in a letter or two, and in nothing where only case and separators do.
pub(super) fn nearest(
    name: &str,
    known: impl IntoIterator<Item = &'static str>,
) -> Option<&'static str> {
    let plain = |text: &str| text.to_ascii_lowercase().replace(['-', '_'], "");
    let name = plain(name);
    let candidates = known.into_iter().map(|known| (distance(&name, &plain(known)), known));
    candidates.filter(|(distance, _)| *distance <= 2).min().map(|(_, name)| name)
}

/// How many letters have to be put in, taken out or changed.
fn distance(one: &str, other: &str) -> usize {
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (above, a) in (1..).zip(one.bytes()) {
        let mut diagonal = above - 1;
        let mut left = above;
        let mut next = vec![above];
        for (b, up) in other.bytes().zip(row.iter().skip(1)) {
            let changed = diagonal + usize::from(a != b);
            diagonal = *up;
            left = changed.min(up + 1).min(left + 1);
            next.push(left);
        }
        row = next;
    }
    row.last().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn misspelt_names_are_recognised() {
        let known = ["readonly", "exportname", "passphrase-file"];
        for (name, meant) in [
            ("readonyl", Some("readonly")),
            ("read_only", Some("readonly")),
            ("export_name", Some("exportname")),
            ("passphrase_file", Some("passphrase-file")),
            ("colour", None),
        ] {
            assert_eq!(nearest(name, known), meant);
        }
        assert_eq!(distance("kitten", "sitting"), 3);
    }
}
