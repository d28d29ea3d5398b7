//! The files of a chain one by one, found and opened as opening the top image would find and open them. No image is
//! opened: damaged and encrypted ones can be looked at, too.

use std::path::{Path, PathBuf};

use block::HostFile;

use crate::backing::Trail;
use crate::create::BackingFormat;
use crate::error::Error;
use crate::open::{OpenOptions, parse_header};

/// A file of a chain, open for reading.
#[derive(Clone)]
pub struct ChainFile {
    /// The file that was allowed, whatever its path leads to by now.
    pub file: HostFile,
    /// What is in it.
    pub format: BackingFormat,
}

/// Goes down a chain by the names that its images record, within [`OpenOptions::references`].
pub struct ChainFiles {
    options: OpenOptions,
    trail: Trail,
    next: Next,
}

enum Next {
    Top(PathBuf),
    Below { file: PathBuf, name: Vec<u8>, format: Option<Vec<u8>> },
    End,
}

impl ChainFiles {
    /// A chain whose topmost image is the qcow2 image in `top`. Of the options those count that say which files are
    /// opened, and how; all are opened for reading.
    ///
    /// # Errors
    /// [`Error::Path`] where the folder that references are confined to cannot be opened.
    pub fn start(top: &Path, options: &OpenOptions) -> Result<Self, Error> {
        let trail = Trail::start(top, &options.references)?;
        Ok(Self { options: options.to_read(), trail, next: Next::Top(top.to_owned()) })
    }

    /// Opens the next file: first the top, then what each image stands on; `None` behind the last. An image whose
    /// header cannot be read is the last.
    ///
    /// # Errors
    /// [`Error::Reference`] where it may not be opened, closes a loop or lies too deep, [`Error::Unsupported`] for its
    /// format, [`Error::Path`], [`Error::Host`]. There is nothing behind an error.
    pub async fn next(&mut self) -> Result<Option<ChainFile>, Error> {
        let (file, format) = match std::mem::replace(&mut self.next, Next::End) {
            Next::End => return Ok(None),
            Next::Top(path) => {
                let format = BackingFormat::Qcow2;
                (self.options.open_file(&path, format).await?, format)
            }
            Next::Below { file, name, format } => {
                let found = self.trail.resolve(&file, &name, format.as_deref())?;
                (found.open(&self.options).await?, found.format)
            }
        };
        self.trail = self.trail.clone().enter(file.path(), file.id())?;
        if format == BackingFormat::Qcow2
            && let Ok(header) = parse_header(&file).await
            && let Some(name) = header.backing_name
        {
            let format = header.extensions.backing_format;
            self.next = Next::Below { file: file.path().to_owned(), name, format };
        }
        Ok(Some(ChainFile { file, format }))
    }
}
