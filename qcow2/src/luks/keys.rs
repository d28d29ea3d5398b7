//! Key slots at work: trying a passphrase on one, filling one, and the digest that tells the right master key. Bytes
//! come in and go out; which slots are tried and where bytes are written is the driver's part.

use std::time::{Duration, Instant};

use zeroize::Zeroizing;

use super::layout::{DIGEST_BYTES, LuksHeader, MIN_ROUNDS, SALT_BYTES};
use super::sectors::Sectors;
use super::split::{merge, split};
use crate::cipher::Cipher;
use crate::encryption::{KeyCost, LuksHash, LuksOptions, Passphrase};
use crate::units::{HostOffset, index};

/// The digest costs this part of a slot: a wrong passphrase pays it for each slot.
const DIGEST_SHARE: u32 = 8;

/// The key that guest data is encrypted with.
pub(super) struct MasterKey(Zeroizing<Vec<u8>>);

impl MasterKey {
    /// The cipher for guest data.
    pub(super) fn cipher(&self, header: &LuksHeader) -> Option<Sectors> {
        Sectors::new(header.cipher, header.tweak, &self.0)
    }
}

/// The master key out of slot `slot`, if `passphrase` is the one that the slot was filled with.
pub(super) fn try_slot(
    header: &LuksHeader,
    slot: usize,
    mut material: Zeroizing<Vec<u8>>,
    passphrase: &Passphrase,
) -> Option<MasterKey> {
    let slot = header.slots.get(slot).filter(|slot| slot.enabled)?;
    let slot_key = derive(header, passphrase.bytes(), &slot.salt, slot.rounds);
    Sectors::new(header.cipher, header.tweak, &slot_key)?.decrypt(HostOffset(0), &mut material);
    let key = merge(header.hash, header.cipher.key_bytes(), &material);
    // Both are digests: their comparison tells nothing of the key.
    (digest(header, &key) == header.digest).then_some(MasterKey(key))
}

/// Fills a slot with the master key under a passphrase and gives its material. The header is changed in memory only:
/// material must be on disk before the header that enables it.
///
/// # Errors
/// What the system says that has no random numbers.
pub(super) fn fill_slot(
    header: &mut LuksHeader,
    slot: usize,
    key: &MasterKey,
    passphrase: &Passphrase,
    cost: KeyCost,
) -> Result<Vec<u8>, getrandom::Error> {
    let mut material = vec![0; header.material_bytes()];
    getrandom::fill(&mut material)?;
    let mut salt = [0; SALT_BYTES];
    getrandom::fill(&mut salt)?;
    let rounds = rounds(header.hash, header.cipher.key_bytes(), cost);
    let slot_key = derive(header, passphrase.bytes(), &salt, rounds);
    split(header.hash, &key.0, &mut material);
    if let Some(sectors) = Sectors::new(header.cipher, header.tweak, &slot_key) {
        sectors.encrypt(HostOffset(0), &mut material);
    }
    if let Some(slot) = header.slots.get_mut(slot) {
        slot.enabled = true;
        slot.rounds = rounds;
        slot.salt = salt;
    }
    Ok(material)
}

/// A new header with a new master key in slot 0: all bytes of its area.
///
/// # Errors
/// What the system says that has no random numbers.
pub(super) fn format(options: &LuksOptions) -> Result<Vec<u8>, getrandom::Error> {
    let mut header = LuksHeader::new(options.cipher, options.hash, uuid()?);
    let mut key = Zeroizing::new(vec![0; options.cipher.key_bytes()]);
    getrandom::fill(&mut key)?;
    let key = MasterKey(key);
    getrandom::fill(&mut header.digest_salt)?;
    let digest_rounds = rounds(options.hash, header.digest.len(), options.cost) / DIGEST_SHARE;
    header.digest_rounds = digest_rounds.max(MIN_ROUNDS);
    header.digest = digest(&header, &key.0);
    let material = fill_slot(&mut header, 0, &key, &options.passphrase, options.cost)?;
    let mut area = header.encode();
    if let Some(slot) = header.slots.first() {
        area.resize(index(slot.at()), 0);
    }
    area.extend_from_slice(&material);
    area.resize(index(header.area_bytes()), 0);
    Ok(area)
}

fn derive(header: &LuksHeader, secret: &[u8], salt: &[u8], rounds: u32) -> Zeroizing<Vec<u8>> {
    let mut key = Zeroizing::new(vec![0; header.cipher.key_bytes()]);
    header.hash.derive(secret, salt, rounds, &mut key);
    key
}

fn digest(header: &LuksHeader, key: &[u8]) -> [u8; DIGEST_BYTES] {
    let mut digest = [0; DIGEST_BYTES];
    header.hash.derive(key, &header.digest_salt, header.digest_rounds, &mut digest);
    digest
}

/// The rounds that cost what is asked for.
fn rounds(hash: LuksHash, key_bytes: usize, cost: KeyCost) -> u32 {
    let wanted = match cost {
        KeyCost::Rounds(rounds) => rounds,
        KeyCost::Milliseconds(wanted) => {
            let (rounds, took) = measure(hash, key_bytes);
            let rate = u128::from(rounds) * u128::from(wanted) * 1_000_000;
            let rounds = rate / took.as_nanos().max(1);
            u32::try_from(rounds).unwrap_or(u32::MAX)
        }
    };
    wanted.max(MIN_ROUNDS)
}

/// How many rounds of a key this machine does in some time, when nothing else keeps it busy: the best of a few tries
/// of some milliseconds.
pub(super) fn rounds_in(hash: LuksHash, key_bytes: usize, time: Duration) -> u64 {
    const ROUNDS: u32 = 2048;
    let mut key = vec![0; key_bytes];
    let best = (0..5).map(|_| {
        let start = Instant::now();
        hash.derive(b"measure", &[0; SALT_BYTES], ROUNDS, &mut key);
        start.elapsed()
    });
    let best = best.min().unwrap_or_default().as_nanos().max(1);
    u64::try_from(u128::from(ROUNDS) * time.as_nanos() / best).unwrap_or(u64::MAX)
}

/// How long some number of rounds takes: enough of them for the clock.
fn measure(hash: LuksHash, key_bytes: usize) -> (u32, Duration) {
    const ENOUGH: Duration = Duration::from_millis(100);
    let mut key = vec![0; key_bytes];
    let mut rounds: u32 = 1 << 12;
    loop {
        let start = Instant::now();
        hash.derive(b"measure", &[0; SALT_BYTES], rounds, &mut key);
        let took = start.elapsed();
        if took >= ENOUGH || rounds > 1 << 26 {
            return (rounds, took);
        }
        rounds = rounds.saturating_mul(4);
    }
}

/// A random UUID in its usual text form.
fn uuid() -> Result<String, getrandom::Error> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes)?;
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let groups = [0..8, 8..12, 12..16, 16..20, 20..32];
    Ok(groups.map(|group| hex.get(group).unwrap_or_default().to_owned()).join("-"))
}

#[cfg(test)]
mod tests {
    use block::ByteRange;

    use super::*;
    use crate::encryption::LuksCipher;

    #[test]
    fn a_new_header_opens_by_its_passphrase_only_and_is_as_long_as_it_says() {
        for (cipher, hash) in
            [(LuksCipher::Aes128Xts, LuksHash::Sha512), (LuksCipher::Aes256Xts, LuksHash::Sha1)]
        {
            let passphrase = Passphrase::new("right");
            let cost = KeyCost::Rounds(1);
            let area = format(&LuksOptions { passphrase: passphrase.clone(), cipher, hash, cost });
            let area = area.unwrap();
            assert_eq!(area.len() as u64, cipher.header_bytes());
            let range = ByteRange::between(1 << 20, (1 << 20) + area.len() as u64);
            let header = LuksHeader::parse(&area, range).unwrap();
            assert_eq!((header.cipher, header.hash), (cipher, hash));
            assert_eq!((header.slots[0].rounds, header.digest_rounds), (MIN_ROUNDS, MIN_ROUNDS));
            assert_eq!(header.encode(), area[..592]);
            let at = index(header.slots[0].at());
            let material = || Zeroizing::new(area[at..at + header.material_bytes()].to_vec());
            assert!(try_slot(&header, 0, material(), &passphrase).is_some());
            assert!(try_slot(&header, 0, material(), &Passphrase::new("wrong")).is_none());
            assert!(try_slot(&header, 1, material(), &passphrase).is_none());
        }
    }

    #[test]
    fn uuids_have_their_usual_form() {
        let uuid = uuid().unwrap();
        assert_eq!(uuid.len(), 36);
        assert_eq!((uuid.as_bytes()[14], uuid.as_bytes()[8]), (b'4', b'-'));
        assert_ne!(uuid, super::uuid().unwrap());
    }
}
