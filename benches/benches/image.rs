//! An image over a real file: writes of 1 MiB into fresh clusters and reads of what is there, without a network. The
//! file lies in the target folder; the caches of the image are warm, those of the kernel are passed by.

use std::hint::black_box;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use block::{BlockDevice, BufferPool, ByteRange, Durability};
use bytes::Bytes;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use qcow2::{CreateOptions, Image, OpenOptions};
use tokio::runtime::Runtime;

const REQUEST_BYTES: u64 = 1 << 20;
/// The requests of one measurement are spread over an image of this many.
const REQUESTS: u64 = 256;

struct Scratch {
    _folder: tempfile::TempDir,
    path: PathBuf,
}

fn scratch() -> Scratch {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a scratch folder");
    Scratch { path: folder.path().join("image.qcow2"), _folder: folder }
}

async fn empty_image(path: &PathBuf) -> Image {
    let _ = std::fs::remove_file(path);
    let options = CreateOptions::new(REQUESTS * REQUEST_BYTES);
    Image::create(path, &options).await.expect("created");
    Image::open(path, OpenOptions::writing()).await.expect("opened")
}

fn payload() -> Bytes {
    let mut buffer = BufferPool::shared().get_now(usize::try_from(REQUEST_BYTES).expect("1 MiB"));
    buffer.fill(0x5a);
    buffer.freeze()
}

async fn fill(image: &Image, data: &Bytes) {
    for request in 0..REQUESTS {
        let written = image.write(request * REQUEST_BYTES, data.clone(), Durability::Deferred);
        written.await.expect("written");
    }
}

fn write_fresh(criterion: &mut Criterion) {
    let (runtime, scratch, data) = (Runtime::new().expect("a runtime"), scratch(), payload());
    let mut group = criterion.benchmark_group("image");
    group.sample_size(10).throughput(Throughput::Bytes(REQUESTS * REQUEST_BYTES));
    group.bench_function("write_1MiB/fresh_clusters", |bencher| {
        bencher.iter_custom(|rounds| {
            let mut spent = Duration::ZERO;
            for _ in 0..rounds {
                spent += runtime.block_on(async {
                    let image = empty_image(&scratch.path).await;
                    let start = Instant::now();
                    fill(&image, &data).await;
                    image.flush().await.expect("flushed");
                    let spent = start.elapsed();
                    image.close().await.expect("closed");
                    spent
                });
            }
            spent
        });
    });
    group.finish();
}

fn read_allocated(criterion: &mut Criterion) {
    let (runtime, scratch, data) = (Runtime::new().expect("a runtime"), scratch(), payload());
    let image = runtime.block_on(async {
        let image = empty_image(&scratch.path).await;
        fill(&image, &data).await;
        image.flush().await.expect("flushed");
        image
    });
    let mut group = criterion.benchmark_group("image");
    group.sample_size(10).throughput(Throughput::Bytes(REQUEST_BYTES));
    let mut request = 0;
    group.bench_function("read_1MiB/allocated", |bencher| {
        bencher.iter(|| {
            let start = request % REQUESTS * REQUEST_BYTES;
            request += 1;
            let range = ByteRange::between(start, start + REQUEST_BYTES);
            black_box(runtime.block_on(image.read(range)).expect("read"))
        });
    });
    group.finish();
    runtime.block_on(image.close()).expect("closed");
}

criterion_group!(benches, write_fresh, read_allocated);
criterion_main!(benches);
