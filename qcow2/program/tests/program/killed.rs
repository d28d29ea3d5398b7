//! The program killed at a system call of its choice: every image reads as before and is sound but for leaks, and the
//! same command line then succeeds.

use crate::deeds::{After, DEEDS, Deed, copy_all, prepare};
use crate::rounds::rounds;
use crate::support::Place;

/// The calls by which files change and go, and the one by which io_uring is asked to change them.
const CALLS: &str = "pwrite64,pwritev,pwritev2,write,fdatasync,fsync,ftruncate,fallocate,copy_file_range,unlink,\
                     unlinkat,io_uring_enter";

/// Kills the deed when one of its threads makes such a call for the `nth` time; whether it came so far. `engine` is a
/// variable as strace sets or, without a value, removes it.
fn dies(deed: &Deed, prepared: &Place, engine: &str, nth: u32) -> bool {
    let place = Place::new();
    copy_all(&prepared.path(""), &place.path(""));
    let kill = format!("inject={CALLS}:signal=KILL:when={nth}");
    let mut line = vec!["-f", "-qq", "-o", "/dev/null", "-E", engine, "-e", &kill];
    line.push(env!("CARGO_BIN_EXE_qcow2"));
    line.extend(deed.args);
    let answer = place.answer("strace", &line);
    let after = if answer.code == 0 { After::Success } else { After::Death };
    deed.judge(&place, &prepared.path(""), &after);
    if after == After::Death {
        // A process that was killed answers nothing, and no error of its own.
        assert!(!answer.err.contains("qcow2:"), "{}: {answer:?}", deed.name);
        let again = place.qcow2(deed.args);
        // It may have been done when it died.
        let is_told = deed.again.is_some_and(|text| again.code == 1 && again.err.contains(text));
        assert!(again.code == 0 || is_told, "{}: {again:?}", deed.name);
        deed.judge(&place, &prepared.path(""), &After::Death);
    }
    after == After::Death
}

#[test]
fn a_killed_program_loses_nothing_and_is_simply_run_again() {
    let kills = rounds(4);
    let prepared = prepare();
    for deed in DEEDS {
        for engine in ["SENDENSE_IO=blocking", "SENDENSE_IO"] {
            let mut deaths = 0;
            for kill in 0..kills {
                // Dense at the beginning, as most deeds have few calls a thread.
                let nth = 1 + kill + kill * kill / 4;
                deaths += u32::from(dies(deed, &prepared, engine, nth));
            }
            assert!(deaths > 0, "{} with {engine} was never killed", deed.name);
        }
    }
}
