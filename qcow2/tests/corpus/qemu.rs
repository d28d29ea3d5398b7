//! QEMU's programs: making an image of the corpus, changing it, reading it. What comes out is judged elsewhere.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, PoisonError};

use crate::disk::{Act, Disk, Do, FILL_BYTES, Fill, below};
use crate::random::{Random, noise, words};
use crate::recipe::{Below, Data, Origin, Recipe, Size};

/// Opens all encrypted images of the corpus.
pub(crate) const PASSPHRASE: &str = "open sesame";
/// The bitmap of images that have one.
pub(crate) const BITMAP: &str = "since";
/// The snapshot of images that have one.
pub(crate) const SNAPSHOT: &str = "before";

/// Held while a process starts: until it runs its own program it holds all files of this one, and locks with them.
pub(crate) static STARTING: Mutex<()> = Mutex::new(());

/// Runs a program in a folder.
pub(crate) fn run(folder: &Path, program: &str, args: &[&str]) -> Output {
    let mut command = Command::new(program);
    command.current_dir(folder).args(args);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let started = {
        let _turn = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
        command.spawn()
    };
    let output = started.and_then(Child::wait_with_output);
    output.unwrap_or_else(|error| panic!("{program}: {error}; run scripts/install-peers.sh"))
}

/// Runs `qemu-img`, which must succeed; the passphrase is the object `key`.
pub(crate) fn qemu_img(folder: &Path, args: &[&str]) -> String {
    let secret = format!("secret,id=key,data={PASSPHRASE}");
    let mut all = vec![args[0], "--object", &secret];
    all.extend(&args[1..]);
    let output = run(folder, "qemu-img", &all);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "qemu-img {args:?}: {said}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// An image of the corpus in a folder of its own.
pub(crate) struct Place {
    pub(crate) folder: tempfile::TempDir,
    /// What all messages about it begin with.
    pub(crate) what: String,
}

impl Place {
    pub(crate) fn new(recipe: &Recipe, seed: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("noise"), noise(5, FILL_BYTES)).unwrap();
        std::fs::write(folder.path().join("words"), words(FILL_BYTES)).unwrap();
        Self { folder, what: format!("{recipe:?}, seed {seed}") }
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn image(&self) -> PathBuf {
        self.path().join("disk.qcow2")
    }

    /// Makes what lies below.
    pub(crate) fn make_below(&self, recipe: &Recipe) {
        let Some(bytes) = below(recipe) else { return };
        std::fs::write(self.path().join("below.raw"), bytes).unwrap();
        let options = match recipe.below {
            Below::ShortQcow2 => "cluster_size=4k",
            Below::LongQcow2 => "cluster_size=64k,compression_type=zstd",
            _ => return,
        };
        let mut args = vec!["convert", "-f", "raw", "-O", "qcow2", "-o", options];
        if recipe.below == Below::LongQcow2 {
            args.push("-c");
        }
        args.extend(["below.raw", "below.qcow2"]);
        qemu_img(self.path(), &args);
    }

    /// Makes the image, with what it begins with.
    pub(crate) fn make(&self, recipe: &Recipe, disk: &Disk) {
        self.make_below(recipe);
        let options = options(recipe);
        if recipe.origin == Origin::Empty {
            let size = recipe.size_bytes().to_string();
            let mut args = vec!["create", "-q", "-f", "qcow2", "-o", &options];
            match recipe.below {
                Below::Nothing => {}
                Below::ShortQcow2 | Below::LongQcow2 => {
                    args.extend(["-F", "qcow2", "-b", "below.qcow2"]);
                }
                Below::ShortRaw | Below::LongRaw => args.extend(["-F", "raw", "-b", "below.raw"]),
            }
            args.extend(["disk.qcow2", &size]);
            qemu_img(self.path(), &args);
            return;
        }
        std::fs::write(self.path().join("origin.raw"), &disk.windows[0].bytes).unwrap();
        let mut args = vec!["convert", "-f", "raw", "-O", "qcow2", "-o", &options];
        if recipe.origin == Origin::Compressed {
            args.push("-c");
        }
        args.extend(["origin.raw", "disk.qcow2"]);
        qemu_img(self.path(), &args);
    }

    /// How QEMU is told of the image.
    pub(crate) fn options(recipe: &Recipe) -> String {
        let key = if recipe.luks { ",encrypt.key-secret=key" } else { "" };
        format!("driver=qcow2,file.filename=disk.qcow2,discard=unmap{key}")
    }

    /// Lets `qemu-io` do all that, one after the other.
    pub(crate) fn act(&self, recipe: &Recipe, acts: &[Act]) {
        let commands: Vec<String> = acts.iter().map(command).collect();
        // Shown where the test fails.
        println!("qemu-io: {commands:?}");
        let secret = format!("secret,id=key,data={PASSPHRASE}");
        let options = Self::options(recipe);
        let mut args = vec!["--object", &secret, "--image-opts", &options];
        for command in &commands {
            args.extend(["-c", command]);
        }
        let output = run(self.path(), "qemu-io", &args);
        let said =
            String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        let good = output.status.success() && !said.contains("failed") && !said.contains("rror");
        assert!(good, "{}: {commands:?}: {said}", self.what);
    }

    /// Insists that QEMU finds no error and no leak.
    pub(crate) fn assert_clean(&self, recipe: &Recipe, when: &str) {
        let secret = format!("secret,id=key,data={PASSPHRASE}");
        let options = Self::options(recipe);
        let args = ["check", "--object", &secret, "--image-opts", &options];
        let output = run(self.path(), "qemu-img", &args);
        assert!(output.status.success(), "{}, {when}: {output:?}", self.what);
    }

    /// What is in the windows of the disk, or in a snapshot of it, as QEMU reads it.
    pub(crate) fn read(&self, recipe: &Recipe, disk: &Disk, snapshot: bool) -> Vec<Vec<u8>> {
        let options = Self::options(recipe);
        let folder = self.path();
        let out = folder.join("by-qemu.raw");
        if recipe.size != Size::Huge {
            let mut args = vec!["convert", "--image-opts", "-O", "raw"];
            if snapshot {
                args.extend(["-l", SNAPSHOT]);
            }
            args.extend([&options, "by-qemu.raw"]);
            qemu_img(folder, &args);
            return vec![std::fs::read(out).unwrap()];
        }
        // A raw file of the whole disk would be longer than file systems have them.
        let mut source = options;
        if snapshot {
            qemu_img(
                folder,
                &[
                    "convert",
                    "--image-opts",
                    "-O",
                    "qcow2",
                    "-l",
                    SNAPSHOT,
                    &source,
                    "by-qemu.qcow2",
                ],
            );
            source = "driver=qcow2,file.filename=by-qemu.qcow2".to_owned();
        }
        let read = |range: std::ops::Range<u64>| {
            let block = 128 << 10;
            let skip = format!("skip={}", range.start / block);
            let count = format!("count={}", range.end / block);
            let source = format!("if={source}");
            let _ = std::fs::remove_file(&out);
            qemu_img(
                folder,
                &[
                    "dd",
                    "--image-opts",
                    "-O",
                    "raw",
                    "bs=128k",
                    &skip,
                    &count,
                    &source,
                    "of=by-qemu.raw",
                ],
            );
            std::fs::read(&out).unwrap()
        };
        disk.windows.iter().map(|window| read(window.range())).collect()
    }
}

/// The options of `qemu-img create`.
pub(crate) fn options(recipe: &Recipe) -> String {
    let compat = if recipe.version2 { "0.10" } else { "1.1" };
    let mut options = format!("compat={compat},cluster_size={}", recipe.cluster_bytes);
    if !recipe.version2 {
        options += &format!(",refcount_bits={}", recipe.refcount_bits);
    }
    for (wanted, option) in [
        (recipe.extended, "extended_l2=on"),
        (recipe.zstd, "compression_type=zstd"),
        (recipe.lazy, "lazy_refcounts=on"),
        (recipe.data != Data::Inside, "data_file=disk.data"),
        (recipe.data == Data::RawFile, "data_file_raw=on"),
        (recipe.luks, "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10"),
    ] {
        if wanted {
            options = format!("{options},{option}");
        }
    }
    format!("{options},preallocation={}", recipe.preallocation)
}

fn command(act: &Act) -> String {
    let fill = |fill: Fill| match fill {
        Fill::Byte(byte) => format!("-P {byte}"),
        Fill::Noise => "-s noise".to_owned(),
        Fill::Words => "-s words".to_owned(),
    };
    let verb = match act.what {
        Do::Write(with) => format!("write {}", fill(with)),
        Do::Compress(with) => format!("write -c {}", fill(with)),
        Do::Zero { unmap: false } => "write -z".to_owned(),
        Do::Zero { unmap: true } => "write -z -u".to_owned(),
        Do::Discard => "discard".to_owned(),
    };
    format!("{verb} {} {}", act.range.start, act.len())
}

/// Acts that QEMU can do, and what they make of the disk.
///
/// QEMU compresses only clusters that are new to the image; and it goes on to fill a host cluster with streams after its
/// last one was overwritten and the cluster given to data, which loses that data (seen in 10.0.2), so that a session
/// that has overwritten streams makes no more of them. A discard is done for whole clusters; what they read
/// afterwards is zeros, but for version 2 over a backing file, where nothing is done.
pub(crate) struct Script<'r> {
    recipe: &'r Recipe,
    used: HashSet<u64>,
    compressed: HashSet<u64>,
}

impl<'r> Script<'r> {
    pub(crate) fn new(recipe: &'r Recipe) -> Self {
        Self { recipe, used: HashSet::new(), compressed: HashSet::new() }
    }

    /// Some acts, done to the model.
    pub(crate) fn draw(&mut self, disk: &mut Disk, random: &mut Random, count: usize) -> Vec<Act> {
        let recipe = self.recipe;
        let cluster = u64::from(recipe.cluster_bytes);
        let mut may_compress = recipe.origin == Origin::Empty && recipe.preallocation == "off";
        let mut acts = Vec::new();
        for _ in 0..count {
            let used = &self.used;
            let mut act =
                disk.draw(recipe, random, |at| may_compress && !used.contains(&(at / cluster)));
            if matches!(act.what, Do::Discard) && random.once_in(2) {
                // Parts of clusters show nothing but that they are left alone.
                let window =
                    act.range.start / cluster * cluster..act.range.end.next_multiple_of(cluster);
                act.range = window.start..window.end.min(disk.size_bytes);
            }
            let clusters = act.range.start / cluster..act.range.end.div_ceil(cluster);
            match act.what {
                Do::Compress(_) => self.compressed.extend(clusters.clone()),
                _ => may_compress &= clusters.clone().all(|at| !self.compressed.contains(&at)),
            }
            self.used.extend(clusters);
            disk.apply(&act);
            if matches!(act.what, Do::Discard)
                && !(recipe.version2 && recipe.below != Below::Nothing)
            {
                let start = act.range.start.next_multiple_of(cluster);
                let end = match act.range.end == disk.size_bytes {
                    true => act.range.end,
                    false => act.range.end / cluster * cluster,
                };
                if start < end {
                    disk.part(start..end).fill(0);
                }
            }
            acts.push(act);
        }
        acts
    }
}
