//! Lists of options as `-o` and `--image-opts` take them: `name=value,name=value`, a comma in a value doubled. Which
//! names there are is said where they are used.

use anyhow::{bail, ensure};

/// Names with values, in the order in which they were given; the last of a name counts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct OptionList(Vec<(String, String)>);

impl OptionList {
    /// Reads several lists as one.
    ///
    /// # Errors
    /// A list that is empty, or begins or ends in a comma.
    pub(crate) fn parse(lists: &[String]) -> anyhow::Result<Self> {
        let mut all = Vec::new();
        for list in lists {
            let trailing = list.len() - list.trim_end_matches(',').len();
            let valid = !list.is_empty() && !list.starts_with(',') && trailing % 2 == 0;
            ensure!(valid, "Invalid option list: {list}");
            all.extend(split(list).into_iter().map(|field| pair(&field)));
        }
        Ok(Self(all))
    }

    /// As [`OptionList::parse`], where the first may be a bare value, whose name is `implied`.
    pub(crate) fn parse_implied(list: &str, implied: &str) -> anyhow::Result<Self> {
        let fields = split(list);
        let mut all: Vec<_> = fields.iter().map(|field| pair(field)).collect();
        if let (Some(first), Some(field)) = (all.first_mut(), fields.first())
            && !field.contains('=')
        {
            *first = (implied.to_owned(), field.clone());
        }
        Ok(Self(all))
    }

    /// Whether help was asked for, by `help` or `?`.
    pub(crate) fn wants_help(&self) -> bool {
        self.0.iter().any(|(name, value)| value == "on" && (name == "help" || name == "?"))
    }

    /// The value of a name.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().rev().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// Every name with its value, as given.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// Gives a name a value, after all others.
    pub(crate) fn set(&mut self, name: &str, value: impl Into<String>) {
        self.0.push((name.to_owned(), value.into()));
    }
}

/// `on` or `off`, in every spelling that qemu takes.
pub(crate) fn switch(name: &str, value: &str) -> anyhow::Result<bool> {
    match value {
        "on" | "yes" | "true" | "y" => Ok(true),
        "off" | "no" | "false" | "n" => Ok(false),
        _ => bail!("Parameter '{name}' expects 'on' or 'off', not '{value}'"),
    }
}

/// Splits at commas; two of them are one that does not split.
fn split(text: &str) -> Vec<String> {
    let mut fields = vec![String::new()];
    let mut rest = text.chars().peekable();
    while let Some(next) = rest.next() {
        if next == ',' && rest.next_if_eq(&',').is_none() {
            fields.push(String::new());
        } else if let Some(last) = fields.last_mut() {
            last.push(next);
        }
    }
    fields
}

/// A bare name is a switch that is on, and off with `no` before it.
fn pair(field: &str) -> (String, String) {
    match (field.split_once('='), field.strip_prefix("no")) {
        (Some((name, value)), _) => (name.to_owned(), value.to_owned()),
        (None, Some(name)) => (name.to_owned(), "off".to_owned()),
        (None, None) => (field.to_owned(), "on".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(lists: &[&str]) -> anyhow::Result<OptionList> {
        OptionList::parse(&lists.iter().map(|list| (*list).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn lists_are_joined_and_the_last_value_counts() {
        let list =
            parse(&["size=1G,backing_file=a,,b", "size=2G", "lazy_refcounts", "nodata_file_raw"]);
        let list = list.unwrap();
        assert_eq!(list.get("size"), Some("2G"));
        assert_eq!(list.get("backing_file"), Some("a,b"));
        assert_eq!(list.get("lazy_refcounts"), Some("on"));
        assert_eq!(list.get("data_file_raw"), Some("off"));
        assert_eq!(list.get("compat"), None);
        assert!(!list.wants_help());
    }

    #[test]
    fn help_is_a_bare_word() {
        assert!(parse(&["help"]).unwrap().wants_help());
        assert!(parse(&["size=1G,?"]).unwrap().wants_help());
        assert!(!parse(&["backing_file=help"]).unwrap().wants_help());
    }

    #[test]
    fn lists_that_cannot_be_joined_are_refused() {
        for list in ["", ",size=1G", "size=1G,"] {
            let error = parse(&[list]).unwrap_err().to_string();
            assert_eq!(error, format!("Invalid option list: {list}"));
        }
        assert_eq!(parse(&["backing_file=a,,"]).unwrap().get("backing_file"), Some("a,"));
    }

    #[test]
    fn the_first_name_may_be_implied() {
        let list = OptionList::parse_implied("/x/disk.img,driver=raw", "file").unwrap();
        assert_eq!((list.get("file"), list.get("driver")), (Some("/x/disk.img"), Some("raw")));
    }
}
