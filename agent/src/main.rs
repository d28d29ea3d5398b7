//! The `sendense-agent` program.
fn main() {}
