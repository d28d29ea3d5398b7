//! The model of a disk: the bytes of the places that are used, and what is done to them. Whose acts they are is decided
//! elsewhere.

use std::ops::Range;

use crate::random::{Random, mixed, noise, words};
use crate::recipe::{Below, Origin, Recipe, Size};

/// What is written.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fill {
    Byte(u8),
    /// The file `noise`, again and again.
    Noise,
    /// The file `words`, again and again.
    Words,
}

/// The length of the two files.
pub(crate) const FILL_BYTES: usize = 300_000;

impl Fill {
    pub(crate) fn bytes(self, len: usize) -> Vec<u8> {
        match self {
            Self::Byte(byte) => vec![byte; len],
            Self::Noise => noise(5, FILL_BYTES).into_iter().cycle().take(len).collect(),
            Self::Words => words(FILL_BYTES).into_iter().cycle().take(len).collect(),
        }
    }
}

/// What is done.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Do {
    Write(Fill),
    /// Of whole clusters.
    Compress(Fill),
    Zero {
        unmap: bool,
    },
    Discard,
}

/// What is done, and where.
#[derive(Clone, Debug)]
pub(crate) struct Act {
    pub(crate) what: Do,
    pub(crate) range: Range<u64>,
}

impl Act {
    pub(crate) fn len(&self) -> u64 {
        self.range.end - self.range.start
    }
}

/// A part of the disk that is used; the rest is never written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Window {
    pub(crate) start: u64,
    pub(crate) bytes: Vec<u8>,
}

impl Window {
    pub(crate) fn range(&self) -> Range<u64> {
        self.start..self.start + self.bytes.len() as u64
    }
}

/// What the disk reads like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Disk {
    pub(crate) size_bytes: u64,
    pub(crate) windows: Vec<Window>,
}

/// The disk below.
pub(crate) fn below(recipe: &Recipe) -> Option<Vec<u8>> {
    let window = windows(recipe, recipe.size_bytes()).remove(0);
    let len = window.end - window.start;
    let sectors = if recipe.below.is_long() { len * 3 / 2 } else { len * 2 / 3 } / 512;
    // A raw file may end inside a sector.
    let len = sectors * 512 + if recipe.below.is_raw() { 100 } else { 0 };
    (recipe.below != Below::Nothing).then(|| mixed(31, usize::try_from(len).unwrap()))
}

fn windows(recipe: &Recipe, size_bytes: u64) -> Vec<Range<u64>> {
    if recipe.size != Size::Huge {
        return std::iter::once(0..size_bytes).collect();
    }
    let len = u64::from(recipe.cluster_bytes) * 4;
    let middle = (5 << 40) - len / 2;
    vec![0..len, middle..middle + len, size_bytes - len..size_bytes]
}

impl Disk {
    /// A new disk of `size_bytes`, over what lies below.
    pub(crate) fn new(recipe: &Recipe, size_bytes: u64) -> Self {
        let mut windows: Vec<Window> = windows(recipe, size_bytes)
            .into_iter()
            .map(|range| {
                let len = usize::try_from(range.end - range.start).unwrap();
                Window { start: range.start, bytes: vec![0; len] }
            })
            .collect();
        let bytes = &mut windows[0].bytes;
        if recipe.origin != Origin::Empty {
            *bytes = mixed(77, bytes.len());
        }
        if let Some(below) = below(recipe) {
            let len = below.len().min(bytes.len());
            bytes[..len].copy_from_slice(&below[..len]);
        }
        Self { size_bytes, windows }
    }

    /// The bytes of a range, which lies in one window.
    pub(crate) fn part(&mut self, range: Range<u64>) -> &mut [u8] {
        let window = self.windows.iter_mut().find(|window| window.range().contains(&range.start));
        let window = window.unwrap();
        let start = usize::try_from(range.start - window.start).unwrap();
        let len = usize::try_from(range.end - range.start).unwrap();
        &mut window.bytes[start..start + len]
    }

    /// What an act leaves behind. Discards are left to who knows what they do.
    pub(crate) fn apply(&mut self, act: &Act) {
        let part = self.part(act.range.clone());
        match act.what {
            Do::Write(fill) | Do::Compress(fill) => part.copy_from_slice(&fill.bytes(part.len())),
            Do::Zero { .. } => part.fill(0),
            Do::Discard => {}
        }
    }

    /// Says where another disk differs.
    pub(crate) fn assert_reads(&self, windows: &[Vec<u8>], what: &str) {
        assert_eq!(self.windows.len(), windows.len(), "{what}");
        for (model, bytes) in self.windows.iter().zip(windows) {
            if model.bytes == *bytes {
                continue;
            }
            let same = model.bytes.iter().zip(bytes).take_while(|(a, b)| a == b).count();
            let whole = model.bytes.len() / 512 * 512;
            assert!(bytes.len() >= whole, "{what}: {} bytes of {whole}", bytes.len());
            assert!(
                same >= model.bytes.len().min(bytes.len()),
                "{what}: differs at {}: {:?}, and not {:?}",
                model.start + same as u64,
                bytes.get(same),
                model.bytes.get(same),
            );
        }
    }

    /// Something that somebody might do. Compressed writes are of clusters that `may_compress`.
    pub(crate) fn draw(
        &self,
        recipe: &Recipe,
        random: &mut Random,
        may_compress: impl Fn(u64) -> bool,
    ) -> Act {
        let window = self.windows[random.index(self.windows.len())].range();
        let cluster = u64::from(recipe.cluster_bytes);
        let unit = [1, 512, cluster][random.index(3)];
        let size = window.end - window.start;
        let start = window.start + random.below(size) / unit * unit;
        let most = [1 + cluster / unit / 2, 1 + 2 * cluster / unit, 1 + size / unit / 4];
        let most = most[random.index(3)];
        let len = unit * (1 + random.below(most));
        let range = start..(start + len).min(window.end);
        let fill = match random.below(4) {
            0 | 1 => Fill::Byte(u8::try_from(1 + random.below(255)).unwrap()),
            2 => Fill::Noise,
            _ => Fill::Words,
        };
        let what = match random.below(10) {
            0..=3 => Do::Write(fill),
            4 => Do::Write(Fill::Byte(0)),
            5 => Do::Zero { unmap: false },
            6 => Do::Zero { unmap: true },
            7 => Do::Discard,
            _ => {
                // Clusters one by one, as long as they may be.
                let first = start / cluster * cluster;
                let count = 1 + random.below(4);
                let starts = (0..count).map(|n| first + n * cluster);
                let free = starts.take_while(|at| *at < window.end && may_compress(*at)).count();
                let end = (first + free as u64 * cluster).min(window.end);
                match recipe.compresses() && free > 0 {
                    true => return Act { what: Do::Compress(fill), range: first..end },
                    false => Do::Write(fill),
                }
            }
        };
        Act { what, range }
    }
}
