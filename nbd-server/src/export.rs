//! An export: a device under a name, and the connections that hold it. Which names are taken is known to
//! the server's table.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use block::{BlockDevice, ByteRange};

use crate::access::{Access, ClientName, Protection};
use crate::admission::Admission;
use crate::attendant::{Attendant, TurnedAway};
use crate::census::Origin;
use crate::clients::Client;
use crate::counters::{Counters, LastError, Tally};
use crate::extent_source::ExtentSource;
use crate::gauge::{Gauge, Held};
use crate::handshake::{ExportFacts, MetaContext, Unavailable};
use crate::leases::Leases;
use crate::limits::Limits;
use crate::peer::Peer;
use crate::server::Shared;
use crate::signal::Signal;
use crate::wire::{MAX_STRING_BYTES, transmission_flag};
use crate::writers::{Claim, Flushing, Lease, LeaseHold, Parting, Writer, Writers};

/// A device to be served under a name.
#[derive(Clone)]
pub struct Export {
    name: String,
    description: String,
    device: Arc<dyn BlockDevice>,
    read_only: bool,
    default_export: bool,
    sources: Vec<(String, Arc<dyn ExtentSource>)>,
    admission: Admission,
    preferred_bytes: Option<u32>,
    rotational: bool,
    withheld: u16,
    access: Access,
    attendant: Option<Arc<dyn Attendant>>,
    max_connections: Option<usize>,
    idle_timeout: Option<Duration>,
    writers: Writers,
    lease: Option<(Arc<Lease>, ByteRange)>,
    seals: bool,
}

impl std::fmt::Debug for Export {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Export").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Export {
    /// Serves `device` as `name`: UTF-8 without NUL, at most 4096 bytes. The empty name is the default export.
    pub fn new(name: impl Into<String>, device: Arc<dyn BlockDevice>) -> Self {
        Self {
            name: name.into(),
            description: String::new(),
            device,
            read_only: false,
            default_export: false,
            sources: Vec::new(),
            admission: Admission::default(),
            preferred_bytes: None,
            rotational: false,
            withheld: 0,
            access: Access::default(),
            attendant: None,
            max_connections: None,
            idle_timeout: None,
            writers: Writers::default(),
            lease: None,
            seals: false,
        }
    }

    /// A text for people, shown in lists: at most 4096 bytes.
    #[must_use]
    pub fn description(mut self, text: impl Into<String>) -> Self {
        self.description = text.into();
        self
    }

    /// Refuses every change, even where the device would take it.
    #[must_use]
    pub fn read_only(mut self, read_only: bool) -> Self {
        self.read_only = read_only;
        self
    }

    /// Also serves it to clients that name no export.
    #[must_use]
    pub fn default_export(mut self, default_export: bool) -> Self {
        self.default_export = default_export;
        self
    }

    /// Offers another metadata context to BLOCK_STATUS: `name` with its namespace, as `qemu:dirty-bitmap:NAME`, UTF-8
    /// without NUL, at most 4096 bytes. `source` is asked at each request, so that clients see what it knows then.
    #[must_use]
    pub fn context(mut self, name: impl Into<String>, source: Arc<dyn ExtentSource>) -> Self {
        self.sources.push((name.into(), source));
        self
    }

    /// Keeps it from clients without TLS, which do not learn that it exists. Of use where a server offers TLS without
    /// demanding it of everybody.
    #[must_use]
    pub fn tls_only(mut self, tls_only: bool) -> Self {
        self.access.tls_only = tls_only;
        self
    }

    /// Keeps it to clients whose certificate bears one of these names, of those whom [`Export::admission`] permits. Others
    /// neither see it in lists nor get in. May be called repeatedly, and includes [`Export::tls_only`]. Who was let in stays, whatever becomes of the certificate.
    #[must_use]
    pub fn clients(mut self, names: impl IntoIterator<Item = ClientName>) -> Self {
        self.access.clients.get_or_insert_default().extend(names);
        self
    }

    /// Who may use it, of those who may connect at all. Others neither see it in lists nor get in.
    #[must_use]
    pub fn admission(mut self, admission: Admission) -> Self {
        self.admission = admission;
        self
    }

    /// Tells clients another preferred size of requests than the device's, in bytes: a power of two from 512 on.
    #[must_use]
    pub fn preferred_bytes(mut self, bytes: u32) -> Self {
        self.preferred_bytes = Some(bytes);
        self
    }

    /// Tells clients that the device is a rotating disk, so that they sort their requests.
    #[must_use]
    pub fn rotational(mut self, rotational: bool) -> Self {
        self.rotational = rotational;
        self
    }

    /// Does not tell clients of these abilities, given as [`transmission_flag`](crate::wire::transmission_flag)s, and
    /// refuses requests that use them all the same.
    #[must_use]
    pub fn withhold(mut self, flags: u16) -> Self {
        self.withheld = flags;
        self
    }

    /// Tells `attendant` of each client that comes and goes.
    #[must_use]
    pub fn attendant(mut self, attendant: Arc<dyn Attendant>) -> Self {
        self.attendant = Some(attendant);
        self
    }

    /// How many connections it may have at once, in the place of [`Limits::connections_per_export`]; `usize::MAX` for any
    /// number; those of what was in its place before a change ([`Server::replace_exports`](crate::Server::replace_exports))
    /// count. Who asks for one more is answered `ERR_POLICY`, with the reason. `CAN_MULTI_CONN` is told only where a
    /// client may have a second connection, by this limit and all others, and by [`Export::writers`].
    #[must_use]
    pub fn max_connections(mut self, connections: usize) -> Self {
        self.max_connections = Some(connections);
        self
    }

    /// How long a client may have nothing in flight before its connection is closed, in the place of
    /// [`Limits::idle_timeout`]; [`Duration::MAX`] for ever.
    #[must_use]
    pub fn idle_timeout(mut self, limit: Duration) -> Self {
        self.idle_timeout = Some(limit);
        self
    }

    /// Who may have it at once, where it can be written.
    #[must_use]
    pub fn writers(mut self, writers: Writers) -> Self {
        self.writers = writers;
        self
    }

    /// Shares the right to write with all exports that are given the same lease, because they write to one thing, this
    /// one to `part` of it: those keep each other out whose parts overlap, as far as [`Export::writers`] of either says.
    /// Otherwise that is so among exports of the same device.
    #[must_use]
    pub fn lease(mut self, lease: Arc<Lease>, part: ByteRange) -> Self {
        self.lease = Some((lease, part));
        self
    }

    /// Seals it once its writer is done: when the last connection of a client that changed or flushed anything has ended by
    /// `DISC`, the device is flushed, [`Attendant::sealed`] is told, and the export is read-only from then on, with all
    /// others that have its [`Lease`] and whatever takes its place, until the lease is gone: nothing that has it is in the
    /// table any more, or has connections. Allows for one client at a time, where [`Export::writers`] says nothing
    /// narrower.
    ///
    /// Where what writes in its place by then is not to be sealed, nothing is.
    ///
    /// Who leaves because it was told that the server stops, or the export is cut off, is not done, but lost.
    ///
    /// Where one of several connections was lost, the client is done only if it came back, for each that was lost by a
    /// later connection that changed or flushed something, and a FLUSH behind that succeeded; otherwise the log says why
    /// nothing was sealed. A writer that was lost as a whole can come back and begin anew.
    #[must_use]
    pub fn seal_on_disconnect(mut self, seals: bool) -> Self {
        self.seals = seals;
        self
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn is_default(&self) -> bool {
        self.default_export || self.name.is_empty()
    }

    /// Whether `other` is the same to clients, whatever its name, and whether or not it is the default one.
    fn is_like(&self, other: &Self) -> bool {
        let source = |(a, b): (&(String, Arc<dyn ExtentSource>), &(String, _))| {
            a.0 == b.0 && Arc::ptr_eq(&a.1, &b.1)
        };
        Arc::ptr_eq(&self.device, &other.device)
            && self.description == other.description
            && self.read_only == other.read_only
            && self.admission == other.admission
            && self.access == other.access
            && self.preferred_bytes == other.preferred_bytes
            && self.rotational == other.rotational
            && self.withheld == other.withheld
            && self.max_connections == other.max_connections
            && self.idle_timeout == other.idle_timeout
            && self.writers == other.writers
            && self.seals == other.seals
            && match (&self.lease, &other.lease) {
                (None, None) => true,
                (Some((one, part)), Some((another, of))) => Arc::ptr_eq(one, another) && part == of,
                _ => false,
            }
            && match (&self.attendant, &other.attendant) {
                (None, None) => true,
                (Some(one), Some(another)) => Arc::ptr_eq(one, another),
                _ => false,
            }
            && self.sources.len() == other.sources.len()
            && self.sources.iter().zip(&other.sources).all(source)
    }
}

/// Why an export cannot be added or removed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// The name is in use.
    #[error("there is already an export named {0:?}")]
    Duplicate(String),
    /// Another export is the default one.
    #[error("the export {0:?} is already the default one")]
    DefaultTaken(String),
    /// The name or the description breaks the protocol's rules for strings.
    #[error(
        "a name, description or metadata context holds a NUL byte or is longer than {MAX_STRING_BYTES} bytes"
    )]
    BadString,
    /// Two metadata contexts have one name, or the name of one has no namespace.
    #[error("a metadata context cannot be named {0:?}: it needs a namespace and a name of its own")]
    Context(String),
    /// The export is for clients with TLS only, and the server does without.
    #[error("the export {0:?} needs TLS, which this server does not speak")]
    NeedsTls(String),
    /// The export names its clients, and the server does not look at clients' certificates.
    #[error("the export {0:?} names its clients, but clients' certificates are ignored")]
    NeedsClientCertificates(String),
    /// There is no export of that name.
    #[error("there is no export named {0:?}")]
    Unknown(String),
    /// The server is stopping.
    #[error("the server is stopping")]
    ShuttingDown,
}

/// What becomes of the connections of an export that is removed, those included that chose it before it was changed. In
/// both cases it is at once unknown to new ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removal {
    /// They go on until their clients leave.
    Drain,
    /// What they have in flight is finished and answered, later requests get `ESHUTDOWN`, then they are closed: when
    /// their client asks for nothing any more, at the latest twice [`Limits::close_timeout`] after the device finished the
    /// last request.
    Cut,
}

/// An export as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ExportStatus {
    /// Its name.
    pub name: String,
    /// Its text for people.
    pub description: String,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Whether every change is refused.
    pub read_only: bool,
    /// Whether that is because its writer is done.
    pub is_sealed: bool,
    /// Whether it is the default export.
    pub is_default: bool,
    /// Connections that hold it now.
    pub connections: usize,
    /// What was done through it so far.
    pub counters: Counters,
    /// The last request that failed.
    pub last_error: Option<LastError>,
}

/// An export in the server's table.
pub(crate) struct Served {
    pub(crate) facts: ExportFacts,
    pub(crate) device: Arc<dyn BlockDevice>,
    pub(crate) sources: HashMap<Arc<str>, Arc<dyn ExtentSource>>,
    pub(crate) access: Access,
    pub(crate) tally: Arc<Tally>,
    /// As it was asked for.
    origin: Export,
    /// Connections that are to leave see this raised.
    pub(crate) closing: Signal,
    /// How long a connection may be idle.
    pub(crate) idle_timeout: Option<Duration>,
    max_connections: usize,
    /// Whether there is room for one connection only, here or in the whole server.
    lonely: bool,
    /// Whether each client may have one connection to the server.
    one_of_client: bool,
    /// Shared with all that write to the same.
    lease: Arc<Lease>,
    /// What of it is written here.
    part: ByteRange,
    pub(crate) connections: Arc<Gauge>,
    /// Those that had its place and its name, and still have connections.
    before: Vec<Predecessor>,
}

/// An export in whose place another one is.
struct Predecessor {
    closing: Signal,
    connections: Arc<Gauge>,
}

impl std::fmt::Debug for Served {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Served").field("facts", &self.facts).finish_non_exhaustive()
    }
}

/// A connection's hold on an export: until the last clone is dropped, by the connection and by every request that is
/// still in the device, the export is not gone.
#[derive(Clone)]
pub(crate) struct Attachment {
    pub(crate) export: Arc<Served>,
    /// The export's, or one of the connection alone.
    pub(crate) device: Arc<dyn BlockDevice>,
    /// Whose connection it is.
    pub(crate) client: Arc<Client>,
    /// Its part in the right to write.
    lease: Option<Arc<LeaseHold>>,
    _held: Arc<Held>,
}

impl std::fmt::Debug for Attachment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Attachment").field("export", &self.export).finish_non_exhaustive()
    }
}

impl Attachment {
    /// Tells the attendant, if there is one, of the client, and takes the device that it gives.
    pub(crate) async fn arrive(&mut self) -> Result<(), TurnedAway> {
        if let Some(attendant) = self.attendant()
            && let Some(device) = attendant.arrived(&self.client.peer).await?
        {
            self.device = device;
        }
        Ok(())
    }

    pub(crate) fn attendant(&self) -> Option<Arc<dyn Attendant>> {
        self.export.origin.attendant.clone()
    }

    /// The client's requests are taken from now on.
    pub(crate) fn begin(&self) {
        if let Some(lease) = &self.lease {
            lease.begin();
        }
    }

    /// The client changes or flushes something.
    pub(crate) fn used(&self) {
        if let Some(lease) = &self.lease {
            lease.used();
        }
    }

    /// The client flushes; to be handed to [`Self::flushed`].
    pub(crate) fn flushing(&self) -> Option<Flushing> {
        self.lease.as_ref()?.flushing()
    }

    /// The client's FLUSH succeeded.
    pub(crate) fn flushed(&self, flushing: Option<Flushing>) {
        if let (Some(lease), Some(flushing)) = (&self.lease, flushing) {
            lease.flushed(flushing);
        }
    }

    /// What the client may know of the export: whoever has no part in the right to write may only read.
    pub(crate) fn facts(&self) -> ExportFacts {
        self.export.facts_for(&self.client.peer, self.lease.is_none())
    }

    /// The connection has ended, by a word of the client or not: seals the export where that makes its writer done, and
    /// where it is to be sealed as the table of exports is by now. Who waits for that is let in once the connection holds
    /// nothing any more.
    pub(crate) async fn leave(self, shared: &Shared, by_word: bool) {
        let Some(lease) = &self.lease else { return };
        let (parting, export) = (lease.leave(by_word), &self.export.facts.name);
        let sealing = match parting {
            Parting::Nothing => return,
            _ if !shared.seals(lease.lease()) => {
                tracing::info!(export, "its writer is gone, and it is not to be sealed any more");
                return;
            }
            Parting::Unfinished(why) => {
                tracing::warn!(export, %why, "its writer is gone, but not done: not sealed");
                return;
            }
            Parting::Done(sealing) => sealing,
        };
        let sealed = async {
            self.export.device.flush().await?;
            match self.attendant() {
                Some(attendant) => attendant.sealed().await,
                None => Ok(()),
            }
        };
        match sealed.await {
            Ok(()) => {
                sealing.seal();
                tracing::info!(export, "its writer is done: sealed");
            }
            Err(error) => tracing::error!(export, %error, "cannot be sealed"),
        }
        drop(self);
        drop(sealing);
    }
}

impl Served {
    /// Asks the device for its limits, once, and takes its lease where it was given none.
    pub(crate) fn new(
        export: Export,
        limits: &Limits,
        leases: &Leases,
    ) -> Result<Self, ExportError> {
        let is_bad = |text: &str| text.len() > MAX_STRING_BYTES || text.contains('\0');
        if is_bad(&export.name) || is_bad(&export.description) {
            return Err(ExportError::BadString);
        }
        let origin = export.clone();
        let mut contexts = vec![MetaContext::Allocation];
        let mut sources = HashMap::new();
        for (name, source) in export.sources {
            if is_bad(&name) {
                return Err(ExportError::BadString);
            }
            let is_known = contexts.iter().any(|context| context.name() == name);
            if is_known || !name.contains(':') {
                return Err(ExportError::Context(name));
            }
            let name = Arc::<str>::from(name);
            contexts.push(MetaContext::Source(Arc::clone(&name)));
            sources.insert(name, source);
        }
        let device = export.device.limits();
        let facts = ExportFacts {
            name: export.name,
            description: export.description,
            size_bytes: device.size_bytes,
            read_only: export.read_only || device.read_only,
            preferred_bytes: export.preferred_bytes.unwrap_or(device.preferred_bytes),
            rotational: export.rotational,
            withheld: export.withheld,
            max_payload_bytes: limits.max_payload_bytes,
            contexts,
        };
        let (lease, part) = match export.lease {
            Some(given) => given,
            None => (leases.of(&export.device), ByteRange::between(0, device.size_bytes)),
        };
        let max_connections =
            origin.max_connections.or(limits.connections_per_export).unwrap_or(usize::MAX);
        Ok(Self {
            facts,
            device: export.device,
            sources,
            access: export.access,
            tally: Arc::default(),
            idle_timeout: origin.idle_timeout.or(limits.idle_timeout),
            max_connections,
            lonely: max_connections.min(limits.connections) < 2,
            one_of_client: limits.connections_per_client.is_some_and(|limit| limit < 2),
            lease,
            part,
            origin,
            closing: Signal::default(),
            connections: Arc::default(),
            before: Vec::new(),
        })
    }

    /// Holds the export for one connection.
    pub(crate) fn attach(
        self: &Arc<Self>,
        client: &Arc<Client>,
        protection: &Protection,
    ) -> Result<Attachment, Unavailable> {
        let held = self.connections.try_hold(self.places()).ok_or_else(|| self.full())?;
        let lease = if self.is_read_only() {
            None
        } else {
            let taken = self.lease.take(self.claim(&client.peer, protection))?;
            // Looked at again, because it may have been sealed in between.
            (!self.is_sealed()).then(|| Arc::new(taken))
        };
        self.tally.connected();
        Ok(Attachment {
            export: Arc::clone(self),
            device: Arc::clone(&self.device),
            client: Arc::clone(client),
            lease,
            _held: Arc::new(held),
        })
    }

    /// Whether a client would be let in now.
    pub(crate) fn judge(&self, peer: &Peer, protection: &Protection) -> Result<(), Unavailable> {
        if self.connections() >= self.places() {
            Err(self.full())
        } else if self.is_read_only() {
            Ok(())
        } else {
            self.lease.judge(&self.claim(peer, protection))
        }
    }

    /// Why it has no place for one more: the connection that seals it keeps its own until then.
    fn full(&self) -> Unavailable {
        let is_sealing = !self.facts.read_only && self.lease.is_sealing();
        if is_sealing { Unavailable::Sealing } else { Unavailable::Full }
    }

    /// The right to write to what it shows.
    pub(crate) fn lease(&self) -> &Arc<Lease> {
        &self.lease
    }

    /// How many connections it may have itself: those to what had its place count, too, and only become fewer.
    fn places(&self) -> usize {
        let before: usize = self.before.iter().map(|one| one.connections.count()).sum();
        self.max_connections.saturating_sub(before)
    }

    /// What a client that writes asks for.
    fn claim(&self, peer: &Peer, protection: &Protection) -> Claim {
        let (writers, writer) = (self.writers(), Writer::new(peer, protection));
        Claim { writers, writer, part: self.part, seals: self.origin.seals }
    }

    /// Whether it writes to what the lease is for, and then, whether that is to be sealed.
    pub(crate) fn seals(&self, lease: &Arc<Lease>) -> Option<bool> {
        let writes = !self.facts.read_only && Arc::ptr_eq(&self.lease, lease);
        writes.then_some(self.origin.seals)
    }

    fn writers(&self) -> Writers {
        match self.origin.writers {
            Writers::Any if self.origin.seals => Writers::OneClient,
            writers => writers,
        }
    }

    /// Whether every change is refused to those who come now.
    fn is_read_only(&self) -> bool {
        self.facts.read_only || self.is_sealed()
    }

    fn is_sealed(&self) -> bool {
        !self.origin.read_only && self.lease.is_sealed()
    }

    /// What a client that comes now may know of it.
    pub(crate) fn facts_now(&self, peer: &Peer) -> ExportFacts {
        self.facts_for(peer, self.is_read_only())
    }

    /// What a client may know of it: that connections agree only where it may have a second one.
    fn facts_for(&self, peer: &Peer, read_only: bool) -> ExportFacts {
        let mut facts = ExportFacts { read_only, ..self.facts.clone() };
        let is_known = Origin::of(peer).is_some();
        let is_alone = self.lonely
            || (self.one_of_client && is_known)
            || match self.writers() {
                _ if read_only => false,
                Writers::Any => false,
                Writers::OneClient => !is_known,
                Writers::OneConnection => true,
            };
        if is_alone {
            facts.withheld |= transmission_flag::CAN_MULTI_CONN;
        }
        facts
    }

    /// Takes the place of another one of its name, which gets no connection any more.
    pub(crate) fn succeed(&mut self, other: &Self) {
        let all = other.before.iter().map(|one| (&one.closing, &one.connections));
        let all = all.chain([(&other.closing, &other.connections)]);
        let used = all.filter(|(_, connections)| connections.count() > 0);
        let before = used.map(|(closing, connections)| Predecessor {
            closing: closing.clone(),
            connections: Arc::clone(connections),
        });
        self.before = before.collect();
    }

    /// Closes all connections to what has its name.
    pub(crate) fn cut(&self) {
        self.closing.raise();
        self.before.iter().for_each(|one| one.closing.raise());
    }

    pub(crate) fn is_default(&self) -> bool {
        self.origin.is_default()
    }

    /// Whether this client may use it.
    pub(crate) fn permits(&self, peer: &Peer) -> bool {
        self.origin.admission.permits(peer)
    }

    /// Whether a client could not tell it from `other`, of the same name.
    pub(crate) fn is_like(&self, other: &Self) -> bool {
        self.origin.is_like(&other.origin)
    }

    /// How many connections hold it.
    pub(crate) fn connections(&self) -> usize {
        self.connections.count()
    }

    /// Waits until no connection holds it, or what had its place: those may use the same device.
    pub(crate) async fn unheld(&self) {
        self.connections.idle().await;
        for one in &self.before {
            one.connections.idle().await;
        }
    }

    pub(crate) fn status(&self, is_default: bool) -> ExportStatus {
        ExportStatus {
            name: self.facts.name.clone(),
            description: self.facts.description.clone(),
            size_bytes: self.facts.size_bytes,
            read_only: self.is_read_only(),
            is_sealed: self.is_sealed(),
            is_default,
            connections: self.connections.count(),
            counters: self.tally.snapshot(),
            last_error: self.tally.last_error(),
        }
    }
}
