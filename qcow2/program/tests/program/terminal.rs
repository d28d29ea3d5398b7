//! What a user at a terminal sees and does: the bar of long work, and the second Ctrl-C.

use std::process::Stdio;

use crate::support::{Place, Running};

#[test]
fn progress_on_a_terminal_shows_amount_rate_and_remaining_time() {
    let place = Place::new();
    place.write_raw("a.raw", 8 << 20, 1);
    let program = env!("CARGO_BIN_EXE_qcow2");
    for command in
        ["convert -p -f raw -O qcow2 a.raw b", "rebase -p -F raw -b a.raw c", "commit -p c"]
    {
        if command.starts_with("rebase") {
            place.qcow2(&["create", "-f", "qcow2", "c", "8M"]).good();
        }
        let line = format!("{program} {command}");
        let shown = place.tool("script", &["-qec", &line, "/dev/null"]).out;
        for part in ["100%", "MiB/", "iB/s", "ETA"] {
            assert!(shown.contains(part), "{command}: {part} is not in {shown:?}");
        }
        // Where nobody looks, there is no bar: lines that scripts know.
        let read = place.qcow2(&command.split(' ').collect::<Vec<_>>());
        assert!(read.code != 0 || read.out.contains("(100.00/100%)"), "{command}: {read:?}");
        assert!(!read.err.contains("ETA") && !read.out.contains("ETA"), "{command}: {read:?}");
    }
}

#[test]
fn a_second_signal_ends_the_program_though_its_disk_hangs() {
    let place = Place::new();
    place.qemu_img(&["create", "-q", "-f", "qcow2", "base", "8M"]).good();
    place.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "top"]).good();
    place.qemu_io("top", &["write -P 1 0 4M"]);
    // A disk on which every change takes an hour.
    let line = ["-f", "-qq", "-E", "SENDENSE_IO=blocking", "-e", "trace=pwrite64,copy_file_range"];
    let hang = ["-e", "inject=pwrite64,copy_file_range:delay_enter=3600000000", "-o", "trace"];
    let program = [env!("CARGO_BIN_EXE_qcow2"), "commit", "top"];
    let mut strace = std::process::Command::new("strace");
    strace.current_dir(place.path("")).stdin(Stdio::null());
    strace.args([&line[..], &hang, &program].concat());
    let mut running = Running(strace.spawn().expect("strace starts"));
    // The copy is told as soon as it begins.
    let begun = || {
        std::fs::read_to_string(place.path("trace"))
            .is_ok_and(|text| text.contains("copy_file_range("))
    };
    while !begun() {
        assert!(running.0.try_wait().expect("a child of ours").is_none(), "it hangs");
        std::thread::yield_now();
    }
    let children = format!("/proc/{0}/task/{0}/children", running.0.id());
    let child = std::fs::read_to_string(children).expect("strace has a child");
    for signal in ["INT", "TERM"] {
        place.tool("kill", &["-s", signal, child.trim()]);
    }
    // strace waits for the writes that it delays: how the program ended is in its last state.
    let status = loop {
        let stat = format!("/proc/{}/stat", child.trim());
        let stat = std::fs::read_to_string(stat).expect("nobody has asked how it ended");
        let mut fields = stat.split_whitespace();
        if fields.nth(2) == Some("Z") {
            break fields.next_back().and_then(|status| status.parse::<i32>().ok());
        }
        std::thread::yield_now();
    };
    // The code is that of the second: the first alone would have waited for the disk.
    assert_eq!(status.map(|status| status >> 8), Some(143));
}
