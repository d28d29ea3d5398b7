//! What the handshake asks about exports, and the facts it hands on. Where exports live and how they come and go is
//! told by [`crate::Server`].

use std::sync::Arc;

use crate::wire::{self, transmission_flag as flag};

/// A metadata context that an export offers to BLOCK_STATUS.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MetaContext {
    /// `base:allocation`: holes and zeros.
    Allocation,
    /// One of this name, which the export was given with an [`ExtentSource`](crate::ExtentSource).
    Source(Arc<str>),
}

impl MetaContext {
    /// The name on the wire.
    pub fn name(&self) -> &str {
        match self {
            Self::Allocation => "base:allocation",
            Self::Source(name) => name,
        }
    }
}

/// A context chosen by a client, with the number by which replies name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SelectedContext {
    /// Unique within the connection.
    pub id: u32,
    /// Which.
    pub context: MetaContext,
}

/// What a client may know of an export. Constant while the export exists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportFacts {
    /// The canonical name.
    pub name: String,
    /// A text for people; may be empty.
    pub description: String,
    /// The size in bytes.
    pub size_bytes: u64,
    /// Whether every change is refused.
    pub read_only: bool,
    /// The unit in which the device likes to be asked, in bytes.
    pub preferred_bytes: u32,
    /// The longest READ or WRITE, in bytes: a power of two.
    pub max_payload_bytes: u32,
    /// Whether clients should sort their requests, as for a rotating disk.
    pub rotational: bool,
    /// Transmission flags that are not told although the device could.
    pub withheld: u16,
    /// What BLOCK_STATUS can tell.
    pub contexts: Vec<MetaContext>,
}

impl ExportFacts {
    /// The transmission flags of the export itself, given whether replies have chunks.
    ///
    /// Source: "Transmission flags".
    pub fn transmission_flags(&self, structured: bool) -> u16 {
        let mut flags = flag::HAS_FLAGS
            | flag::SEND_FLUSH
            | flag::SEND_FUA
            | flag::SEND_CACHE
            | flag::CAN_MULTI_CONN;
        if self.read_only {
            flags |= flag::READ_ONLY;
        } else {
            flags |= flag::SEND_TRIM | flag::SEND_WRITE_ZEROES | flag::SEND_FAST_ZERO;
        }
        if structured {
            flags |= flag::SEND_DF;
        }
        if self.rotational {
            flags |= flag::ROTATIONAL;
        }
        // What every reply with flags has, and what protects the image, cannot be left out.
        flags &= !(self.withheld & !(flag::HAS_FLAGS | flag::READ_ONLY));
        // A way to do what cannot be done is never told.
        if flags & flag::SEND_WRITE_ZEROES == 0 {
            flags &= !flag::SEND_FAST_ZERO;
        }
        flags
    }

    /// Minimum, preferred and maximum block size, in bytes.
    ///
    /// Source: "Block size constraints".
    pub fn block_sizes(&self) -> (u32, u32, u32) {
        let wanted = self.preferred_bytes.clamp(512, self.max_payload_bytes.max(512));
        (1, 1 << wanted.ilog2(), self.max_payload_bytes)
    }
}

/// Why an export cannot be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Unavailable {
    /// There is none of that name.
    Unknown,
    /// This client may not use it.
    Forbidden,
    /// It has as many connections as it may have.
    Full,
    /// It may have one writer, and has another.
    Leased,
    /// Its writer is done, and it is being sealed.
    Sealing,
    /// Not now, for a reason that may pass soon: ask again in a while. A directory answers this for a bounded time.
    NotYet,
    /// What is to be done before a client is let in has failed.
    TurnedAway,
    /// The server is stopping.
    ShuttingDown,
    /// Not without TLS; or there is none of that name, which is nobody's business without TLS.
    TlsRequired,
}

impl Unavailable {
    /// The option reply that says so, and its text.
    pub(super) fn reply(self) -> (u32, &'static str) {
        match self {
            Self::Unknown => (wire::reply::ERR_UNKNOWN, "there is no export of that name"),
            Self::Forbidden => (wire::reply::ERR_POLICY, "the client may not use the export"),
            Self::Full => {
                (wire::reply::ERR_POLICY, "the export has as many connections as it may have")
            }
            Self::Leased => {
                (wire::reply::ERR_POLICY, "another client or connection is writing to the export")
            }
            Self::Sealing => {
                (wire::reply::ERR_POLICY, "the export is being sealed behind its writer; try again")
            }
            Self::NotYet => (wire::reply::ERR_POLICY, "the export cannot be had now; try again"),
            Self::TurnedAway => (
                wire::reply::ERR_POLICY,
                "the server failed to prepare the export; its log tells why",
            ),
            Self::ShuttingDown => (wire::reply::ERR_SHUTDOWN, "the server is stopping"),
            Self::TlsRequired => (
                wire::reply::ERR_TLS_REQD,
                "there is no export of that name without TLS; is the name right?",
            ),
        }
    }

    /// The same for an option other than INFO and GO, which must not tell that TLS would help.
    ///
    /// Source: "SELECTIVETLS mode".
    pub(super) fn without_tls_hint(self) -> Self {
        match self {
            Self::TlsRequired => Self::Unknown,
            other => other,
        }
    }
}

/// The exports as one client sees them while it negotiates.
pub trait ExportDirectory {
    /// Name and description of the first export, or of the one that comes next behind that of this name, in the order of
    /// names. There need not be one of this name any more.
    fn next(&mut self, after: Option<&str>) -> Option<(String, String)>;

    /// Whether clients may ask for that at all.
    fn lists(&self) -> bool {
        true
    }

    /// Looks an export up; the empty name means the default one.
    ///
    /// # Errors
    /// [`Unavailable`].
    fn look_up(&mut self, name: &str) -> Result<ExportFacts, Unavailable>;

    /// Looks an export up and holds on to it for the connection, so that it cannot go away between the reply and the
    /// first request.
    ///
    /// # Errors
    /// [`Unavailable`].
    fn enter(&mut self, name: &str) -> Result<ExportFacts, Unavailable>;

    /// Whether every further option is to be refused.
    fn is_shutting_down(&self) -> bool;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(read_only: bool, preferred_bytes: u32) -> ExportFacts {
        ExportFacts {
            name: "disk".into(),
            description: String::new(),
            size_bytes: 1 << 20,
            read_only,
            preferred_bytes,
            max_payload_bytes: wire::MAX_PAYLOAD_BYTES,
            rotational: false,
            withheld: 0,
            contexts: vec![MetaContext::Allocation],
        }
    }

    #[test]
    fn df_is_offered_only_with_structured_replies() {
        let facts = facts(false, 4096);
        assert_eq!(facts.transmission_flags(false) & flag::SEND_DF, 0);
        assert_ne!(facts.transmission_flags(true) & flag::SEND_DF, 0);
    }

    #[test]
    fn a_read_only_export_offers_no_change() {
        let flags = facts(true, 4096).transmission_flags(true);
        assert_ne!(flags & flag::READ_ONLY, 0);
        let changes = flag::SEND_TRIM | flag::SEND_WRITE_ZEROES | flag::SEND_FAST_ZERO;
        assert_eq!(flags & changes, 0);
    }

    #[test]
    fn withheld_flags_are_not_told_but_those_that_protect_are() {
        let withheld = flag::SEND_FLUSH | flag::READ_ONLY | flag::HAS_FLAGS;
        let facts = ExportFacts { withheld, rotational: true, ..facts(true, 4096) };
        let flags = facts.transmission_flags(true);
        assert_eq!(flags & flag::SEND_FLUSH, 0);
        let told = flag::HAS_FLAGS | flag::READ_ONLY | flag::ROTATIONAL;
        assert_eq!(flags & told, told);
        let facts = ExportFacts { withheld: flag::SEND_WRITE_ZEROES, ..self::facts(false, 4096) };
        assert_eq!(facts.transmission_flags(true) & flag::SEND_FAST_ZERO, 0);
    }

    #[test]
    fn block_sizes_are_powers_of_two_in_order_whatever_the_device_prefers() {
        for preferred in [0, 1, 511, 513, 4096, 65_537, u32::MAX] {
            let (min, preferred, max) = facts(false, preferred).block_sizes();
            assert!([min, preferred, max].iter().all(|size| size.is_power_of_two()));
            assert!(min <= preferred && 512 <= preferred && preferred <= max);
        }
    }
}
