//! Passphrases from the command line: `--object secret,…` as for qemu, or a file. They are never printed; what
//! the library does with them is its own matter.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, bail, ensure};
use qcow2::Passphrase;

use crate::options::OptionList;

/// What `--object` defines: a secret by its id.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct SecretObject {
    id: String,
    origin: Origin,
    base64: bool,
}

#[derive(Clone, PartialEq, Eq)]
enum Origin {
    Data(String),
    File(PathBuf),
}

impl fmt::Debug for SecretObject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SecretObject").field("id", &self.id).finish_non_exhaustive()
    }
}

impl FromStr for SecretObject {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let list =
            OptionList::parse_implied(text, "qom-type").map_err(|error| error.to_string())?;
        if list.get("qom-type") != Some("secret") {
            return Err("only objects of type secret are known".to_owned());
        }
        for (name, _) in list.iter() {
            if !matches!(name, "qom-type" | "id" | "data" | "file" | "format") {
                return Err(format!("a secret has no property '{name}' here"));
            }
        }
        let id = list.get("id").ok_or("a secret needs an id")?.to_owned();
        let origin = match (list.get("data"), list.get("file")) {
            (Some(data), None) => Origin::Data(data.to_owned()),
            (None, Some(file)) => Origin::File(file.into()),
            _ => return Err("a secret needs either data or file".to_owned()),
        };
        let base64 = match list.get("format") {
            None | Some("raw") => false,
            Some("base64") => true,
            Some(other) => {
                return Err(format!("the format of a secret is raw or base64, not {other}"));
            }
        };
        Ok(Self { id, origin, base64 })
    }
}

/// Where passphrases come from.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct Secrets {
    /// A secret that options refer to by its id: secret,id=ID,file=FILE or secret,id=ID,data=TEXT
    #[arg(long = "object", value_name = "OBJECT")]
    objects: Vec<SecretObject>,

    /// The passphrase of encrypted images that no option names a secret for
    #[arg(long, value_name = "FILE")]
    passphrase_file: Option<PathBuf>,
}

impl Secrets {
    /// Every passphrase: an image takes the one that fits.
    ///
    /// # Errors
    /// As [`Secrets::passphrase`].
    pub(crate) fn all(&self) -> anyhow::Result<Vec<Passphrase>> {
        let mut all = Vec::new();
        for object in &self.objects {
            all.push(object.passphrase()?);
        }
        if let Some(file) = &self.passphrase_file {
            all.push(Passphrase::new(without_newline(read(file)?)));
        }
        Ok(all)
    }

    /// The passphrases of the objects with these ids, or every one where there are no ids.
    ///
    /// # Errors
    /// As [`Secrets::passphrase`].
    pub(crate) fn named(&self, ids: &[String]) -> anyhow::Result<Vec<Passphrase>> {
        match ids {
            [] => self.all(),
            ids => ids.iter().map(|id| self.passphrase(Some(id))).collect(),
        }
    }

    /// Whether there are objects, and whether there is a file.
    pub(crate) fn given(&self) -> (bool, bool) {
        (!self.objects.is_empty(), self.passphrase_file.is_some())
    }

    /// The passphrase by the id of its object, or the one from the file.
    ///
    /// # Errors
    /// An id that no object has, no file where none was named, a file that cannot be read.
    pub(crate) fn passphrase(&self, id: Option<&str>) -> anyhow::Result<Passphrase> {
        match (id, &self.passphrase_file) {
            (Some(id), _) => {
                let object = self.objects.iter().rev().find(|object| object.id == id);
                object
                    .with_context(|| {
                        format!("No secret with id '{id}': define it by --object secret,id={id},file=FILE")
                    })?
                    .passphrase()
            }
            (None, Some(file)) => Ok(Passphrase::new(without_newline(read(file)?))),
            (None, None) => bail!("a passphrase is needed: name a file by --passphrase-file"),
        }
    }
}

impl SecretObject {
    fn passphrase(&self) -> anyhow::Result<Passphrase> {
        let bytes = match &self.origin {
            Origin::Data(data) => data.clone().into_bytes(),
            Origin::File(file) => read(file)?,
        };
        let bytes = match self.base64 {
            false => bytes,
            true => from_base64(&bytes)
                .with_context(|| format!("secret '{}' is not base64", self.id))?,
        };
        Ok(Passphrase::new(bytes))
    }
}

fn read(file: &Path) -> anyhow::Result<Vec<u8>> {
    let bytes = std::fs::read(file);
    bytes.with_context(|| format!("cannot read the passphrase from {}", file.display()))
}

/// Editors end a file with a newline that nobody typed.
fn without_newline(mut bytes: Vec<u8>) -> Vec<u8> {
    if bytes.last() == Some(&b'\n') {
        bytes.pop();
    }
    bytes
}

fn from_base64(text: &[u8]) -> anyhow::Result<Vec<u8>> {
    let text: Vec<u8> = text.iter().copied().filter(|byte| !byte.is_ascii_whitespace()).collect();
    ensure!(text.len().is_multiple_of(4), "its length is no multiple of four");
    let end = text.len() - text.iter().rev().take_while(|byte| **byte == b'=').count();
    ensure!(text.len() - end <= 2, "it is padded by more than two signs");
    let mut decoded = Vec::with_capacity(text.len() / 4 * 3);
    let (mut bits, mut held) = (0_u32, 0);
    for byte in text.iter().take(end) {
        let value = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => bail!("it holds a sign outside the alphabet"),
        };
        bits = (bits << 6 | u32::from(value)) & 0xffff;
        held += 6;
        if held >= 8 {
            held -= 8;
            let [_, _, _, byte] = (bits >> held & 0xff).to_be_bytes();
            decoded.push(byte);
        }
    }
    Ok(decoded)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secrets(objects: &[&str]) -> Secrets {
        let objects = objects.iter().map(|object| object.parse().unwrap()).collect();
        Secrets { objects, passphrase_file: None }
    }

    #[test]
    fn secrets_are_found_by_their_id() {
        let secrets = secrets(&["secret,id=a,data=x,,y", "secret,id=b,data=YWJj,format=base64"]);
        assert_eq!(secrets.passphrase(Some("a")).unwrap(), Passphrase::new("x,y"));
        assert_eq!(secrets.passphrase(Some("b")).unwrap(), Passphrase::new("abc"));
        assert!(secrets.passphrase(Some("c")).is_err());
        assert!(secrets.passphrase(None).is_err());
        assert_eq!(secrets.all().unwrap().len(), 2);
        assert_eq!(secrets.named(&[]).unwrap().len(), 2);
        assert_eq!(secrets.named(&["b".to_owned()]).unwrap(), [Passphrase::new("abc")]);
        assert!(secrets.named(&["b".to_owned(), "c".to_owned()]).is_err());
    }

    #[test]
    fn objects_that_are_no_secrets_are_refused() {
        for text in ["tls-creds,id=a", "secret,data=x", "secret,id=a", "secret,id=a,data=x,keyid=b"]
        {
            assert!(text.parse::<SecretObject>().is_err(), "{text}");
        }
    }

    #[test]
    fn base64_is_strict() {
        assert_eq!(from_base64(b"").unwrap(), b"");
        assert_eq!(from_base64(b"AA==").unwrap(), [0]);
        assert_eq!(from_base64(b"/+8=\n").unwrap(), [0xff, 0xef]);
        for text in ["A", "A===", "AA!=", "AA=A"] {
            assert!(from_base64(text.as_bytes()).is_err(), "{text}");
        }
    }

    #[test]
    fn a_secret_does_not_appear_in_debug_output() {
        let object: SecretObject = "secret,id=a,data=hidden".parse().unwrap();
        assert!(!format!("{object:?}").contains("hidden"));
    }
}
