//! The cases that are measured. How a load is made from one is fio's business.

/// A kind of load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Case {
    /// Sequential writes of 1 MiB into an empty image.
    SeqWrite,
    /// Sequential reads of 1 MiB of an image just filled, with cold caches.
    SeqRead,
}

/// All cases, in the order of the table.
pub(crate) const CASES: &[Case] = &[Case::SeqWrite, Case::SeqRead];

impl Case {
    /// The name on the command line and in the table.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::SeqWrite => "seq-write",
            Self::SeqRead => "seq-read",
        }
    }

    /// Whether the image must hold data before the load starts.
    pub(crate) fn needs_data(self) -> bool {
        self == Self::SeqRead
    }
}
