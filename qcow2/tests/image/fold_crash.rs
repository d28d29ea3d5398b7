//! Power cuts at every moment while chains are committed, rebased and merged: whatever order the host gave to what was
//! not synced, in whichever of the files, the images above read as before, and doing it again ends it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use block::{BlockDevice, Durability, Engine, MemoryFiles, ZeroMode};
use qcow2::{
    BackingFormat, BackingName, CommitOptions, CreateOptions, FoldOptions, Image, MergeOptions,
    OpenOptions, Progress, RebaseOptions, commit, merge, rebase,
};
use tempfile::TempDir;

use crate::check::check;
use crate::common::{block_on, pattern, qemu_check, range, raw_of, read_all};
use crate::rounds::rounds;

const SECTOR: usize = 512;

/// A chain in a folder: the names of its files, the lowest first, with their cluster and disk sizes; no cluster size
/// is a raw file.
struct Chain {
    dir: TempDir,
    layers: Vec<(&'static str, Option<u32>, u64)>,
    /// What each layer shows.
    shown: HashMap<&'static str, Vec<u8>>,
}

impl Chain {
    fn new(layers: &[(&'static str, Option<u32>, u64)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut chain = Self { dir, layers: layers.to_vec(), shown: HashMap::new() };
        let mut below: Option<BackingName> = None;
        for (number, (name, cluster, size)) in layers.iter().copied().enumerate() {
            let path = chain.path(name);
            let seed = 100 * (number as u64 + 1);
            let format = match cluster {
                None => {
                    std::fs::write(&path, pattern(seed, usize::try_from(size).unwrap())).unwrap();
                    chain.shown.insert(name, std::fs::read(&path).unwrap());
                    BackingFormat::Raw
                }
                Some(cluster) => {
                    let mut options = CreateOptions::new(size).cluster_bytes(cluster);
                    if let Some(BackingName { path, format }) = &below {
                        options = options.backing(path, *format);
                    }
                    chain.shown.insert(name, block_on(fill(&path, &options, size, seed)));
                    BackingFormat::Qcow2
                }
            };
            below = Some(BackingName { path: name.to_owned(), format });
        }
        chain
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The files in memory, as they are on disk.
    fn in_memory(&self) -> MemoryFiles {
        let files = MemoryFiles::new();
        for (name, ..) in &self.layers {
            let path = self.path(name);
            let storage = files.put(&path, std::fs::read(&path).unwrap(), 512).unwrap();
            // Growing ahead would make every file of every cut megabytes long.
            storage.without_fallocate();
        }
        files
    }
}

/// A new image with data, zeros and holes in many places.
async fn fill(path: &Path, options: &CreateOptions, size: u64, seed: u64) -> Vec<u8> {
    Image::create(path, options).await.unwrap();
    let image = Image::open(path, OpenOptions::writing()).await.unwrap();
    for number in 0..6 {
        let seed = seed + number;
        let at = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) % (size - 1000) / 512 * 512;
        let len = (1 + seed * 7919 % 60) * 512;
        let part = range(at, len.min(size - at));
        if number % 3 == 2 {
            image.write_zeroes(part, ZeroMode::default(), Durability::Deferred).await.unwrap();
        } else {
            let data = pattern(seed, usize::try_from(part.len()).unwrap());
            image.write(part.start(), data.into(), Durability::Deferred).await.unwrap();
        }
    }
    let shown = read_all(&image).await;
    image.close().await.unwrap();
    shown
}

fn open_with(files: &MemoryFiles, read_only: bool) -> OpenOptions {
    let engine = Some(Engine::memory(files.clone()));
    OpenOptions { read_only, engine, ..OpenOptions::reading() }
}

fn folding(files: &MemoryFiles) -> FoldOptions {
    FoldOptions { open: open_with(files, true), requests: 2, ..FoldOptions::default() }
}

fn quiet(_: Progress) {}

/// What is done to a chain.
#[derive(Clone, Copy, Debug)]
enum Deed {
    Commit(Option<&'static str>),
    Merge { last: &'static str, base: &'static str },
    Rebase(Option<&'static str>, bool),
}

impl Deed {
    async fn run(self, chain: &Chain, files: &MemoryFiles) {
        let top = chain.path(chain.layers.last().unwrap().0);
        let copy = folding(files);
        match self {
            Self::Commit(base) => {
                let base = base.map(|name| chain.path(name));
                let options = CommitOptions { copy, base, keep_top: false };
                commit(&top, &options, quiet).await.unwrap();
            }
            Self::Merge { last, base } => {
                let (last, base) = (Some(chain.path(last)), Some(chain.path(base)));
                let options = MergeOptions { copy, base, last, remove: false };
                merge(&top, &options, quiet).await.unwrap();
            }
            Self::Rebase(onto, compress) => {
                let backing = onto.map(|path| BackingName {
                    path: path.to_owned(),
                    format: BackingFormat::Qcow2,
                });
                let options = RebaseOptions { copy, backing, unchecked: false, compress };
                rebase(&top, &options, quiet).await.unwrap();
            }
        }
    }

    /// The layer whose bytes change while it goes on, if that is what it shows, too.
    fn target(self, chain: &Chain) -> Option<&'static str> {
        match self {
            Self::Commit(Some(base)) | Self::Merge { base, .. } => Some(base),
            Self::Commit(None) => Some(chain.layers[chain.layers.len() - 2].0),
            Self::Rebase(..) => None,
        }
    }

    /// The layer whose content the target takes.
    fn source(self, chain: &Chain) -> &'static str {
        match self {
            Self::Merge { last, .. } => last,
            _ => chain.layers.last().unwrap().0,
        }
    }

    /// Layers that read as before at every moment.
    fn keeps(self, chain: &Chain) -> Vec<&'static str> {
        let names: Vec<_> = chain.layers.iter().map(|(name, ..)| *name).collect();
        let place = |name| names.iter().position(|n| *n == name).unwrap();
        match self {
            Self::Rebase(..) => names,
            Self::Commit(_) | Self::Merge { .. } => {
                let (target, source) =
                    (place(self.target(chain).unwrap()), place(self.source(chain)));
                let of = |n: usize| n < target || n >= source;
                names.iter().enumerate().filter(|(n, _)| of(*n)).map(|(_, name)| *name).collect()
            }
        }
    }

    /// Whether all of it has happened, so that doing it again would be something else.
    async fn is_over(self, chain: &Chain, files: &MemoryFiles) -> bool {
        let Self::Merge { last, .. } = self else { return false };
        let place = chain.layers.iter().position(|(name, ..)| *name == last).unwrap();
        let over = chain.path(chain.layers[place + 1].0);
        let bytes = files.storage(&over).unwrap().snapshot();
        let field =
            |at: usize| usize::try_from(u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap()));
        let (at, len) = (field(12).unwrap(), field(16).unwrap());
        bytes[at..at + len] != *last.as_bytes()
    }
}

async fn shows(chain: &Chain, files: &MemoryFiles, name: &str) -> Vec<u8> {
    let path = chain.path(name);
    if chain.layers.iter().any(|(other, cluster, _)| *other == name && cluster.is_none()) {
        return files.storage(&path).unwrap().snapshot();
    }
    let image = Image::open(&path, open_with(files, true)).await.unwrap();
    let shown = read_all(&image).await;
    image.close().await.unwrap();
    shown
}

/// Every sector of the target is as before or as it is to be.
fn assert_between(now: &[u8], old: &[u8], new: &[u8], what: &str) {
    for (number, sector) in now.chunks(SECTOR).enumerate() {
        let at = number * SECTOR;
        let is = |other: &[u8]| {
            // A disk that has not grown yet, or one that is longer, has no opinion behind its end.
            other.get(at..at + sector.len()).map_or(block::is_zero(sector), |o| o == sector)
        };
        assert!(is(old) || is(new), "{what}: sector {number} is neither old nor new");
    }
}

async fn assert_survived(chain: &Chain, deed: Deed, left: &MemoryFiles, what: &str) {
    for (name, cluster, _) in &chain.layers {
        if cluster.is_some() {
            let bytes = left.storage(&chain.path(name)).unwrap().snapshot();
            check(&bytes).assert_consistent(&format!("{what}: {name}"));
        }
    }
    for name in deed.keeps(chain) {
        assert!(shows(chain, left, name).await == chain.shown[name], "{what}: {name} changed");
    }
    if let Some(target) = deed.target(chain) {
        let now = shows(chain, left, target).await;
        assert_between(&now, &chain.shown[target], &chain.shown[deed.source(chain)], what);
    }
}

/// Puts the files where QEMU finds them, and asks it.
fn ask_qemu(chain: &Chain, deed: Deed, left: &MemoryFiles, what: &str) {
    let dir = tempfile::tempdir().unwrap();
    for (name, ..) in &chain.layers {
        let bytes = left.storage(&chain.path(name)).unwrap().snapshot();
        std::fs::write(dir.path().join(name), bytes).unwrap();
    }
    for (name, cluster, _) in &chain.layers {
        let path = dir.path().join(name);
        if cluster.is_none() {
            continue;
        }
        let found = qemu_check(&path);
        assert!(found.is_consistent(), "{what}: {name}: {found:?}");
        if deed.keeps(chain).contains(name) {
            assert!(raw_of(&path) == chain.shown[name], "{what}: {name} by qemu");
        }
    }
}

/// Cuts the power at every moment.
fn survives_every_cut(layers: &[(&'static str, Option<u32>, u64)], deed: Deed) {
    let chain = Chain::new(layers);
    block_on(async {
        let files = chain.in_memory();
        deed.run(&chain, &files).await;
        let events = files.events();
        assert!(events > 8, "{deed:?}: only {events} operations");
        let mut looked = 0u32;
        for cut in 0..=events {
            for seed in 0..3 + u64::from(rounds(1)) {
                let seed = if seed < 2 { seed } else { seed + cut * 31 };
                let what = format!("{deed:?} cut after {cut} of {events}, seed {seed}");
                let left = files.crash_seeded(cut, seed);
                assert_survived(&chain, deed, &left, &what).await;
                looked += 1;
                if looked.is_multiple_of(29) {
                    ask_qemu(&chain, deed, &left, &what);
                }
                if looked.is_multiple_of(7) {
                    if !deed.is_over(&chain, &left).await {
                        deed.run(&chain, &left).await;
                    }
                    assert_survived(&chain, deed, &left, &what).await;
                    assert_done(&chain, deed, &left, &what).await;
                }
            }
        }
        assert_done(&chain, deed, &files, "without a cut").await;
    });
}

/// The end of it: the target shows what the source does, and the image no longer needs what it no longer needs.
async fn assert_done(chain: &Chain, deed: Deed, files: &MemoryFiles, what: &str) {
    let Some(target) = deed.target(chain) else { return };
    let (now, new) = (shows(chain, files, target).await, &chain.shown[deed.source(chain)]);
    assert!(now[..new.len()] == **new, "{what}: {target} does not show what it should");
    if matches!(deed, Deed::Merge { .. }) {
        assert!(block::is_zero(&now[new.len()..]), "{what}: more of {target} shows");
        assert!(deed.is_over(chain, files).await, "{what}: not put over {target}");
    }
}

const KIB: u64 = 1 << 10;

#[test]
fn a_commit_survives_every_power_cut() {
    for cluster in [512, 4096] {
        let layers = [("base", Some(4096), 150 * KIB), ("top", Some(cluster), 150 * KIB)];
        survives_every_cut(&layers, Deed::Commit(None));
    }
}

#[test]
fn a_commit_into_a_smaller_raw_file_survives_every_power_cut() {
    let layers = [("base", None, 100 * KIB), ("top", Some(4096), 150 * KIB)];
    survives_every_cut(&layers, Deed::Commit(None));
}

#[test]
fn a_commit_over_a_layer_into_a_smaller_image_survives_every_power_cut() {
    let layers = [
        ("base", Some(512), 70 * KIB),
        ("middle", Some(4096), 130 * KIB),
        ("top", Some(65536), 150 * KIB),
    ];
    survives_every_cut(&layers, Deed::Commit(Some("base")));
}

#[test]
fn a_merge_survives_every_power_cut() {
    for clusters in [[4096, 4096, 4096], [512, 4096, 512], [4096, 512, 4096]] {
        let [base, one, two] = clusters.map(Some);
        let layers = [
            ("base", base, 150 * KIB),
            ("one", one, 150 * KIB),
            ("two", two, 150 * KIB),
            ("top", Some(4096), 150 * KIB),
        ];
        survives_every_cut(&layers, Deed::Merge { last: "one", base: "base" });
    }
}

#[test]
fn a_merge_of_short_layers_into_a_longer_base_survives_every_power_cut() {
    let layers = [
        ("base", Some(4096), 180 * KIB),
        ("one", Some(4096), 90 * KIB),
        ("two", Some(4096), 120 * KIB),
        ("top", Some(4096), 200 * KIB),
    ];
    survives_every_cut(&layers, Deed::Merge { last: "two", base: "base" });
}

#[test]
fn a_rebase_survives_every_power_cut() {
    let layers = [
        ("base", Some(4096), 150 * KIB),
        ("middle", Some(4096), 150 * KIB),
        ("top", Some(4096), 150 * KIB),
    ];
    for onto in [None, Some("base")] {
        for compress in [false, true] {
            survives_every_cut(&layers, Deed::Rebase(onto, compress));
        }
    }
}
