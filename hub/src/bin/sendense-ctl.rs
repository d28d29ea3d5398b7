//! The command line for people and scripts. Everything is in the library.

fn main() -> std::process::ExitCode {
    hub::ctl::main()
}
