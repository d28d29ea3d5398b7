//! The second reader, dissect.hypervisor, as a process that answers requests. What it reads is judged elsewhere.

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};

use serde_json::json;

use crate::disk::Disk;
use crate::qemu::{Place, STARTING};
use crate::recipe::{Below, Recipe, Size};

pub(crate) struct Dissect(Mutex<Child>);

impl Dissect {
    /// Whether it reads such images where QEMU has made them: encryption it refuses, behind the end of a backing file
    /// it leaves bytes out, over extended L2 entries it never ends or fails, and in the name of a backing file it looks
    /// for the type of compression that version 2 does not have.
    pub(crate) fn reads(recipe: &Recipe) -> bool {
        let is_short = matches!(recipe.below, Below::ShortQcow2 | Below::ShortRaw);
        // A disk of 64 TiB ends far behind any backing file.
        let is_beyond = recipe.below != Below::Nothing && recipe.size == Size::Huge;
        let is_confused = recipe.version2 && recipe.below != Below::Nothing;
        !(is_confused || recipe.luks || recipe.extended || is_short || is_beyond)
    }

    pub(crate) fn start() -> Self {
        let python = python();
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/corpus/read_with_dissect.py");
        let mut command = Command::new(&python);
        command.arg(script).stdin(Stdio::piped()).stdout(Stdio::piped());
        let started = {
            let _turn = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
            command.spawn()
        };
        let child = started.unwrap_or_else(|error| {
            panic!("{}: {error}; run scripts/install-peers.sh", python.display())
        });
        Self(Mutex::new(child))
    }

    /// What is in the windows of the disk, or of a snapshot of it.
    pub(crate) fn read(&self, place: &Place, disk: &Disk, snapshot: Option<&str>) -> Vec<Vec<u8>> {
        let out = place.path().join("by-dissect.raw");
        let parts: Vec<_> =
            disk.windows.iter().map(|window| (window.start, window.bytes.len())).collect();
        let request = json!({
            "image": place.image(), "snapshot": snapshot, "parts": parts, "out": out,
        });
        let mut child = self.0.lock().unwrap();
        let asked = writeln!(child.stdin.as_mut().unwrap(), "{request}");
        let mut answer = String::new();
        let answered = BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut answer);
        let what = "dissect failed; where it is missing, run scripts/install-peers.sh";
        assert!(asked.is_ok() && answered.is_ok(), "{}: {what}", place.what);
        assert_eq!(answer.trim(), "done", "{}: {what}", place.what);
        let mut bytes = std::fs::read(out).unwrap();
        let mut read = Vec::new();
        for window in &disk.windows {
            let rest = bytes.split_off(window.bytes.len().min(bytes.len()));
            read.push(std::mem::replace(&mut bytes, rest));
        }
        read
    }
}

impl Drop for Dissect {
    fn drop(&mut self) {
        if let Ok(child) = self.0.get_mut() {
            drop(child.stdin.take());
            let _ = child.wait();
        }
    }
}

/// The interpreter that scripts/install-peers.sh has put beside what cargo builds.
fn python() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    // The test is target/PROFILE/deps/TEST; where coverage is measured, it lies one folder deeper.
    let targets = test.ancestors().skip(3).take(2);
    let mut places = targets.map(|target| target.join("peers/bin/python3"));
    let first = places.next().unwrap();
    if first.exists() {
        first
    } else {
        places.next().filter(|place| place.exists()).unwrap_or(first)
    }
}
