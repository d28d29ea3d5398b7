//! What the end-to-end tests share: our programs as real processes, source disks that look like disks, and outside
//! judges. Nothing here knows how our crates work inside; it speaks to them as a user would.

mod counting_proxy;
mod disk;
mod hub;
mod judge;
mod nbdkit;
mod program;

pub use counting_proxy::CountingProxy;
pub use disk::{BLOCK, Disk, digest};
pub use hub::{Hub, HubOptions, Vm, layer};
pub use judge::{assert_clean, assert_same, qemu_img};
pub use nbdkit::Nbdkit;
pub use program::{Running, program, run, wait_until};
