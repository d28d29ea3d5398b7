//! The machine of the demonstration: a system disk with an ext4 file system full of files, and a sparse data disk. All
//! content is made here, the same in every run; nothing is mounted, so that it needs no root.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};

const MIB: u64 = 1 << 20;
/// The size of the disk with the file system, and what the files in it take.
const SYSTEM_BYTES: u64 = 512 * MIB;
const FOLDERS: u64 = 8;
const FILES_A_FOLDER: u64 = 40;
const FILE_BYTES: u64 = MIB;
/// The size of the data disk, and what is written to it in pieces.
const DATA_BYTES: u64 = 1024 * MIB;
const DATA_PIECES: u64 = 96;
const DATA_PIECE_BYTES: u64 = 4 * MIB;
/// One file and one piece in this many changes: 5 %.
const CHANGE_ONE_IN: u64 = 20;

/// Two disks and where they lie.
pub(super) struct Machine {
    system: PathBuf,
    data: PathBuf,
    folder: PathBuf,
}

impl Machine {
    /// Makes both disks in a new folder.
    pub(super) fn create(folder: &Path) -> anyhow::Result<Self> {
        fs::create_dir(folder)?;
        let machine = Self {
            system: folder.join("system.raw"),
            data: folder.join("data.raw"),
            folder: folder.to_owned(),
        };
        machine.make_system()?;
        machine.make_data()?;
        Ok(machine)
    }

    /// The disks, by index.
    pub(super) fn disks(&self) -> Vec<PathBuf> {
        vec![self.system.clone(), self.data.clone()]
    }

    /// Replaces, adds and removes files on the one disk and overwrites pieces of the other; answers about how many
    /// bytes that changes.
    pub(super) fn change(&mut self) -> anyhow::Result<u64> {
        let scratch = self.folder.join("changed-file");
        let (mut commands, mut changed) = (String::new(), 0);
        let count = FOLDERS * FILES_A_FOLDER;
        for file in (0..count).step_by(usize::try_from(CHANGE_ONE_IN)?) {
            let (path, replacement) = (inside(file), scratch.with_extension(file.to_string()));
            fs::write(&replacement, noise("changed file", file, FILE_BYTES))?;
            writeln!(commands, "rm {path}\nwrite {} {path}", replacement.display())?;
            changed += FILE_BYTES;
        }
        debugfs(&self.system, &commands)?;
        for file in (0..count).step_by(usize::try_from(CHANGE_ONE_IN)?) {
            fs::remove_file(scratch.with_extension(file.to_string()))?;
        }
        let disk = File::options().write(true).open(&self.data)?;
        for piece in (0..DATA_PIECES).step_by(usize::try_from(CHANGE_ONE_IN)?) {
            disk.write_all_at(&noise("changed data", piece, DATA_PIECE_BYTES), place(piece))?;
            changed += DATA_PIECE_BYTES;
        }
        Ok(changed)
    }

    fn make_system(&self) -> anyhow::Result<()> {
        let tree = self.folder.join("files");
        for folder in 0..FOLDERS {
            fs::create_dir_all(tree.join(format!("srv/site-{folder}")))?;
        }
        for file in 0..FOLDERS * FILES_A_FOLDER {
            let path = tree.join(inside(file).trim_start_matches('/'));
            fs::write(path, noise("file", file, FILE_BYTES))?;
        }
        fs::write(tree.join("README"), "Files of the demonstration machine.\n")?;
        File::create_new(&self.system)?.set_len(SYSTEM_BYTES)?;
        let mut command = tool("mkfs.ext4");
        command.args(["-q", "-F", "-L", "system", "-d"]).arg(&tree).arg(&self.system);
        finish(&mut command)?;
        Ok(fs::remove_dir_all(&tree)?)
    }

    fn make_data(&self) -> anyhow::Result<()> {
        let disk = File::create_new(&self.data)?;
        disk.set_len(DATA_BYTES)?;
        for piece in 0..DATA_PIECES {
            disk.write_all_at(&noise("data", piece, DATA_PIECE_BYTES), place(piece))?;
        }
        Ok(())
    }
}

/// Checks the file system on a disk without changing it.
pub(super) fn check_file_system(disk: &Path) -> anyhow::Result<()> {
    finish(tool("e2fsck").args(["-f", "-n"]).arg(disk))
}

/// The path of a file within the file system.
fn inside(file: u64) -> String {
    format!("/srv/site-{}/page-{:03}.bin", file % FOLDERS, file / FOLDERS)
}

/// Where a piece of the data disk begins.
fn place(piece: u64) -> u64 {
    piece * (DATA_BYTES / DATA_PIECES)
}

/// Bytes that look like nothing, the same for the same arguments.
fn noise(what: &str, number: u64, len: u64) -> Vec<u8> {
    let mut hash = blake3::Hasher::new_derive_key("sendense demo");
    hash.update(what.as_bytes()).update(&number.to_le_bytes());
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    hash.finalize_xof().fill(&mut bytes);
    bytes
}

/// Runs commands of `debugfs` on a file system that is not mounted.
fn debugfs(disk: &Path, commands: &str) -> anyhow::Result<()> {
    let script = disk.with_extension("debugfs");
    fs::write(&script, commands)?;
    let done = finish(tool("debugfs").arg("-w").arg("-f").arg(&script).arg(disk));
    fs::remove_file(&script)?;
    done
}

/// A program of e2fsprogs, which lies where only administrators look.
fn tool(name: &str) -> Command {
    let mut command = Command::new(name);
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{path}:/usr/sbin:/sbin"));
    command
}

fn finish(command: &mut Command) -> anyhow::Result<()> {
    let output = command.output().with_context(|| {
        format!("{:?} does not start; it is in the package e2fsprogs", command.get_program())
    })?;
    if !output.status.success() {
        bail!("{command:?}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}
