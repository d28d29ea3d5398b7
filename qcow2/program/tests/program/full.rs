//! File systems that run full under the program: it says so, everything reads as before, nothing half-made stays, and
//! with room the same command line succeeds.

use std::path::PathBuf;

use crate::deeds::{After, DEEDS, Deed, Judge, copy_all, prepare};
use crate::support::{Answer, Place, Running};

/// A file system in memory that only the programs started in it see.
struct Small {
    place: Place,
    keeper: Running,
}

impl Small {
    fn new(size: &str) -> Self {
        let place = Place::new();
        let script = format!("mount -t tmpfs -o size={size} tmpfs . && echo mounted && exec cat");
        let mut keeper = place.start("unshare", &["--mount", "sh", "-c", &script]);
        let mut told = String::new();
        let mut out = std::io::BufReader::new(keeper.0.stdout.take().expect("a pipe"));
        std::io::BufRead::read_line(&mut out, &mut told).expect("a line");
        assert_eq!(told, "mounted\n");
        Self { place, keeper }
    }

    /// The folder, as this process sees it.
    fn folder(&self) -> PathBuf {
        let inside = self.place.path("");
        let inside = inside.strip_prefix("/").expect("a whole path");
        PathBuf::from(format!("/proc/{}/root", self.keeper.0.id())).join(inside)
    }

    fn free_bytes(&self) -> u64 {
        let told = self.run("stat", &["-f", "-c", "%a %S", "."]).good().out;
        told.split_whitespace().map(|number| number.parse::<u64>().expect("a number")).product()
    }

    /// Makes the images anew and leaves `free_bytes`, or all there is.
    fn begin(&self, prepared: &Place, free_bytes: Option<u64>) {
        let folder = self.folder();
        for entry in std::fs::read_dir(&folder).expect("a readable folder") {
            std::fs::remove_file(entry.expect("an entry").path()).expect("a file");
        }
        copy_all(&prepared.path(""), &folder);
        if let Some(free_bytes) = free_bytes {
            let ballast = usize::try_from(self.free_bytes() - free_bytes).expect("it fits");
            std::fs::write(folder.join("ballast"), vec![1; ballast]).expect("room for ballast");
        }
    }
}

impl Judge for Small {
    fn run(&self, program: &str, args: &[&str]) -> Answer {
        let (pid, folder) = (self.keeper.0.id().to_string(), self.place.path(""));
        let enter = ["--target", &pid, "--mount", "sh", "-c", "cd \"$0\" && exec \"$@\""];
        let line = [&enter[..], &[folder.to_str().expect("readable"), program], args].concat();
        self.place.answer("nsenter", &line)
    }
}

/// Runs the deed with less and less room than it needs.
fn runs_out_of_room(deed: &Deed, small: &Small, prepared: &Place) {
    let ours = env!("CARGO_BIN_EXE_qcow2");
    let contents = prepared.path("");
    small.begin(prepared, None);
    let before = small.free_bytes();
    small.run(ours, deed.args).good();
    deed.judge(small, &contents, &After::Success);
    let needs = before - small.free_bytes().min(before);
    let mut failures = 0;
    for part in [0, 2, 5, 7] {
        small.begin(prepared, Some(needs * part / 8));
        let answer = small.run(ours, deed.args);
        let after = if answer.code == 0 { After::Success } else { After::Failure };
        if after == After::Failure {
            assert!(answer.err.contains("No space left on device"), "{}: {answer:?}", deed.name);
            failures += 1;
        }
        deed.judge(small, &contents, &after);
        if after == After::Failure {
            std::fs::remove_file(small.folder().join("ballast")).expect("it is there");
            small.run(ours, deed.args).good();
            deed.judge(small, &contents, &After::Success);
        }
    }
    // What needs no room at all cannot run out of it.
    assert!(failures > 0 || needs < 4096, "{} needs {needs} bytes and never ran out", deed.name);
}

#[test]
fn without_room_nothing_is_lost_and_with_room_the_same_command_succeeds() {
    let (small, prepared) = (Small::new("80m"), prepare());
    for deed in DEEDS {
        runs_out_of_room(deed, &small, &prepared);
    }
}

#[test]
fn a_file_that_may_not_grow_further_is_told_as_such() {
    let place = Place::new();
    // In units of 512 bytes.
    let script = "ulimit -f 4096 && exec \"$0\" create -f qcow2 -o preallocation=full x.qcow2 8M";
    let answer = place.answer("sh", &["-c", script, env!("CARGO_BIN_EXE_qcow2")]);
    answer.bad(1, "File too large");
}
