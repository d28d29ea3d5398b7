//! A checker that shares no code with the crate: it walks every table of an image in memory and compares what is
//! referenced with what is counted. Written from the specification alone.

use std::collections::{HashMap, HashSet};

/// What a walk found.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    /// Clusters that are used more often than counted, flags that lie, entries that point nowhere.
    pub(crate) errors: Vec<String>,
    /// Clusters that are counted and not used.
    pub(crate) leaks: u64,
    /// Clusters of guest data.
    pub(crate) data_clusters: u64,
}

impl Findings {
    pub(crate) fn assert_consistent(&self, what: &str) {
        assert!(self.errors.is_empty(), "{what}: {:?}", self.errors);
    }

    pub(crate) fn assert_clean(&self, what: &str) {
        self.assert_consistent(what);
        assert_eq!(self.leaks, 0, "{what}: leaked clusters");
    }
}

struct Walk<'a> {
    bytes: &'a [u8],
    cluster: u64,
    used: HashMap<u64, u64>,
    /// The clusters that compressed clusters share among themselves.
    streams: HashSet<u64>,
    /// Snapshots may share clusters.
    shared: bool,
    /// The bytes of an L2 entry.
    entry: u64,
    /// The bits of a refcount.
    width: u64,
    found: Findings,
}

/// Checks an image with its data inside, with or without internal snapshots.
pub(crate) fn check(bytes: &[u8]) -> Findings {
    let mut walk = Walk {
        bytes,
        cluster: 0,
        used: HashMap::new(),
        streams: HashSet::new(),
        shared: false,
        entry: 8,
        width: 16,
        found: Findings::default(),
    };
    walk.cluster = 1 << walk.u32(20);
    let (l1_at, l1_len) = (walk.u64(40), u64::from(walk.u32(36)));
    let (table_at, table_len) = (walk.u64(48), u64::from(walk.u32(56)) * walk.cluster);
    let is_old = walk.u32(4) == 2;
    if !is_old {
        walk.width = 1 << walk.u32(96);
        walk.entry = if walk.u64(72) & 16 == 0 { 8 } else { 16 };
    }
    walk.take(0, walk.cluster, "header");
    walk.take(l1_at, l1_len * 8, "L1 table");
    walk.take(table_at, table_len, "refcount table");
    let blocks: Vec<u64> = (0..table_len / 8).map(|at| walk.u64(table_at + at * 8)).collect();
    for block in blocks.iter().filter(|block| **block != 0) {
        walk.take(*block, walk.cluster, "refcount block");
    }
    let snapshots = u64::from(walk.u32(60));
    walk.shared = snapshots > 0;
    let mut copied = Vec::new();
    walk.tree(l1_at, l1_len, &mut copied);
    walk.snapshots(snapshots);
    if !is_old {
        walk.bitmaps();
    }
    walk.compare(&blocks, &copied);
    walk.found
}

impl Walk<'_> {
    /// Counts what an L1 table leads to, and notes the copied flags.
    fn tree(&mut self, l1_at: u64, l1_len: u64, copied: &mut Vec<(u64, u64)>) {
        for at in 0..l1_len {
            let entry = self.u64(l1_at + at * 8);
            let table = entry & 0x00ff_ffff_ffff_fe00;
            if table == 0 {
                continue;
            }
            self.take(table, self.cluster, "L2 table");
            copied.push((table, entry >> 63));
            for slot in 0..self.cluster / self.entry {
                let entry = self.u64(table + slot * self.entry);
                if self.entry == 16 {
                    self.subclusters(entry, self.u64(table + slot * 16 + 8));
                }
                let host = entry & 0x00ff_ffff_ffff_fe00;
                if entry >> 62 & 1 == 1 {
                    self.take_stream(entry);
                } else if host != 0 {
                    self.take(host, self.cluster, "data");
                    self.found.data_clusters += 1;
                    copied.push((host, entry >> 63));
                }
            }
        }
    }

    /// A subcluster is data or zeros, not both, and data only where there is a cluster.
    fn subclusters(&mut self, entry: u64, bitmap: u64) {
        let (alloc, zero) = (bitmap & 0xffff_ffff, bitmap >> 32);
        let host = entry & 0x00ff_ffff_ffff_fe00;
        let compressed = entry >> 62 & 1 == 1;
        let wrong =
            if compressed { bitmap != 0 } else { host == 0 && alloc != 0 || entry & 1 != 0 };
        if wrong || alloc & zero != 0 {
            self.found.errors.push(format!("entry {entry:#x} with bitmap {bitmap:#x}"));
        }
    }

    fn snapshots(&mut self, count: u64) {
        let start = self.u64(64);
        let mut at = start;
        for _ in 0..count {
            at = at.next_multiple_of(8);
            let (l1_at, l1_len) = (self.u64(at), u64::from(self.u32(at + 8)));
            self.take(l1_at, l1_len * 8, "snapshot's L1 table");
            // In inactive tables the copied flags mean nothing.
            self.tree(l1_at, l1_len, &mut Vec::new());
            let texts = self.u32(at + 12);
            let extra = self.u32(at + 36);
            assert!(
                extra >= 16,
                "a snapshot in version 3 without the extra data that it must have"
            );
            at += 40 + u64::from(extra) + u64::from(texts >> 16) + u64::from(texts & 0xffff);
        }
        self.take(start, at - start, "snapshot table");
    }

    fn u32(&self, at: u64) -> u32 {
        let at = usize::try_from(at).unwrap();
        self.bytes.get(at..at + 4).map_or(0, |b| u32::from_be_bytes(b.try_into().unwrap()))
    }

    fn u64(&self, at: u64) -> u64 {
        u64::from(self.u32(at)) << 32 | u64::from(self.u32(at + 4))
    }

    fn take(&mut self, at: u64, len: u64, what: &str) {
        if len == 0 {
            return;
        }
        if !at.is_multiple_of(self.cluster) {
            self.found.errors.push(format!("{what} at {at:#x} is not aligned"));
        }
        for cluster in at / self.cluster..(at + len).div_ceil(self.cluster) {
            let users = self.used.entry(cluster).or_default();
            *users += 1;
            if (*users > 1 && !self.shared) || self.streams.contains(&cluster) {
                self.found.errors.push(format!("{what}: cluster {cluster} is used twice"));
            }
        }
    }

    /// A compressed cluster counts once in each host cluster that its sectors lie in.
    fn take_stream(&mut self, entry: u64) {
        let bits = 62 - (self.cluster.trailing_zeros() - 8);
        let at = entry & ((1 << bits) - 1);
        let sectors = (entry & ((1 << 62) - 1)) >> bits;
        let last = (at / 512 + sectors) * 512;
        for cluster in at / self.cluster..=last / self.cluster {
            let users = self.used.entry(cluster).or_default();
            if *users > 0 && !self.shared && !self.streams.contains(&cluster) {
                let error = format!("compressed {entry:#x}: cluster {cluster} is used otherwise");
                self.found.errors.push(error);
            }
            *users += 1;
            self.streams.insert(cluster);
        }
    }

    /// The bitmaps, where the autoclear bit says that they are in order.
    fn bitmaps(&mut self) {
        let mut at = u64::from(self.u32(100));
        while self.u32(at) != 0 && self.u32(at) != 0x2385_2875 {
            at += 8 + u64::from(self.u32(at + 4)).next_multiple_of(8);
        }
        if self.u64(88) & 1 == 0 {
            return;
        }
        if self.u32(at) == 0 {
            return self.found.errors.push("bitmaps without an extension".to_owned());
        }
        let (count, len, start) = (self.u32(at + 8), self.u64(at + 16), self.u64(at + 24));
        self.take(start, len, "bitmap directory");
        let mut entry = start;
        for _ in 0..count {
            let (table, slots) = (self.u64(entry), u64::from(self.u32(entry + 8)));
            self.take(table, slots * 8, "bitmap table");
            for slot in 0..slots {
                let host = self.u64(table + slot * 8) & 0x00ff_ffff_ffff_fe00;
                if host != 0 {
                    self.take(host, self.cluster, "bits");
                }
            }
            let name = u64::from(self.u32(entry + 16) & 0xffff);
            entry += (24 + u64::from(self.u32(entry + 20)) + name).next_multiple_of(8);
        }
        if entry != start + len {
            self.found.errors.push("a bitmap directory of another length".to_owned());
        }
    }

    /// The refcounts of a block.
    fn per_block(&self) -> u64 {
        self.cluster * 8 / self.width
    }

    fn count(&self, blocks: &[u64], cluster: u64) -> u64 {
        let block = usize::try_from(cluster / self.per_block()).unwrap();
        let block = blocks.get(block).copied().unwrap_or(0);
        if block == 0 {
            return 0;
        }
        let bit = cluster % self.per_block() * self.width;
        let at = usize::try_from(block + bit / 8).unwrap();
        if self.width < 8 {
            let byte = u64::from(self.bytes.get(at).copied().unwrap_or(0));
            return byte >> (bit % 8) & ((1 << self.width) - 1);
        }
        let bytes = self.bytes.get(at..at + usize::try_from(self.width / 8).unwrap());
        bytes.unwrap_or_default().iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
    }

    fn compare(&mut self, blocks: &[u64], copied: &[(u64, u64)]) {
        let counted = blocks.len() as u64 * self.per_block();
        for cluster in self.used.keys().filter(|cluster| **cluster >= counted) {
            self.found.errors.push(format!("cluster {cluster} lies behind all refcounts"));
        }
        for (block, _) in blocks.iter().enumerate().filter(|(_, at)| **at != 0) {
            let first = block as u64 * self.per_block();
            for cluster in first..first + self.per_block() {
                let (count, used) =
                    (self.count(blocks, cluster), self.used.get(&cluster).copied().unwrap_or(0));
                if count < used {
                    let error = format!("cluster {cluster} has {used} users and refcount {count}");
                    self.found.errors.push(error);
                }
                self.found.leaks += u64::from(count > used);
            }
        }
        let uncovered: Vec<_> = self
            .used
            .keys()
            .filter(|cluster| self.count(blocks, **cluster) == 0)
            .copied()
            .collect();
        for cluster in uncovered {
            self.found.errors.push(format!("cluster {cluster} is used and has refcount 0"));
        }
        for (at, flag) in copied {
            let once = self.count(blocks, at / self.cluster) == 1;
            if once != (*flag == 1) {
                self.found.errors.push(format!("{at:#x} has the wrong copied flag"));
            }
        }
    }
}
