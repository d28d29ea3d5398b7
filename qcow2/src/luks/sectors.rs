//! AES in XTS mode over sectors of 512 bytes, for guest data and for the material of key slots. Where the keys come
//! from is not known here.

use std::fmt;

use aes::cipher::KeyInit;
use aes::{Aes128, Aes256};
use xts_mode::{Array, Xts128, get_tweak_default};

use crate::cipher::{CIPHER_SECTOR_BYTES, Cipher};
use crate::encryption::LuksCipher;
use crate::units::{HostOffset, index};

/// What the tweak of a sector is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tweak {
    /// The low 32 bits of its number.
    Plain,
    /// Its number.
    Plain64,
}

impl Tweak {
    /// Its name in LUKS headers.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Plain64 => "plain64",
        }
    }
}

/// A cipher with its key.
pub(super) struct Sectors {
    keyed: Keyed,
    tweak: Tweak,
}

enum Keyed {
    Aes128(Box<Xts128<Aes128>>),
    Aes256(Box<Xts128<Aes256>>),
}

impl fmt::Debug for Sectors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.keyed {
            Keyed::Aes128(_) => "aes-128-xts",
            Keyed::Aes256(_) => "aes-256-xts",
        })
    }
}

impl Sectors {
    /// The cipher with a key, or `None` for a key of another length.
    pub(super) fn new(cipher: LuksCipher, tweak: Tweak, key: &[u8]) -> Option<Self> {
        let (data, tweaks) = key.split_at_checked(cipher.key_bytes() / 2)?;
        let keyed = match cipher {
            LuksCipher::Aes128Xts => Keyed::Aes128(Box::new(Xts128::new(
                Aes128::new_from_slice(data).ok()?,
                Aes128::new_from_slice(tweaks).ok()?,
            ))),
            LuksCipher::Aes256Xts => Keyed::Aes256(Box::new(Xts128::new(
                Aes256::new_from_slice(data).ok()?,
                Aes256::new_from_slice(tweaks).ok()?,
            ))),
        };
        Some(Self { keyed, tweak })
    }

    fn tweak_of(&self, sector: u64) -> Array<u8, xts_mode::array::sizes::U16> {
        get_tweak_default(u128::from(match self.tweak {
            Tweak::Plain => sector & u64::from(u32::MAX),
            Tweak::Plain64 => sector,
        }))
    }

    /// Each whole sector with its tweak.
    fn each<'a>(
        &self,
        at: HostOffset,
        sectors: &'a mut [u8],
    ) -> impl Iterator<Item = (&'a mut [u8], Array<u8, xts_mode::array::sizes::U16>)> {
        let first = at.0 / CIPHER_SECTOR_BYTES;
        let pieces = sectors.chunks_exact_mut(index(CIPHER_SECTOR_BYTES));
        pieces.zip(first..).map(|(piece, number)| (piece, self.tweak_of(number)))
    }
}

impl Cipher for Sectors {
    fn decrypt(&self, at: HostOffset, sectors: &mut [u8]) {
        let each = self.each(at, sectors);
        match &self.keyed {
            Keyed::Aes128(xts) => each.for_each(|(piece, tweak)| xts.decrypt_sector(piece, tweak)),
            Keyed::Aes256(xts) => each.for_each(|(piece, tweak)| xts.decrypt_sector(piece, tweak)),
        }
    }

    fn encrypt(&self, at: HostOffset, sectors: &mut [u8]) {
        let each = self.each(at, sectors);
        match &self.keyed {
            Keyed::Aes128(xts) => each.for_each(|(piece, tweak)| xts.encrypt_sector(piece, tweak)),
            Keyed::Aes256(xts) => each.for_each(|(piece, tweak)| xts.encrypt_sector(piece, tweak)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(hex: &str) -> Vec<u8> {
        (0..hex.len())
            .step_by(2)
            .map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap())
            .collect()
    }

    #[test]
    fn sectors_become_what_ieee_1619_says() {
        let zeros = Sectors::new(LuksCipher::Aes128Xts, Tweak::Plain64, &[0; 32]).unwrap();
        let mut sector = vec![0; 512];
        zeros.encrypt(HostOffset(0), &mut sector);
        let wanted = "917cf69ebd68b2ec9b9fe9a3eadda692cd43d2f59598ed858c02c2652fbf922e";
        assert_eq!(sector[..32], bytes(wanted));

        let key = "2718281828459045235360287471352662497757247093699959574966967627\
                   3141592653589793238462643383279502884197169399375105820974944592";
        let numbers = Sectors::new(LuksCipher::Aes256Xts, Tweak::Plain64, &bytes(key)).unwrap();
        let plain: Vec<u8> = (0..=255).chain(0..=255).collect();
        let mut sectors = [plain.clone(), plain.clone()].concat();
        numbers.encrypt(HostOffset(0xfe * 512), &mut sectors);
        let wanted = "1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b";
        assert_eq!(sectors[512..][..32], bytes(wanted));
        numbers.decrypt(HostOffset(0xfe * 512), &mut sectors);
        assert_eq!(sectors, [plain.clone(), plain].concat());
    }

    #[test]
    fn only_plain64_tells_sectors_apart_behind_two_tebibytes() {
        let seal = |tweak, sector: u64| {
            let mut bytes = vec![0; 512];
            let cipher = Sectors::new(LuksCipher::Aes256Xts, tweak, &[7; 64]).unwrap();
            cipher.encrypt(HostOffset(sector * 512), &mut bytes);
            bytes
        };
        assert_eq!(seal(Tweak::Plain, 5), seal(Tweak::Plain, 5 + (1 << 32)));
        assert_ne!(seal(Tweak::Plain64, 5), seal(Tweak::Plain64, 5 + (1 << 32)));
        assert_eq!(seal(Tweak::Plain, 5), seal(Tweak::Plain64, 5));
    }

    #[test]
    fn a_key_of_another_length_is_no_key() {
        assert!(Sectors::new(LuksCipher::Aes256Xts, Tweak::Plain64, &[0; 32]).is_none());
    }
}
