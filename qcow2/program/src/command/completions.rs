//! `completions` and `man`: what shells and people read about the program, made from the definition that it parses by.

use anyhow::Context;
use clap::CommandFactory;
use clap_complete::Shell;

use crate::output::print;

/// Print a completion script for a shell
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The shell
    shell: Shell,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<u8> {
    let mut command = crate::cli::Cli::command();
    let mut script = Vec::new();
    clap_complete::generate(options.shell, &mut command, "qcow2", &mut script);
    print(&String::from_utf8_lossy(&script))?;
    Ok(0)
}

/// Prints the manual, one page with every command in it.
pub(crate) fn manual() -> anyhow::Result<u8> {
    let mut root = crate::cli::Cli::command();
    let mut page = Vec::new();
    let whole = clap_mangen::Man::new(root.clone());
    // Without the list of pages for each command, which there are not.
    whole
        .render_title(&mut page)
        .and_then(|()| whole.render_name_section(&mut page))
        .and_then(|()| whole.render_synopsis_section(&mut page))
        .and_then(|()| whole.render_description_section(&mut page))
        .and_then(|()| whole.render_options_section(&mut page))
        .context("cannot write the manual")?;
    root.build();
    for sub in root.get_subcommands().filter(|sub| sub.get_name() != "help") {
        let name = format!("qcow2 {}", sub.get_name());
        let man = clap_mangen::Man::new(sub.clone().bin_name(name));
        man.render_synopsis_section(&mut page)
            .and_then(|()| man.render_description_section(&mut page))
            .and_then(|()| man.render_options_section(&mut page))
            .context("cannot write the manual")?;
    }
    whole.render_extra_section(&mut page).context("cannot write the manual")?;
    whole.render_version_section(&mut page).context("cannot write the manual")?;
    print(&String::from_utf8_lossy(&page))?;
    Ok(0)
}
