//! Where an image keeps what it says of itself: every structure and every field in it, and from these the lies that can
//! be told. Read from sound images only, so that nothing here is careful.

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;

/// A run of bytes with one meaning.
#[derive(Clone, Debug)]
pub(crate) struct Structure {
    pub(crate) what: &'static str,
    pub(crate) at: usize,
    pub(crate) len: usize,
}

/// A number.
#[derive(Clone, Debug)]
pub(crate) struct Field {
    pub(crate) what: String,
    pub(crate) at: usize,
    /// 1, 2, 4 or 8 bytes.
    pub(crate) len: usize,
    /// It is an offset, maybe with flags.
    pub(crate) leads: bool,
}

/// An image with one thing wrong.
pub(crate) struct Mutant {
    pub(crate) what: String,
    pub(crate) bytes: Vec<u8>,
}

/// What an image consists of.
pub(crate) struct Anatomy {
    bytes: Vec<u8>,
    cluster: usize,
    pub(crate) structures: Vec<Structure>,
    pub(crate) fields: Vec<Field>,
}

impl Anatomy {
    pub(crate) fn of(bytes: &[u8]) -> Self {
        let cluster = 1usize << number(bytes, 20, 4);
        let mut anatomy =
            Self { bytes: bytes.to_vec(), cluster, structures: Vec::new(), fields: Vec::new() };
        anatomy.header();
        anatomy.snapshots();
        let l1 = (anatomy.at(40), anatomy.get(36, 4));
        anatomy.l1("L1 table", l1.0, usize::try_from(l1.1).unwrap());
        anatomy.refcounts();
        anatomy.structures.retain(|part| part.len > 0);
        anatomy
    }

    fn get(&self, at: usize, len: usize) -> u64 {
        number(&self.bytes, at, len)
    }

    fn at(&self, at: usize) -> usize {
        usize::try_from(self.get(at, 8) & OFFSET).unwrap()
    }

    fn field(&mut self, what: impl Into<String>, at: usize, len: usize, leads: bool) {
        if at + len <= self.bytes.len() {
            self.fields.push(Field { what: what.into(), at, len, leads });
        }
    }

    fn structure(&mut self, what: &'static str, at: usize, len: usize) {
        self.structures.push(Structure { what, at, len });
    }

    fn header(&mut self) {
        let v3 = self.get(4, 4) == 3;
        let len = if v3 { usize::try_from(self.get(100, 4)).unwrap() } else { 72 };
        self.structure("header", 0, self.cluster);
        let fields: [(&str, usize, usize); 19] = [
            ("magic", 0, 4),
            ("version", 4, 4),
            ("backing_file_offset", 8, 8),
            ("backing_file_size", 16, 4),
            ("cluster_bits", 20, 4),
            ("size", 24, 8),
            ("crypt_method", 32, 4),
            ("l1_size", 36, 4),
            ("l1_table_offset", 40, 8),
            ("refcount_table_offset", 48, 8),
            ("refcount_table_clusters", 56, 4),
            ("nb_snapshots", 60, 4),
            ("snapshots_offset", 64, 8),
            ("incompatible_features", 72, 8),
            ("compatible_features", 80, 8),
            ("autoclear_features", 88, 8),
            ("refcount_order", 96, 4),
            ("header_length", 100, 4),
            ("compression_type", 104, 1),
        ];
        for (what, at, width) in fields {
            if at < len {
                self.field(what, at, width, what.ends_with("offset"));
            }
        }
        self.extensions(len);
    }

    fn extensions(&mut self, start: usize) {
        let mut at = start;
        while at + 8 <= self.cluster {
            let (kind, len) = (self.get(at, 4), usize::try_from(self.get(at + 4, 4)).unwrap());
            self.field(format!("extension {kind:#x} type"), at, 4, false);
            self.field(format!("extension {kind:#x} length"), at + 4, 4, false);
            match kind {
                0 => break,
                0x2385_2875 => {
                    self.field("bitmaps extension count", at + 8, 4, false);
                    self.field("bitmaps extension reserved", at + 12, 4, false);
                    self.field("bitmaps extension directory_size", at + 16, 8, false);
                    self.field("bitmaps extension directory_offset", at + 24, 8, true);
                    self.bitmaps(self.at(at + 24), self.get(at + 8, 4));
                }
                0x0537_be77 => {
                    self.field("LUKS header offset", at + 8, 8, true);
                    self.field("LUKS header length", at + 16, 8, false);
                    self.luks(self.at(at + 8));
                }
                _ => self.field(format!("extension {kind:#x} data"), at + 8, 1, false),
            }
            at = (at + 8 + len).next_multiple_of(8);
        }
    }

    fn luks(&mut self, start: usize) {
        self.structure("LUKS header", start, 4096);
        for (what, at, len) in [
            ("magic", 0, 4),
            ("version", 6, 2),
            ("cipher", 8, 4),
            ("mode", 40, 4),
            ("hash", 72, 4),
            ("payload", 104, 4),
            ("key_bytes", 108, 4),
            ("master rounds", 164, 4),
            ("slot 0 active", 208, 4),
            ("slot 0 rounds", 212, 4),
            ("slot 0 offset", 248, 4),
            ("slot 0 stripes", 252, 4),
            ("slot 1 active", 256, 4),
        ] {
            self.field(format!("LUKS {what}"), start + at, len, false);
        }
    }

    fn snapshots(&mut self) {
        let (start, count) = (self.at(64), self.get(60, 4));
        let mut at = start;
        for number in 0..count {
            at = at.next_multiple_of(8);
            for (what, place, len) in [
                ("l1_table_offset", 0, 8),
                ("l1_size", 8, 4),
                ("id_size", 12, 2),
                ("name_size", 14, 2),
                ("date_sec", 16, 4),
                ("date_nsec", 20, 4),
                ("vm_clock", 24, 8),
                ("vm_state_size", 32, 4),
                ("extra_data_size", 36, 4),
                ("vm_state_size 64", 40, 8),
                ("disk_size", 48, 8),
                ("icount", 56, 8),
                ("id", 64, 1),
            ] {
                let leads = what == "l1_table_offset";
                self.field(format!("snapshot {number} {what}"), at + place, len, leads);
            }
            let l1 = (self.at(at), usize::try_from(self.get(at + 8, 4)).unwrap());
            self.l1("snapshot L1 table", l1.0, l1.1);
            let variable = self.get(at + 36, 4) + self.get(at + 12, 2) + self.get(at + 14, 2);
            at += 40 + usize::try_from(variable).unwrap();
        }
        self.structure("snapshot table", start, at - start);
    }

    fn bitmaps(&mut self, start: usize, count: u64) {
        let mut at = start;
        for number in 0..count {
            for (what, place, len) in [
                ("table_offset", 0, 8),
                ("table_size", 8, 4),
                ("flags", 12, 4),
                ("type", 16, 1),
                ("granularity_bits", 17, 1),
                ("name_size", 18, 2),
                ("extra_data_size", 20, 4),
                ("name", 24, 1),
            ] {
                let leads = what == "table_offset";
                self.field(format!("bitmap {number} {what}"), at + place, len, leads);
            }
            let table = (self.at(at), usize::try_from(self.get(at + 8, 4)).unwrap() * 8);
            self.structure("bitmap table", table.0, table.1);
            self.entries("bitmap table", table.0, table.1, 8);
            for entry in (0..table.1).step_by(8) {
                let data = self.at(table.0 + entry);
                if data > 0 {
                    self.structure("bitmap data", data, self.cluster);
                }
            }
            let variable = self.get(at + 18, 2) + self.get(at + 20, 4);
            at = (at + 24 + usize::try_from(variable).unwrap()).next_multiple_of(8);
        }
        self.structure("bitmap directory", start, at - start);
    }

    fn l1(&mut self, what: &'static str, start: usize, entries: usize) {
        self.structure(what, start, entries * 8);
        self.entries(what, start, entries * 8, 8);
        let extended = self.get(4, 4) == 3 && self.get(72, 8) & 16 != 0;
        let step = if extended { 16 } else { 8 };
        let tables = (0..entries).map(|entry| self.at(start + entry * 8)).filter(|at| *at > 0);
        for table in tables.collect::<Vec<_>>() {
            if self.structures.iter().any(|known| known.at == table) {
                continue;
            }
            self.structure("L2 table", table, self.cluster);
            self.entries("L2 table", table, self.cluster, step);
            let data = (table..table + self.cluster).step_by(step).find_map(|at| {
                let entry = self.get(at, 8);
                (entry & COMPRESSED == 0 && entry & OFFSET > 0).then(|| self.at(at))
            });
            if let Some(data) = data.filter(|data| *data < self.bytes.len()) {
                self.structure("data", data, self.cluster);
            }
        }
    }

    fn refcounts(&mut self) {
        let (start, clusters) = (self.at(48), usize::try_from(self.get(56, 4)).unwrap());
        let len = clusters * self.cluster;
        self.structure("refcount table", start, len);
        self.entries("refcount table", start, len, 8);
        for at in (start..start + len).step_by(8) {
            let block = self.at(at);
            if block > 0 {
                self.structure("refcount block", block, self.cluster);
                self.entries("refcount block", block, self.cluster, 8);
            }
        }
    }

    /// Of a table: the first entries that say something, the last, the first that says nothing, and the very last.
    fn entries(&mut self, what: &'static str, start: usize, len: usize, step: usize) {
        let all: Vec<_> = (start..(start + len).min(self.bytes.len())).step_by(step).collect();
        let used: Vec<_> = all.iter().copied().filter(|at| self.get(*at, 8) != 0).collect();
        let unused = all.iter().copied().find(|at| self.get(*at, 8) == 0);
        let mut chosen: Vec<_> = used.iter().copied().take(2).collect();
        chosen.extend(used.last());
        chosen.extend(unused);
        chosen.extend(all.last());
        chosen.sort_unstable();
        chosen.dedup();
        for at in chosen {
            let entry = (at - start) / step;
            self.field(format!("{what} at {start:#x} entry {entry}"), at, 8, true);
            if step == 16 {
                self.field(format!("{what} at {start:#x} bitmap {entry}"), at + 8, 8, false);
            }
        }
    }

    /// What may stand in a field instead.
    fn lies(&self, field: &Field) -> Vec<u64> {
        let (real, bits) = (self.get(field.at, field.len), field.len * 8);
        let all = if bits == 64 { u64::MAX } else { (1 << bits) - 1 };
        let mut lies: Vec<u64> = (0..bits).map(|bit| 1 << bit).collect();
        lies.extend([0, all, all >> 1, real.wrapping_sub(1) & all, real.wrapping_add(1) & all]);
        if field.leads {
            let flags = real & !OFFSET;
            lies.extend([1 << 63, 1 << 62, 1].map(|flag| real ^ flag));
            let places = self.structures.iter().map(|part| part.at as u64);
            let end = self.bytes.len() as u64;
            let cluster = self.cluster as u64;
            let places =
                places.chain([end, end - cluster, end.next_multiple_of(cluster) + cluster]);
            lies.extend(places.map(|at| at | flags));
        }
        lies.sort_unstable();
        lies.dedup();
        lies.retain(|lie| *lie != real);
        lies
    }

    /// All images with one field that lies, about `limit` of them, spread over all fields.
    pub(crate) fn liars(&self, limit: u32) -> impl Iterator<Item = Mutant> + '_ {
        let all = self
            .fields
            .iter()
            .flat_map(|field| self.lies(field).into_iter().map(move |lie| (field, lie)));
        let all: Vec<_> = all.collect();
        spread(all, limit).map(|(field, lie)| {
            let mut bytes = self.bytes.clone();
            let number = lie.to_be_bytes();
            bytes[field.at..field.at + field.len].copy_from_slice(&number[8 - field.len..]);
            Mutant { what: format!("{} is {lie:#x}", field.what), bytes }
        })
    }

    /// The image with an end at, before and behind the edges of all its structures.
    pub(crate) fn stumps(&self) -> impl Iterator<Item = Mutant> + '_ {
        let mut ends: Vec<usize> = (0..120).step_by(7).collect();
        for part in &self.structures {
            for edge in [part.at, part.at + part.len / 2, part.at + part.len] {
                ends.extend([edge.saturating_sub(1), edge, edge + 1]);
            }
        }
        ends.sort_unstable();
        ends.dedup();
        ends.retain(|end| *end < self.bytes.len());
        ends.into_iter().map(|end| Mutant {
            what: format!("it ends after {end} bytes"),
            bytes: self.bytes[..end].to_vec(),
        })
    }

    /// The image with each structure lying where another does: its bytes are copied there, too.
    pub(crate) fn overlaps(&self, limit: u32) -> impl Iterator<Item = Mutant> + '_ {
        let pairs = self.structures.iter().flat_map(|from| {
            let others = self.structures.iter().filter(|to| to.at != from.at);
            others.map(move |to| (from, to))
        });
        let pairs: Vec<_> = pairs.collect();
        spread(pairs, limit).map(|(from, to)| {
            let mut bytes = self.bytes.clone();
            let end = (from.at + from.len).min(self.bytes.len());
            let what = self.bytes[from.at.min(end)..end].to_vec();
            let len = what.len().min(bytes.len().saturating_sub(to.at));
            bytes[to.at..to.at + len].copy_from_slice(&what[..len]);
            // Whatever led to the one leads to the other now.
            for field in self.fields.iter().filter(|field| field.leads && field.at >= self.cluster)
            {
                let entry = self.get(field.at, 8);
                if entry & OFFSET == from.at as u64 {
                    let moved = to.at as u64 | entry & !OFFSET;
                    if field.at + 8 <= bytes.len() {
                        bytes[field.at..field.at + 8].copy_from_slice(&moved.to_be_bytes());
                    }
                }
            }
            Mutant { what: format!("{} lies over {}", from.what, to.what), bytes }
        })
    }
}

/// About `limit` of the items, from everywhere among them.
fn spread<T>(items: Vec<T>, limit: u32) -> impl Iterator<Item = T> {
    let total = items.len().max(1);
    let chosen = move |at: usize| {
        let random = (at as u64 ^ 0x5bd1_e995).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
        usize::try_from(random).unwrap() % total < limit as usize
    };
    items.into_iter().enumerate().filter(move |(at, _)| chosen(*at)).map(|(_, item)| item)
}

fn number(bytes: &[u8], at: usize, len: usize) -> u64 {
    let bytes = bytes.get(at..at + len).unwrap_or_default();
    bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}
