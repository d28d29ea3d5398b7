//! Numbers that look random and are the same every time, and bytes made of them. No judging is done here.

/// A generator with its state.
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    /// Another seed, another sequence.
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11
    }

    /// A number below `limit`.
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// An index below `limit`.
    pub(crate) fn index(&mut self, limit: usize) -> usize {
        usize::try_from(self.below(limit as u64)).unwrap()
    }

    /// Yes once in `times`.
    pub(crate) fn once_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }
}

/// Bytes that do not compress.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut random = Random::new(seed);
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        bytes.extend_from_slice(&random.next().to_le_bytes()[..6]);
    }
    bytes.truncate(len);
    bytes
}

/// Bytes that compress well and differ from place to place.
pub(crate) fn words(len: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> =
        (0u32..).step_by(3).take(len / 4 + 1).flat_map(|n| (n / 7).to_le_bytes()).collect();
    bytes.truncate(len);
    bytes
}

/// Data that compresses, data that does not, and zeros in turn.
pub(crate) fn mixed(seed: u64, len: usize) -> Vec<u8> {
    let mut random = Random::new(seed);
    let mut disk = Vec::new();
    while disk.len() < len {
        let piece = 512 * (1 + random.index(300));
        match random.below(4) {
            0 => disk.extend(noise(random.below(1 << 30), piece)),
            1 => disk.extend(words(piece)),
            2 => disk.extend(vec![0; piece]),
            _ => disk.extend(vec![0x5a; piece]),
        }
    }
    disk.truncate(len);
    disk
}
