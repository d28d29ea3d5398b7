//! Data that goes from layer to layer without passing through this process: by the host's own copying on any file
//! system, and as shared extents on one that has them. The judge is `qemu-img`.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use block::{BlockDevice, Durability};
use qcow2::{CommitOptions, Image, MergeOptions, OpenOptions, Progress, commit, merge};

use crate::common::{block_on, pattern, qemu_check, qemu_create, qemu_img, qemu_io};

const SIZE: u64 = 24 << 20;

/// A chain whose layers have clusters of these sizes, the lowest first; each holds data that it shares with none.
fn chain(dir: &Path, options: &[&str]) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = Vec::new();
    for (number, options) in (0u64..).zip(options) {
        let path = dir.join(format!("layer{number}"));
        let below = paths.last().and_then(|below| below.file_name()?.to_str());
        qemu_create(&path, options, &SIZE.to_string(), below);
        block_on(async {
            let image = Image::open(&path, OpenOptions::writing()).await.unwrap();
            for (at, len) in [(number * (3 << 20), 4 << 20), ((13 << 20) + number * 70_000, 90_000)]
            {
                let data = pattern(at + number + 1, len);
                image.write(at, data.into(), Durability::Deferred).await.unwrap();
            }
            image.close().await.unwrap();
        });
        paths.push(path);
    }
    paths
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn keep(path: &Path) -> PathBuf {
    let copy = path.with_extension("as-it-was");
    qemu_img(&["convert", "-O", "raw", text(path), text(&copy)]);
    copy
}

fn assert_same(path: &Path, was: &Path) {
    qemu_img(&["compare", "-F", "raw", text(path), text(was)]);
}

fn quiet(_: Progress) {}

/// Merges and commits, and gives what the host moved and what was moved in all.
fn merges_and_commits(dir: &Path, options: &[&str]) -> (u64, u64) {
    let paths = chain(dir, options);
    let was: Vec<_> = paths.iter().map(|path| keep(path)).collect();
    let top = paths.last().unwrap();
    let merged = block_on(merge(top, &MergeOptions::default(), quiet)).unwrap();
    assert_same(&paths[0], &was[1]);
    for (path, was) in paths.iter().zip(&was).skip(2) {
        assert_same(path, was);
    }
    let committed = block_on(commit(&paths[2], &CommitOptions::default(), quiet)).unwrap();
    assert_same(&paths[0], &was[2]);
    assert_same(&paths[2], &was[2]);
    for path in [&paths[0], &paths[2], top] {
        assert!(qemu_check(path).is_clean(), "{}", path.display());
    }
    let sum = [merged, committed].map(|folded| (folded.by_host_bytes, folded.written_bytes));
    (sum[0].0 + sum[1].0, sum[0].1 + sum[1].1)
}

const SAME: [&str; 4] = ["cluster_size=64k"; 4];

#[test]
fn plain_data_is_copied_by_the_host_and_the_rest_is_not() {
    for place in [std::env::temp_dir(), PathBuf::from("/dev/shm")] {
        let dir = || tempfile::tempdir_in(&place).unwrap();
        let (by_host, written) = merges_and_commits(dir().path(), &SAME);
        assert!(by_host > 7 << 20 && by_host <= written, "{by_host} of {written}");
        let mixed = [
            "cluster_size=4k",
            "cluster_size=64k",
            "cluster_size=64k,extended_l2=on",
            "cluster_size=512",
        ];
        let (by_host, written) = merges_and_commits(dir().path(), &mixed);
        assert!(by_host > 7 << 20 && by_host <= written, "{by_host} of {written}");
        let coarse =
            ["cluster_size=2M", "cluster_size=4k", "compat=0.10,cluster_size=64k", SAME[0]];
        merges_and_commits(dir().path(), &coarse);
    }
}

#[test]
fn compressed_data_and_data_in_files_of_their_own_are_merged_too() {
    let dir = tempfile::tempdir().unwrap();
    let paths = chain(dir.path(), &SAME);
    qemu_io(&paths[1], &["write -P 5 0 8M"]);
    let was = keep(&paths[1]);
    let packed = dir.path().join("packed");
    let args = ["convert", "-c", "-O", "qcow2", "-B", "layer0", "-F", "qcow2"];
    qemu_img(&[&args[..], &[text(&paths[1]), text(&packed)]].concat());
    std::fs::rename(&packed, &paths[1]).unwrap();
    let merged = block_on(merge(&paths[3], &MergeOptions::default(), quiet)).unwrap();
    // What did not get smaller is stored as it is.
    assert!(merged.by_host_bytes < 1 << 20 && merged.written_bytes > 8 << 20, "{merged:?}");
    assert_same(&paths[0], &was);

    let data = dir.path().join("layer2.data");
    let options = format!("data_file={}", text(&data));
    let apart = dir.path().join("apart");
    let was = keep(&paths[2]);
    let args = ["convert", "-O", "qcow2", "-B", "layer0", "-F", "qcow2", "-o", &options];
    qemu_img(&[&args[..], &[text(&paths[2]), text(&apart)]].concat());
    std::fs::rename(&apart, &paths[2]).unwrap();
    let merged = block_on(merge(&paths[3], &MergeOptions::default(), quiet)).unwrap();
    assert!(merged.by_host_bytes > 1 << 20, "{merged:?}");
    assert_same(&paths[0], &was);
}

/// A file system that shares extents, in a file; unmounted when it goes.
struct Mounted {
    dir: tempfile::TempDir,
}

impl Mounted {
    fn point(&self) -> PathBuf {
        self.dir.path().join("mounted")
    }

    /// `None`, with the reason printed, where this machine does not let us mount a file.
    fn new() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let (file, mounted) = (dir.path().join("disk"), Self { dir });
        std::fs::File::create(&file).unwrap().set_len(1 << 30).unwrap();
        std::fs::create_dir(mounted.point()).unwrap();
        let made = run("mkfs.xfs", &["-q", "-m", "reflink=1", text(&file)]);
        assert!(made.status.success(), "mkfs.xfs: {}", said(&made));
        let there = run("mount", &["-o", "loop", text(&file), text(&mounted.point())]);
        if there.status.success() {
            return Some(mounted);
        }
        println!("NOT TESTED: shared extents, it takes root and loop devices: {}", said(&there));
        None
    }
}

/// Runs a program of the system, which may lie where only root looks.
fn run(program: &str, args: &[&str]) -> Output {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let output = Command::new("env").arg(format!("PATH={path}")).arg(program).args(args).output();
    let output = output.unwrap();
    assert_ne!(output.status.code(), Some(127), "{}: scripts/install-peers.sh", said(&output));
    output
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).trim().to_owned()
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Fails where nothing was mounted.
        let _gone = run("umount", &["-q", text(&self.point())]);
    }
}

#[test]
fn layers_share_extents_where_the_file_system_can() {
    let Some(mounted) = Mounted::new() else { return };
    let (by_host, written) = merges_and_commits(&mounted.point(), &SAME);
    assert!(by_host > 7 << 20 && by_host <= written, "{by_host} of {written}");
    let base = mounted.point().join("layer0");
    let map = run("filefrag", &["-v", text(&base)]);
    let map = String::from_utf8_lossy(&map.stdout).into_owned();
    assert!(map.contains("shared"), "nothing is shared: {map}");
    // What is written to one of them afterwards is not seen in the other.
    let one = mounted.point().join("layer1");
    let was = keep(&base);
    qemu_io(&one, &["write -P 7 0 24M"]);
    assert_same(&base, &was);
}
