//! What the tests share: a folder for each, the two programs in it, and JSON to compare.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// What a program said and how it ended.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Answer {
    fn of(output: &Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// The answer of a program that must succeed.
    pub(crate) fn good(self) -> Self {
        assert_eq!(self.code, 0, "{self:?}");
        self
    }

    /// The answer of a program that must succeed, and say something of `text` beside its results.
    pub(crate) fn good_saying(self, text: &str) -> Self {
        self.bad(0, text)
    }

    /// The answer of a program that must end with this code and say something of `text`.
    pub(crate) fn bad(self, code: i32, text: &str) -> Self {
        assert_eq!(self.code, code, "{self:?}");
        assert!(self.err.contains(text), "{text:?} is not in {self:?}");
        self
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// A folder in which both programs run.
pub(crate) struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    pub(crate) fn new() -> Self {
        Self { folder: tempfile::tempdir().expect("a temporary folder") }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, program: impl AsRef<std::ffi::OsStr>, args: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.current_dir(self.folder.path()).args(args).stdin(Stdio::null());
        // Both print dates in local time.
        command.env("TZ", "UTC");
        command
    }

    /// Our program, not yet started.
    pub(crate) fn ours(&self, args: &[&str]) -> Command {
        self.command(env!("CARGO_BIN_EXE_qcow2"), args)
    }

    /// What our program answers.
    pub(crate) fn qcow2(&self, args: &[&str]) -> Answer {
        Answer::of(&self.ours(args).output().expect("the program runs"))
    }

    /// What our program answers where it has 512 MiB of addresses and 5 seconds of a processor. A signal, or a minute
    /// without an answer, is a code of 124 or above.
    pub(crate) fn limited(&self, args: &[&str]) -> Answer {
        let mut line = vec!["-k", "1", "60", "prlimit", "--as=536870912", "--cpu=5", "--core=0"];
        line.push(env!("CARGO_BIN_EXE_qcow2"));
        line.extend(args);
        let mut command = self.command("timeout", &line);
        // Each arena of the allocator reserves 64 MiB of addresses, used or not.
        command.env("MALLOC_ARENA_MAX", "2");
        Answer::of(&command.output().expect("timeout and prlimit run"))
    }

    /// What qemu-img answers.
    pub(crate) fn qemu_img(&self, args: &[&str]) -> Answer {
        self.answer("qemu-img", args)
    }

    /// What another program answers.
    pub(crate) fn answer(&self, program: &str, args: &[&str]) -> Answer {
        Answer::of(&self.command(program, args).output().expect("the program runs"))
    }

    /// What another program, which must succeed, answers.
    pub(crate) fn tool(&self, program: &str, args: &[&str]) -> Answer {
        self.answer(program, args).good()
    }

    /// What a program answers to somebody who is not root, and so bound by permissions.
    pub(crate) fn as_nobody(&self, program: &str, args: &[&str]) -> Answer {
        let is_root = std::fs::metadata("/proc/self").expect("a Linux").uid() == 0;
        let nobody = ["--reuid=65534", "--regid=65534", "--clear-groups", program];
        let mut command = match is_root {
            true => self.command("setpriv", &[&nobody, args].concat()),
            false => self.command(program, args),
        };
        Answer::of(&command.output().expect("the program runs"))
    }

    /// Another program, started.
    pub(crate) fn start(&self, program: &str, args: &[&str]) -> Running {
        let mut command = self.command(program, args);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        Running(command.spawn().expect("the program starts"))
    }

    /// Writes through qemu-io.
    pub(crate) fn qemu_io(&self, image: &str, commands: &[&str]) {
        let mut args = vec!["-f", "qcow2"];
        if image.ends_with(".raw") {
            args = vec!["-f", "raw"];
        }
        for command in commands {
            args.extend(["-c", command]);
        }
        args.push(image);
        let answer = self.tool("qemu-io", &args);
        assert!(!answer.out.contains("failed"), "{answer:?}");
    }

    /// Bytes that no format mistakes for zeros, from a number.
    pub(crate) fn write_raw(&self, name: &str, len: usize, seed: u8) {
        std::fs::write(self.path(name), pattern(len, seed)).expect("a writable folder");
    }

    pub(crate) fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).expect("a readable file")
    }
}

/// Bytes of a pattern without long runs.
pub(crate) fn pattern(len: usize, seed: u8) -> Vec<u8> {
    let mut state = u32::from(seed) + 1;
    std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0] | 1
    })
    .take(len)
    .collect()
}

/// A program that runs until the test is over.
pub(crate) struct Running(pub(crate) std::process::Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Takes `keys` out of a document, wherever they stand.
pub(crate) fn without(mut value: Value, keys: &[&str]) -> Value {
    fn strip(value: &mut Value, keys: &[&str]) {
        match value {
            Value::Object(map) => {
                map.retain(|key, _| !keys.contains(&key.as_str()));
                map.values_mut().for_each(|value| strip(value, keys));
            }
            Value::Array(list) => list.iter_mut().for_each(|value| strip(value, keys)),
            _ => {}
        }
    }
    strip(&mut value, keys);
    value
}

/// Whether a file exists.
pub(crate) fn exists(path: &Path) -> bool {
    path.try_exists().expect("a readable folder")
}

/// Starts qemu-nbd and waits until it listens.
pub(crate) fn serve(place: &Place, args: &[&str], socket: &str) -> Running {
    let pid = format!("{socket}.pid");
    // Of a server before, which was killed.
    for stale in [pid.as_str(), socket] {
        let _ = std::fs::remove_file(stale);
    }
    let mut line = vec!["--pid-file", &pid];
    line.extend(args);
    let mut server = place.start("qemu-nbd", &line);
    // It writes its pid once it listens.
    while !exists(Path::new(&pid)) {
        let ended = server.0.try_wait().expect("a child of ours");
        assert!(ended.is_none(), "qemu-nbd ended with {ended:?}");
        std::thread::yield_now();
    }
    server
}
