//! Encryption as callers see it: passphrases, what a new LUKS header is to be, and the step of opening that gives an
//! image its cipher. The cryptography itself stands in `luks`, behind the feature of that name; without it an
//! encrypted image is refused here.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use block::{ByteRange, DeviceError, HostFile};
use zeroize::Zeroizing;

use crate::cipher::Cipher;
use crate::error::{Corruption, Error, Fault, Feature, KeyError};
use crate::header::Header;
use crate::image::Image;
use crate::units::HostOffset;

/// How long a processor may work on PBKDF2 to try one passphrase on one key slot, where
/// [`crate::OpenOptions::unlock_time`] does not say otherwise: slots that ask for more are not tried.
///
/// QEMU fills a slot so that a try takes 2 seconds on the machine that made it, which may be several times as fast as
/// the one that opens the image. A header has 8 slots, so one that lies costs 2 minutes at most.
pub const DEFAULT_UNLOCK_TIME: Duration = Duration::from_secs(15);

/// A passphrase. Its memory is wiped when the last clone goes, and it never shows in debug output.
#[derive(Clone)]
pub struct Passphrase(Arc<Zeroizing<Vec<u8>>>);

impl Passphrase {
    /// Takes a passphrase; QEMU takes only UTF-8 text.
    pub fn new(bytes: impl Into<Vec<u8>>) -> Self {
        Self(Arc::new(Zeroizing::new(bytes.into())))
    }

    #[cfg(feature = "luks")]
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Passphrase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Passphrase")
    }
}

impl PartialEq for Passphrase {
    fn eq(&self, other: &Self) -> bool {
        ***self.0 == ***other.0
    }
}

impl Eq for Passphrase {}

/// How guest data is encrypted: AES in XTS mode, the tweak of each sector being its number in 64 bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LuksCipher {
    /// With a key of 128 bits (and another for the tweaks).
    Aes128Xts,
    /// With a key of 256 bits (and another for the tweaks): QEMU's choice, too.
    #[default]
    Aes256Xts,
}

impl LuksCipher {
    /// The length of a key in bytes, both halves of it.
    pub(crate) const fn key_bytes(self) -> usize {
        match self {
            Self::Aes128Xts => 32,
            Self::Aes256Xts => 64,
        }
    }

    /// The length of a new LUKS header with all its key slots, in bytes.
    pub const fn header_bytes(self) -> u64 {
        4096 + 8 * (self.key_bytes() as u64 * 4000).next_multiple_of(4096)
    }
}

/// The hash behind the keys of a LUKS header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LuksHash {
    /// SHA-1. For old images.
    Sha1,
    /// SHA-224.
    Sha224,
    /// SHA-256: QEMU's choice, too.
    #[default]
    Sha256,
    /// SHA-384.
    Sha384,
    /// SHA-512.
    Sha512,
}

/// How much work it is to try a passphrase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyCost {
    /// As many rounds as a processor of this machine does in this time, whatever else it is busy with.
    Milliseconds(u32),
    /// This many rounds, and at least 1000.
    Rounds(u32),
}

impl Default for KeyCost {
    /// Two seconds, as QEMU.
    fn default() -> Self {
        Self::Milliseconds(2000)
    }
}

/// What the encryption of a new image is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LuksOptions {
    /// What opens the first key slot.
    pub passphrase: Passphrase,
    /// The cipher.
    pub cipher: LuksCipher,
    /// The hash.
    pub hash: LuksHash,
    /// The work for each try.
    pub cost: KeyCost,
}

impl LuksOptions {
    /// QEMU's defaults.
    pub fn new(passphrase: Passphrase) -> Self {
        Self {
            passphrase,
            cipher: LuksCipher::default(),
            hash: LuksHash::default(),
            cost: KeyCost::default(),
        }
    }
}

/// Which keys are meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Slots {
    /// The key in this slot, counted from 0.
    One(usize),
    /// All keys that this passphrase opens.
    OpenedBy(Passphrase),
}

/// A change to the keys of an encrypted image. To change a passphrase, add the new one and then remove the old one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeyChange {
    /// Fills a slot.
    Add {
        /// A passphrase that opens the image.
        existing: Passphrase,
        /// The one that shall, too.
        added: Passphrase,
        /// The slot; the first free one otherwise.
        slot: Option<usize>,
        /// The work for each try.
        cost: KeyCost,
        /// Overwrite a slot in use; a crash then may lose both keys.
        force: bool,
    },
    /// Empties slots and wipes what was in them.
    Remove {
        /// Which.
        slots: Slots,
        /// Even if nothing opens the image any more.
        force: bool,
    },
}

/// A key slot of a LUKS header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotInfo {
    /// Whether it has a key.
    pub active: bool,
    /// The rounds of PBKDF2 for each try.
    pub rounds: u32,
    /// Where its material starts, in bytes from the start of the LUKS header.
    pub key_offset: u64,
}

/// What a LUKS header says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LuksInfo {
    /// The cipher.
    pub cipher: LuksCipher,
    /// What sectors are tweaked with: `plain` or `plain64`.
    pub tweak: &'static str,
    /// The hash.
    pub hash: LuksHash,
    /// The identity of the header.
    pub uuid: String,
    /// Where data would start in a volume without qcow2, in bytes from the start of the LUKS header.
    pub payload_offset: u64,
    /// The rounds of PBKDF2 that the digest of the master key takes.
    pub digest_rounds: u32,
    /// All key slots.
    pub slots: Vec<SlotInfo>,
}

/// Where the encryption header of an image lies, and that it can be opened by this build.
///
/// `None` for an image that is not encrypted.
///
/// # Errors
/// [`Feature::LegacyEncryption`], [`Feature::LuksLeftOut`], and [`Corruption`] for a header that is not where it says.
pub(crate) fn area(header: &Header, file_bytes: u64) -> Result<Option<ByteRange>, Fault> {
    match header.crypt_method {
        0 => return Ok(None),
        1 => return Err(Fault::Unsupported(Feature::LegacyEncryption)),
        _ => {}
    }
    let corrupt = |what| Fault::Corrupt { at: HostOffset(32), what };
    let Some(pointer) = header.extensions.luks else {
        return Err(corrupt(Corruption::NoEncryptionHeader));
    };
    let (at, len) = (pointer.at.0, pointer.bytes);
    let misplaced = || corrupt(Corruption::EncryptionHeaderPlace { at, len });
    let area = ByteRange::new(at, len).filter(|area| area.end() <= file_bytes);
    let area = area.ok_or_else(misplaced)?;
    if at == 0 || len == 0 || !header.geometry.is_aligned(at) {
        return Err(misplaced());
    }
    if cfg!(not(feature = "luks")) {
        return Err(Fault::Unsupported(Feature::LuksLeftOut));
    }
    Ok(Some(area))
}

/// Opens the encryption of an image with the first passphrase that fits. `None` for an image that is not encrypted.
///
/// # Errors
/// As [`area`]; [`Error::Locked`] where no passphrase fits.
pub(crate) async fn unlock(
    file: &HostFile,
    header: &Header,
    passphrases: &[Passphrase],
    time: Duration,
) -> Result<Option<Arc<dyn Cipher>>, Error> {
    let area = area(header, file.len()).map_err(|fault| fault.of(file.path()))?;
    let Some(area) = area else { return Ok(None) };
    #[cfg(feature = "luks")]
    {
        crate::luks::unlock(file, area, passphrases, time).await.map(Some)
    }
    #[cfg(not(feature = "luks"))]
    {
        // `area` has refused already.
        let _ = (area, passphrases, time);
        Ok(None)
    }
}

/// The LUKS header of a new image, [`LuksCipher::header_bytes`] long: what goes to clusters of its own.
///
/// # Errors
/// [`Feature::LuksLeftOut`], [`Error::NoRandomness`].
pub(crate) async fn format(path: &Path, options: &LuksOptions) -> Result<Vec<u8>, Error> {
    #[cfg(feature = "luks")]
    {
        crate::luks::format(path, options).await
    }
    #[cfg(not(feature = "luks"))]
    {
        let _ = options;
        Err(Fault::Unsupported(Feature::LuksLeftOut).of(path))
    }
}

/// What the LUKS header of an image says of itself, without a passphrase. `None` for an image that is not encrypted.
///
/// # Errors
/// As [`area`], and what is wrong with the LUKS header.
pub(crate) async fn describe(file: &HostFile, header: &Header) -> Result<Option<LuksInfo>, Error> {
    let area = area(header, file.len()).map_err(|fault| fault.of(file.path()))?;
    let Some(area) = area else { return Ok(None) };
    #[cfg(feature = "luks")]
    {
        crate::luks::describe(file, area).await.map(Some)
    }
    #[cfg(not(feature = "luks"))]
    {
        // `area` has refused already.
        let _ = area;
        Ok(None)
    }
}

impl Image {
    /// Adds or removes keys of an encrypted image. Durable when it returns; guest data is not touched.
    ///
    /// # Errors
    /// [`Error::Key`] for what would lose the image or makes no sense, [`Error::Locked`] where the passphrase opens
    /// nothing, [`Error::Request`] for an image that is open for reading only, [`Error::Host`].
    pub async fn change_keys(&self, change: &KeyChange) -> Result<(), Error> {
        if self.inner.limits().read_only {
            return Err(Error::Request(DeviceError::ReadOnly));
        }
        let live = self.inner.live()?;
        let found = area(&self.inner.core.lock().header, live.file.len());
        let found = found.map_err(|fault| self.inner.fault(fault))?;
        let refused = |reason| Error::Key { file: self.inner.path.clone(), reason };
        let area = found.ok_or_else(|| refused(KeyError::NotEncrypted))?;
        let _turn = self.inner.flush_gate.lock().await;
        #[cfg(feature = "luks")]
        {
            crate::luks::change_keys(&live.file, area, change, live.unlock_time).await
        }
        #[cfg(not(feature = "luks"))]
        {
            let _ = (area, change, live.unlock_time);
            Err(refused(KeyError::NotEncrypted))
        }
    }
}
