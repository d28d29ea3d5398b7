//! The program beside qemu-img: the same command lines, and what users and scripts read of the answers. The formats
//! themselves are judged in the library's tests.

mod bench;
mod bitmap;
mod chain;
mod check;
mod compare;
mod convert;
mod create;
mod dd;
mod deeds;
mod full;
mod hostile;
mod info;
mod killed;
mod letters;
mod map;
mod measure;
mod misuse;
mod resize;
#[path = "../../../tests/common/rounds.rs"]
mod rounds;
mod snapshot;
mod support;
mod terminal;
