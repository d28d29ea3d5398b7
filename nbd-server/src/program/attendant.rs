//! What happens around each connection: commands before and after it, and a disk of its own. When, is told by the server.

use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;

use async_trait::async_trait;
use block::{BlockDevice, DeviceError};
use nbd_server::{Attendant, Peer, TurnedAway};
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::process::Command;

use super::options::ExportSpec;
use super::overlay::Overlay;
use super::sealable::Sealable;

/// The attendant of one export.
pub(super) struct Doorkeeper {
    name: String,
    path: PathBuf,
    before: Option<String>,
    after: Option<String>,
    /// What each client gets a fresh one of.
    overlay: Option<Arc<Overlay>>,
    /// What is sealed when its writer is done.
    sealable: Option<Arc<Sealable>>,
}

impl Doorkeeper {
    /// `None` where nothing is to be done.
    pub(super) fn new(
        spec: &ExportSpec,
        overlay: Option<Arc<Overlay>>,
        sealable: Option<Arc<Sealable>>,
    ) -> Option<Arc<Self>> {
        let (before, after) = (spec.before.clone(), spec.after.clone());
        if before.is_none() && after.is_none() && overlay.is_none() && sealable.is_none() {
            return None;
        }
        let (name, path) = (spec.name.clone(), spec.path.clone());
        Some(Arc::new(Self { name, path, before, after, overlay, sealable }))
    }

    /// Runs a command to its end; whether it went well. Where the future is dropped, a command that is not `lasting` is
    /// killed with all that it has started.
    async fn run(&self, command: &str, peer: &Peer, lasting: bool) -> Result<(), TurnedAway> {
        let path = quoted(&self.path.to_string_lossy());
        let mut shell = Command::new("sh");
        shell.arg("-c").arg(command.replace("%s", &path)).stdin(Stdio::null());
        shell.env("NBD_EXPORT", &self.name).env("NBD_PEER", peer.to_string());
        // These sockets are ours.
        shell.env_remove("LISTEN_FDS").env_remove("LISTEN_PID");
        shell.process_group(0);
        let ended = async {
            let mut child = shell.spawn()?;
            let pid = child.id().and_then(|id| Pid::from_raw(id.try_into().ok()?));
            let mut group = Group(pid.filter(|_| !lasting));
            let status = child.wait().await?;
            group.0 = None;
            Ok::<_, std::io::Error>(status)
        };
        match ended.await {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(TurnedAway(format!("{command:?} ended with {status}"))),
            Err(error) => Err(TurnedAway(format!("cannot run {command:?}: {error}"))),
        }
    }
}

/// A command that has not ended, with all that it has started; killed when dropped.
struct Group(Option<Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        // It is gone where this fails.
        let _ = self.0.map(|leader| kill_process_group(leader, Signal::KILL));
    }
}

/// A text as one word of the shell.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[async_trait]
impl Attendant for Doorkeeper {
    async fn arrived(&self, peer: &Peer) -> Result<Option<Arc<dyn BlockDevice>>, TurnedAway> {
        if let Some(command) = &self.before {
            self.run(command, peer, false).await?;
        }
        Ok(self.overlay.as_ref().map(|overlay| overlay.fresh() as Arc<dyn BlockDevice>))
    }

    async fn sealed(&self) -> Result<(), DeviceError> {
        match &self.sealable {
            Some(sealable) => sealable.seal().await,
            None => Ok(()),
        }
    }

    async fn left(&self, peer: &Peer) {
        if let Some(command) = &self.after
            && let Err(error) = self.run(command, peer, true).await
        {
            tracing::warn!(export = self.name, %peer, "{error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_one_word_of_the_shell_whatever_it_holds() {
        for path in ["/a b", "/a'b; rm x", "$HOME", "\"`"] {
            let shell = std::process::Command::new("sh")
                .args(["-c", &format!("printf %s {}", quoted(path))])
                .output()
                .unwrap();
            assert_eq!(String::from_utf8(shell.stdout).unwrap(), path);
        }
    }
}
