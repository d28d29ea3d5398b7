//! The cases that are measured. How a load is made from one is fio's business, and who serves it the contenders'.

/// A kind of load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Case {
    /// The name on the command line and in the table.
    pub(crate) name: &'static str,
    pub(crate) direction: Direction,
    pub(crate) pattern: Pattern,
    pub(crate) transport: Transport,
    /// Whether the image holds data before the load starts; else every cluster is a fresh one.
    pub(crate) allocated: bool,
    /// How many files the image consists of, each owning a stripe of the data.
    pub(crate) layers: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    Read,
    Write,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pattern {
    /// 1 MiB after the other, 16 in flight in each job.
    Sequential,
    /// 4 KiB anywhere, each once, 32 in flight in each job.
    Random,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transport {
    Unix,
    /// On the loopback.
    Tcp,
}

use Direction::{Read, Write};
use Pattern::{Random, Sequential};

/// How many files a long chain has.
const CHAIN: u32 = 64;

const fn case(
    name: &'static str,
    direction: Direction,
    pattern: Pattern,
    transport: Transport,
    allocated: bool,
    layers: u32,
) -> Case {
    Case { name, direction, pattern, transport, allocated, layers }
}

/// All cases, in the order of the table.
pub(crate) const CASES: &[Case] = &[
    case("seq-write", Write, Sequential, Transport::Unix, false, 1),
    case("seq-read", Read, Sequential, Transport::Unix, true, 1),
    case("seq-write-tcp", Write, Sequential, Transport::Tcp, false, 1),
    case("seq-read-tcp", Read, Sequential, Transport::Tcp, true, 1),
    case("rand-write", Write, Random, Transport::Unix, true, 1),
    case("rand-read", Read, Random, Transport::Unix, true, 1),
    case("rand-write-fresh", Write, Random, Transport::Unix, false, 1),
    case("chain-seq-read", Read, Sequential, Transport::Unix, true, CHAIN),
    case("chain-rand-read", Read, Random, Transport::Unix, true, CHAIN),
];

impl Case {
    /// The same disk with all its data in one file, for a case with a chain: what the chain costs.
    pub(crate) fn flat(self) -> Option<Self> {
        (self.layers > 1).then_some(Self { layers: 1, ..self })
    }

    /// What fills the image before the load.
    pub(crate) fn filling(self) -> Self {
        Self { direction: Write, pattern: Sequential, allocated: false, layers: 1, ..self }
    }

    /// Bytes of a request.
    pub(crate) fn request_bytes(self) -> u64 {
        match self.pattern {
            Sequential => 1 << 20,
            Random => 4 << 10,
        }
    }

    /// How much of a disk of `mib` is moved, in MiB: random loads take a part of it.
    pub(crate) fn moved_mib(self, mib: u64) -> u64 {
        match self.pattern {
            Sequential => mib,
            Random => (mib / 8).max(2),
        }
    }
}
