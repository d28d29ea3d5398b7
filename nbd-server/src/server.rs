//! The server: the table of exports, what is listening, and the way down. What is said on a connection is told in
//! `negotiate` and `connection`, and what one client goes through in `serve`.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::ops::Bound;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use block::{BlockDevice, DeviceError};
use futures_util::future::join_all;
use parking_lot::{Mutex, RwLock};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tracing::Instrument;

use crate::access::Protection;
use crate::admission::Admission;
use crate::census::{Census, Counted};
use crate::clients::{Client, Clients, ConnectionStatus};
use crate::deadline::Deadline;
use crate::departures::{Departures, Patience, Watch};
use crate::export::{Attachment, Export, ExportError, ExportStatus, Removal, Served};
use crate::gauge::{Gauge, Held};
use crate::handshake::{ExportDirectory, ExportFacts, TlsMode, Unavailable};
use crate::intake::Arriving;
use crate::leases::Leases;
use crate::limits::Limits;
use crate::listener;
use crate::memory::Memory;
use crate::peer::Peer;
use crate::replace::{Beside, Replaced, settle};
use crate::serve::serve;
use crate::signal::Signal;
use crate::socket::{Kind, ListeningSocket, SocketFileOptions};
#[cfg(feature = "tls")]
use crate::tls::ServerTls;
use crate::writers::Lease;

/// How a server is set up.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct ServerConfig {
    /// What clients may ask for.
    pub limits: Limits,
    /// What TLS needs, and whether clients need TLS.
    #[cfg(feature = "tls")]
    tls: Option<(TlsMode, ServerTls)>,
}

impl ServerConfig {
    /// A configuration with these limits.
    pub fn with_limits(limits: Limits) -> Self {
        Self { limits, ..Self::default() }
    }

    /// With TLS, on all its listeners. The mode holds for the life of the server; the certificate can be replaced by
    /// [`Server::replace_tls`].
    #[cfg(feature = "tls")]
    #[must_use]
    pub fn tls(mut self, mode: TlsMode, tls: ServerTls) -> Self {
        self.tls = Some((mode, tls));
        self
    }
}

/// An NBD server in this process. Clones are the same server.
///
/// It needs a tokio runtime around it; devices do their I/O where they like. Dropping the last clone does not stop it:
/// [`Server::shutdown`] does.
#[derive(Clone, Debug)]
pub struct Server {
    shared: Arc<Shared>,
}

/// How a shutdown went.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct ShutdownReport {
    /// Connections that did not close in time and were dropped, those with whose attendants the server still was included.
    pub dropped_connections: usize,
    /// Exports whose device could not be flushed; no error where the flush was not over in time.
    pub unflushed: Vec<(String, Option<DeviceError>)>,
}

#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) limits: Limits,
    pub(crate) arriving: Arc<Arriving>,
    pub(crate) memory: Arc<Memory>,
    pub(crate) tls_mode: TlsMode,
    #[cfg(feature = "tls")]
    pub(crate) tls: RwLock<Option<ServerTls>>,
    table: RwLock<Table>,
    leases: Leases,
    policy: RwLock<Policy>,
    /// Nothing new is accepted, what is open comes to its end.
    pub(crate) stopping: Signal,
    /// A client that had entered an export has left.
    pub(crate) left: Signal,
    /// Connections that are still open are dropped.
    forced: Signal,
    /// Nobody is waited for any more, neither clients nor attendants.
    over: Signal,
    pub(crate) connections: Arc<Gauge>,
    /// Those who wait for a place, and have no greeting yet.
    waiting: Arc<Gauge>,
    pub(crate) departures: Arc<Departures>,
    census: Arc<Census>,
    clients: Arc<Clients>,
    listeners: Mutex<Vec<JoinHandle<()>>>,
}

/// What holds for every client.
#[derive(Debug)]
struct Policy {
    admission: Admission,
    listing: bool,
}

#[derive(Debug, Default)]
pub(crate) struct Table {
    pub(crate) exports: BTreeMap<String, Arc<Served>>,
    /// The name of the export that the empty name stands for.
    default: Option<String>,
}

impl Table {
    pub(crate) fn insert(&mut self, served: Served) -> Result<(), ExportError> {
        let name = served.facts.name.clone();
        if self.exports.contains_key(&name) {
            return Err(ExportError::Duplicate(name));
        }
        if served.is_default() {
            if let Some(taken) = &self.default {
                return Err(ExportError::DefaultTaken(taken.clone()));
            }
            self.default = Some(name.clone());
        }
        self.exports.insert(name, Arc::new(served));
        Ok(())
    }

    fn find(&self, name: &str) -> Option<&Arc<Served>> {
        match (&self.default, name) {
            (Some(default), "") => self.exports.get(default),
            _ => self.exports.get(name),
        }
    }
}

impl Server {
    /// A server without exports that listens nowhere.
    pub fn new(config: ServerConfig) -> Self {
        let limits = config.limits.clamped();
        #[cfg(feature = "tls")]
        let (tls_mode, tls) = match config.tls {
            Some((mode, tls)) => (mode, Some(tls)),
            None => (TlsMode::Off, None),
        };
        #[cfg(not(feature = "tls"))]
        let tls_mode = TlsMode::Off;
        let shared = Shared {
            arriving: Arc::new(Arriving::new(&limits)),
            memory: Arc::new(Memory::new(&limits)),
            limits,
            tls_mode,
            #[cfg(feature = "tls")]
            tls: RwLock::new(tls),
            table: RwLock::default(),
            leases: Leases::default(),
            policy: RwLock::new(Policy { admission: Admission::default(), listing: true }),
            stopping: Signal::default(),
            left: Signal::default(),
            forced: Signal::default(),
            over: Signal::default(),
            connections: Arc::default(),
            waiting: Arc::default(),
            departures: Arc::default(),
            census: Arc::default(),
            clients: Arc::default(),
            listeners: Mutex::default(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Listens on a TCP address and accepts in the background. Returns the actual address, which matters for port 0.
    ///
    /// # Errors
    /// What the host says, for instance that the address is in use.
    pub async fn listen_tcp(&self, addr: SocketAddr) -> io::Result<SocketAddr> {
        let socket = ListeningSocket::tcp(addr, false)?;
        let actual = socket.tcp_address().unwrap_or(addr);
        self.listen(socket)?;
        Ok(actual)
    }

    /// Listens on a Unix socket and accepts in the background. A socket file on which nobody listens is replaced;
    /// the file is removed when the server stops.
    ///
    /// # Errors
    /// What the host says; `AddrInUse` where another process listens there, or where the file is no socket.
    pub async fn listen_unix(&self, path: &Path) -> io::Result<()> {
        self.listen(ListeningSocket::unix(path, &SocketFileOptions::default())?)
    }

    /// Accepts on a socket in the background. To be called on a runtime.
    ///
    /// # Errors
    /// What the runtime says.
    pub fn listen(&self, socket: ListeningSocket) -> io::Result<()> {
        let ListeningSocket { socket, kind } = socket;
        match kind {
            Kind::Tcp => {
                let limit = self.shared.limits.peer_timeout;
                self.accept(listener::Tcp::new(socket, limit)?);
            }
            Kind::Unix(file) => self.accept(listener::Unix::new(socket, file)?),
            Kind::Vsock => self.accept(listener::Vsock::new(socket)?),
        }
        Ok(())
    }

    fn accept<L: listener::Listener>(&self, listener: L) {
        let task = tokio::spawn(listener::accept(self.clone(), listener));
        self.shared.listeners.lock().push(task);
    }

    /// Serves one client on a stream that somebody else accepted. The same limits hold.
    pub fn serve_stream<S>(&self, stream: S)
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        self.serve_stream_of(stream, Peer::Unknown);
    }

    /// Serves one client of whom the caller knows who it is.
    pub fn serve_stream_of<S>(&self, stream: S, peer: Peer)
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let (reader, writer) = tokio::io::split(stream);
        self.serve_halves(reader, writer, peer);
    }

    /// Waits until the server is told to stop.
    pub(crate) async fn stopping(&self) {
        self.shared.stopping.raised().await;
    }

    /// Serves one client, or closes the connection where it may not connect or there are too many.
    pub(crate) fn serve_halves<R, W>(&self, reader: R, writer: W, peer: Peer)
    where
        R: AsyncRead + Send + Unpin + 'static,
        W: AsyncWrite + Send + Unpin + 'static,
    {
        if !self.shared.policy.read().admission.permits(&peer) {
            tracing::warn!(%peer, "a client that may not connect is refused");
            return;
        }
        let full = match self.shared.place(&peer) {
            Ok(place) => return self.serve_at(place, reader, writer, peer),
            Err(full) => full,
        };
        // As many may wait as may be served.
        let Some(waiting) = self.shared.waiting.try_hold(self.shared.limits.connections) else {
            return full.tell(&peer, &self.shared.limits);
        };
        let server = self.clone();
        tokio::spawn(async move {
            let place = server.shared.wait_for_place(&peer).await;
            drop(waiting);
            if let Some(place) = place {
                server.serve_at(place, reader, writer, peer);
            }
        });
    }

    fn serve_at<R, W>(&self, place: (Counted, Held), reader: R, writer: W, peer: Peer)
    where
        R: AsyncRead + Send + Unpin + 'static,
        W: AsyncWrite + Send + Unpin + 'static,
    {
        let (shared, client) = (Arc::clone(&self.shared), self.shared.clients.add(peer));
        let span = client.span();
        let serving = async move {
            // Dropped behind the place: whoever hears of the departure finds it.
            let _leaving = shared.departures.someone();
            let _place = place;
            serve(&shared, reader, writer, &client).await;
        };
        tokio::spawn(serving.instrument(span));
    }

    /// Uses another certificate, and other demands on clients', for TLS that begins from now on. Connections that are
    /// open go on as they are. No effect on a server that was made without TLS.
    ///
    /// # Errors
    /// [`ExportError::NeedsClientCertificates`] where an export names its clients and `tls` does not look at their
    /// certificates; nothing has changed then.
    #[cfg(feature = "tls")]
    pub fn replace_tls(&self, tls: ServerTls) -> Result<(), ExportError> {
        // Under the lock, so that no such export is added meanwhile.
        let table = self.shared.table.write();
        for served in table.exports.values().filter(|one| one.access.clients.is_some()) {
            check_access(served, self.shared.tls_mode, tls.identifies_clients())?;
        }
        self.shared.use_tls(tls);
        Ok(())
    }

    /// Adds an export; clients can choose it at once.
    ///
    /// # Errors
    /// [`ExportError`].
    pub fn add_export(&self, export: Export) -> Result<(), ExportError> {
        let served = self.served(export)?;
        let mut table = self.shared.table.write();
        if self.shared.stopping.is_raised() {
            return Err(ExportError::ShuttingDown);
        }
        check_access(&served, self.shared.tls_mode, self.shared.identifies_clients())?;
        table.insert(served)
    }

    pub(crate) fn limits(&self) -> &Limits {
        &self.shared.limits
    }

    /// An export as it would stand in the table.
    pub(crate) fn served(&self, export: Export) -> Result<Served, ExportError> {
        Served::new(export, &self.shared.limits, &self.shared.leases)
    }

    /// Makes `next` the table, with what changes beside it.
    pub(crate) fn exchange(
        &self,
        mut next: Table,
        how: Removal,
        beside: Beside,
    ) -> Result<Replaced, ExportError> {
        let mut table = self.shared.table.write();
        if self.shared.stopping.is_raised() {
            return Err(ExportError::ShuttingDown);
        }
        let identifies = self.shared.identifies_clients();
        #[cfg(feature = "tls")]
        let identifies = beside.tls.as_ref().map_or(identifies, ServerTls::identifies_clients);
        for served in next.exports.values() {
            check_access(served, self.shared.tls_mode, identifies)?;
        }
        #[cfg(feature = "tls")]
        if let Some(tls) = beside.tls {
            self.shared.use_tls(tls);
        }
        // Under the lock of the table, so that nobody finds it by the rules of another one.
        let mut policy = self.shared.policy.write();
        policy.admission = beside.admission.unwrap_or_else(|| policy.admission.clone());
        policy.listing = beside.listing.unwrap_or(policy.listing);
        drop(policy);
        let mut replaced = settle(&table.exports, &mut next);
        replaced.default_changed = table.default != next.default;
        let before = std::mem::replace(&mut *table, next);
        drop(table);
        if how == Removal::Cut {
            let gone = replaced.removed.iter().filter_map(|name| before.exports.get(name));
            gone.for_each(|served| served.cut());
        }
        Ok(replaced)
    }

    /// Sets who may connect, and who of those that are connected may still choose an export. By default everybody. Exports
    /// can have rules of their own: [`Export::admission`].
    pub fn set_admission(&self, admission: Admission) {
        self.shared.policy.write().admission = admission;
    }

    /// Sets whether clients may list the exports. By default they may, and are shown those that they may use.
    pub fn set_listing(&self, listing: bool) {
        self.shared.policy.write().listing = listing;
    }

    /// Removes an export and returns its device once no connection and no request uses it; the caller closes it.
    ///
    /// New clients do not find it from the first poll on, even where the future is dropped before it is done. What
    /// happens to connections that are open is told by [`Removal`].
    ///
    /// # Errors
    /// [`ExportError::Unknown`].
    pub async fn remove_export(
        &self,
        name: &str,
        how: Removal,
    ) -> Result<Arc<dyn BlockDevice>, ExportError> {
        let served = {
            let mut table = self.shared.table.write();
            let served = table.exports.remove(name);
            if served.is_some() && table.default.as_deref() == Some(name) {
                table.default = None;
            }
            served.ok_or_else(|| ExportError::Unknown(name.to_owned()))?
        };
        if how == Removal::Cut {
            served.cut();
        }
        served.unheld().await;
        Ok(Arc::clone(&served.device))
    }

    /// The exports, by name.
    pub fn exports(&self) -> Vec<ExportStatus> {
        let table = self.shared.table.read();
        let is_default = |name: &String| table.default.as_ref() == Some(name);
        table.exports.iter().map(|(name, served)| served.status(is_default(name))).collect()
    }

    /// Waits until a client that used an export has left and nobody else is connected, as `qemu-nbd` does before it
    /// ends. Clients that only look around do not count.
    pub async fn used_and_left(&self) {
        self.shared.left.raised().await;
        self.shared.connections.idle().await;
    }

    /// Connections that are open now, those in the handshake included.
    pub fn connections(&self) -> usize {
        self.shared.connections.count()
    }

    /// The connections that are open now, in the order in which they were accepted.
    pub fn clients(&self) -> Vec<ConnectionStatus> {
        self.shared.clients.status()
    }

    /// What all connections together hold of [`Limits::memory_bytes`] now, in bytes.
    pub fn memory_in_use(&self) -> u64 {
        self.shared.memory.held_bytes()
    }

    /// Stops: accepts nothing more, finishes and answers what is in flight, answers later requests with `ESHUTDOWN`,
    /// closes the connections once nothing more comes, flushes every device. Exports stay in the table; the caller closes
    /// their devices.
    ///
    /// Returns within `grace`, whatever clients, devices and attendants do: after three quarters of it, connections that
    /// are still open are dropped, and the rest is left for flushing, and for attendants, each of which is told that its
    /// client has left. A `grace` beyond what the clock can tell has no end.
    pub async fn shutdown(&self, grace: Duration) -> ShutdownReport {
        let (flushed_by, closed_by) = (Deadline::after(grace), Deadline::after(grace / 4 * 3));
        let exports: Vec<_> = {
            // Under the lock, so that no export is added between the signal and the list.
            let table = self.shared.table.write();
            self.shared.stopping.raise();
            table.exports.values().map(Arc::clone).collect()
        };
        let listeners = std::mem::take(&mut *self.shared.listeners.lock());
        let closed = async {
            join_all(listeners).await;
            self.shared.connections.idle().await;
        };
        let mut report = ShutdownReport::default();
        if closed_by.within(closed).await.is_none() {
            report.dropped_connections = self.shared.connections.count();
            self.shared.forced.raise();
        }
        let flushes = exports.iter().map(|export| async {
            match flushed_by.within(export.device.flush()).await {
                Some(Ok(())) => None,
                Some(Err(error)) => Some((export.facts.name.clone(), Some(error))),
                None => Some((export.facts.name.clone(), None)),
            }
        });
        // Those that were dropped still have their attendants told.
        let told = flushed_by.within(self.shared.connections.idle());
        let (unflushed, told) = tokio::join!(join_all(flushes), told);
        if told.is_none() {
            let connections = self.shared.connections.count();
            tracing::warn!(connections, "attendants of clients that have left are given up");
        }
        self.shared.over.raise();
        report.unflushed = unflushed.into_iter().flatten().collect();
        report
    }
}

/// Whether what an export demands of its clients can be had with TLS of this kind.
fn check_access(served: &Served, mode: TlsMode, identifies: bool) -> Result<(), ExportError> {
    if served.access.needs_tls() && mode == TlsMode::Off {
        return Err(ExportError::NeedsTls(served.facts.name.clone()));
    }
    if served.access.clients.is_some() && !identifies {
        return Err(ExportError::NeedsClientCertificates(served.facts.name.clone()));
    }
    Ok(())
}

/// Which limit leaves no place for a connection.
#[derive(Clone, Copy, Debug)]
enum Full {
    Client,
    Server,
}

impl Full {
    fn tell(self, peer: &Peer, limits: &Limits) {
        match self {
            Self::Client => {
                let limit = limits.connections_per_client;
                tracing::warn!(%peer, limit, "too many connections of one client");
            }
            Self::Server => {
                tracing::warn!(%peer, limit = limits.connections, "too many connections");
            }
        }
    }
}

impl Shared {
    /// A place for one more connection of a client.
    fn place(&self, peer: &Peer) -> Result<(Counted, Held), Full> {
        let limits = &self.limits;
        let counted = self.census.admit(peer, limits.connections_per_client).ok_or(Full::Client)?;
        let held = self.connections.try_hold(limits.connections).ok_or(Full::Server)?;
        Ok((counted, held))
    }

    /// The same once there is one; `None` where that takes too long.
    async fn wait_for_place(&self, peer: &Peer) -> Option<(Counted, Held)> {
        let (mut watch, mut patience) = (self.departures.watch(), Patience::default());
        loop {
            watch.look();
            let full = match self.place(peer) {
                Ok(place) => return Some(place),
                Err(full) => full,
            };
            // Those who were sent away are in the way of others now.
            self.connections.refuse();
            let wait = watch.wait(&mut patience, self.limits.leaving_patience());
            if self.stopping.bounds(wait).await != Some(true) {
                full.tell(peer, &self.limits);
                return None;
            }
        }
    }

    /// Whether clients' certificates are looked at.
    fn identifies_clients(&self) -> bool {
        #[cfg(feature = "tls")]
        return self.tls.read().as_ref().is_some_and(ServerTls::identifies_clients);
        #[cfg(not(feature = "tls"))]
        false
    }

    /// Whether what the lease is for is to be sealed when its writer is done, as the table is now. It is where nothing in
    /// the table writes to it any more.
    pub(crate) fn seals(&self, lease: &Arc<Lease>) -> bool {
        let table = self.table.read();
        let seals: Vec<bool> =
            table.exports.values().filter_map(|served| served.seals(lease)).collect();
        seals.is_empty() || seals.contains(&true)
    }

    /// The outcome of a part of a connection; `None` where connections are dropped before.
    pub(crate) async fn unless_dropped<T>(&self, part: impl Future<Output = T>) -> Option<T> {
        self.forced.bounds(part).await
    }

    /// The outcome of what comes after a connection; `None` where it is given up.
    pub(crate) async fn unless_over<T>(&self, part: impl Future<Output = T>) -> Option<T> {
        self.over.bounds(part).await
    }

    /// Begins TLS with these certificates from now on, where it is spoken at all.
    #[cfg(feature = "tls")]
    fn use_tls(&self, tls: ServerTls) {
        if self.tls_mode != TlsMode::Off {
            *self.tls.write() = Some(tls);
        }
    }
}

/// The table as one negotiating client sees it.
pub(crate) struct Visitor {
    shared: Arc<Shared>,
    client: Arc<Client>,
    protection: Protection,
    /// The export that was entered last.
    entered: Option<Attachment>,
    arrival: Arrival,
    /// What keeps an export that was asked for last from being had, if that may pass.
    obstacle: Option<Obstacle>,
    watch: Watch,
    patience: Patience,
    /// Whether it has waited for long enough.
    is_impatient: bool,
}

/// Why a client waits.
enum Obstacle {
    Sealing(Arc<Lease>),
    Others,
    /// The attendant of the export that is entered is not told yet.
    Attendant,
}

/// What an attendant has said of the client.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Arrival {
    #[default]
    Untold,
    LetIn,
    TurnedAway,
}

impl Visitor {
    pub(crate) fn new(shared: &Arc<Shared>, client: &Arc<Client>) -> Self {
        let (shared, client) = (Arc::clone(shared), Arc::clone(client));
        Self {
            watch: shared.departures.watch(),
            shared,
            client,
            protection: Protection::Plain,
            entered: None,
            arrival: Arrival::default(),
            obstacle: None,
            patience: Patience::default(),
            is_impatient: false,
        }
    }

    /// The same client behind TLS.
    #[cfg(feature = "tls")]
    pub(crate) fn secured(self, identity: Option<Arc<crate::access::Identity>>) -> Self {
        Self { protection: Protection::Tls(identity), entered: None, ..self }
    }

    /// Who it is, as far as the kernel tells.
    pub(crate) fn peer(&self) -> &Peer {
        &self.client.peer
    }

    /// The connection.
    #[cfg(feature = "tls")]
    pub(crate) fn client(&self) -> &Client {
        &self.client
    }

    /// Waits until what kept an export from being had may have passed, or for so long that the client is to be told.
    pub(crate) async fn wait(&mut self) {
        let stopping = self.shared.stopping.clone();
        // Whoever is told that the server stops waits for nothing.
        let _ = stopping.bounds(self.wait_for_obstacle()).await;
    }

    async fn wait_for_obstacle(&mut self) {
        let limits = &self.shared.limits;
        let has_passed = match self.obstacle.take() {
            Some(Obstacle::Sealing(lease)) => {
                timeout(limits.sealing_patience(), lease.settled()).await.is_ok()
            }
            Some(Obstacle::Others) => {
                self.watch.wait(&mut self.patience, limits.leaving_patience()).await
            }
            Some(Obstacle::Attendant) => return self.arrive().await,
            None => true,
        };
        self.is_impatient |= !has_passed;
    }

    /// Tells the attendant of the export that is entered of the client, who is turned away or let in by what it says.
    async fn arrive(&mut self) {
        let Some(attachment) = &mut self.entered else { return };
        match attachment.arrive().await {
            Ok(()) => self.arrival = Arrival::LetIn,
            Err(why) => {
                let export = attachment.export.facts.name.clone();
                tracing::warn!(peer = %self.peer(), export, %why, "a client is turned away");
                self.arrival = Arrival::TurnedAway;
                self.leave().await;
            }
        }
    }

    /// The export that is entered, for the requests of the client.
    pub(crate) fn begin(&mut self) -> Option<Attachment> {
        self.entered.take()
    }

    /// Gives back the export that is entered and not begun with: it may be the last that the end of others waited for.
    pub(crate) async fn leave(&mut self) {
        let Some(attachment) = self.entered.take() else { return };
        let attendant = attachment.attendant().filter(|_| self.arrival == Arrival::LetIn);
        let _ = self.shared.unless_dropped(attachment.leave(&self.shared, false)).await;
        self.shared.departures.tell();
        if let Some(attendant) = attendant {
            let _ = self.shared.unless_over(attendant.left(self.peer())).await;
        }
    }

    /// Why the client may not have the export, for itself and for the log; `None` where it may.
    fn refusal(&self, served: &Served) -> Option<(Unavailable, &'static str)> {
        let by_tls = served.access.judge(&self.protection).err();
        let may_connect = || self.shared.policy.read().admission.permits(self.peer());
        match by_tls {
            Some(why @ Unavailable::TlsRequired) => Some((why, "the export needs TLS")),
            Some(why) => {
                Some((why, "its certificate bears none of the names of the export's clients"))
            }
            None if !may_connect() => Some((Unavailable::Forbidden, "it may not connect any more")),
            None if !served.permits(self.peer()) => {
                Some((Unavailable::Forbidden, "the export allows others only, or denies it"))
            }
            None => None,
        }
    }

    /// Has the client wait where an export that it may use has no room for it now; tells and logs why once it has waited.
    fn or_wait<T>(
        &mut self,
        name: &str,
        lease: Arc<Lease>,
        outcome: Result<T, Unavailable>,
    ) -> Result<T, Unavailable> {
        let (obstacle, why) = match &outcome {
            Err(Unavailable::Sealing) => (Obstacle::Sealing(lease), "it is being sealed"),
            Err(Unavailable::Full) => {
                (Obstacle::Others, "it has as many connections as it may have")
            }
            Err(Unavailable::Leased) => {
                (Obstacle::Others, "another client or connection is writing to it")
            }
            Ok(_) => {
                self.patience.renew();
                self.is_impatient = false;
                return outcome;
            }
            _ => return outcome,
        };
        if !self.is_impatient {
            self.obstacle = Some(obstacle);
            return Err(Unavailable::NotYet);
        }
        tracing::warn!(peer = %self.peer(), export = name, why, "a client gets no connection to the export");
        outcome
    }

    fn find<T>(&self, name: &str, then: impl FnOnce(&Arc<Served>) -> T) -> Result<T, Unavailable> {
        let table = self.shared.table.read();
        if self.shared.stopping.is_raised() {
            return Err(Unavailable::ShuttingDown);
        }
        let Some(served) = table.find(name) else {
            // Without TLS nobody finds out which names there are among those that need it.
            let hides = |served: &Arc<Served>| served.access.needs_tls();
            let hidden =
                matches!(self.protection, Protection::Plain) && table.exports.values().any(hides);
            return Err(if hidden { Unavailable::TlsRequired } else { Unavailable::Unknown });
        };
        if let Some((refused, why)) = self.refusal(served) {
            let (export, peer) = (&served.facts.name, self.peer());
            tracing::warn!(%peer, client = %self.protection, export, why, "a client may not use the export");
            return Err(refused);
        }
        // Still under the lock: an export that was found cannot be removed before it is held.
        Ok(then(served))
    }
}

impl ExportDirectory for Visitor {
    fn next(&mut self, after: Option<&str>) -> Option<(String, String)> {
        let table = self.shared.table.read();
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let mut behind = table.exports.range::<str, _>((from, Bound::Unbounded));
        let (name, served) = behind.find(|(_, served)| self.refusal(served).is_none())?;
        Some((name.clone(), served.facts.description.clone()))
    }

    fn lists(&self) -> bool {
        self.shared.policy.read().listing
    }

    fn look_up(&mut self, name: &str) -> Result<ExportFacts, Unavailable> {
        self.watch.look();
        let (peer, protection) = (self.peer(), &self.protection);
        let (judged, lease) = self.find(name, |served| {
            let judged = served.judge(peer, protection).map(|()| served.facts_now(peer));
            (judged, Arc::clone(served.lease()))
        })?;
        self.or_wait(name, lease, judged)
    }

    fn enter(&mut self, name: &str) -> Result<ExportFacts, Unavailable> {
        match (std::mem::take(&mut self.arrival), &self.entered) {
            (Arrival::TurnedAway, _) => return Err(Unavailable::TurnedAway),
            // Asked again for the same, because nothing was answered.
            (Arrival::LetIn, Some(attachment)) => {
                self.arrival = Arrival::LetIn;
                return Ok(attachment.facts());
            }
            _ => {}
        }
        self.watch.look();
        let (attached, lease) = self.find(name, |served| {
            let attached = served.attach(&self.client, &self.protection);
            (attached, Arc::clone(served.lease()))
        })?;
        let attachment = self.or_wait(name, lease, attached)?;
        let (facts, attendant) = (attachment.facts(), attachment.attendant());
        self.entered = Some(attachment);
        if attendant.is_some() {
            self.obstacle = Some(Obstacle::Attendant);
            return Err(Unavailable::NotYet);
        }
        Ok(facts)
    }

    fn is_shutting_down(&self) -> bool {
        self.shared.stopping.is_raised()
    }
}
