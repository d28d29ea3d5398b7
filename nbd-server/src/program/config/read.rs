//! Reading the main file and those that it includes, and what has to hold between them.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::fault::{Fault, Faults, Place, Remark};
use super::ini::{self, Document};
use super::keys::{GENERIC, Keys, Log};
use super::{Config, export, generic};

/// The longest file that is read, in bytes.
const MAX_FILE_BYTES: u64 = 4 << 20;

/// Reads the configuration that begins in `path`.
///
/// # Errors
/// All that is wrong with it, by file and line.
pub(crate) fn read(path: &Path) -> Result<Config, Faults> {
    let mut log = Log::default();
    let main: Arc<Path> = path.into();
    let document = load(&main, &mut log);
    let mut generic = None;
    let mut sections = document.sections.iter();
    match sections.next() {
        Some(first) if first.name == "generic" => {
            generic =
                Some(generic::read(&mut Keys::new(&main, first, (GENERIC, "[generic]"), &mut log)));
        }
        Some(first) => log.fault(&main, first.line, Fault::NotGeneric),
        None if document.faults.is_empty() && log.faults.is_empty() => {
            log.fault(&main, 1, Fault::NotGeneric);
        }
        None => {}
    }
    let mut files = vec![(main, sections.cloned().collect::<Vec<_>>())];
    if let Some((folder, line)) = generic.as_ref().and_then(|generic| generic.include.clone()) {
        match included(&folder) {
            Ok(Included { paths, others }) => {
                for other in others {
                    let text = format!("{} is no file, and is left out", other.display());
                    log.remark(&files[0].0, line, text);
                }
                files.extend(paths.into_iter().map(|path| {
                    let file: Arc<Path> = path.into();
                    let sections = load(&file, &mut log).sections;
                    (file, sections)
                }));
            }
            Err(error) => {
                let (file, why) = (&files[0].0, error.to_string());
                log.fault(file, line, Fault::Unreadable { path: folder, why });
            }
        }
    }
    let mut exports = Vec::new();
    let mut first = HashMap::new();
    for (file, sections) in &files {
        for section in sections {
            if section.name == "generic" {
                log.fault(file, section.line, Fault::GenericHere);
                continue;
            }
            let place = Place { file: Arc::clone(file), line: section.line };
            if let Some(first) = first.insert(section.name.clone(), place.clone()) {
                let name = section.name.clone();
                log.fault(file, section.line, Fault::SectionTwice { name, first });
            }
            exports.extend(export::read(file, section, &mut log).map(|spec| (place, spec)));
        }
    }
    match generic {
        Some(generic) if log.faults.is_empty() => {
            let files = files.into_iter().map(|(file, _)| file.to_path_buf()).collect();
            Ok(Config { generic, exports, files, remarks: log.remarks })
        }
        _ => Err(Faults(log.faults)),
    }
}

/// What a folder adds, by name.
#[derive(Default)]
struct Included {
    paths: Vec<PathBuf>,
    /// What has such a name and is no file.
    others: Vec<PathBuf>,
}

fn included(folder: &Path) -> io::Result<Included> {
    let mut included = Included::default();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let is_ours = path.as_os_str().as_encoded_bytes().ends_with(b".conf");
        // What vanished meanwhile, or is a link to nowhere, is not silently left out: reading it fails.
        if is_ours {
            let is_file = std::fs::metadata(&path).map_or(true, |metadata| metadata.is_file());
            if is_file { &mut included.paths } else { &mut included.others }.push(path);
        }
    }
    included.paths.sort();
    included.others.sort();
    Ok(included)
}

/// Reads and takes apart one file.
fn load(file: &Arc<Path>, log: &mut Log) -> Document {
    let bytes = match read_whole(file) {
        Ok(Some(bytes)) => bytes,
        Ok(None) => {
            log.fault(file, 1, Fault::Changing);
            return Document::default();
        }
        Err(error) => {
            let (path, why) = (file.to_path_buf(), error.to_string());
            log.fault(file, 0, Fault::Unreadable { path, why });
            return Document::default();
        }
    };
    if bytes.len() as u64 > MAX_FILE_BYTES {
        log.fault(file, 0, Fault::TooLong(MAX_FILE_BYTES));
        return Document::default();
    }
    if bytes.is_empty() {
        log.fault(file, 1, Fault::Empty);
    }
    // Some editors begin a file with the mark of its encoding.
    let document = ini::parse(bytes.strip_prefix("\u{feff}".as_bytes()).unwrap_or(&bytes));
    for (line, fault) in &document.faults {
        log.fault(file, *line, fault.clone());
    }
    if let Some(line) = document.unfinished {
        let place = Place { file: Arc::clone(file), line };
        let text = "the line has no end; a reload would not take the file".to_owned();
        log.remarks.push(Remark { place, text, unfinished: true });
    }
    document
}

/// What the file holds; `None` where somebody writes it meanwhile.
fn read_whole(path: &Path) -> io::Result<Option<Vec<u8>>> {
    let file = File::open(path)?;
    let stamp = |file: &File| -> io::Result<_> {
        let metadata = file.metadata()?;
        Ok((metadata.len(), metadata.modified()?))
    };
    let before = stamp(&file)?;
    let mut bytes = Vec::new();
    (&file).take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes)?;
    Ok((stamp(&file)? == before).then_some(bytes))
}
