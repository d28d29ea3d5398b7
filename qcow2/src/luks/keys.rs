//! Key slots at work: trying a passphrase on one, filling one, and the digest that tells the right master key. Bytes
//! come in and go out; which slots are tried and where bytes are written is the driver's part.

use std::time::Duration;

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
    /// Enough for the clock.
    const ENOUGH: Duration = Duration::from_millis(100);
    let wanted = match cost {
        KeyCost::Rounds(rounds) => rounds,
        KeyCost::Milliseconds(wanted) => {
            let speed = Speed::measure(hash, key_bytes, ENOUGH, processor_time);
            let rounds = speed.rounds_in(Duration::from_millis(wanted.into()));
            u32::try_from(rounds).unwrap_or(u32::MAX)
        }
    };
    wanted.max(MIN_ROUNDS)
}

/// How many rounds of a key this machine does in some time: by the best of a few tries of a millisecond.
pub(super) fn rounds_in(hash: LuksHash, key_bytes: usize, time: Duration) -> u64 {
    const ENOUGH: Duration = Duration::from_millis(1);
    let tries = (0..5).map(|_| Speed::measure(hash, key_bytes, ENOUGH, processor_time));
    tries.map(|speed| speed.rounds_in(time)).max().unwrap_or_default()
}

/// How fast keys are derived.
struct Speed {
    rounds: u32,
    took: Duration,
}

impl Speed {
    /// By a number of rounds that takes long enough on that clock.
    fn measure(
        hash: LuksHash,
        key_bytes: usize,
        enough: Duration,
        clock: impl Fn() -> Duration,
    ) -> Self {
        const MOST: u32 = 1 << 26;
        let mut key = Zeroizing::new(vec![0; key_bytes]);
        let mut rounds: u32 = 1 << 11;
        loop {
            let start = clock();
            hash.derive(b"measure", &[0; SALT_BYTES], rounds, &mut key);
            let took = clock().saturating_sub(start);
            if took >= enough || rounds >= MOST {
                return Self { rounds, took };
            }
            rounds = rounds.saturating_mul(2);
        }
    }

    fn rounds_in(&self, time: Duration) -> u64 {
        let rounds = u128::from(self.rounds) * time.as_nanos() / self.took.as_nanos().max(1);
        u64::try_from(rounds).unwrap_or(u64::MAX)
    }
}

/// How long a processor has worked for this thread. Whatever else keeps the machine busy does not count: a key that is
/// made under load would be cheap to guess, and an image that opens on an idle machine would not open on a busy one.
fn processor_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap_or_default()
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
    fn the_cost_of_a_key_grows_with_the_time_that_is_asked_for() {
        let ticks = std::cell::Cell::new(0);
        // A clock by which everything takes 3 milliseconds.
        let clock = || {
            ticks.set(ticks.get() + 1);
            Duration::from_millis(3 * ticks.get())
        };
        let speed = Speed::measure(LuksHash::Sha256, 32, Duration::from_millis(2), clock);
        assert_eq!((speed.rounds, speed.took), (2048, Duration::from_millis(3)));
        assert_eq!(speed.rounds_in(Duration::from_millis(3000)), 2_048_000);
        assert_eq!(speed.rounds_in(Duration::from_millis(30)), 20_480);
        assert_eq!(speed.rounds_in(Duration::ZERO), 0);
    }

    #[test]
    fn the_work_of_others_does_not_count_as_work_of_a_thread() {
        let busy = Duration::from_millis(20);
        let before = processor_time();
        let other = std::thread::spawn(move || {
            let start = processor_time();
            while processor_time() - start < busy {
                std::hint::spin_loop();
            }
        });
        other.join().unwrap();
        // By the clock on the wall it would be longer than that.
        assert!(processor_time() - before < busy);
        let speed = Speed::measure(LuksHash::Sha256, 32, busy, processor_time);
        assert!(speed.took >= busy && processor_time() - before >= busy);
    }

    #[test]
    fn uuids_have_their_usual_form() {
        let uuid = uuid().unwrap();
        assert_eq!(uuid.len(), 36);
        assert_eq!((uuid.as_bytes()[14], uuid.as_bytes()[8]), (b'4', b'-'));
        assert_ne!(uuid, super::uuid().unwrap());
    }
}
