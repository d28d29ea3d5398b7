//! Our own engine: making an image of the corpus, changing it, reading it. What comes out is judged elsewhere.

use std::path::Path;

use block::{BlockDevice, ByteRange, Durability, ZeroMode};
use qcow2::{
    BackingFormat, Compression, CreateOptions, Image, KeyCost, LuksOptions, OpenOptions,
    Passphrase, Preallocation, Version,
};

use crate::disk::{Act, Disk, Do};
use crate::qemu::PASSPHRASE;
use crate::random::Random;
use crate::recipe::{Below, Data, Recipe};

/// Runs a future on this thread.
pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(future)
}

/// Opens an image, encrypted or not.
pub(crate) async fn open(path: &Path, options: OpenOptions) -> Image {
    let opened = Image::open(path, options.passphrase(Passphrase::new(PASSPHRASE))).await;
    opened.unwrap_or_else(|error| panic!("{}: {error:?}", path.display()))
}

/// What is in the windows of a disk.
pub(crate) async fn read(image: &Image, disk: &Disk) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for window in &disk.windows {
        let range = ByteRange::between(window.range().start, window.range().end);
        let mut bytes = Vec::new();
        for piece in range.pieces(1 << 20) {
            bytes.extend(image.read(piece).await.unwrap().to_vec());
        }
        all.push(bytes);
    }
    all
}

/// How an image like this is made.
pub(crate) fn options(recipe: &Recipe, size_bytes: u64) -> CreateOptions {
    let mut options = CreateOptions::new(size_bytes)
        .cluster_bytes(recipe.cluster_bytes)
        .version(if recipe.version2 { Version::V2 } else { Version::V3 })
        .extended_l2(recipe.extended)
        .refcount_bits(recipe.refcount_bits)
        .lazy_refcounts(recipe.lazy)
        .compression(if recipe.zstd { Compression::Zstd } else { Compression::Deflate })
        .preallocation(match recipe.preallocation {
            "metadata" => Preallocation::Metadata,
            "falloc" => Preallocation::Falloc,
            "full" => Preallocation::Full,
            _ => Preallocation::Off,
        });
    options = match recipe.below {
        Below::Nothing => options,
        Below::ShortQcow2 | Below::LongQcow2 => {
            options.backing("below.qcow2", BackingFormat::Qcow2)
        }
        Below::ShortRaw | Below::LongRaw => options.backing("below.raw", BackingFormat::Raw),
    };
    if recipe.data != Data::Inside {
        options = options.data_file("disk.data", recipe.data == Data::RawFile);
    }
    if recipe.luks {
        let mut luks = LuksOptions::new(Passphrase::new(PASSPHRASE));
        luks.cost = KeyCost::Rounds(1000);
        options = options.encryption(luks);
    }
    options
}

/// Does some of everything to an image and to its model; what is discarded reads as it did or as zeros.
pub(crate) async fn change(
    image: &Image,
    recipe: &Recipe,
    disk: &mut Disk,
    random: &mut Random,
    count: usize,
) -> Vec<Act> {
    let mut acts = Vec::new();
    for _ in 0..count {
        let act = disk.draw(recipe, random, |_| true);
        // Shown where the test fails.
        println!("we: {act:?}");
        apply(image, &act).await;
        disk.apply(&act);
        if matches!(act.what, Do::Discard) {
            let range = ByteRange::between(act.range.start, act.range.end);
            let now = image.read(range).await.unwrap().to_vec();
            let old = disk.part(act.range.clone());
            assert!(now.iter().zip(&*old).all(|(now, old)| *now == 0 || now == old), "{act:?}");
            old.copy_from_slice(&now);
        }
        acts.push(act);
    }
    acts
}

async fn apply(image: &Image, act: &Act) {
    let range = ByteRange::between(act.range.start, act.range.end);
    let len = usize::try_from(act.len()).unwrap();
    let later = Durability::Deferred;
    let done = match act.what {
        Do::Write(fill) => image.write(range.start(), fill.bytes(len).into(), later).await,
        Do::Compress(fill) => {
            let done = image.write_compressed(range.start(), fill.bytes(len).into()).await;
            done.map_err(Into::into)
        }
        Do::Zero { unmap } => {
            let mode = ZeroMode { keep_allocated: !unmap, fast_only: false };
            image.write_zeroes(range, mode, later).await
        }
        Do::Discard => image.discard(range, later).await,
    };
    done.unwrap_or_else(|error| panic!("{act:?}: {error:?}"));
}
