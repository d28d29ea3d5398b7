//! The server against raw clients and real peers. The machines' own rules are tested beside them.

mod device;
mod raw;
mod transmission;
