//! LUKS version 1 inside an image: what opens it, makes it and changes its keys. Guest data itself passes through the
//! [`Cipher`] that comes out of here.
//!
//! QEMU writes and opens version 1 alone; AES in XTS mode with keys of 128 and 256 bits is what we do of its ciphers.

mod hash;
mod keys;
mod layout;
mod sectors;
mod split;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use block::{ByteRange, HostFile, on_cpu};
use bytes::Bytes;
use zeroize::Zeroizing;

use crate::cipher::Cipher;
use crate::encryption::{KeyChange, LuksInfo, LuksOptions, Passphrase, SlotInfo, Slots};
use crate::error::{Error, KeyError, UnlockError};
use crate::units::{SECTOR_BYTES, index};
use keys::MasterKey;
use layout::{HEADER_BYTES, LuksHeader};

/// The cipher of the image in `file`, whose LUKS header fills `area`, by the first passphrase that fits.
///
/// # Errors
/// [`Error::Locked`], and what is wrong with the header.
pub(crate) async fn unlock(
    file: &HostFile,
    area: ByteRange,
    passphrases: &[Passphrase],
    time: Duration,
) -> Result<Arc<dyn Cipher>, Error> {
    let header = read_header(file, area).await?;
    if passphrases.is_empty() {
        return Err(locked(file, UnlockError::NoPassphrase));
    }
    let (_, key) = find_key(file, area, &header, passphrases, time).await?;
    // The key has the length that the header's cipher asks for: the slot gave it.
    match key.cipher(&header) {
        Some(cipher) => Ok(Arc::new(cipher)),
        None => Err(locked(file, UnlockError::WrongPassphrase)),
    }
}

/// What the LUKS header in `area` says of itself; no passphrase is needed.
///
/// # Errors
/// What is wrong with the header.
pub(crate) async fn describe(file: &HostFile, area: ByteRange) -> Result<LuksInfo, Error> {
    let header = read_header(file, area).await?;
    let slots = header.slots.iter().map(|slot| SlotInfo {
        active: slot.enabled,
        rounds: slot.rounds,
        key_offset: slot.at(),
    });
    Ok(LuksInfo {
        cipher: header.cipher,
        tweak: header.tweak.name(),
        hash: header.hash,
        uuid: header.uuid.clone(),
        payload_offset: header.area_bytes(),
        digest_rounds: header.digest_rounds,
        slots: slots.collect(),
    })
}

/// A new LUKS header with all its slots, of which the first has a key: the bytes of its area.
///
/// # Errors
/// [`Error::NoRandomness`].
pub(crate) async fn format(path: &Path, options: &LuksOptions) -> Result<Vec<u8>, Error> {
    let options = options.clone();
    compute(path, move || keys::format(&options)).await?.map_err(no_randomness)
}

/// Adds or removes keys of the image in `file`.
///
/// A slot is enabled by its header after its material is durable, and disabled before its material is wiped.
///
/// # Errors
/// [`Error::Key`] for what would lose the image or makes no sense, [`Error::Locked`].
pub(crate) async fn change_keys(
    file: &HostFile,
    area: ByteRange,
    change: &KeyChange,
    time: Duration,
) -> Result<(), Error> {
    let header = read_header(file, area).await?;
    match change {
        KeyChange::Add { existing, added, slot, cost, force } => {
            let (number, key) = {
                let number =
                    free_slot(&header, *slot, *force).map_err(|reason| refused(file, reason))?;
                let (_, key) =
                    find_key(file, area, &header, std::slice::from_ref(existing), time).await?;
                (number, key)
            };
            let (added, cost, mut filled) = (added.clone(), *cost, header.clone());
            let (filled, material) = compute(file.path(), move || {
                let material = keys::fill_slot(&mut filled, number, &key, &added, cost)?;
                Ok((filled, material))
            })
            .await?
            .map_err(no_randomness)?;
            if header.slots.get(number).is_some_and(|slot| slot.enabled) {
                disable(file, area, &header, number).await?;
            }
            write_material(file, area, &filled, number, material).await?;
            write_header(file, area, &filled, [1, 0]).await
        }
        KeyChange::Remove { slots, force } => {
            let chosen = chosen_slots(file, area, &header, slots, time).await?;
            let left = header.slots.iter().enumerate();
            let left =
                left.filter(|(number, slot)| slot.enabled && !chosen.contains(number)).count();
            if left == 0 && !force {
                return Err(refused(file, KeyError::LastKey));
            }
            let mut header = header;
            for number in chosen {
                header = disable(file, area, &header, number).await?;
                let mut noise = vec![0; header.material_bytes()];
                getrandom::fill(&mut noise).map_err(no_randomness)?;
                write_material(file, area, &header, number, noise).await?;
            }
            Ok(())
        }
    }
}

fn free_slot(header: &LuksHeader, slot: Option<usize>, force: bool) -> Result<usize, KeyError> {
    let Some(number) = slot else {
        return header.slots.iter().position(|slot| !slot.enabled).ok_or(KeyError::NoFreeSlot);
    };
    match header.slots.get(number) {
        None => Err(KeyError::NoSuchSlot(number)),
        Some(slot) if slot.enabled && !force => Err(KeyError::SlotInUse(number)),
        Some(_) => Ok(number),
    }
}

async fn chosen_slots(
    file: &HostFile,
    area: ByteRange,
    header: &LuksHeader,
    slots: &Slots,
    time: Duration,
) -> Result<Vec<usize>, Error> {
    let passphrase = match slots {
        Slots::One(number) => {
            return match header.slots.get(*number) {
                None => Err(refused(file, KeyError::NoSuchSlot(*number))),
                Some(slot) if !slot.enabled => Err(refused(file, KeyError::SlotEmpty(*number))),
                Some(_) => Ok(vec![*number]),
            };
        }
        Slots::OpenedBy(passphrase) => passphrase,
    };
    let limit = WorkLimit::measure(file, header, time).await?;
    let admitted = header.enabled().try_for_each(|number| limit.admit(header, number));
    // Before the first is tried: the passphrase may open those, too.
    admitted.map_err(|reason| locked(file, reason))?;
    let mut chosen = Vec::new();
    for number in header.enabled() {
        if try_slot(file, area, header, number, passphrase).await?.is_some() {
            chosen.push(number);
        }
    }
    if chosen.is_empty() { Err(locked(file, UnlockError::WrongPassphrase)) } else { Ok(chosen) }
}

/// Disables a slot durably, and gives the header without it.
async fn disable(
    file: &HostFile,
    area: ByteRange,
    header: &LuksHeader,
    number: usize,
) -> Result<LuksHeader, Error> {
    let mut header = header.clone();
    if let Some(slot) = header.slots.get_mut(number) {
        slot.enabled = false;
        slot.rounds = 0;
        slot.salt.fill(0);
    }
    write_header(file, area, &header, [0, 1]).await?;
    Ok(header)
}

async fn write_material(
    file: &HostFile,
    area: ByteRange,
    header: &LuksHeader,
    number: usize,
    material: Vec<u8>,
) -> Result<(), Error> {
    let Some(slot) = header.slots.get(number) else { return Ok(()) };
    file.write(area.start() + slot.at(), Bytes::from(material), None).await?;
    Ok(file.sync().await?)
}

/// Writes the two sectors of a header one after the other, in the order given: a slot may lie in both, and its first
/// field, in the first of them, says whether it counts.
async fn write_header(
    file: &HostFile,
    area: ByteRange,
    header: &LuksHeader,
    order: [u64; 2],
) -> Result<(), Error> {
    let bytes = Bytes::from(header.encode());
    for sector in order {
        let at = sector * SECTOR_BYTES;
        let end = index(at + SECTOR_BYTES).min(bytes.len());
        file.write(area.start() + at, bytes.slice(index(at)..end), None).await?;
        file.sync().await?;
    }
    Ok(())
}

async fn read_header(file: &HostFile, area: ByteRange) -> Result<LuksHeader, Error> {
    let end = area.end().min(area.start().saturating_add(HEADER_BYTES as u64));
    let bytes = file.read(ByteRange::between(area.start(), end)).await?;
    LuksHeader::parse(&bytes, area).map_err(|fault| fault.of(file.path()))
}

/// The slot and the master key that the first fitting passphrase opens. Slots that ask for too much work are left out.
async fn find_key(
    file: &HostFile,
    area: ByteRange,
    header: &LuksHeader,
    passphrases: &[Passphrase],
    time: Duration,
) -> Result<(usize, MasterKey), Error> {
    let limit = WorkLimit::measure(file, header, time).await?;
    let mut left_out = None;
    for passphrase in passphrases {
        for number in header.enabled() {
            if let Err(reason) = limit.admit(header, number) {
                left_out = left_out.or(Some(reason));
            } else if let Some(key) = try_slot(file, area, header, number, passphrase).await? {
                return Ok((number, key));
            }
        }
    }
    Err(locked(file, left_out.unwrap_or(UnlockError::WrongPassphrase)))
}

async fn try_slot(
    file: &HostFile,
    area: ByteRange,
    header: &LuksHeader,
    number: usize,
    passphrase: &Passphrase,
) -> Result<Option<MasterKey>, Error> {
    let Some(slot) = header.slots.get(number) else { return Ok(None) };
    let start = area.start() + slot.at();
    let end = start + header.material_bytes() as u64;
    let material = file.read(ByteRange::between(start, end)).await?;
    let material = Zeroizing::new(material.to_vec());
    let (header, passphrase) = (header.clone(), passphrase.clone());
    compute(file.path(), move || keys::try_slot(&header, number, material, &passphrase)).await
}

/// The rounds of PBKDF2 that a key slot may ask for. The limit is of each slot and not of their sum, so that it does
/// not depend on the slot whether an image opens, and a wrong passphrase is called wrong.
struct WorkLimit {
    rounds: u64,
}

impl WorkLimit {
    /// What this machine does in that time.
    async fn measure(file: &HostFile, header: &LuksHeader, time: Duration) -> Result<Self, Error> {
        let (hash, key_bytes) = (header.hash, header.cipher.key_bytes());
        let rounds = compute(file.path(), move || keys::rounds_in(hash, key_bytes, time)).await?;
        Ok(Self { rounds })
    }

    /// Refuses a slot that would take too long.
    fn admit(&self, header: &LuksHeader, number: usize) -> Result<(), UnlockError> {
        let slot = header.slots.get(number).map_or(0, |slot| u64::from(slot.rounds));
        let rounds = slot + u64::from(header.digest_rounds);
        if rounds <= self.rounds {
            return Ok(());
        }
        Err(UnlockError::TooMuchWork { slot: number, rounds, limit: self.rounds })
    }
}

async fn compute<T: Send + 'static>(
    path: &Path,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    on_cpu(work).await.map_err(|source| Error::Cpu { file: path.to_owned(), source })
}

fn no_randomness(error: getrandom::Error) -> Error {
    Error::NoRandomness { source: error.into() }
}

fn refused(file: &HostFile, reason: KeyError) -> Error {
    Error::Key { file: file.path().to_owned(), reason }
}

fn locked(file: &HostFile, reason: UnlockError) -> Error {
    Error::Locked { file: file.path().to_owned(), reason }
}
