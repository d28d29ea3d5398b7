//! Cache modes by qemu's names. What is written is durable when a command succeeds, in every mode; a mode chooses the
//! way, and whether each write waits.

use std::str::FromStr;

use block::Durability;

/// How a file is read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cache {
    /// Bypass the page cache of the host.
    pub(crate) direct: bool,
    /// Whether each write waits until it is durable.
    pub(crate) write: Durability,
}

impl Cache {
    /// Through the page cache of the host: what is read was often written a moment ago.
    pub(crate) const PAGES: Self = Self { direct: false, write: Durability::Deferred };
    /// Past it: a large target leaves the memory to others.
    pub(crate) const DIRECT: Self = Self { direct: true, write: Durability::Deferred };
}

impl FromStr for Cache {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (direct, write) = match text {
            "none" | "off" => (true, Durability::Deferred),
            "directsync" => (true, Durability::Durable),
            "writeback" | "unsafe" => (false, Durability::Deferred),
            "writethrough" => (false, Durability::Durable),
            _ => {
                return Err(format!(
                    "Invalid cache option: {text}; none, writeback, writethrough, directsync and \
                     unsafe are known"
                ));
            }
        };
        Ok(Self { direct, write })
    }
}
