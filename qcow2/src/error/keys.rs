//! Why an encrypted image was not opened, or its keys were not changed.

/// Why an encrypted image was not opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UnlockError {
    /// The caller gave no passphrase.
    #[error("it is encrypted and no passphrase was given")]
    NoPassphrase,
    /// No key slot opens with a passphrase of the caller.
    #[error("it is encrypted and the passphrase opens none of its key slots")]
    WrongPassphrase,
    /// A key slot asks for more rounds of PBKDF2 than this machine does in [`crate::OpenOptions::unlock_time`], and
    /// those that were tried do not open with a passphrase of the caller.
    #[error(
        "it is encrypted and key slot {slot} was not tried: it asks for {rounds} rounds of PBKDF2, and this machine does \
         {limit} in the time that is allowed for a slot"
    )]
    TooMuchWork {
        /// The slot, counted from 0.
        slot: usize,
        /// The rounds that it asks for, with those of the digest that tells the right key.
        rounds: u64,
        /// The limit.
        limit: u64,
    },
}

/// Why the keys of an encrypted image were not changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    /// The image has no keys.
    #[error("it is not encrypted")]
    NotEncrypted,
    /// There are slots 0 to 7.
    #[error("there is no key slot {0}, only 0 to 7")]
    NoSuchSlot(usize),
    /// All slots have keys.
    #[error("all key slots are in use")]
    NoFreeSlot,
    /// The slot has a key, which nobody asked to lose.
    #[error("key slot {0} is in use")]
    SlotInUse(usize),
    /// The slot has no key.
    #[error("key slot {0} is empty")]
    SlotEmpty(usize),
    /// Nothing would open the image any more.
    #[error("no key would be left, and nothing could open the image again")]
    LastKey,
}
