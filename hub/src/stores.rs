//! The repositories that are open: each with its lease, opened when first needed and kept until the hub ends. Which
//! there are is known to the database.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use chain::Repository;
use tokio::sync::Mutex;

use crate::error::{HubError, describe};
use crate::model::RepositoryRow;

/// How long a file system may take to say how full it is before its repository counts as offline.
const SPACE_TIMEOUT: Duration = Duration::from_secs(2);

/// Size and free space of a file system, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Space {
    pub(crate) total: u64,
    pub(crate) available: u64,
}

/// The open repositories, by id.
#[derive(Default)]
pub(crate) struct Stores {
    open: Mutex<HashMap<String, Arc<Repository>>>,
}

impl Stores {
    /// Opens the repository, or returns it where it is open.
    ///
    /// # Errors
    /// [`HubError::Unavailable`] where its directory cannot be used, [`HubError::Conflict`] where another hub has it.
    pub(crate) async fn get(&self, row: &RepositoryRow) -> Result<Arc<Repository>, HubError> {
        let mut open = self.open.lock().await;
        if let Some(repository) = open.get(&row.id) {
            return Ok(Arc::clone(repository));
        }
        let repository = Arc::new(open_root(Path::new(&row.path)).await?);
        open.insert(row.id.clone(), Arc::clone(&repository));
        Ok(repository)
    }

    /// The repository of that id, where it is open.
    pub(crate) async fn opened(&self, id: &str) -> Option<Arc<Repository>> {
        self.open.lock().await.get(id).map(Arc::clone)
    }

    /// Keeps a repository that was opened to see whether it can be.
    pub(crate) async fn keep(&self, id: &str, repository: Repository) {
        self.open.lock().await.insert(id.to_owned(), Arc::new(repository));
    }
}

/// Opens a directory as a repository.
pub(crate) async fn open_root(root: &Path) -> Result<Repository, HubError> {
    Repository::open(root).await.map_err(|error| match error {
        chain::Error::Leased { .. } => HubError::Conflict(describe(&error)),
        error => HubError::Unavailable(format!("the repository is offline: {}", describe(&error))),
    })
}

/// How large the file system of `root` is and how much of it is free, asked off the async workers and with a deadline:
/// a lost network file system answers late or never.
pub(crate) async fn space(root: PathBuf) -> Result<Space, String> {
    let asked = tokio::task::spawn_blocking(move || rustix::fs::statvfs(&root));
    match tokio::time::timeout(SPACE_TIMEOUT, asked).await {
        Ok(Ok(Ok(stat))) => Ok(Space {
            total: stat.f_blocks.saturating_mul(stat.f_frsize),
            available: stat.f_bavail.saturating_mul(stat.f_frsize),
        }),
        Ok(Ok(Err(error))) => Err(std::io::Error::from(error).to_string()),
        Ok(Err(_)) => Err("the hub is stopping".to_owned()),
        Err(_) => Err("its file system does not answer".to_owned()),
    }
}
