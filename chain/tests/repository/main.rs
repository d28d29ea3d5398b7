//! Repositories on a real file system, with QEMU's own tools as the judge of every layer. What is pure is tested
//! beside its code.

mod crash;
mod layers;
mod support;
mod tamper;
