//! The server against raw clients and real peers. The machines' own rules are tested beside them.

mod device;
mod lifecycle;
mod peers;
mod raw;
mod transmission;
