//! Changes of images that are hurt half-way: what is there before, the command line, and what must hold afterwards
//! whether it succeeded, failed or was killed. The judge is qemu-img.

use std::path::Path;

use crate::support::{Answer, Place};

/// A command line over the images that [`prepare`] makes.
pub(crate) struct Deed {
    pub(crate) name: &'static str,
    pub(crate) args: &'static [&'static str],
    /// A file that it makes, and its format; it reads as `top` does.
    pub(crate) makes: Option<&'static str>,
    /// Images whose content stays, whatever happens.
    pub(crate) keeps: &'static [&'static str],
    /// What it answers where it was done before, unless it simply succeeds again.
    pub(crate) again: Option<&'static str>,
}

/// The images that deeds find.
const IMAGES: &[&str] = &["base", "mid", "top", "marked", "small", "broken"];

pub(crate) const DEEDS: &[Deed] = &[
    Deed::making("convert", &["convert", "-O", "qcow2", "top", "new"], "qcow2"),
    Deed::making("compress", &["convert", "-c", "-O", "qcow2", "top", "new"], "qcow2"),
    Deed::making("to raw", &["convert", "-O", "raw", "top", "new"], "raw"),
    Deed::making("dd", &["dd", "-f", "qcow2", "-O", "qcow2", "if=top", "of=new"], "qcow2"),
    Deed::changing("commit", &["commit", "top"], &["base", "top"]),
    Deed::changing("rebase", &["rebase", "-b", "", "top"], &["base", "mid", "top"]),
    Deed::changing("commit far", &["commit", "-b", "base", "top"], &["top"]),
    Deed::changing("rebase far", &["rebase", "-b", "base", "-F", "qcow2", "top"], &["base", "top"]),
    Deed::changing("merge", &["merge", "top"], &["top"]).or("nothing to merge"),
    Deed::changing("purge", &["merge", "--remove", "top"], &["top"]).or("nothing to merge"),
    Deed::changing("snapshot", &["snapshot", "-c", "second", "marked"], &["marked"]),
    Deed::changing("forget", &["snapshot", "-d", "first", "marked"], &["marked"])
        .or("there is no snapshot"),
    Deed::changing("widen", &["amend", "-o", "refcount_bits=64", "marked"], &["marked"]),
    Deed::changing("bitmap", &["bitmap", "--add", "-g", "512", "marked", "more"], &["marked"])
        .or("already"),
    Deed::changing("union", &["bitmap", "--merge", "one", "marked", "two"], &["marked"]),
    Deed::changing("resize", &["resize", "small", "100G"], &["small"]),
    Deed::changing("shrink", &["resize", "--shrink", "small", "700k"], &["small"]),
    Deed::changing("repair", &["check", "-r", "all", "broken"], &["broken"]),
];

impl Deed {
    const fn making(
        name: &'static str,
        args: &'static [&'static str],
        format: &'static str,
    ) -> Self {
        Self { name, args, makes: Some(format), keeps: &["base", "mid", "top"], again: None }
    }

    const fn changing(
        name: &'static str,
        args: &'static [&'static str],
        keeps: &'static [&'static str],
    ) -> Self {
        Self { name, args, makes: None, keeps, again: None }
    }

    const fn or(self, again: &'static str) -> Self {
        Self { again: Some(again), ..self }
    }

    /// Looks at everything that must hold in `folder` once the work has ended with `answer`. Contents are kept in
    /// `prepared`.
    pub(crate) fn judge(&self, judge: &impl Judge, prepared: &Path, after: &After) {
        let name = self.name;
        let complete = matches!(after, After::Success);
        let concerned = |image: &&&str| self.args.contains(image) || self.keeps.contains(image);
        for image in IMAGES.iter().filter(concerned) {
            let check = ask(judge, &["check", image]);
            let is_fit = match check.code {
                0 => true,
                // What nothing refers to, after a death. It was broken before.
                3 => matches!(after, After::Death),
                _ => *image == "broken" && !complete,
            };
            assert!(is_fit, "{name} {after:?}: {image}: {check:?}");
        }
        let as_before = |image: &str, format: &str, model: &str| {
            let raw = prepared.join(format!("{model}.raw"));
            let raw = raw.to_str().expect("a readable path");
            let same = ask(judge, &["compare", "-f", format, "-F", "raw", image, raw]);
            assert_eq!(same.code, 0, "{name} {after:?}: {image}: {same:?}");
        };
        for image in self.keeps {
            as_before(image, "qcow2", image);
        }
        let Some(format) = self.makes else { return };
        match after {
            After::Success => as_before("new", format, "top"),
            After::Failure => {
                let list = judge.run("ls", &[]).out;
                assert!(
                    !list.lines().any(|file| file == "new"),
                    "{name}: half of it stays: {list}"
                );
            }
            After::Death => {}
        }
    }
}

/// What qemu-img answers once it gets the lock: the system takes its time to take apart what a killed process had in
/// flight, and keeps the image locked meanwhile.
fn ask(judge: &impl Judge, args: &[&str]) -> Answer {
    for _try in 0..2000 {
        let answer = judge.run("qemu-img", args);
        if !answer.err.contains("Failed to get shared") {
            return answer;
        }
    }
    panic!("{args:?}: the lock stays")
}

/// How the work ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum After {
    Success,
    Failure,
    Death,
}

/// Whoever runs programs where the images are.
pub(crate) trait Judge {
    /// What `program` answers there.
    fn run(&self, program: &str, args: &[&str]) -> Answer;
}

impl Judge for Place {
    fn run(&self, program: &str, args: &[&str]) -> Answer {
        self.answer(program, args)
    }
}

/// A folder with the images, and the content of each as a raw file beside it.
pub(crate) fn prepare() -> Place {
    let place = Place::new();
    for (name, options, below, size) in [
        ("base", "cluster_size=4k", "", "8M"),
        ("mid", "cluster_size=64k", "base", "8M"),
        ("top", "cluster_size=4k", "mid", "8M"),
        ("marked", "cluster_size=4k,refcount_bits=16", "", "8M"),
        ("small", "cluster_size=512", "", "1M"),
        ("broken", "cluster_size=512", "", "8M"),
    ] {
        let mut line = vec!["create", "-f", "qcow2", "-o", options];
        if !below.is_empty() {
            line.extend(["-b", below, "-F", "qcow2"]);
        }
        line.extend([name, size]);
        place.qemu_img(&line).good();
    }
    place.qemu_io("base", &["write -P 1 0 5M"]);
    place.qemu_io("mid", &["write -P 2 1M 2M", "write -P 2 6M 100k", "write -z 4M 256k"]);
    place.qemu_io("top", &["write -P 3 2M 2M", "write -P 3 7M 300k", "write -z 512k 64k"]);
    place.qemu_io("marked", &["write -P 4 0 2M"]);
    place.qemu_img(&["snapshot", "-c", "first", "marked"]).good();
    for (granularity, bitmap) in [("512", "one"), ("64k", "two")] {
        place.qemu_img(&["bitmap", "--add", "-g", granularity, "marked", bitmap]).good();
    }
    place.qemu_io("marked", &["write -P 5 1M 2M", "discard 512k 128k", "write -P 5 7M 1M"]);
    place.qemu_io("small", &["write -P 6 0 700k"]);
    place.qemu_io("broken", &["write -P 7 0 3M"]);
    lose_refcounts(&place.path("broken"));
    for image in IMAGES {
        let raw = format!("{image}.raw");
        place.qemu_img(&["convert", "-O", "raw", image, &raw]).good();
    }
    place
}

/// Makes the whole refcount table zeros: every cluster is in use and none is counted.
fn lose_refcounts(path: &Path) {
    let mut bytes = std::fs::read(path).expect("a readable image");
    let field = |at: usize, len: usize| {
        let value =
            bytes[at..at + len].iter().fold(0, |value, byte| value << 8 | usize::from(*byte));
        assert!(value > 0);
        value
    };
    let (table, clusters) = (field(48, 8), field(56, 4));
    bytes[table..table + clusters * 512].fill(0);
    std::fs::write(path, bytes).expect("a writable image");
}

/// Copies the images from one folder to another.
pub(crate) fn copy_all(from: &Path, to: &Path) {
    for image in IMAGES {
        std::fs::copy(from.join(image), to.join(image)).expect("room for the images");
    }
}
