//! What QEMU makes of what a power cut leaves: no errors, or after a crash with lazy refcounts none that it does not
//! repair, and the same disk as we read. What that disk may be is judged elsewhere.

use std::process::Command;

use super::judge::is_dirty;
use super::setup::{Files, PASSPHRASE};
use crate::crowd::Value;

/// The images of one run.
pub(super) struct Qemu {
    dir: tempfile::TempDir,
    seen: Vec<Seen>,
}

struct Seen {
    what: String,
    /// How QEMU is told of it.
    options: String,
    disk: Vec<u8>,
}

impl Qemu {
    pub(super) fn new(files: &Files) -> Self {
        let dir = tempfile::tempdir().unwrap();
        if let Some(below) = files.below() {
            std::fs::write(dir.path().join("below"), below).unwrap();
        }
        Self { dir, seen: Vec::new() }
    }

    fn run(&self, command: &str, args: &[&str], what: &str) -> std::process::ExitStatus {
        let secret = format!("secret,id=key,data={PASSPHRASE}");
        // Names are relative to where it runs.
        let output = Command::new("qemu-img")
            .args([command, "--object", &secret, "--image-opts"])
            .args(args)
            .current_dir(self.dir.path())
            .output();
        let output = output.unwrap_or_else(|error| panic!("cannot run qemu-img: {error}"));
        let leaks = command == "check" && output.status.code() == Some(3);
        assert!(output.status.success() || leaks, "{what}: {command}: {output:?}");
        output.status
    }

    /// Shows it an image that reads like this.
    pub(super) fn see(&mut self, left: &Files, disk: &[Option<Value>], what: String) {
        let number = self.seen.len();
        let write = |name: &str, bytes: Vec<u8>| {
            let name = format!("{name}.{number}");
            std::fs::write(self.dir.path().join(&name), bytes).unwrap();
            name
        };
        let image = write("image", left.image.snapshot());
        let mut options = format!("driver=qcow2,file.filename={image}");
        if let Some(data) = &left.data {
            let data = write("data", data.snapshot());
            options += &format!(",data-file.driver=file,data-file.filename={data}");
        }
        if left.setup.options.encryption.is_some() {
            options += ",encrypt.key-secret=key";
        }
        if is_dirty(left) {
            self.run("check", &["-q", "-r", "all", &options], &what);
        }
        self.run("check", &["-q", &options], &what);
        let disk = (0..).zip(disk).flat_map(|(at, value)| value.unwrap().bytes(at)).collect();
        self.seen.push(Seen { what, options, disk });
    }

    /// All of them read as they were shown.
    pub(super) fn assert_reads(&self) {
        let mut args = vec!["-O", "raw"];
        args.extend(self.seen.iter().map(|seen| seen.options.as_str()));
        args.push("all");
        // One behind the other.
        self.run("convert", &args, "all of them");
        let all = std::fs::read(self.dir.path().join("all")).unwrap();
        let mut rest = &all[..];
        for Seen { what, disk, .. } in &self.seen {
            let (read, others) = rest.split_at(disk.len());
            let wrong = read.chunks(512).zip(disk.chunks(512)).position(|(read, is)| read != is);
            assert!(wrong.is_none(), "{what}: QEMU reads sector {wrong:?} otherwise");
            rest = others;
        }
        assert!(rest.is_empty(), "{} bytes are left", rest.len());
    }
}
