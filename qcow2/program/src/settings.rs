//! The options of image formats that `-o` takes: their names, kinds and defaults, for help and for what `create` and
//! `convert` say they do. What they mean is in `making`.

use std::fmt::Write;

use anyhow::{anyhow, bail};

use crate::format::Format;
use crate::options::{OptionList, switch};
use crate::size::Size;

/// What kind of value an option takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Text,
    Size,
    Number,
    Switch,
}

/// One option of a format.
struct Setting {
    name: &'static str,
    kind: Kind,
    /// What holds, and is said, where it is not given.
    default: Option<&'static str>,
    help: &'static str,
    /// Whether `amend` takes it, too.
    can_amend: bool,
    /// Whether `create` does.
    can_create: bool,
}

const fn setting(name: &'static str, kind: Kind, help: &'static str) -> Setting {
    Setting { name, kind, default: None, help, can_amend: false, can_create: true }
}

impl Setting {
    const fn or(self, default: &'static str) -> Self {
        Self { default: Some(default), ..self }
    }

    const fn amendable(self) -> Self {
        Self { can_amend: true, ..self }
    }

    const fn only_amendable(self) -> Self {
        Self { can_amend: true, can_create: false, ..self }
    }
}

/// In the order in which `create` tells them.
const QCOW2: &[Setting] = &[
    setting("encryption", Kind::Switch, "refused: the AES mode of old is not safe"),
    setting("encrypt.format", Kind::Text, "luks"),
    setting("encrypt.key-secret", Kind::Text, "id of the secret with the passphrase"),
    setting("encrypt.cipher-alg", Kind::Text, "aes-256 or aes-128"),
    setting("encrypt.cipher-mode", Kind::Text, "xts"),
    setting("encrypt.ivgen-alg", Kind::Text, "plain64"),
    setting("encrypt.hash-alg", Kind::Text, "sha256, sha1, sha224, sha384 or sha512"),
    setting("encrypt.state", Kind::Text, "active or inactive: what becomes of the key slots")
        .only_amendable(),
    setting("encrypt.keyslot", Kind::Number, "the one slot that is meant").only_amendable(),
    setting("encrypt.old-secret", Kind::Text, "id of the secret whose slots are meant")
        .only_amendable(),
    setting("encrypt.new-secret", Kind::Text, "id of the secret that shall open the image, too")
        .only_amendable(),
    setting("encrypt.iter-time", Kind::Number, "milliseconds that a try of a passphrase costs")
        .amendable(),
    setting("cluster_size", Kind::Size, "bytes of a cluster, 512 to 2M").or("65536"),
    setting("extended_l2", Kind::Switch, "32 subclusters a cluster").or("off"),
    setting("preallocation", Kind::Text, "off, metadata, falloc or full"),
    setting("compression_type", Kind::Text, "zlib or zstd").or("zlib"),
    setting("size", Kind::Size, "size of the disk").amendable(),
    setting("compat", Kind::Text, "version of the format: 1.1 (or v3), 0.10 (or v2)").amendable(),
    setting("backing_file", Kind::Text, "image below, by its path seen from the new one")
        .amendable(),
    setting("backing_fmt", Kind::Text, "its format").amendable(),
    setting("data_file", Kind::Text, "file for guest data, by its path seen from the image")
        .amendable(),
    setting("data_file_raw", Kind::Switch, "that file reads like the disk without the image")
        .amendable(),
    setting("lazy_refcounts", Kind::Switch, "count references late").or("off").amendable(),
    setting("refcount_bits", Kind::Number, "bits of a reference count, 1 to 64")
        .or("16")
        .amendable(),
    EXTENT_SIZE_HINT,
];

/// A hint, which is not needed: clusters are allocated in large steps.
const EXTENT_SIZE_HINT: Setting =
    setting("extent_size_hint", Kind::Size, "taken for qemu-img's sake");

const RAW: &[Setting] = &[
    setting("size", Kind::Size, "size of the disk"),
    setting("preallocation", Kind::Text, "off, falloc or full"),
    EXTENT_SIZE_HINT,
];

fn settings(format: Format) -> &'static [Setting] {
    match format {
        Format::Qcow2 => QCOW2,
        Format::Raw => RAW,
        Format::Vmdk => &[],
    }
}

/// Whether options are for a new image or for one that is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    Create,
    Amend,
}

impl Setting {
    fn is_for(&self, purpose: Purpose) -> bool {
        match purpose {
            Purpose::Create => self.can_create,
            Purpose::Amend => self.can_amend,
        }
    }
}

/// Refuses names that the format does not have, and values that are not of their kind.
///
/// # Errors
/// Each with the name.
pub(crate) fn check(list: &OptionList, format: Format, purpose: Purpose) -> anyhow::Result<()> {
    for (name, value) in list.iter() {
        let known = settings(format).iter().find(|setting| setting.name == name);
        let Some(setting) = known.filter(|setting| setting.is_for(purpose)) else {
            let hint = match known {
                Some(_) if purpose == Purpose::Amend => {
                    "\nThis option is only supported for image creation".to_owned()
                }
                Some(_) => "\nThis option is only supported by amend".to_owned(),
                None => format!(" (-f {format} -o help lists what there is)"),
            };
            bail!("Invalid parameter '{name}'{hint}");
        };
        match setting.kind {
            Kind::Text => {}
            Kind::Size => drop(size(name, value)?),
            Kind::Number => drop(number(name, value)?),
            Kind::Switch => drop(switch(name, value)?),
        }
    }
    Ok(())
}

/// A size by its name.
pub(crate) fn size(name: &str, value: &str) -> anyhow::Result<u64> {
    let size: Size = value.parse().map_err(|why| anyhow!("Parameter '{name}': {why}"))?;
    Ok(size.0)
}

/// A number by its name.
pub(crate) fn number(name: &str, value: &str) -> anyhow::Result<u64> {
    value.parse().map_err(|_| anyhow!("Parameter '{name}' expects a number, not '{value}'"))
}

/// Every option with its value, as `create` prints them before it starts.
pub(crate) fn describe(list: &OptionList, format: Format) -> String {
    let mut text = String::new();
    for setting in settings(format).iter().filter(|setting| setting.can_create) {
        let given = list.get(setting.name);
        let Some(value) = given.or(setting.default) else { continue };
        let value = match (setting.kind, value.parse::<Size>()) {
            (Kind::Size, Ok(size)) => size.0.to_string(),
            _ => value.replace(',', ",,"),
        };
        let separator = if text.is_empty() { "" } else { " " };
        // Writing into a string does not fail.
        let _ = write!(text, "{separator}{}={value}", setting.name);
    }
    text
}

/// The list that `-o help` prints.
pub(crate) fn help(format: Format, purpose: Purpose) -> String {
    let mut text = match purpose {
        Purpose::Create => format!("Supported {format} options:\n"),
        Purpose::Amend => format!("Amend options for '{format}':\n"),
    };
    let mut lines: Vec<_> = settings(format)
        .iter()
        .filter(|setting| setting.is_for(purpose))
        .map(|setting| {
            let kind = match setting.kind {
                Kind::Text => "<str>",
                Kind::Size => "<size>",
                Kind::Number => "<num>",
                Kind::Switch => "<bool (on/off)>",
            };
            let default = setting.default.map(|value| format!(" [default: {value}]"));
            let what = format!("  {}={kind}", setting.name);
            format!("{what:<24} - {}{}\n", setting.help, default.unwrap_or_default())
        })
        .collect();
    lines.sort();
    text.extend(lines);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(text: &str) -> OptionList {
        OptionList::parse(&[text.to_owned()]).unwrap()
    }

    #[test]
    fn options_are_told_in_order_with_their_defaults() {
        let text = describe(&list("size=1G,backing_file=a,,b"), Format::Qcow2);
        assert!(text.starts_with("cluster_size=65536 extended_l2=off "), "{text}");
        assert!(text.contains(" size=1073741824 backing_file=a,,b"), "{text}");
    }

    #[test]
    fn unknown_names_and_wrong_kinds_are_refused() {
        for text in [
            "bad=1",
            "size=x",
            "cluster_size",
            "refcount_bits=x",
            "extended_l2=1",
            "encrypt.state=active",
        ] {
            assert!(check(&list(text), Format::Qcow2, Purpose::Create).is_err(), "{text}");
        }
        let error = check(&list("cluster_size=1k"), Format::Qcow2, Purpose::Amend).unwrap_err();
        assert!(error.to_string().contains("only supported for image creation"), "{error}");
    }
}
