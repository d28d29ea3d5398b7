//! The hashes of LUKS: how they are called, the derivation of keys, and the diffusion of the anti-forensic splitter.
//! What is derived and split is decided by the callers.

use sha1::Sha1;
use sha2::digest::Digest;
use sha2::{Sha224, Sha256, Sha384, Sha512};

use crate::encryption::LuksHash;

impl LuksHash {
    const ALL: [Self; 5] = [Self::Sha1, Self::Sha224, Self::Sha256, Self::Sha384, Self::Sha512];

    /// The name that LUKS headers record.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sha1 => "sha1",
            Self::Sha224 => "sha224",
            Self::Sha256 => "sha256",
            Self::Sha384 => "sha384",
            Self::Sha512 => "sha512",
        }
    }

    /// The hash of a name, where it is one of ours.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|hash| hash.name() == name)
    }

    /// PBKDF2 with HMAC of this hash; fills `key`.
    pub(crate) fn derive(self, secret: &[u8], salt: &[u8], rounds: u32, key: &mut [u8]) {
        match self {
            Self::Sha1 => pbkdf2::pbkdf2_hmac::<Sha1>(secret, salt, rounds, key),
            Self::Sha224 => pbkdf2::pbkdf2_hmac::<Sha224>(secret, salt, rounds, key),
            Self::Sha256 => pbkdf2::pbkdf2_hmac::<Sha256>(secret, salt, rounds, key),
            Self::Sha384 => pbkdf2::pbkdf2_hmac::<Sha384>(secret, salt, rounds, key),
            Self::Sha512 => pbkdf2::pbkdf2_hmac::<Sha512>(secret, salt, rounds, key),
        }
    }

    /// Spreads each bit of `block` over a digest's length: every piece as long as a digest becomes the digest of its
    /// number and itself, cut to its length.
    pub(crate) fn diffuse(self, block: &mut [u8]) {
        match self {
            Self::Sha1 => diffuse::<Sha1>(block),
            Self::Sha224 => diffuse::<Sha224>(block),
            Self::Sha256 => diffuse::<Sha256>(block),
            Self::Sha384 => diffuse::<Sha384>(block),
            Self::Sha512 => diffuse::<Sha512>(block),
        }
    }
}

fn diffuse<D: Digest>(block: &mut [u8]) {
    for (number, piece) in (0u32..).zip(block.chunks_mut(<D as Digest>::output_size())) {
        let digest = D::new().chain_update(number.to_be_bytes()).chain_update(&*piece).finalize();
        piece.iter_mut().zip(digest).for_each(|(byte, new)| *byte = new);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn keys_are_derived_as_rfc_6070_and_its_kin_say() {
        let derive = |hash: LuksHash, rounds, len| {
            let mut key = vec![0; len];
            hash.derive(b"password", b"salt", rounds, &mut key);
            hex(&key)
        };
        assert_eq!(derive(LuksHash::Sha1, 1, 20), "0c60c80f961f0e71f3a9b524af6012062fe037a6");
        assert_eq!(derive(LuksHash::Sha1, 4096, 20), "4b007901b765489abead49d926f721d065a429c1");
        assert_eq!(
            derive(LuksHash::Sha256, 4096, 32),
            "c5e478d59288c841aa530db6845c4c8d962893a001ce4e11a4963873aa98134a"
        );
        assert_eq!(
            derive(LuksHash::Sha512, 1, 64),
            "867f70cf1ade02cff3752599a3a53dc4af34c7a669815ae5d513554e1c8cf252\
             c02d470a285a0501bad999bfe943c08f050235d7d68b1da55e63f73b60a57fce"
        );
    }

    #[test]
    fn names_lead_back_to_their_hashes() {
        for hash in LuksHash::ALL {
            assert_eq!(LuksHash::named(hash.name()), Some(hash));
        }
        assert_eq!(LuksHash::named("ripemd160"), None);
    }
}
