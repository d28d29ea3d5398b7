//! Our programs, found beside the test that runs them, as processes that never outlive a test.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// The longest that any single step of a test may take before it counts as hung.
const STEP_LIMIT: Duration = Duration::from_secs(240);

/// The path of one of our programs, as `cargo build --workspace --bins` leaves it.
///
/// # Panics
/// Where it was not built.
pub fn program(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a test knows its own path");
    let folder = test.ancestors().nth(2).expect("tests lie in target/PROFILE/deps");
    let path = folder.join(name);
    assert!(path.exists(), "{name} is not built: run `cargo build --workspace --bins` first");
    path
}

/// Runs a command to its end.
///
/// # Errors
/// Where it does not start, or fails: then with what it printed.
pub fn run<I, S>(command: &str, arguments: I) -> Result<String>
where
    I: IntoIterator<Item = S>,
    S: AsRef<OsStr>,
{
    let mut command = Command::new(command);
    command.args(arguments);
    let output = command.output().with_context(|| format!("{command:?} does not start"))?;
    succeeded(&command, &output)?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn succeeded(command: &Command, output: &Output) -> Result<()> {
    if output.status.success() {
        return Ok(());
    }
    bail!(
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// Waits until `ready` says yes.
///
/// # Errors
/// Where it never does within the limit of a step, or fails itself.
pub fn wait_until(what: &str, mut ready: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + STEP_LIMIT;
    while !ready()? {
        anyhow::ensure!(Instant::now() < deadline, "gave up waiting: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// A process that is killed where the test forgets it.
pub struct Running {
    child: Child,
    name: String,
}

impl Running {
    /// Starts a process without a terminal.
    ///
    /// # Errors
    /// Where it does not start.
    pub fn start(command: &mut Command) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        let child = command
            .stdin(Stdio::null())
            .spawn()
            .with_context(|| format!("{command:?} does not start"))?;
        Ok(Self { child, name })
    }

    /// Its process number.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it prints, where that is piped.
    pub fn stdout(&mut self) -> Option<std::process::ChildStdout> {
        self.child.stdout.take()
    }

    /// Whether it still runs.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// SIGKILL, as a crash would.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn kill(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// SIGTERM, then waits; answers the exit code.
    ///
    /// # Errors
    /// Where it does not end in time, or by another signal.
    pub fn stop(mut self) -> Result<i32> {
        let pid = i32::try_from(self.child.id())?;
        let pid = rustix::process::Pid::from_raw(pid).context("an odd process number")?;
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        self.wait()
    }

    /// Waits for it to end by itself; answers the exit code.
    ///
    /// # Errors
    /// Where it does not end in time, or by a signal.
    pub fn wait(&mut self) -> Result<i32> {
        let child = &mut self.child;
        let mut ended = None;
        wait_until(&format!("the end of {}", self.name), || {
            ended = child.try_wait()?;
            Ok(ended.is_some())
        })?;
        ended.and_then(|status| status.code()).context("ended by a signal")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
