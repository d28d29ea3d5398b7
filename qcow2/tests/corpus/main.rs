//! A corpus over the whole table of the format, judged by independent readers: what QEMU makes we read and change, what
//! we make QEMU and dissect read, and the program `qcow2` tells of both what `qemu-img` tells.
//!
//! Images are drawn so that every two choices that go together meet in one of them; `SENDENSE_TEST_ROUNDS` draws more.

mod disk;
mod dissect;
mod our_images;
mod ours;
mod program;
mod qemu;
mod qemu_images;
mod random;
mod recipe;
#[path = "../common/rounds.rs"]
mod rounds;
