//! Compares the `nbd-server` program with qemu-nbd and with the limits of wire and disk, in turns, in one run.
//! Prints medians and ratios; asserts nothing: figures are for people to read.

mod accepted;
mod case;
mod disk;
mod fio;
mod host;
mod peer;
mod picture;
mod report;

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Parser;

use crate::accepted::Accepted;
use crate::case::{CASES, Case};
use crate::fio::Load;
use crate::peer::{Contender, LineUp};
use crate::report::{Report, Sample};

/// Takes turns between our server, qemu-nbd in three tunings, and the limits.
#[derive(Parser)]
struct Arguments {
    /// Runs these cases alone.
    #[arg(long = "case", value_delimiter = ',', value_parser = clap::builder::PossibleValuesParser::new(CASES.iter().map(|case| case.name)))]
    only: Vec<String>,
    /// Rounds a case; the table shows medians.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// MiB of the disk, all of which is moved sequentially in a round, and an eighth at random.
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
    /// Where the medians are drawn.
    #[arg(long, default_value = "bench-results/compare.svg")]
    picture: PathBuf,
    /// The ratios that were accepted last.
    #[arg(long, default_value = "benches/accepted.json")]
    accepted: PathBuf,
    /// Accepts the ratios of this run in their place.
    #[arg(long)]
    accept: bool,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let is_meant = |case: &&Case| {
        arguments.only.is_empty() || arguments.only.iter().any(|only| only == case.name)
    };
    let cases: Vec<Case> = CASES.iter().filter(is_meant).copied().collect();
    let mut accepted = Accepted::read(&arguments.accepted)?;

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
                    let load = Load { case: *case, mib: arguments.mib, folder: folder.path() };
                    let Some(figures) = line_up.measure(contender, &load)? else { continue };
                    eprintln!("{file_system} {} round {round}: {contender}", case.name);
                    report.add(Sample::new(&file_system, *case, contender, round, figures));
                }
            }
        }
    }
    print!("{}", report.table(&accepted));
    report.write_json(&arguments.json)?;
    std::fs::write(&arguments.picture, picture::draw(&report))?;
    if arguments.accept {
        for section in report.sections() {
            if let Some(ratios) = section.ratios() {
                accepted.accept(section.name(), ratios);
            }
        }
        accepted.write(&arguments.accepted)?;
    }
    Ok(())
}
