//! The table of the corpus: what an image can be like, which choices go together, and a list of images in which every
//! two choices that do meet. How they are made is others' to know.

use std::collections::HashSet;
use std::ops::RangeInclusive;

use crate::random::Random;
use crate::rounds::rounds;

/// Where guest data lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Data {
    Inside,
    File,
    RawFile,
}

/// What lies below.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Below {
    Nothing,
    ShortQcow2,
    LongQcow2,
    ShortRaw,
    LongRaw,
}

impl Below {
    pub(crate) fn is_raw(self) -> bool {
        matches!(self, Self::ShortRaw | Self::LongRaw)
    }

    pub(crate) fn is_long(self) -> bool {
        matches!(self, Self::LongQcow2 | Self::LongRaw)
    }
}

/// How large the disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Size {
    /// A few clusters, or a few tables of them.
    Whole,
    /// The last cluster lies partly outside.
    Odd,
    /// 64 TiB.
    Huge,
}

/// What the image begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    Empty,
    Converted,
    Compressed,
}

/// What an image is like.
#[derive(Clone, Debug)]
pub(crate) struct Recipe {
    pub(crate) version2: bool,
    pub(crate) cluster_bytes: u32,
    pub(crate) refcount_bits: u32,
    pub(crate) extended: bool,
    pub(crate) zstd: bool,
    pub(crate) lazy: bool,
    pub(crate) preallocation: &'static str,
    pub(crate) data: Data,
    pub(crate) below: Below,
    pub(crate) luks: bool,
    pub(crate) size: Size,
    pub(crate) snapshots: bool,
    pub(crate) bitmaps: bool,
    pub(crate) origin: Origin,
}

const CLUSTERS: [u32; 13] = [
    512,
    1 << 10,
    2 << 10,
    4 << 10,
    8 << 10,
    16 << 10,
    32 << 10,
    64 << 10,
    128 << 10,
    256 << 10,
    512 << 10,
    1 << 20,
    2 << 20,
];
/// The usual ones, of which all pairs are made.
const USUAL_CLUSTERS: [u32; 5] = [512, 4 << 10, 16 << 10, 64 << 10, 2 << 20];
/// Of the first of them all pairs are made.
const REFCOUNTS: [u32; 7] = [16, 1, 4, 64, 2, 8, 32];
const USUAL_REFCOUNTS: usize = 4;
const PREALLOCATIONS: [&str; 4] = ["off", "metadata", "falloc", "full"];
const DATA: [Data; 3] = [Data::Inside, Data::File, Data::RawFile];
const BELOW: [Below; 5] =
    [Below::Nothing, Below::ShortQcow2, Below::LongQcow2, Below::ShortRaw, Below::LongRaw];
const SIZES: [Size; 3] = [Size::Whole, Size::Odd, Size::Huge];
const ORIGINS: [Origin; 3] = [Origin::Empty, Origin::Converted, Origin::Compressed];

const AXES: usize = 14;
const CLUSTER_AXIS: usize = 1;
const REFCOUNT_AXIS: usize = 2;
const LUKS_AXIS: usize = 9;
/// The images with each of the sizes of clusters that are not usual.
const UNUSUAL_IMAGES: usize = 1;
/// How many choices there are on each axis.
const CHOICES: [usize; AXES] = [
    2,
    CLUSTERS.len(),
    REFCOUNTS.len(),
    2,
    2,
    2,
    PREALLOCATIONS.len(),
    DATA.len(),
    BELOW.len(),
    2,
    SIZES.len(),
    2,
    2,
    ORIGINS.len(),
];

impl Recipe {
    fn of(choice: &Choice) -> Self {
        Self {
            version2: choice[0] == 1,
            cluster_bytes: CLUSTERS[choice[CLUSTER_AXIS]],
            refcount_bits: REFCOUNTS[choice[2]],
            extended: choice[3] == 1,
            zstd: choice[4] == 1,
            lazy: choice[5] == 1,
            preallocation: PREALLOCATIONS[choice[6]],
            data: DATA[choice[7]],
            below: BELOW[choice[8]],
            luks: choice[9] == 1,
            size: SIZES[choice[10]],
            snapshots: choice[11] == 1,
            bitmaps: choice[12] == 1,
            origin: ORIGINS[choice[13]],
        }
    }

    /// Whether `qemu-img` makes such images. What it refuses, the format has no room for.
    fn exists(&self) -> bool {
        let prepared = self.preallocation != "off";
        let outside = self.data != Data::Inside;
        let version3 = self.refcount_bits != 16
            || self.extended
            || self.zstd
            || self.lazy
            || outside
            || self.bitmaps
            || prepared && self.luks;
        let refused = [
            self.version2 && version3,
            self.extended && self.cluster_bytes < 16 << 10,
            self.below != Below::Nothing && prepared && !self.extended,
            self.below != Below::Nothing && self.data == Data::RawFile,
            self.luks && self.data == Data::RawFile,
            // A snapshot counts everything twice, streams that share a cluster, too, and leaves no place to itself in
            // another file.
            self.snapshots && (self.refcount_bits < 4 || outside),
            // The mapping of 64 TiB, and files of that length, are more than a test machine has.
            self.size == Size::Huge && (prepared || outside || self.cluster_bytes < 64 << 10),
            self.origin != Origin::Empty && self.below != Below::Nothing,
            self.origin != Origin::Empty && self.size == Size::Huge,
            self.origin == Origin::Compressed && (outside || self.luks || prepared),
            // What was never written deciphers to noise.
            self.luks && prepared && self.origin == Origin::Empty,
            self.luks && !cfg!(feature = "luks"),
        ];
        !refused.contains(&true)
    }

    /// Whether clusters can be compressed.
    pub(crate) fn compresses(&self) -> bool {
        self.data == Data::Inside && !self.luks
    }

    /// The size of the disk, in whole sectors.
    pub(crate) fn size_bytes(&self) -> u64 {
        let whole = match self.cluster_bytes {
            0..=1024 => 256 << 10,
            1025..=8192 => 2 << 20,
            8193..=32_768 => 3 << 20,
            32_769..=262_144 => 4 << 20,
            _ => 12 << 20,
        };
        match self.size {
            Size::Whole => whole,
            Size::Odd => whole - 512 * 3,
            Size::Huge => 64 << 40,
        }
    }

    /// The bytes of the disk that a bit of a bitmap stands for.
    pub(crate) fn granularity_bytes(&self) -> u64 {
        match self.size {
            Size::Huge => 4 << 20,
            _ => u64::from(self.cluster_bytes).max(4096),
        }
    }
}

/// A choice on each axis.
type Choice = [usize; AXES];
/// Pairs of choices, each an axis and a choice on it.
type Pairs = HashSet<[(usize, usize); 2]>;

fn pairs(choice: &Choice) -> impl Iterator<Item = [(usize, usize); 2]> {
    (0..AXES).flat_map(move |a| (a + 1..AXES).map(move |b| [(a, choice[a]), (b, choice[b])]))
}

fn triples(choice: &Choice) -> impl Iterator<Item = [(usize, usize); 3]> {
    let with =
        move |[a, b]: [(usize, usize); 2]| (b.0 + 1..AXES).map(move |c| [a, b, (c, choice[c])]);
    pairs(choice).flat_map(with)
}

/// Choices that may exist or not, with clusters of this size. Most are usual ones in most images, or hardly any would
/// exist.
fn draw(random: &mut Random, cluster_bytes: u32) -> Choice {
    let often = 2 + random.below(4);
    std::array::from_fn(|axis| match axis {
        CLUSTER_AXIS => CLUSTERS.iter().position(|one| *one == cluster_bytes).unwrap(),
        REFCOUNT_AXIS if random.once_in(often) => random.index(USUAL_REFCOUNTS),
        _ if random.once_in(often) => random.index(CHOICES[axis]),
        _ => 0,
    })
}

/// The images of a round: all pairs that exist are in one of them, with the usual sizes of clusters and widths of
/// refcounts; and as many triples as an image can have with each of the other sizes.
pub(crate) fn recipes(round: u64) -> Vec<Recipe> {
    let mut random = Random::new(1000 + round);
    let mut seen = Pairs::new();
    let mut drawn: Vec<Choice> = Vec::new();
    for _ in 0..20_000 {
        let cluster_bytes = USUAL_CLUSTERS[random.index(USUAL_CLUSTERS.len())];
        let choice = draw(&mut random, cluster_bytes);
        if Recipe::of(&choice).exists() && pairs(&choice).any(|pair| seen.insert(pair)) {
            drawn.push(choice);
        }
    }
    // The fewest of these that cover as much, nearly.
    let mut kept = Vec::new();
    let mut left = seen;
    while !left.is_empty() {
        let count = |choice: &Choice| pairs(choice).filter(|pair| left.contains(pair)).count();
        let best = *drawn.iter().max_by_key(|choice| count(choice)).unwrap();
        left.retain(|pair| !pairs(&best).any(|covered| covered == *pair));
        kept.push(best);
    }
    let mut covered: HashSet<_> = kept.iter().flat_map(triples).collect();
    let mut widths = (USUAL_REFCOUNTS..REFCOUNTS.len()).chain([0]).cycle();
    for cluster_bytes in CLUSTERS.into_iter().filter(|one| !USUAL_CLUSTERS.contains(one)) {
        for _ in 0..UNUSUAL_IMAGES {
            let width = widths.next().unwrap();
            let drawn = (0..500).map(|_| {
                let mut choice = draw(&mut random, cluster_bytes);
                choice[REFCOUNT_AXIS] = width;
                // Every opening by QEMU costs what its key does.
                choice[LUKS_AXIS] *= usize::from(width == 0);
                choice
            });
            let exist = drawn.filter(|choice| Recipe::of(choice).exists());
            let count = |choice: &Choice| triples(choice).filter(|t| !covered.contains(t)).count();
            let best = exist.max_by_key(count).unwrap();
            covered.extend(triples(&best));
            kept.push(best);
        }
    }
    kept.iter().map(Recipe::of).collect()
}

/// Runs `judge` on every image of the corpus with these cluster sizes, with a seed of its own for each.
pub(crate) fn for_each(clusters: RangeInclusive<u32>, judge: impl Fn(&Recipe, u64)) {
    for round in 0..u64::from(rounds(1)) {
        for (number, recipe) in (0u64..).zip(recipes(round)) {
            if clusters.contains(&recipe.cluster_bytes) {
                judge(&recipe, round * 10_000 + number);
            }
        }
    }
}

#[test]
fn every_choice_is_in_the_corpus_and_every_version_in_every_cluster_size() {
    let recipes = recipes(0);
    assert!(recipes.len() > 25, "{}", recipes.len());
    for cluster_bytes in USUAL_CLUSTERS {
        for version2 in [false, true] {
            let there = |r: &&Recipe| r.cluster_bytes == cluster_bytes && r.version2 == version2;
            assert!(recipes.iter().any(|r| there(&r)), "{cluster_bytes} {version2}");
        }
    }
    for cluster_bytes in CLUSTERS {
        let there = recipes.iter().filter(|recipe| recipe.cluster_bytes == cluster_bytes);
        assert!(there.count() >= UNUSUAL_IMAGES, "{cluster_bytes}");
    }
    for bits in REFCOUNTS {
        let there = recipes.iter().filter(|recipe| recipe.refcount_bits == bits);
        assert!(there.count() > 1, "{bits}");
    }
    for preallocation in PREALLOCATIONS {
        assert!(recipes.iter().any(|r| r.preallocation == preallocation && r.extended));
    }
    for below in BELOW {
        assert!(recipes.iter().any(|r| r.below == below && r.zstd), "{below:?}");
    }
}
