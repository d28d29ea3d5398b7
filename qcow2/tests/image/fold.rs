//! Chains that are committed, rebased and merged, judged by `qemu-img`: what has to stay reads as before, at the end
//! and wherever the work is broken off.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Waker};

use block::{BlockDevice, ByteRange, Durability, ZeroMode};
use qcow2::{
    BackingFormat, BackingName, CommitOptions, FoldError, FoldPlan, Image, LayerState,
    MergeOptions, OpenOptions, Progress, RebaseOptions, commit, merge, plan_commit, plan_merge,
    plan_rebase, rebase,
};
use tempfile::TempDir;

use crate::bitmaps::dirty_by_qemu;
use crate::common::{block_on, pattern, qemu_check, qemu_img, qemu_io, range, raw_of};

/// A chain in a folder, and what each of its layers shows.
struct Chain {
    dir: TempDir,
    seed: u64,
}

impl Chain {
    fn new(seed: u64) -> Self {
        Self { dir: tempfile::tempdir().unwrap(), seed: seed * 1000 + 1 }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Makes a layer by `qemu-img`, writes something and says what it shows then.
    fn layer(
        &mut self,
        name: &str,
        options: &str,
        size: u64,
        below: Option<(&str, &str)>,
    ) -> Vec<u8> {
        let (path, size_text) = (self.path(name), size.to_string());
        let mut args = vec!["create", "-q", "-f", "qcow2", "-o", options];
        if let Some((name, format)) = below {
            args.extend(["-b", name, "-F", format]);
        }
        args.extend([path.to_str().unwrap(), &size_text]);
        qemu_img(&args);
        self.scribble(&path, size);
        raw_of(&path)
    }

    /// Data, zeros and discards at places that differ from call to call.
    fn scribble(&mut self, path: &Path, size: u64) {
        block_on(async {
            let image = Image::open(path, OpenOptions::writing()).await.unwrap();
            for _ in 0..12 {
                self.seed += 1;
                let at = self.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) % (size - 1000);
                let len = (self.seed * 7919 % 200_000 + 1).min(size - at);
                let bytes = pattern(self.seed, usize::try_from(len).unwrap());
                image.write(at, bytes.into(), Durability::Deferred).await.unwrap();
            }
            for part in 0..3u64 {
                self.seed += 1;
                let at = self.seed.wrapping_mul(0x1234_5678_9abc_def1) % (size - 300_000);
                let zeros = range(at, 100_000 * (part + 1));
                image.write_zeroes(zeros, ZeroMode::default(), Durability::Deferred).await.unwrap();
            }
            image.close().await.unwrap();
        });
    }

    /// `base.qcow2`, `one`, `two`, `three` and `top`, with clusters of many sizes, and what they show.
    fn five(seed: u64) -> (Self, Vec<Vec<u8>>) {
        let mut chain = Self::new(seed);
        let size = (4 << 20) + 5 * 512;
        let shown = vec![
            chain.layer("base", "cluster_size=64k", size, None),
            chain.layer("one", "cluster_size=4k", size, Some(("base", "qcow2"))),
            chain.layer("two", "cluster_size=64k,extended_l2=on", size, Some(("one", "qcow2"))),
            chain.layer("three", "cluster_size=512", size, Some(("two", "qcow2"))),
            chain.layer("top", "cluster_size=1M", size, Some(("three", "qcow2"))),
        ];
        (chain, shown)
    }

    fn assert_shows(&self, name: &str, shown: &[u8]) {
        let path = self.path(name);
        let now = raw_of(&path);
        let differs = now.iter().zip(shown).position(|(a, b)| a != b);
        assert_eq!((now.len(), differs), (shown.len(), None), "{name}");
        let check = qemu_check(&path);
        assert!(check.is_clean(), "{name}: {check:?}");
    }
}

fn quiet(_: Progress) {}

fn copied(plan: &FoldPlan) -> (u64, u64) {
    (plan.data_bytes(), plan.layers.iter().map(|layer| layer.zero_bytes).sum())
}

#[test]
fn a_commit_moves_a_layer_down_and_empties_it() {
    for (format, raw) in [("qcow2", false), ("raw", true)] {
        let mut chain = Chain::new(1);
        chain.layer("base", "cluster_size=4k", 2 << 20, None);
        if raw {
            let bytes = raw_of(&chain.path("base"));
            std::fs::write(chain.path("base"), bytes).unwrap();
        }
        let shown = chain.layer("top", "cluster_size=64k", 2 << 20, Some(("base", format)));
        let top = chain.path("top");
        let options = CommitOptions::default();
        let plan = block_on(plan_commit(&top, &options)).unwrap();
        let last = AtomicU64::new(0);
        let progress = |progress: Progress| {
            assert!(last.swap(progress.done_bytes, Ordering::Relaxed) <= progress.done_bytes);
        };
        let folded = block_on(commit(&top, &options, progress)).unwrap();
        assert_eq!(last.into_inner(), 2 << 20);
        assert!(folded.written_bytes > 0 && folded.written_bytes <= plan.data_bytes());
        chain.assert_shows("top", &shown);
        if raw {
            assert!(std::fs::read(chain.path("base")).unwrap() == shown);
        } else {
            chain.assert_shows("base", &shown);
        }
        block_on(async {
            let image = Image::open(&top, OpenOptions::reading()).await.unwrap();
            for extent in image.map(range(0, 2 << 20)).await.unwrap() {
                assert_eq!(extent.state, LayerState::Unallocated);
            }
        });
    }
}

#[test]
fn a_raw_base_grows_to_its_top() {
    let mut chain = Chain::new(2);
    std::fs::write(chain.path("base"), pattern(9, 1_000_000)).unwrap();
    let shown = chain.layer("top", "cluster_size=64k", 3 << 20, Some(("base", "raw")));
    block_on(commit(&chain.path("top"), &CommitOptions::default(), quiet)).unwrap();
    assert!(std::fs::read(chain.path("base")).unwrap() == shown);
    chain.assert_shows("top", &shown);
}

#[test]
fn an_image_below_grows_to_its_top() {
    let mut chain = Chain::new(12);
    chain.layer("low", "cluster_size=64k", 3 << 20, None);
    chain.layer("base", "cluster_size=4k", 1_000_448, Some(("low", "qcow2")));
    let shown = chain.layer("top", "cluster_size=64k", 3 << 20, Some(("base", "qcow2")));
    let plan = block_on(plan_commit(&chain.path("top"), &CommitOptions::default())).unwrap();
    assert_eq!(plan.grows_to_bytes, Some(3 << 20));
    block_on(commit(&chain.path("top"), &CommitOptions::default(), quiet)).unwrap();
    chain.assert_shows("base", &shown);
    chain.assert_shows("top", &shown);
}

#[test]
fn a_commit_over_several_layers_keeps_the_top_as_it_is() {
    let (chain, shown) = Chain::five(3);
    let options = CommitOptions { base: Some(chain.path("base")), ..CommitOptions::default() };
    let plan = block_on(plan_commit(&chain.path("top"), &options)).unwrap();
    assert_eq!(plan.layers.len(), 4);
    let before = std::fs::read(chain.path("top")).unwrap();
    block_on(commit(&chain.path("top"), &options, quiet)).unwrap();
    chain.assert_shows("base", &shown[4]);
    chain.assert_shows("top", &shown[4]);
    assert!(std::fs::read(chain.path("top")).unwrap() == before);
}

#[test]
fn what_a_short_middle_layer_hides_does_not_come_back() {
    let mut chain = Chain::new(4);
    chain.layer("base", "cluster_size=64k", 4 << 20, None);
    chain.layer("middle", "cluster_size=64k", 1_000_448, Some(("base", "qcow2")));
    let shown = chain.layer("top", "cluster_size=64k", 4 << 20, Some(("middle", "qcow2")));
    let options = CommitOptions { base: Some(chain.path("base")), ..CommitOptions::default() };
    block_on(commit(&chain.path("top"), &options, quiet)).unwrap();
    chain.assert_shows("base", &shown);
    chain.assert_shows("top", &shown);
}

#[test]
fn a_commit_without_a_place_to_go_is_refused() {
    let (chain, _) = Chain::five(5);
    let refused = |path: &str, base: Option<&str>| {
        let base = base.map(|name| chain.path(name));
        let options = CommitOptions { base, ..CommitOptions::default() };
        block_on(commit(&chain.path(path), &options, quiet)).unwrap_err()
    };
    assert!(matches!(refused("base", None), FoldError::NoBacking { .. }));
    assert!(matches!(refused("two", Some("top")), FoldError::NotInChain { .. }));
    assert!(matches!(refused("two", Some("two")), FoldError::NotInChain { .. }));
}

#[test]
fn a_commit_leaves_the_bitmaps_of_the_top_as_they_are() {
    let mut chain = Chain::new(13);
    chain.layer("base", "cluster_size=64k", 4 << 20, None);
    let shown = chain.layer("top", "cluster_size=64k", 4 << 20, Some(("base", "qcow2")));
    let (top, base) = (chain.path("top"), chain.path("base"));
    for path in [&top, &base] {
        qemu_img(&["bitmap", "--add", "-g", "64k", path.to_str().unwrap(), "since"]);
    }
    qemu_io(&top, &["write 1M 128k"]);
    let (dirty, data) = (dirty_by_qemu(&top, "since"), raw_of(&top));
    assert!(!dirty.is_empty() && data != shown);
    block_on(commit(&top, &CommitOptions::default(), quiet)).unwrap();
    assert_eq!(dirty_by_qemu(&top, "since"), dirty);
    // What came into the base is a change there.
    assert!(!dirty_by_qemu(&base, "since").is_empty());
    chain.assert_shows("top", &data);
    chain.assert_shows("base", &data);
}

/// Polls a future so many times, as often as it is woken, then does something, and then ends it.
fn interrupted<T>(future: impl Future<Output = T>, polls: u64, then: impl FnOnce()) -> T {
    block_on(async {
        let mut future = std::pin::pin!(future);
        let mut left = polls;
        let early = std::future::poll_fn(|context| {
            if left == 0 {
                return Poll::Ready(None);
            }
            left -= 1;
            future.as_mut().poll(context).map(Some)
        });
        let early = early.await;
        then();
        match early {
            Some(done) => done,
            None => future.await,
        }
    })
}

/// Whoever puts the top, or the layer that will be, over another image between the look at the chain and the locks must
/// keep what they did.
#[test]
fn a_chain_that_changes_while_it_is_opened_is_left_alone() {
    let (mut moved, mut refused) = (0, 0);
    for (merges, polls) in (0..20).flat_map(|polls| [(false, polls), (true, polls)]) {
        let mut chain = Chain::new(14);
        let size = 1 << 20;
        chain.layer("base", "cluster_size=64k", size, None);
        chain.layer("other", "cluster_size=64k", size, None);
        chain.layer("mid", "cluster_size=64k", size, Some(("base", "qcow2")));
        chain.layer("top", "cluster_size=64k", size, Some(("mid", "qcow2")));
        let top = chain.path("top");
        let mut rebased = false;
        let rebase = || {
            let name = top.to_str().unwrap();
            let args = ["rebase", "-u", "-f", "qcow2", "-b", "other", "-F", "qcow2", name];
            rebased = std::process::Command::new("qemu-img")
                .args(args)
                .output()
                .unwrap()
                .status
                .success();
        };
        let expected = |rebased: bool| {
            // What the top has itself, over whatever it lies over then.
            let copy = chain.path("copy");
            std::fs::copy(chain.path("pristine"), &copy).unwrap();
            if rebased {
                let name = copy.to_str().unwrap();
                qemu_img(&["rebase", "-u", "-f", "qcow2", "-b", "other", "-F", "qcow2", name]);
            }
            raw_of(&copy)
        };
        std::fs::copy(&top, chain.path("pristine")).unwrap();
        let (as_it_is, over_other) = (expected(false), expected(true));
        let before = std::fs::read(chain.path("mid")).unwrap();
        let options = MergeOptions { remove: true, ..MergeOptions::default() };
        let done = match merges {
            true => interrupted(merge(&top, &options, quiet), polls, rebase),
            false => interrupted(commit(&top, &CommitOptions::default(), quiet), polls, rebase),
        };
        let what = format!("merges: {merges}, after {polls} polls, rebased: {rebased}: {done:?}");
        match &done {
            Ok(_) => assert!(raw_of(&top) == if rebased { over_other } else { as_it_is }, "{what}"),
            Err(error) => {
                assert!(rebased, "{what}");
                moved += u32::from(matches!(error, FoldError::Moved { .. }));
                assert!(raw_of(&top) == over_other, "{what}");
                assert!(std::fs::read(chain.path("mid")).unwrap() == before, "{what}");
            }
        }
        refused += u32::from(!rebased);
    }
    assert!(moved > 0 && refused > 0, "{moved} chains moved, {refused} were locked");
}

#[test]
fn increments_roll_into_the_full_backup_one_after_the_other() {
    let (chain, shown) = Chain::five(6);
    let top = chain.path("top");
    let options = MergeOptions { remove: true, ..MergeOptions::default() };
    for (folded, names) in [("one", ["two", "three", "top"]), ("two", ["three", "top", "top"])] {
        let plan = block_on(plan_merge(&top, &options)).unwrap();
        assert_eq!(plan.removed.len(), 1);
        assert!(plan.removed[0].ends_with(folded) && plan.into.ends_with("base"));
        assert!(copied(&plan).0 > 0);
        block_on(merge(&top, &options, quiet)).unwrap();
        assert!(!chain.path(folded).exists());
        for name in names {
            let index = ["base", "one", "two", "three", "top"].iter().position(|n| *n == name);
            chain.assert_shows(name, &shown[index.unwrap()]);
        }
        assert!(qemu_check(&chain.path("base")).is_clean());
    }
    let info = qemu_img(&["info", chain.path("three").to_str().unwrap()]);
    assert!(info.contains("backing file: base ") && info.contains("backing file format: qcow2"));
    block_on(merge(&top, &options, quiet)).unwrap();
    chain.assert_shows("top", &shown[4]);
    let refused = block_on(merge(&top, &options, quiet));
    assert!(matches!(refused, Err(FoldError::NothingBetween { .. })));
}

#[test]
fn several_increments_are_merged_at_once_into_a_layer_in_the_middle() {
    let (chain, shown) = Chain::five(7);
    let (base, last) = (Some(chain.path("one")), Some(chain.path("three")));
    let options = MergeOptions { base, last, ..MergeOptions::default() };
    block_on(merge(&chain.path("top"), &options, quiet)).unwrap();
    assert!(chain.path("two").exists());
    chain.assert_shows("one", &shown[3]);
    chain.assert_shows("top", &shown[4]);
    chain.assert_shows("base", &shown[0]);
}

fn onto(path: &str, format: BackingFormat) -> RebaseOptions {
    let backing = Some(BackingName { path: path.to_owned(), format });
    RebaseOptions { backing, ..RebaseOptions::default() }
}

#[test]
fn an_image_reads_the_same_over_any_backing_file() {
    let mut chain = Chain::new(8);
    let size = (3 << 20) + 512;
    chain.layer("old", "cluster_size=4k", size - 700_000, None);
    chain.layer("short", "cluster_size=64k", 1 << 20, None);
    chain.layer("long", "cluster_size=64k", 5 << 20, None);
    std::fs::write(chain.path("raw"), pattern(77, 4 << 20)).unwrap();
    for options in [
        "cluster_size=64k",
        "cluster_size=512",
        "cluster_size=128k,extended_l2=on",
        "compat=0.10,cluster_size=4k",
    ] {
        let shown = chain.layer("top", options, size, Some(("old", "qcow2")));
        let top = chain.path("top");
        let ways = [
            onto("short", BackingFormat::Qcow2),
            onto("raw", BackingFormat::Raw),
            onto("long", BackingFormat::Qcow2),
            RebaseOptions::default(),
            onto("old", BackingFormat::Qcow2),
        ];
        for way in ways {
            let plan = block_on(plan_rebase(&top, &way, quiet)).unwrap();
            let folded = block_on(rebase(&top, &way, quiet)).unwrap();
            assert_eq!(copied(&plan), (folded.written_bytes, folded.zeroed_bytes));
            chain.assert_shows("top", &shown);
            let info = qemu_img(&["info", top.to_str().unwrap()]);
            match &way.backing {
                Some(backing) => {
                    assert!(info.contains(&format!("backing file: {} ", backing.path)))
                }
                None => assert!(!info.contains("backing file")),
            }
        }
        std::fs::remove_file(&top).unwrap();
    }
}

#[test]
fn a_rebase_down_the_chain_takes_what_was_between() {
    let (chain, shown) = Chain::five(9);
    let top = chain.path("top");
    block_on(rebase(&top, &onto("one", BackingFormat::Qcow2), quiet)).unwrap();
    chain.assert_shows("top", &shown[4]);
    let same = block_on(rebase(&top, &onto("one", BackingFormat::Qcow2), quiet)).unwrap();
    assert_eq!((same.written_bytes, same.zeroed_bytes), (0, 0));
    chain.assert_shows("top", &shown[4]);
}

#[test]
fn a_rebase_may_compress_what_it_takes() {
    let (chain, shown) = Chain::five(10);
    let top = chain.path("two");
    let options = RebaseOptions { compress: true, ..RebaseOptions::default() };
    block_on(rebase(&top, &options, quiet)).unwrap();
    chain.assert_shows("two", &shown[2]);
}

#[test]
fn an_unchecked_rebase_changes_a_name_and_asks_nobody() {
    let mut chain = Chain::new(11);
    chain.layer("old", "cluster_size=64k", 1 << 20, None);
    let shown = chain.layer("top", "cluster_size=64k", 1 << 20, Some(("old", "qcow2")));
    std::fs::rename(chain.path("old"), chain.path("moved")).unwrap();
    let options = RebaseOptions { unchecked: true, ..onto("moved", BackingFormat::Qcow2) };
    block_on(rebase(&chain.path("top"), &options, quiet)).unwrap();
    chain.assert_shows("top", &shown);
    let checked = block_on(rebase(&chain.path("top"), &onto("top", BackingFormat::Qcow2), quiet));
    assert!(matches!(checked, Err(FoldError::Image(qcow2::Error::Reference { .. }))));
    let long = onto(&"x".repeat(1024), BackingFormat::Qcow2);
    assert!(block_on(rebase(&chain.path("top"), &long, quiet)).is_err());
    chain.assert_shows("top", &shown);
}

/// Polls a future at most `polls` times and drops it; whether it came to its end.
fn break_off<T>(future: impl Future<Output = T>, polls: u64) -> Option<T> {
    let mut future = Box::pin(future);
    let mut context = Context::from_waker(Waker::noop());
    for _ in 0..polls {
        if let Poll::Ready(done) = future.as_mut().poll(&mut context) {
            return Some(done);
        }
        std::thread::yield_now();
    }
    None
}

/// The disk, as we read it from a chain that was left somehow.
fn read(path: &Path) -> Vec<u8> {
    block_on(async {
        // What was dropped is let go when its last operation has finished: the lock waits for that.
        let image = Image::open(path, OpenOptions::reading()).await.unwrap();
        image.read(ByteRange::between(0, image.limits().size_bytes)).await.unwrap().to_vec()
    })
}

#[test]
fn work_that_is_broken_off_anywhere_leaves_every_chain_readable() {
    for round in 0..8 {
        let polls = 3 + round * round * 400;
        let (chain, shown) = Chain::five(20);
        let top = chain.path("top");
        let merging = MergeOptions::default();
        let merged = break_off(merge(&top, &merging, quiet), polls).is_some();
        assert!(read(&top) == shown[4], "{round}");
        assert!(read(&chain.path("two")) == shown[2], "{round}");
        assert!(qemu_check(&chain.path("base")).is_consistent());
        if !merged {
            block_on(merge(&top, &merging, quiet)).unwrap();
        }
        break_off(rebase(&top, &onto("two", BackingFormat::Qcow2), quiet), polls);
        assert!(read(&top) == shown[4], "{round}");
        assert!(qemu_check(&top).is_consistent());
        break_off(commit(&top, &CommitOptions::default(), quiet), polls);
        assert!(read(&top) == shown[4], "{round}");
        block_on(commit(&top, &CommitOptions::default(), quiet)).unwrap();
        chain_end(&chain, &shown[4]);
    }
}

fn chain_end(chain: &Chain, shown: &[u8]) {
    assert!(raw_of(&chain.path("top")) == shown);
    assert!(qemu_check(&chain.path("top")).is_consistent());
}
