//! The names in a client's certificate. The certificate was found valid before; here nothing is judged, and what cannot
//! be read is left out.
//!
//! Source: RFC 5280, 4.1.2.4 "Issuer" (the type Name) and 4.2.1.6 "Subject Alternative Name".

use rustls::pki_types::CertificateDer;
use webpki::EndEntityCert;

use crate::access::{ClientName, Identity};

/// DER tags of the types that a name is made of.
mod tag {
    pub(super) const OBJECT_IDENTIFIER: u8 = 0x06;
    pub(super) const UTF8_STRING: u8 = 0x0c;
    pub(super) const PRINTABLE_STRING: u8 = 0x13;
    pub(super) const IA5_STRING: u8 = 0x16;
    pub(super) const SEQUENCE: u8 = 0x30;
    pub(super) const SET: u8 = 0x31;
}

/// id-at-commonName.
const COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];

/// The common names and the DNS names of a certificate.
pub(super) fn identity(certificate: &CertificateDer<'_>) -> Identity {
    let Ok(certificate) = EndEntityCert::try_from(certificate) else { return Identity::default() };
    let mut names: Vec<_> =
        common_names(certificate.subject()).into_iter().map(ClientName::Common).collect();
    names.extend(certificate.valid_dns_names().map(|name| ClientName::Dns(name.to_owned())));
    Identity { names }
}

/// The common names in the content of a Name; none where any of it cannot be read.
fn common_names(name: &[u8]) -> Vec<String> {
    let mut names = Vec::new();
    let mut rest = name;
    while !rest.is_empty() {
        let Some(relative) = take(&mut rest, tag::SET) else { return Vec::new() };
        let mut attributes = relative;
        while !attributes.is_empty() {
            match take(&mut attributes, tag::SEQUENCE).map(common_name) {
                None => return Vec::new(),
                Some(found) => names.extend(found),
            }
        }
    }
    names
}

/// The value of an attribute that is a common name, and can be one: text without NUL.
fn common_name(mut attribute: &[u8]) -> Option<String> {
    let kind = take(&mut attribute, tag::OBJECT_IDENTIFIER)?;
    let text = [tag::UTF8_STRING, tag::PRINTABLE_STRING, tag::IA5_STRING]
        .into_iter()
        .find_map(|tag| take(&mut attribute, tag))?;
    let text = std::str::from_utf8(text).ok()?;
    let is_name = kind == COMMON_NAME && attribute.is_empty();
    (is_name && !text.is_empty() && !text.contains('\0')).then(|| text.to_owned())
}

/// Takes the content of an element of this type from the front of `input`; leaves `input` alone where there is none.
fn take<'a>(input: &mut &'a [u8], tag: u8) -> Option<&'a [u8]> {
    let (found, rest) = input.split_first()?;
    let (first, rest) = rest.split_first()?;
    let (len, rest) = match *first {
        short @ 0..=0x7f => (usize::from(short), rest),
        0x81 => rest.split_first().map(|(len, rest)| (usize::from(*len), rest))?,
        0x82 => {
            let (len, rest) = rest.split_first_chunk::<2>()?;
            (usize::from(u16::from_be_bytes(*len)), rest)
        }
        // No name is longer than 64 KiB.
        _ => return None,
    };
    let (content, rest) = rest.split_at_checked(len)?;
    if *found != tag {
        return None;
    }
    *input = rest;
    Some(content)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A Name of one attribute.
    fn name(kind: &[u8], string_tag: u8, text: &[u8]) -> Vec<u8> {
        let element = |tag: u8, content: &[u8]| {
            let mut bytes = vec![tag, u8::try_from(content.len()).unwrap()];
            bytes.extend_from_slice(content);
            bytes
        };
        let mut attribute = element(tag::OBJECT_IDENTIFIER, kind);
        attribute.extend(element(string_tag, text));
        element(tag::SET, &element(tag::SEQUENCE, &attribute))
    }

    #[test]
    fn common_names_are_found_among_other_attributes() {
        let organisation = name(&[0x55, 0x04, 0x0a], tag::UTF8_STRING, b"Sendense");
        let first = name(COMMON_NAME, tag::UTF8_STRING, "böse".as_bytes());
        let second = name(COMMON_NAME, tag::PRINTABLE_STRING, b"backup-1");
        let all = [organisation, first, second].concat();
        assert_eq!(common_names(&all), ["böse", "backup-1"]);
        assert!(common_names(&[]).is_empty());
    }

    #[test]
    fn what_cannot_be_a_name_is_none() {
        assert!(common_names(&name(COMMON_NAME, tag::UTF8_STRING, b"a\0b")).is_empty());
        assert!(common_names(&name(COMMON_NAME, tag::UTF8_STRING, b"")).is_empty());
        assert!(common_names(&name(COMMON_NAME, tag::UTF8_STRING, b"\xff")).is_empty());
        assert!(common_names(&name(COMMON_NAME, 0x1e, b"\0a")).is_empty());
        let good = name(COMMON_NAME, tag::UTF8_STRING, b"good");
        for cut in 1..good.len() {
            assert!(common_names(&good[..cut]).is_empty(), "{cut}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_do_not_panic(bytes in any::<Vec<u8>>()) {
            common_names(&bytes);
            prop_assert_eq!(identity(&CertificateDer::from(bytes)), Identity::default());
        }
    }
}
