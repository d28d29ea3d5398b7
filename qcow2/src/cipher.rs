//! What encrypts guest data in host sectors: one trait between the data path and the ciphers. Where keys come from and
//! which ciphers there are is told elsewhere.

use crate::units::HostOffset;

/// The unit of encryption in bytes, whatever the cluster size and whatever the host writes at once.
pub(crate) const CIPHER_SECTOR_BYTES: u64 = 512;

/// Encrypts and decrypts whole sectors in place.
///
/// The tweak of a sector is its *host* offset in sectors, so that moving a cluster means decrypting and encrypting it.
/// `at` and the length of `sectors` are multiples of [`CIPHER_SECTOR_BYTES`]; a last part of a sector stays as it is.
/// Both are pure computation, slow enough for large buffers to belong on the CPU pool.
pub(crate) trait Cipher: Send + Sync {
    /// Makes plain text of the cipher text that lies at `at` of the file.
    fn decrypt(&self, at: HostOffset, sectors: &mut [u8]);

    /// Makes cipher text for `at` of the file of plain text.
    fn encrypt(&self, at: HostOffset, sectors: &mut [u8]);
}
