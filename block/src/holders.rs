//! Who has a file open and locked. The kernel does not tell it of locks that belong to open files, so it is looked up
//! among the processes that `/proc` shows; what may be done beside them is decided in `lock`.

use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// The most that are named.
const MOST: usize = 4;

/// A process that has locked a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Its number.
    pub process: u32,
    /// The name of its program, as the kernel knows it.
    pub program: String,
}

impl Holder {
    /// The process that asks.
    pub(crate) fn own() -> Self {
        Self::of(std::process::id())
    }

    fn of(process: u32) -> Self {
        let name = fs::read_to_string(format!("/proc/{process}/comm")).unwrap_or_default();
        Self { process, program: name.trim_end().to_owned() }
    }

    /// Whether it is the process that asks.
    pub fn is_own(&self) -> bool {
        self.process == std::process::id()
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_own() {
            return f.write_str("this program itself");
        }
        write!(f, "{} (process {})", self.program, self.process)
    }
}

/// The processes that have locked the file at `path`: those that we may look into, at most [`MOST`].
pub(crate) fn holders(path: &Path) -> Vec<Holder> {
    let Ok(wanted) = fs::metadata(path) else { return Vec::new() };
    let wanted = (wanted.dev(), wanted.ino());
    let Ok(processes) = fs::read_dir("/proc") else { return Vec::new() };
    let numbers =
        processes.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    numbers.filter(|process| holds(*process, wanted)).map(Holder::of).take(MOST).collect()
}

/// Whether a process has the file open by a description that is locked.
fn holds(process: u32, wanted: (u64, u64)) -> bool {
    let Ok(files) = fs::read_dir(format!("/proc/{process}/fd")) else { return false };
    files.filter_map(Result::ok).any(|file| {
        let found = fs::metadata(file.path());
        if !found.is_ok_and(|found| (found.dev(), found.ino()) == wanted) {
            return false;
        }
        let info = format!("/proc/{process}/fdinfo/{}", file.file_name().to_string_lossy());
        fs::read_to_string(info).is_ok_and(|info| info.contains("OFDLCK"))
    })
}
