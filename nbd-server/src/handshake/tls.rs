//! STARTTLS, and what a server refuses as long as it has not happened. Who is on the other end of TLS, and which exports
//! they may have, is for the [`ExportDirectory`](super::ExportDirectory) to know.
//!
//! Source: `doc/proto.md`, "TLS support".

use crate::wire::{option, reply};

/// Whether a server speaks TLS. A client has no say in it, apart from [`TlsMode::Offered`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TlsMode {
    /// Never: STARTTLS is refused. The document's NOTLS.
    #[default]
    Off,
    /// For clients that ask for it, and for all clients of exports that demand it. SELECTIVETLS.
    Offered,
    /// Without TLS, nothing is answered but STARTTLS and ABORT. FORCEDTLS.
    Required,
}

/// How a server answers STARTTLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StartTls {
    /// Acknowledge and begin.
    Begin,
    /// Refuse with this reply and text.
    Refuse(u32, &'static str),
    /// What came behind the option was sent by somebody who did not wait for the answer, and whoever sits in between
    /// could have sent it: it must not be taken for what TLS protects.
    Plaintext,
}

/// What STARTTLS deserves; `alone` where no byte came behind it.
pub(super) fn start(mode: TlsMode, secured: bool, alone: bool) -> StartTls {
    match mode {
        _ if secured => StartTls::Refuse(reply::ERR_INVALID, "TLS has begun already"),
        TlsMode::Off => StartTls::Refuse(reply::ERR_UNSUP, "this server is not configured for TLS"),
        TlsMode::Offered | TlsMode::Required if alone => StartTls::Begin,
        TlsMode::Offered | TlsMode::Required => StartTls::Plaintext,
    }
}

/// Whether a client without TLS may use the option in this mode.
pub(super) fn permits(mode: TlsMode, option: u32) -> bool {
    mode != TlsMode::Required || matches!(option, option::STARTTLS | option::ABORT)
}

/// The answer to options that are not permitted.
pub(super) const REQUIRED: (u32, &str) =
    (reply::ERR_TLS_REQD, "this server demands TLS: begin it with STARTTLS");
