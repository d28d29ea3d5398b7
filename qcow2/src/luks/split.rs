//! The anti-forensic splitter: a key blown up to thousands of stripes, all of which are needed to get it back, so that
//! wiping a few sectors of a medium that remaps them wipes the key. No cipher is at work here.

use zeroize::Zeroizing;

use crate::encryption::LuksHash;

/// Fills the last stripe of `material`, whose other stripes are random, so that [`merge`] gives back `key`.
pub(super) fn split(hash: LuksHash, key: &[u8], material: &mut [u8]) {
    let Some(body) = material.len().checked_sub(key.len()) else { return };
    let (random, last) = material.split_at_mut(body);
    let block = fold(hash, key.len(), random);
    last.copy_from_slice(&block);
    xor(last, key);
}

/// The key of `key_bytes` bytes that `material` holds; some other key where a single bit is not as written.
pub(super) fn merge(hash: LuksHash, key_bytes: usize, material: &[u8]) -> Zeroizing<Vec<u8>> {
    let (random, last) = material.split_at(material.len().saturating_sub(key_bytes));
    let mut key = fold(hash, key_bytes, random);
    xor(&mut key, last);
    key
}

fn fold(hash: LuksHash, key_bytes: usize, stripes: &[u8]) -> Zeroizing<Vec<u8>> {
    let mut block = Zeroizing::new(vec![0; key_bytes]);
    for stripe in stripes.chunks_exact(key_bytes.max(1)) {
        xor(&mut block, stripe);
        hash.diffuse(&mut block);
    }
    block
}

fn xor(into: &mut [u8], other: &[u8]) {
    into.iter_mut().zip(other).for_each(|(byte, other)| *byte ^= other);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_split_key_comes_back_and_every_bit_of_it_matters() {
        for hash in [LuksHash::Sha1, LuksHash::Sha256, LuksHash::Sha512] {
            let key: Vec<u8> = (0..64).collect();
            let mut material: Vec<u8> = (0..64 * 50u32).map(|i| (i * 7 % 251) as u8).collect();
            split(hash, &key, &mut material);
            assert_eq!(*merge(hash, 64, &material), key);
            for at in [0, 700, 64 * 49, 64 * 50 - 1] {
                let mut damaged = material.clone();
                damaged[at] ^= 1;
                assert_ne!(*merge(hash, 64, &damaged), key, "{at}");
            }
        }
    }
}
