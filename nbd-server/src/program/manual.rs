//! What people and shells read about the program: the manual and scripts for completion, made from the definitions that
//! it parses by.

use std::io::Write;

use anyhow::Context;
use clap::CommandFactory;
use clap_complete::Shell;
use clap_mangen::roff::{Roff, bold, roman};

use super::config::{EXPORT, GENERIC, Key};
use super::options::Options;

/// What the program is called with.
const SYNOPSIS: [&str; 4] = [
    " --listen ADDRESS ... --export NAME=PATH[,...] ... [OPTION] ...",
    " --config FILE [--listen ADDRESS] ... [--export NAME=PATH[,...]] ... [OPTION] ...",
    " --config FILE --check-config",
    " --help | --version | --man | --completions SHELL",
];

const SYNTAX: &str = "Configuration files have the format of the reference nbd-server: sections [NAME], lines KEY = \
VALUE, and comments that begin with #. The first section of the main file is [generic]; each other one, and each in the \
files that includedir adds, is an export of that name. Sizes are bytes, or take K, M, G or T. Relative paths begin at \
the folder of the file. A key that is not known, or that would promise what is not kept, is an error; one without effect \
here is a warning. Both tell file and line.";

const RELOADING: &str = "Reads the configuration again. Exports are added, changed and removed at one stroke, or, where \
anything is wrong, not at all: then what is wrong is told by file and line, and everything goes on as before. Images of \
exports that stay are not opened again. Open connections stay with an export that changed; removal says what becomes of \
those to one that is gone. Addresses, limits, user and group change with the next start. An image that is served read-only is not opened again for writing: such a change is \
refused, and passes --check-config, which does not know what is served.";

const MERGING: &str = "Tells that the images are whole for which exports with waitfile wait. Each is opened, what was written \
is merged into it and made durable, NAME.waiting is removed, and the image is served. Requests to the export wait meanwhile, and \
so do reloads. Where an image is missing, has not filesize bytes or cannot be written, the log says so, and the export goes \
on waiting until the next SIGUSR1. Has no effect where none waits.";

const STOPPING: &str = "Answers what is in flight, and what clients ask until they hear of it with ESHUTDOWN, closes the \
connections, flushes and closes the images, and ends with 0. Takes as long as --shutdown-timeout says for clients, and as much again for images. A second signal, half a \
second later or more, ends at once, with 1.";

/// Lines are as long as their words, which are whole: what an export takes is a word of many lines.
const RAGGED: &[u8] = b".ad l\n.nh\n";

/// Prints the manual.
pub(super) fn print() -> anyhow::Result<()> {
    let mut page = Vec::new();
    let manual = clap_mangen::Man::new(Options::command());
    let mut synopsis = Roff::new();
    synopsis.control("SH", ["SYNOPSIS"]);
    for (index, arguments) in SYNOPSIS.iter().enumerate() {
        if index > 0 {
            synopsis.control("br", []);
        }
        synopsis.text([bold("nbd-server"), roman(*arguments)]);
    }
    manual
        .render_title(&mut page)
        .and_then(|()| page.write_all(RAGGED))
        .and_then(|()| manual.render_name_section(&mut page))
        .and_then(|()| page.write_all(synopsis.render().as_bytes()))
        .and_then(|()| manual.render_description_section(&mut page))
        .and_then(|()| manual.render_options_section(&mut page))
        .and_then(|()| manual.render_version_section(&mut page))
        .context("cannot write the manual")?;
    let mut more = Roff::new();
    more.control("SH", ["CONFIGURATION FILES"]);
    more.text([roman(SYNTAX)]);
    keys(&mut more, "Keys of [generic]", GENERIC);
    keys(&mut more, "Keys of exports", EXPORT);
    more.control("SH", ["SIGNALS"]);
    for (signal, text) in
        [("SIGHUP", RELOADING), ("SIGUSR1", MERGING), ("SIGTERM, SIGINT", STOPPING)]
    {
        more.control("TP", []);
        more.text([bold(signal)]);
        more.text([roman(text)]);
    }
    more.control("SH", ["ENVIRONMENT"]);
    for (name, text) in [
        ("LISTEN_FDS, LISTEN_PID", "Sockets that systemd hands over, see sd_listen_fds(3)."),
        ("RUST_LOG", "What is logged to standard error, as `debug` or `nbd_server=debug`."),
        ("SENDENSE_IO", "`blocking` does without io_uring."),
    ] {
        more.control("TP", []);
        more.text([bold(name)]);
        more.text([roman(text)]);
    }
    more.control("SH", ["EXIT STATUS"]);
    more.text([roman("0 after a clean end, 1 after an error, 2 where the command line is wrong.")]);
    page.extend(more.render().into_bytes());
    out(breakable(&String::from_utf8_lossy(&page)).as_bytes())
}

/// A page in which what an export takes can be broken between its parts.
fn breakable(page: &str) -> String {
    page.replace("][,", "]\\:[,").replace("...[,", "...\\:[,")
}

fn keys(page: &mut Roff, title: &str, keys: &[Key]) {
    page.control("SS", [title]);
    for key in keys {
        page.control("TP", []);
        page.text([bold(key.name), roman(" = "), roman(key.value)]);
        page.text([roman(key.text), roman(".")]);
    }
}

/// Prints a script for a shell.
pub(super) fn complete(shell: Shell) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Options::command(), "nbd-server", &mut script);
    out(&script)
}

fn out(bytes: &[u8]) -> anyhow::Result<()> {
    let mut out = std::io::stdout();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        // Who reads no further has read enough.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        written => written.context("cannot write to standard output"),
    }
}
