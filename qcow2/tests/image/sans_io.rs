//! The core without the driver: a program with I/O of its own, here a vector, reads and writes an image.

use block::ByteRange;
use qcow2::sans_io::{FlushPlan, MetaWrite, Metadata, Move, Place, Step, Table, Tables};
use qcow2::{CreateOptions, Image};

use crate::common::{block_on, pattern, qemu_check, range, raw_of};

/// An image in a vector, with all that a driver has to do.
struct Vector {
    file: Vec<u8>,
    metadata: Metadata,
}

impl Vector {
    fn open(file: Vec<u8>) -> Self {
        let tables = Tables::of_header(&file, file.len() as u64).unwrap();
        let part = |range: ByteRange| &file[span(range)];
        let (l1, refcounts) = (part(tables.l1()), part(tables.refcounts()));
        let metadata = Metadata::new(tables, l1, refcounts, None, file.len() as u64);
        Self { file, metadata }
    }

    /// Does what the core asks for, until it has an answer.
    fn step<T>(&mut self, mut ask: impl FnMut(&mut Metadata) -> Step<T>) -> T {
        loop {
            match ask(&mut self.metadata) {
                Step::Ready(answer) => return answer,
                Step::Load(table) => self.load(table),
                Step::Grow(to) => {
                    self.file.resize(usize::try_from(to).unwrap(), 0);
                    self.metadata.grown(to);
                }
            }
        }
    }

    fn load(&mut self, table: Table) {
        let bytes = self.file[span(self.metadata.bytes_of(table))].to_vec();
        self.metadata.loaded(table, &bytes).unwrap();
    }

    fn put(&mut self, at: u64, bytes: &[u8]) {
        self.file[span(range(at, bytes.len() as u64))].copy_from_slice(bytes);
    }

    /// Writes whole clusters.
    fn write(&mut self, at: u64, data: &[u8]) {
        let wanted = range(at, data.len() as u64);
        let plan = self.step(|metadata| metadata.plan_write(wanted).unwrap());
        for one in plan.moves {
            let Move::Payload { guest, host } = one else {
                panic!("whole clusters need no filling")
            };
            let part = range(guest.start() - at, guest.len());
            self.put(host.0, &data[span(part)]);
        }
        self.metadata.publish(&plan.reservation);
    }

    fn flush(&mut self) {
        let (FlushPlan { first, link, last, end_bytes }, captured) = self.metadata.capture();
        let end = usize::try_from(end_bytes).unwrap();
        self.file.resize(self.file.len().max(end), 0);
        for MetaWrite { at, bytes } in [first, link, last].into_iter().flatten() {
            self.put(at.0, &bytes);
        }
        for run in self.metadata.landed(captured) {
            let unused = self.step(|metadata| metadata.drop_run(run).unwrap());
            self.metadata.release(&unused);
        }
    }
}

fn span(range: ByteRange) -> std::ops::Range<usize> {
    usize::try_from(range.start()).unwrap()..usize::try_from(range.end()).unwrap()
}

#[test]
fn a_program_with_io_of_its_own_writes_what_qemu_reads() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vector.qcow2");
    block_on(Image::create(&path, &CreateOptions::new(64 << 20).cluster_bytes(4096))).unwrap();
    let mut image = Vector::open(std::fs::read(&path).unwrap());
    image.step(|metadata| metadata.find_end().unwrap());
    let mut model = vec![0; 64 << 20];
    for (n, at) in (0u64..40).map(|n| (n, (n * 977) % 16000 * 4096)) {
        let data = pattern(n + 1, 8192);
        image.write(at, &data);
        model[span(range(at, 8192))].copy_from_slice(&data);
        if n % 7 == 0 {
            image.flush();
        }
    }
    image.flush();
    std::fs::write(&path, &image.file).unwrap();
    assert!(qemu_check(&path).is_consistent());
    assert!(raw_of(&path) == model);

    let mut again = Vector::open(image.file);
    let extents = again.step(|metadata| metadata.lookup(range(977 * 4096, 4096)).unwrap());
    let Place::Data { host, exclusive: true } = extents[0].place else { panic!("{extents:?}") };
    assert!(again.file[span(range(host.0, 4096))] == model[span(range(977 * 4096, 4096))]);
}
