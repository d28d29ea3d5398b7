//! The LUKS header on disk: its fields, their limits, and the places of the key slots. Nothing is derived or decrypted
//! here.

use block::ByteRange;

use super::sectors::Tweak;
use crate::cipher::CIPHER_SECTOR_BYTES;
use crate::encryption::{LuksCipher, LuksHash};
use crate::error::{Corruption, Fault, Feature};
use crate::units::{HostOffset, index};

/// The fields of a header, in bytes.
pub(super) const HEADER_BYTES: usize = 592;
/// The key slots of every header.
pub(super) const SLOTS: usize = 8;
/// The fewest rounds of PBKDF2 that new keys get.
pub(super) const MIN_ROUNDS: u32 = 1000;
/// The length of all salts in bytes.
pub(super) const SALT_BYTES: usize = 32;
/// The length of the digest of the master key in bytes.
pub(super) const DIGEST_BYTES: usize = 20;

/// `LUKS\xba\xbe`.
const MAGIC: &[u8] = b"LUKS\xba\xbe";
/// How many times a key is blown up in a slot: the only number that there is.
const STRIPES: u32 = 4000;
/// The material of slots starts behind this many bytes, and on multiples of them.
const SLOT_ALIGN_BYTES: u64 = 4096;
const SLOT_ENABLED: u32 = 0x00ac_71f3;
const SLOT_DISABLED: u32 = 0x0000_dead;

const CIPHER_NAME_AT: usize = 8;
const CIPHER_MODE_AT: usize = 40;
const HASH_AT: usize = 72;
const PAYLOAD_AT: usize = 104;
const KEY_BYTES_AT: usize = 108;
const DIGEST_AT: usize = 112;
const DIGEST_SALT_AT: usize = 132;
const DIGEST_ROUNDS_AT: usize = 164;
const UUID_AT: usize = 168;
const SLOTS_AT: usize = 208;
const SLOT_BYTES: usize = 48;
const TEXT_BYTES: usize = 32;
const UUID_BYTES: usize = 40;

/// A key slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    pub enabled: bool,
    pub rounds: u32,
    pub salt: [u8; SALT_BYTES],
    pub sector: u32,
}

impl Slot {
    /// Where the material of this slot starts, in bytes from the start of the header.
    pub(super) fn at(&self) -> u64 {
        u64::from(self.sector) * CIPHER_SECTOR_BYTES
    }
}

/// A LUKS header, as far as it is understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LuksHeader {
    pub cipher: LuksCipher,
    pub tweak: Tweak,
    pub hash: LuksHash,
    pub digest: [u8; DIGEST_BYTES],
    pub digest_salt: [u8; SALT_BYTES],
    pub digest_rounds: u32,
    pub payload_sector: u32,
    pub uuid: String,
    pub slots: [Slot; SLOTS],
    /// The name of the mode as recorded: a hash that plain tweaks do not need may stand behind it.
    mode: String,
}

impl LuksHeader {
    /// The numbers of the slots that have a key.
    pub(super) fn enabled(&self) -> impl Iterator<Item = usize> {
        (0..).zip(&self.slots).filter(|(_, slot)| slot.enabled).map(|(number, _)| number)
    }

    /// Reads the header at the start of `area`, a range of the file; `bytes` are its first bytes.
    ///
    /// # Errors
    /// [`Corruption`] where a field breaks the format or slots overlap, [`Feature`] for ciphers that we do not have.
    ///
    /// Source: LUKS On-Disk Format Specification 1.2.3, "The partition header".
    pub(super) fn parse(bytes: &[u8], area: ByteRange) -> Result<Self, Fault> {
        let fields = Fields { bytes, base: area.start() };
        if bytes.len() < HEADER_BYTES {
            return Err(fields.corrupt(0, Corruption::Truncated { what: "the LUKS header" }));
        }
        if !bytes.starts_with(MAGIC) {
            return Err(fields.field("magic", u64::from(fields.u32(0)), 0));
        }
        let version = u16::from_be_bytes([fields.array::<2>(6)[0], fields.array::<2>(6)[1]]);
        match version {
            1 => {}
            0 => return Err(fields.field("version", 0, 6)),
            other => return Err(Fault::Unsupported(Feature::LuksVersion(other))),
        }
        let name = fields.text("cipher-name", CIPHER_NAME_AT, TEXT_BYTES)?;
        let mode = fields.text("cipher-mode", CIPHER_MODE_AT, TEXT_BYTES)?;
        let hash = fields.text("hash-spec", HASH_AT, TEXT_BYTES)?;
        let key_bytes = fields.u32(KEY_BYTES_AT);
        let (cipher, tweak) = cipher(&name, &mode, key_bytes)?;
        let hash = LuksHash::named(&hash)
            .ok_or_else(|| Fault::Unsupported(Feature::LuksHash(hash.clone())))?;
        let digest_rounds = fields.u32(DIGEST_ROUNDS_AT);
        if digest_rounds == 0 {
            return Err(fields.field("mk-digest-iter", 0, DIGEST_ROUNDS_AT));
        }
        let payload_sector = fields.u32(PAYLOAD_AT);
        if u64::from(payload_sector) * CIPHER_SECTOR_BYTES < SLOT_ALIGN_BYTES {
            return Err(fields.field("payload-offset", u64::from(payload_sector), PAYLOAD_AT));
        }
        let mut slots = Vec::with_capacity(SLOTS);
        for slot in 0..SLOTS {
            slots.push(fields.slot(slot)?);
        }
        let slots = slots.try_into().map_err(|_| fields.field("key slots", 0, SLOTS_AT))?;
        let header = Self {
            cipher,
            tweak,
            hash,
            digest: fields.array(DIGEST_AT),
            digest_salt: fields.array(DIGEST_SALT_AT),
            digest_rounds,
            payload_sector,
            uuid: String::from_utf8_lossy(fields.until_nul(UUID_AT, UUID_BYTES)).into_owned(),
            slots,
            mode,
        };
        header.check_places(area)?;
        Ok(header)
    }

    /// A header with no key yet.
    pub(super) fn new(cipher: LuksCipher, hash: LuksHash, uuid: String) -> Self {
        let step = slot_step(cipher) / CIPHER_SECTOR_BYTES;
        let sector_of = |slot: u64| {
            u32::try_from(SLOT_ALIGN_BYTES / CIPHER_SECTOR_BYTES + slot * step).unwrap_or(u32::MAX)
        };
        let slots = std::array::from_fn(|slot| Slot {
            enabled: false,
            rounds: 0,
            salt: [0; SALT_BYTES],
            sector: sector_of(slot as u64),
        });
        Self {
            cipher,
            tweak: Tweak::Plain64,
            hash,
            digest: [0; DIGEST_BYTES],
            digest_salt: [0; SALT_BYTES],
            digest_rounds: 0,
            payload_sector: sector_of(SLOTS as u64),
            uuid,
            slots,
            mode: "xts-plain64".to_owned(),
        }
    }

    /// The fields as they are written.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; HEADER_BYTES];
        let mut put = |at: usize, field: &[u8]| {
            bytes[at..at + field.len()].copy_from_slice(field);
        };
        let key_bytes = u32::try_from(self.cipher.key_bytes()).unwrap_or(0);
        let uuid = self.uuid.as_bytes();
        put(0, MAGIC);
        put(6, &1u16.to_be_bytes());
        put(CIPHER_NAME_AT, b"aes");
        put(CIPHER_MODE_AT, self.mode.as_bytes());
        put(HASH_AT, self.hash.name().as_bytes());
        put(PAYLOAD_AT, &self.payload_sector.to_be_bytes());
        put(KEY_BYTES_AT, &key_bytes.to_be_bytes());
        put(DIGEST_AT, &self.digest);
        put(DIGEST_SALT_AT, &self.digest_salt);
        put(DIGEST_ROUNDS_AT, &self.digest_rounds.to_be_bytes());
        put(UUID_AT, uuid.get(..UUID_BYTES).unwrap_or(uuid));
        for (slot, at) in self.slots.iter().zip((SLOTS_AT..).step_by(SLOT_BYTES)) {
            let state = if slot.enabled { SLOT_ENABLED } else { SLOT_DISABLED };
            put(at, &state.to_be_bytes());
            put(at + 4, &slot.rounds.to_be_bytes());
            put(at + 8, &slot.salt);
            put(at + 40, &slot.sector.to_be_bytes());
            put(at + 44, &STRIPES.to_be_bytes());
        }
        bytes
    }

    /// The length of the header with all its slots, in bytes.
    pub(super) fn area_bytes(&self) -> u64 {
        u64::from(self.payload_sector) * CIPHER_SECTOR_BYTES
    }

    /// The length of a slot's material in bytes.
    pub(super) fn material_bytes(&self) -> usize {
        self.cipher.key_bytes() * index(u64::from(STRIPES))
    }

    /// Every slot lies behind the header, in the area, before the payload, and over no other.
    fn check_places(&self, area: ByteRange) -> Result<(), Fault> {
        let step = slot_step(self.cipher);
        let payload = u64::from(self.payload_sector) * CIPHER_SECTOR_BYTES;
        for (number, slot) in self.slots.iter().enumerate() {
            let at = slot.at();
            let behind = at + step > payload || at + self.material_bytes() as u64 > area.len();
            let others = self.slots.iter().skip(number + 1);
            let overlaps = others.into_iter().any(|o| at < o.at() + step && o.at() < at + step);
            if at < SLOT_ALIGN_BYTES || behind || overlaps {
                let field_at = area.start() + (SLOTS_AT + number * SLOT_BYTES + 40) as u64;
                let what = Corruption::LuksOverlap { slot: number };
                return Err(Fault::Corrupt { at: HostOffset(field_at), what });
            }
        }
        Ok(())
    }
}

/// The room of a slot in bytes.
fn slot_step(cipher: LuksCipher) -> u64 {
    (cipher.key_bytes() as u64 * u64::from(STRIPES)).next_multiple_of(SLOT_ALIGN_BYTES)
}

fn cipher(name: &str, mode: &str, key_bytes: u32) -> Result<(LuksCipher, Tweak), Fault> {
    let tweak = match mode.split(':').next() {
        Some("xts-plain64") => Some(Tweak::Plain64),
        Some("xts-plain") => Some(Tweak::Plain),
        _ => None,
    };
    match (name, tweak, key_bytes) {
        ("aes", Some(tweak), 32) => Ok((LuksCipher::Aes128Xts, tweak)),
        ("aes", Some(tweak), 64) => Ok((LuksCipher::Aes256Xts, tweak)),
        _ => {
            let bits = u64::from(key_bytes) * 8;
            let cipher = format!("{name}-{mode} with a key of {bits} bits");
            Err(Fault::Unsupported(Feature::LuksCipher(cipher)))
        }
    }
}

/// The bytes of a header, of which there are [`HEADER_BYTES`] at least, and where they lie in the file.
struct Fields<'a> {
    bytes: &'a [u8],
    base: u64,
}

impl<'a> Fields<'a> {
    fn array<const N: usize>(&self, at: usize) -> [u8; N] {
        self.bytes.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_be_bytes(self.array(at))
    }

    fn until_nul(&self, at: usize, len: usize) -> &'a [u8] {
        let field = self.bytes.get(at..at + len).unwrap_or_default();
        field.split(|byte| *byte == 0).next().unwrap_or_default()
    }

    fn text(&self, field: &'static str, at: usize, len: usize) -> Result<String, Fault> {
        let text = self.until_nul(at, len);
        let printable = !text.is_empty() && text.iter().all(u8::is_ascii_graphic);
        if text.len() == len || !printable {
            return Err(self.corrupt(at, Corruption::LuksText { field }));
        }
        Ok(String::from_utf8_lossy(text).into_owned())
    }

    fn slot(&self, number: usize) -> Result<Slot, Fault> {
        let at = SLOTS_AT + number * SLOT_BYTES;
        let enabled = match self.u32(at) {
            SLOT_ENABLED => true,
            SLOT_DISABLED => false,
            other => return Err(self.field("key slot state", u64::from(other), at)),
        };
        let rounds = self.u32(at + 4);
        if enabled && rounds == 0 {
            return Err(self.field("key slot iterations", 0, at + 4));
        }
        let stripes = self.u32(at + 44);
        if stripes != STRIPES {
            return Err(self.field("key slot stripes", u64::from(stripes), at + 44));
        }
        Ok(Slot { enabled, rounds, salt: self.array(at + 8), sector: self.u32(at + 40) })
    }

    fn field(&self, field: &'static str, value: u64, at: usize) -> Fault {
        self.corrupt(at, Corruption::LuksField { field, value })
    }

    fn corrupt(&self, at: usize, what: Corruption) -> Fault {
        Fault::Corrupt { at: HostOffset(self.base.saturating_add(at as u64)), what }
    }
}
