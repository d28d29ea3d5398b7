//! Every option that qemu-img takes for a command of ours, by its letter and by its name: scripts use both. What options
//! do is told with the commands.

use crate::support::Place;

/// A command, what stands behind its options, and its options, each with what it needs beside it. The file that they
/// name is not there, so that a command line that is understood ends with its name.
struct Taken {
    command: &'static str,
    operands: &'static [&'static str],
    /// Taken by qemu-img, too.
    options: &'static [&'static str],
    /// Names that qemu-img's help tells, or told in other versions.
    told: &'static [&'static str],
}

const OBJECT: &str = "--object secret,id=s,data=abc";

const ALL: [Taken; 15] = [
    Taken {
        command: "create",
        operands: &["nofile/x", "1M"],
        options: &[
            "-f qcow2",
            "--format qcow2",
            "-q",
            "--quiet",
            "-f qcow2 -o cluster_size=64k",
            "-f qcow2 --options cluster_size=64k",
            "-f qcow2 -u -b b -F qcow2",
            "-f qcow2 --backing-unsafe --backing b --backing-format qcow2",
            OBJECT,
        ],
        told: &[],
    },
    Taken {
        command: "info",
        operands: &["nofile"],
        options: &[
            "-f qcow2",
            "--format qcow2",
            "--image-opts",
            "-b",
            "--backing-chain",
            "-U",
            "--force-share",
            "--output json",
            OBJECT,
        ],
        told: &[],
    },
    Taken {
        command: "check",
        operands: &["nofile"],
        options: &[
            "-q",
            "--quiet",
            "-f qcow2",
            "--format qcow2",
            "--image-opts",
            "-T none",
            "--cache none",
            "-U",
            "--force-share",
            "--output human",
            "-r leaks",
            "--repair all",
            OBJECT,
        ],
        told: &[],
    },
    Taken {
        command: "convert",
        operands: &["nofile", "x"],
        options: &[
            "-q",
            "--quiet",
            "-p",
            "-f qcow2",
            "--source-format qcow2",
            "--image-opts",
            "--source-image-opts",
            "-l s",
            "--snapshot s",
            "-T none",
            "--source-cache none",
            "-O qcow2",
            "--output-format qcow2",
            "-n --target-image-opts",
            "-o preallocation=off",
            "--options preallocation=off",
            "-O qcow2 -c",
            "-t none",
            "-O qcow2 -B b -F qcow2",
            "-O qcow2 --backing b --backing-format qcow2",
            "-n --target-is-zero",
            "-S 4k",
            "--sparse-size 4k",
            "-O qcow2 --bitmaps --skip-broken-bitmaps",
            "-U",
            "--force-share",
            "-r 1M",
            "--rate 1M",
            "-m 4",
            "--parallel 4",
            "-C",
            "--copy-range-offloading",
            "--salvage",
            "-W",
            "--oob-writes",
            OBJECT,
        ],
        told: &[
            "--progress",
            "--source-snapshot s",
            "--target-format qcow2",
            "--target-options preallocation=off",
            "-O qcow2 --compress",
            "--target-cache none",
            "--no-create",
            "--format qcow2",
        ],
    },
    Taken {
        command: "compare",
        operands: &["nofile", "nofile"],
        options: &[
            "-q",
            "--quiet",
            "-p",
            "--progress",
            "-f raw",
            "--a-format raw",
            "-F raw",
            "--b-format raw",
            "--image-opts",
            "-s",
            "--strict",
            "-T none",
            "--cache none",
            "-U",
            "--force-share",
            OBJECT,
        ],
        told: &["--format raw"],
    },
    Taken {
        command: "map",
        operands: &["nofile"],
        options: &[
            "-f qcow2",
            "--format qcow2",
            "--image-opts",
            "-s 0",
            "--start-offset 0",
            "-l 1M",
            "--max-length 1M",
            "-U",
            "--force-share",
            "--output json",
            OBJECT,
        ],
        told: &[],
    },
    Taken {
        command: "measure",
        operands: &["nofile"],
        options: &[
            "-O qcow2",
            "--target-format qcow2",
            "-o preallocation=off",
            "--options preallocation=off",
            "-f qcow2",
            "--format qcow2",
            "--image-opts",
            "-l s",
            "--snapshot s",
            "-U",
            "--force-share",
            "--output json",
            OBJECT,
        ],
        told: &["--output-format qcow2"],
    },
    Taken {
        command: "snapshot",
        operands: &["nofile"],
        options: &[
            "-l",
            "--list",
            "-c s",
            "--create s",
            "-a s",
            "--apply s",
            "-d s",
            "--delete s",
            "-q",
            "--quiet",
            "-f qcow2",
            "--format qcow2",
            "--image-opts",
            "-U",
            "--force-share",
            OBJECT,
        ],
        told: &[],
    },
    Taken {
        command: "bitmap",
        operands: &["nofile", "b"],
        options: &[
            "--add -f qcow2",
            "--add --image-opts",
            "--add -g 64k",
            "--add --granularity 64k",
            "--remove",
            "--clear",
            "--enable",
            "--disable",
            "--merge a -b nofile -F qcow2",
            "--merge a --source-file nofile --source-format qcow2",
            "--add --object secret,id=s,data=abc",
        ],
        told: &["--add --format qcow2"],
    },
    Taken {
        command: "resize",
        operands: &["nofile", "1M"],
        options: &[
            "-f qcow2",
            "--format qcow2",
            "--image-opts",
            "-q",
            "--quiet",
            "--shrink",
            "--preallocation off",
            OBJECT,
        ],
        told: &[],
    },
    Taken {
        command: "rebase",
        operands: &["nofile"],
        options: &[
            "-u -b b -F qcow2 -q",
            "--backing-unsafe --backing b --backing-format qcow2 --quiet",
            "-u -p -f qcow2",
            "-u --progress --format qcow2",
            "-u --image-opts",
            "-u -t none -T none",
            "-u --cache none --backing-cache none",
            "-u -c",
            "-u --compress",
            "-u -U",
            "-u --force-share",
            "-u --object secret,id=s,data=abc",
        ],
        told: &[],
    },
    Taken {
        command: "commit",
        operands: &["nofile"],
        options: &[
            "-q",
            "--quiet",
            "-p",
            "--progress",
            "-f qcow2",
            "--format qcow2",
            "--image-opts",
            "-t none",
            "--cache none",
            "-d",
            "--drop",
            "-b b",
            "--base b",
            "-r 1M",
            "--rate 1M",
            OBJECT,
        ],
        told: &[],
    },
    Taken {
        command: "amend",
        operands: &["nofile"],
        options: &[
            "-o compat=1.1 -q",
            "--options compat=1.1 --quiet",
            "-o compat=1.1 -p -f qcow2",
            "-o compat=1.1 --progress --format qcow2",
            "-o compat=1.1 --progres",
            "-o compat=1.1 --image-opts",
            "-o compat=1.1 -t none",
            "-o compat=1.1 --cache none",
            "-o compat=1.1 --force",
            "-o compat=1.1 --object secret,id=s,data=abc",
        ],
        told: &[],
    },
    Taken {
        command: "dd",
        operands: &["if=nofile", "of=x"],
        options: &[
            "-f qcow2",
            "--format qcow2",
            "-O qcow2",
            "--output-format qcow2",
            "--image-opts",
            "-U",
            "--force-share",
            OBJECT,
        ],
        told: &[],
    },
    Taken {
        command: "bench",
        operands: &["nofile"],
        options: &[
            "-q",
            "-f qcow2",
            "--format qcow2",
            "--image-opts",
            "-t none",
            "--cache none",
            "-c 1",
            "--count 1",
            "-s 4k",
            "--buffer-size 4k",
            "-d 1",
            "--depth 1",
            "-o 0",
            "--offset 0",
            "-S 4k",
            "--step-size 4k",
            "-i threads",
            "--aio threads",
            "-n -t none",
            "--native --cache none",
            "-w",
            "--write",
            "-w --pattern 1 --flush-interval 64 --no-drain",
            "-U",
            "--force-share",
        ],
        told: &["--quiet"],
    },
];

impl Taken {
    fn line<'a>(&'a self, options: &'a str) -> Vec<&'a str> {
        let mut line = vec![self.command];
        line.extend(options.split(' '));
        line.extend(self.operands);
        line
    }

    fn names(&self, option: &str) -> bool {
        let all = self.options.iter().chain(self.told);
        all.flat_map(|options| options.split(' ')).any(|word| word == option)
    }
}

#[test]
fn every_letter_and_name_is_taken() {
    let place = Place::new();
    for taken in &ALL {
        for options in taken.options.iter().chain(taken.told) {
            let line = taken.line(options);
            let answer = place.qcow2(&line);
            assert!(answer.code != 0 && answer.err.contains("nofile"), "{line:?}: {answer:?}");
            assert!(!answer.err.contains("argument"), "{line:?}: {answer:?}");
        }
    }
    let line = ["measure", "-s", "1M", "-O", "qcow2"];
    let whole = ["measure", "--size", "1M", "--target-format", "qcow2"];
    assert_eq!(place.qcow2(&line).good().out, place.qemu_img(&whole).good().out);
}

#[test]
fn the_table_of_options_is_qemu_imgs() {
    let place = Place::new();
    for taken in &ALL {
        for options in taken.options {
            let line = taken.line(options);
            let theirs = place.qemu_img(&line);
            let known =
                !theirs.err.contains("unrecognized") && !theirs.err.contains("invalid option");
            assert!(known && theirs.code != 0, "{line:?}: {theirs:?}");
        }
        let help = place.qemu_img(&[taken.command, "--help"]).good().out;
        for line in help.lines().map(str::trim_start).filter(|line| line.starts_with('-')) {
            let words = line.split([' ', ',']).filter(|word| !word.is_empty()).take(2);
            for word in words.filter(|word| word.starts_with('-') && !word.contains('[')) {
                let is_help = ["-h", "--help"].contains(&word);
                let special = taken.command == "measure" && ["-s", "--size"].contains(&word);
                let known = is_help || special || taken.names(word);
                assert!(known, "{} {word} of {line:?} is not in the table", taken.command);
            }
        }
    }
}
