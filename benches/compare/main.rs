//! Compares the `nbd-server` program with qemu-nbd and with the limits of wire and disk, in turns, in one run.
//! Prints medians and ratios; asserts nothing: figures are for people to read.

mod case;
mod fio;
mod host;
mod peer;
mod report;

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Parser;

use crate::case::{CASES, Case};
use crate::fio::Load;
use crate::peer::{Contender, LineUp};
use crate::report::{Report, Sample};

/// Takes turns between our server, qemu-nbd in three tunings, and the limits.
#[derive(Parser)]
struct Arguments {
    /// Runs one case alone: seq-write or seq-read.
    #[arg(long = "case")]
    only: Option<String>,
    /// Rounds a case; the table shows medians.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// MiB moved in a round.
    #[arg(long, default_value_t = 2048)]
    mib: u64,
    /// Directories to measure in; each on another kind of file system says more.
    #[arg(long = "dir", default_values_t = [String::from("target"), String::from("/dev/shm")])]
    dirs: Vec<String>,
    /// The program under test; the one that was built beside this one, unless named.
    #[arg(long)]
    nbd_server: Option<PathBuf>,
    /// Where the samples are written as JSON.
    #[arg(long, default_value = "bench-results/compare.json")]
    json: PathBuf,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let cases: Vec<Case> = CASES
        .iter()
        .copied()
        .filter(|case| arguments.only.as_deref().is_none_or(|only| only == case.name()))
        .collect();
    anyhow::ensure!(!cases.is_empty(), "no such case; there are seq-write and seq-read");

    let beside = || std::env::current_exe().map(|this| this.with_file_name("nbd-server"));
    let nbd_server = arguments.nbd_server.clone().map_or_else(beside, Ok)?;
    let line_up = LineUp { nbd_server };
    let mut report = Report::new(host::describe()?, arguments.mib, arguments.rounds);
    for dir in &arguments.dirs {
        let folder = tempfile::Builder::new()
            .prefix("sendense-bench-")
            .tempdir_in(dir)
            .with_context(|| format!("no bench folder in {dir}"))?;
        let file_system = host::file_system(folder.path())?;
        for case in &cases {
            for round in 1..=arguments.rounds {
                for contender in Contender::ALL {
                    eprintln!("{file_system} {} round {round}: {contender}", case.name());
                    let load = Load { case: *case, mib: arguments.mib, folder: folder.path() };
                    let figures = line_up.measure(contender, &load)?;
                    report.add(Sample::new(&file_system, *case, contender, round, figures));
                }
            }
        }
    }
    print!("{}", report.table());
    report.write_json(&arguments.json)
}
