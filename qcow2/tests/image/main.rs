//! Tests of whole images through the public interface: in memory with faults and power cuts, and on real files with
//! `qemu-img` as the judge. Tests of single parts stand beside them in the crate.

mod bitmap_faults;
mod bitmaps;
mod by_host;
mod changes;
mod check;
mod checking;
mod common;
mod compressed;
mod convert;
mod corrupt;
mod crash;
mod crash_compressed;
mod crash_crowd;
mod create;
mod crowd;
mod damage;
mod examples;
mod faults;
mod fold;
mod fold_crash;
mod formats;
mod giants;
mod given_up;
mod growing;
mod hostile;
mod interop;
mod layers;
#[cfg(feature = "luks")]
mod luks;
mod measure;
mod memory;
mod model;
mod order;
mod power;
mod refusals;
mod repairing;
mod resizing;
#[path = "../common/rounds.rs"]
mod rounds;
mod sans_io;
mod sendable;
mod shape;
mod snapshot_crash;
mod snapshots;
mod uncounted;
#[cfg(feature = "vmdk")]
mod vmdk;
