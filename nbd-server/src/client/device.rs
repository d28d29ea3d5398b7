//! [`NbdDevice`]: an export as a [`BlockDevice`], over one connection or several. Cuts requests to what the server
//! accepts and spells what it lacks by what it has; knows nothing of sockets.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use block::{
    BlockDevice, BufferPool, ByteRange, DeviceError, Durability, Extent, Limits, MAX_EXTENTS,
    Segment, Segments, ZeroMode,
};
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::future::join_all;
use tokio::io::{AsyncRead, AsyncWrite};

use super::address::Address;
use super::connection::{self, Call, Connection};
use super::error::ClientError;
use super::export::{ExportInfo, ExportListing, StatusExtent};
use super::links::{Links, Target};
use super::memory::Destination;
use super::options::ClientOptions;
use super::reply::Answer;
use super::security::Security;
use super::stream::Halves;
use super::uri::NbdUri;
use crate::wire::{Headers, allocation, command, command_flag, error, transmission_flag};

/// The address of a stream that somebody else connected, in errors.
const STREAM: &str = "the server";
/// The context that [`BlockDevice::extents`] stands on.
const ALLOCATION: &str = "base:allocation";
/// The longest WRITE_ZEROES that need not be fast, in bytes: few enough requests for any disk, and each short enough to
/// be answered in time by a server that really writes the zeros.
const MAX_ZEROES_BYTES: u64 = 1 << 30;
/// The longest other request without a payload, in bytes: what headers of 32 and of 64 bits hold in whole blocks.
const MAX_COMPACT_BYTES: u64 = 1 << 31;
const MAX_EXTENDED_BYTES: u64 = 1 << 63;
/// The zeros written at once to a server without WRITE_ZEROES, in bytes.
const ZEROS_BYTES: u32 = 1 << 20;

/// An NBD export, opened.
///
/// Requests of any length may be in flight at once. They are spread over the connections, and a connection that dies
/// fails what it has in flight; the others go on. With [`ClientOptions::reconnect`] it is replaced instead, and what it
/// had in flight is sent again.
///
/// A server without FLUSH promises nothing about when changes are durable, and cannot be asked to make them so. With
/// one, [`BlockDevice::flush`] succeeds at once, [`Durability::Durable`] means no more than that the server has answered
/// unless it knows FUA, and a reconnect cannot bring back what it has answered and lost; opening its export for writing
/// logs a warning.
pub struct NbdDevice {
    links: Arc<Links>,
    closed: AtomicBool,
}

impl NbdDevice {
    /// Connects to the export; further connections are opened where the server promises that they agree.
    ///
    /// # Errors
    /// What the first connection failed at. Where a further one does not come about, those that did must do; one that
    /// sees another export is [`ClientError::Inconsistent`].
    pub async fn connect(
        address: &Address,
        export: &str,
        options: ClientOptions,
    ) -> Result<Arc<Self>, ClientError> {
        let counters = Arc::default();
        let (first, negotiated) = Connection::open(address, export, &options, &counters).await?;
        let info = negotiated.export;
        let more = match options.connections.clamp(1, ClientOptions::MAX_CONNECTIONS) {
            wanted if info.has(transmission_flag::CAN_MULTI_CONN) => wanted - 1,
            _ => 0,
        };
        let opening = (0..more).map(|_| Connection::open(address, export, &options, &counters));
        let mut connections = vec![first];
        for (index, opened) in (1..).zip(join_all(opening).await) {
            match opened {
                Ok((connection, negotiated)) => {
                    if let Some(what) = info.difference(&negotiated.export) {
                        return Err(ClientError::Inconsistent { index, what });
                    }
                    connections.push(connection);
                }
                Err(error) => tracing::warn!(%error, %address, "one NBD connection fewer"),
            }
        }
        let target = Target { address: address.clone(), export: export.to_owned() };
        if !info.is_read_only() && !info.has(transmission_flag::SEND_FLUSH) {
            tracing::warn!(export, %address, "the server has no FLUSH: nothing tells when changes are durable");
        }
        let links = Links::new(info, connections, options, counters, Some(target));
        Ok(Arc::new(Self::new(links)))
    }

    /// Connects to the export that a URI names, as it says: by TLS where the URI demands it or the options do.
    ///
    /// # Errors
    /// Those of [`NbdDevice::connect`] and of [`NbdUri::options`].
    pub async fn open(uri: &NbdUri, options: ClientOptions) -> Result<Arc<Self>, ClientError> {
        Self::connect(&uri.address, &uri.export, uri.options(options)?).await
    }

    /// Negotiates on a stream that somebody else connected: one connection, which is not replaced when it breaks. With
    /// TLS in the options, the server proves the name that is set there, or else `localhost`.
    ///
    /// # Errors
    /// Those of [`NbdDevice::connect`].
    pub async fn over_stream<S>(
        stream: S,
        export: &str,
        options: ClientOptions,
    ) -> Result<Arc<Self>, ClientError>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let counters = Arc::default();
        let (read, write) = tokio::io::split(stream);
        let halves = Halves::new(read, write, &counters);
        let security = Security::of(None, &options)?;
        let opened = Connection::over(halves, STREAM, security, export, &options).await;
        let (connection, negotiated) = opened?;
        let links = Links::new(negotiated.export, vec![connection], options, counters, None);
        Ok(Arc::new(Self::new(links)))
    }

    pub(super) fn new(links: Arc<Links>) -> Self {
        Self { links, closed: AtomicBool::new(false) }
    }

    /// What was negotiated.
    pub fn export(&self) -> &ExportInfo {
        self.links.export()
    }

    /// The names of the meta contexts that [`NbdDevice::block_status`] answers.
    pub fn contexts(&self) -> &[String] {
        &self.export().contexts
    }

    /// The number of connections that were opened.
    pub fn connections(&self) -> usize {
        self.links.len()
    }

    /// Everything on the sockets so far, headers and negotiation too: sent and received, in bytes.
    pub fn wire_bytes(&self) -> (u64, u64) {
        self.links.wire_bytes()
    }

    /// The exports of the server at `address`.
    ///
    /// # Errors
    /// [`ClientError::Refused`] where the server keeps the list to itself.
    pub async fn list(address: &Address) -> Result<Vec<ExportListing>, ClientError> {
        Self::list_with(address, &ClientOptions::default()).await
    }

    /// The exports of the server at `address`, with these limits of time and this TLS.
    ///
    /// # Errors
    /// Those of [`NbdDevice::list`], and where TLS does not come about.
    pub async fn list_with(
        address: &Address,
        options: &ClientOptions,
    ) -> Result<Vec<ExportListing>, ClientError> {
        connection::list(address, options).await
    }

    /// The extents of `range` in a negotiated context, in order, without gaps, from its start. May end early: ask again
    /// from the end of the last.
    ///
    /// # Errors
    /// [`ClientError::NoContext`]; [`ClientError::Device`] where the range leaves the export; and what the server or
    /// the connection failed at.
    pub async fn block_status(
        &self,
        context: &str,
        range: ByteRange,
    ) -> Result<Vec<StatusExtent>, ClientError> {
        Ok(self.block_statuses(&[context], range).await?.pop().unwrap_or_default())
    }

    /// The extents of `range` in several negotiated contexts, by one request; each as from
    /// [`NbdDevice::block_status`], in the order of `contexts`. The answers may end at different places.
    ///
    /// Where the server can choose among its contexts (with extended headers), it is not asked for others.
    ///
    /// # Errors
    /// As [`NbdDevice::block_status`].
    pub async fn block_statuses(
        &self,
        contexts: &[&str],
        range: ByteRange,
    ) -> Result<Vec<Vec<StatusExtent>>, ClientError> {
        self.limits().check_read(range)?;
        let place = |context: &&str| {
            let found = self.export().contexts.iter().position(|known| known == *context);
            found.ok_or_else(|| ClientError::NoContext { context: (*context).to_owned() })
        };
        let contexts = contexts.iter().map(place).collect::<Result<Vec<usize>, _>>()?;
        if range.is_empty() || contexts.is_empty() {
            return Ok(vec![Vec::new(); contexts.len()]);
        }
        let wide = self.widen(range);
        let end = wide.end().min(wide.start().saturating_add(self.effect_bytes()));
        let mut call = Call::new(command::BLOCK_STATUS, 0, ByteRange::between(wide.start(), end));
        call.contexts = contexts;
        let mut all = match self.call(call).await? {
            Answer::Status(all) => all,
            Answer::Success | Answer::Data(_) => Vec::new(),
        };
        // What was asked for only because of the block size is cut off again.
        for extents in &mut all {
            for extent in &mut *extents {
                extent.range = extent.range.intersection(range);
            }
            extents.retain(|extent| !extent.range.is_empty());
        }
        Ok(all)
    }

    /// Waits for what is in flight, then disconnects; later requests fail with [`ClientError::Closed`]. Does not flush.
    pub async fn disconnect(&self) {
        self.links.disconnect().await;
    }

    /// The whole blocks around `range`, as far as the export goes.
    fn widen(&self, range: ByteRange) -> ByteRange {
        let wide = range.widen(u64::from(self.export().block_sizes.minimum));
        ByteRange::between(wide.start(), wide.end().min(self.export().size_bytes.max(range.end())))
    }

    /// The longest request without a payload, in bytes of the export, that its header can hold: a power of two.
    fn effect_bytes(&self) -> u64 {
        match self.export().headers {
            Headers::Extended => MAX_EXTENDED_BYTES,
            Headers::Structured | Headers::Simple => MAX_COMPACT_BYTES,
        }
    }

    /// The longest payload in bytes: a power of two.
    fn payload_bytes(&self) -> u64 {
        let sizes = self.export().block_sizes;
        let most =
            self.links.options().max_payload_bytes.min(sizes.maximum).max(sizes.minimum).max(1);
        1 << most.ilog2()
    }

    /// How many pieces of one request may be in flight.
    fn window(&self) -> usize {
        let in_flight = self.links.options().in_flight;
        self.links.len() * in_flight.clamp(1, ClientOptions::MAX_IN_FLIGHT)
    }

    fn pool(&self) -> &Arc<BufferPool> {
        self.links.pool()
    }

    /// Sends one request whose reply has no content of a read.
    async fn call(&self, call: Call) -> Result<Answer, ClientError> {
        self.links.call(call, Destination::none()).await
    }

    fn check_aligned(&self, range: ByteRange) -> Result<(), ClientError> {
        let minimum = self.export().block_sizes.minimum;
        if range.is_aligned(u64::from(minimum)) {
            return Ok(());
        }
        Err(ClientError::Unaligned { range, minimum })
    }

    /// The flag for `durability`, where the server has one.
    fn durability_flag(&self, durability: Durability) -> u16 {
        match durability {
            Durability::Durable if self.export().has(transmission_flag::SEND_FUA) => {
                command_flag::FUA
            }
            Durability::Durable | Durability::Deferred => 0,
        }
    }

    /// After a change: what FUA would have done, where the server lacks it.
    async fn settle(&self, durability: Durability) -> Result<(), ClientError> {
        match durability {
            Durability::Durable if !self.export().has(transmission_flag::SEND_FUA) => {
                self.flush_all().await
            }
            Durability::Durable | Durability::Deferred => Ok(()),
        }
    }

    async fn read_range(&self, range: ByteRange) -> Result<Segments, ClientError> {
        let wide = self.widen(range);
        let mut pieces: Vec<_> =
            wide.pieces(self.payload_bytes()).map(|piece| (piece, None)).collect();
        if let Some((piece, memory)) = pieces.first_mut() {
            // Waited for before anything is held: memory for the other pieces is taken without waiting.
            *memory = Some(Destination::wait(self.pool(), buffer_len(*piece)?).await);
        }
        let read = |(piece, memory): (ByteRange, Option<Destination>)| async move {
            let memory = match memory {
                Some(memory) => memory,
                None => Destination::now(self.pool(), buffer_len(piece)?),
            };
            match self.links.call(Call::new(command::READ, 0, piece), memory).await? {
                Answer::Data(segments) => Ok(segments),
                Answer::Success | Answer::Status(_) => Ok(Segments::default()),
            }
        };
        let mut all = Segments::default();
        for segments in self.each(pieces, read).await? {
            all.extend(segments);
        }
        if wide == range { Ok(all) } else { Ok(cut(all, wide.start(), range)) }
    }

    async fn write_range(
        &self,
        range: ByteRange,
        data: Bytes,
        durability: Durability,
    ) -> Result<(), ClientError> {
        self.check_aligned(range)?;
        let flags = self.durability_flag(durability);
        let mut rest = data;
        let pieces: Vec<_> = range
            .pieces(self.payload_bytes())
            .map(|piece| {
                let len = usize::try_from(piece.len()).unwrap_or(usize::MAX).min(rest.len());
                (piece, rest.split_to(len))
            })
            .collect();
        let write = |(piece, payload): (ByteRange, Bytes)| {
            let mut call = Call::new(command::WRITE, flags, piece);
            call.payload = payload;
            self.call(call)
        };
        self.each(pieces, write).await?;
        self.settle(durability).await
    }

    async fn zero_range(
        &self,
        range: ByteRange,
        mode: ZeroMode,
        durability: Durability,
    ) -> Result<(), ClientError> {
        self.check_aligned(range)?;
        if mode.fast_only && !self.export().has(transmission_flag::SEND_FAST_ZERO) {
            return Err(ClientError::NotSupported { what: "fast zeroes" });
        }
        let mut flags = self.durability_flag(durability);
        if !self.export().has(transmission_flag::SEND_WRITE_ZEROES) {
            self.write_zeros(range, flags).await?;
            return self.settle(durability).await;
        }
        if mode.keep_allocated {
            flags |= command_flag::NO_HOLE;
        }
        let mut rest = range;
        if self.tries_fast_zeroes(range, mode) {
            let first = range.pieces(self.effect_bytes()).next().unwrap_or(range);
            let call = Call::new(command::WRITE_ZEROES, flags | command_flag::FAST_ZERO, first);
            match self.call(call).await {
                // The first piece decides for all: a refusal after it would come when something has changed.
                Ok(_) => rest = ByteRange::between(first.end(), range.end()),
                Err(ClientError::Server { error: error::ENOTSUP, .. }) if !mode.fast_only => {}
                Err(failed) => return Err(failed),
            }
        }
        let zero = |piece| self.call(Call::new(command::WRITE_ZEROES, flags, piece));
        self.each(rest.pieces(MAX_ZEROES_BYTES).collect(), zero).await?;
        self.settle(durability).await
    }

    /// Whether zeros are to be fast or not at all: where the caller says so, and where one long request may save many.
    fn tries_fast_zeroes(&self, range: ByteRange, mode: ZeroMode) -> bool {
        let is_one = self.export().headers == Headers::Extended && range.len() > MAX_ZEROES_BYTES;
        mode.fast_only || is_one && self.export().has(transmission_flag::SEND_FAST_ZERO)
    }

    /// Zeros by WRITE, for servers without WRITE_ZEROES.
    async fn write_zeros(&self, range: ByteRange, flags: u16) -> Result<(), ClientError> {
        let most = u64::from(ZEROS_BYTES).min(self.payload_bytes());
        let most = most.max(u64::from(self.export().block_sizes.minimum));
        let zeros = Bytes::from(vec![0; usize::try_from(most).unwrap_or_default()]);
        let write = |piece: ByteRange| {
            let mut call = Call::new(command::WRITE, flags, piece);
            let len = usize::try_from(piece.len()).unwrap_or_default();
            call.payload = zeros.slice(..len.min(zeros.len()));
            self.call(call)
        };
        // A round at a time: a list of all the pieces of a large disk would be long.
        for round in range.pieces(MAX_ZEROES_BYTES) {
            self.each(round.pieces(most).collect(), write).await?;
        }
        Ok(())
    }

    async fn trim_range(
        &self,
        range: ByteRange,
        durability: Durability,
    ) -> Result<(), ClientError> {
        if !self.export().has(transmission_flag::SEND_TRIM) {
            return Ok(());
        }
        // A hint loses nothing where its edges are left out.
        let minimum = u64::from(self.export().block_sizes.minimum);
        let start = range.start().next_multiple_of(minimum);
        let inner = ByteRange::between(start, range.end() - range.end() % minimum);
        let flags = self.durability_flag(durability);
        let trim = |piece| self.call(Call::new(command::TRIM, flags, piece));
        self.each(inner.pieces(self.effect_bytes()).collect(), trim).await?;
        self.settle(durability).await
    }

    /// One FLUSH is enough: with several connections the server has promised that it covers all of them.
    async fn flush_all(&self) -> Result<(), ClientError> {
        if self.export().is_read_only() || !self.export().has(transmission_flag::SEND_FLUSH) {
            return Ok(());
        }
        let nothing = ByteRange::between(0, 0);
        self.call(Call::new(command::FLUSH, 0, nothing)).await.map(|_| ())
    }

    /// Runs `call` on every piece, as many at once as there is room for, and returns the answers in order. After a
    /// failure no more pieces are begun, but those that were are waited for: nothing of this request is in flight when
    /// it has failed.
    async fn each<P, T, F>(
        &self,
        pieces: Vec<P>,
        call: impl Fn(P) -> F + Send,
    ) -> Result<Vec<T>, ClientError>
    where
        P: Send,
        T: Send,
        F: Future<Output = Result<T, ClientError>> + Send,
    {
        let mut answers = Vec::with_capacity(pieces.len());
        let mut pieces = pieces.into_iter();
        let mut running = futures_util::stream::FuturesOrdered::new();
        let mut failure = None;
        loop {
            while failure.is_none() && running.len() < self.window() {
                let Some(piece) = pieces.next() else { break };
                running.push_back(call(piece));
            }
            match running.next().await {
                Some(Ok(answer)) => answers.push(answer),
                Some(Err(error)) => failure = failure.or(Some(error)),
                None => break,
            }
        }
        failure.map_or(Ok(answers), Err)
    }
}

#[async_trait]
impl BlockDevice for NbdDevice {
    fn limits(&self) -> Limits {
        Limits {
            size_bytes: self.export().size_bytes,
            read_only: self.export().is_read_only(),
            preferred_bytes: self.export().block_sizes.preferred.max(512),
            can_discard: self.export().has(transmission_flag::SEND_TRIM),
            fast_zeroes: self.export().has(transmission_flag::SEND_WRITE_ZEROES),
        }
    }

    async fn read(&self, range: ByteRange) -> Result<Segments, DeviceError> {
        self.limits().check_read(range)?;
        if range.is_empty() {
            return Ok(Segments::default());
        }
        Ok(self.read_range(range).await?)
    }

    async fn write(
        &self,
        offset: u64,
        data: Bytes,
        durability: Durability,
    ) -> Result<(), DeviceError> {
        let range = self.limits().write_range(offset, data.len())?;
        if range.is_empty() {
            return Ok(());
        }
        Ok(self.write_range(range, data, durability).await?)
    }

    async fn write_zeroes(
        &self,
        range: ByteRange,
        mode: ZeroMode,
        durability: Durability,
    ) -> Result<(), DeviceError> {
        self.limits().check_write(range)?;
        if range.is_empty() {
            return Ok(());
        }
        let zeroed = self.zero_range(range, mode, durability).await;
        zeroed.map_err(|error| match error {
            ClientError::NotSupported { what } => DeviceError::NotSupported { what },
            error => error.into(),
        })
    }

    async fn discard(&self, range: ByteRange, durability: Durability) -> Result<(), DeviceError> {
        self.limits().check_write(range)?;
        if range.is_empty() {
            return Ok(());
        }
        Ok(self.trim_range(range, durability).await?)
    }

    async fn flush(&self) -> Result<(), DeviceError> {
        Ok(self.flush_all().await?)
    }

    async fn extents(&self, range: ByteRange) -> Result<Vec<Extent>, DeviceError> {
        self.limits().check_read(range)?;
        if range.is_empty() {
            return Ok(Vec::new());
        }
        if !self.export().contexts.iter().any(|context| context == ALLOCATION) {
            return Ok(vec![Extent { range, allocated: true, zero: false }]);
        }
        Ok(allocated(&self.block_status(ALLOCATION, range).await?))
    }

    async fn close(&self) -> Result<(), DeviceError> {
        if self.closed.swap(true, Ordering::SeqCst) {
            return Ok(());
        }
        let flushed = self.flush_all().await;
        self.disconnect().await;
        match flushed {
            Ok(()) | Err(ClientError::Closed) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

impl Drop for NbdDevice {
    fn drop(&mut self) {
        self.links.close();
    }
}

impl std::fmt::Debug for NbdDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NbdDevice")
            .field("export", self.export())
            .field("connections", &self.links.len())
            .field("lost", &self.links.lost())
            .finish_non_exhaustive()
    }
}

/// The length of the buffer for a piece.
fn buffer_len(piece: ByteRange) -> Result<usize, ClientError> {
    let too_long = ClientError::NotSupported { what: "reads of this length" };
    usize::try_from(piece.len()).map_err(|_| too_long)
}

/// Of segments that begin at `start`, those bytes that lie in `range`.
fn cut(segments: Segments, start: u64, range: ByteRange) -> Segments {
    let mut kept = Segments::default();
    let mut at = start;
    for segment in segments.0 {
        let here = ByteRange::between(at, at + segment.len());
        at = here.end();
        let wanted = here.intersection(range);
        kept.push(match segment {
            _ if wanted.is_empty() => continue,
            Segment::Zero(_) => Segment::Zero(wanted.len()),
            Segment::Data(bytes) => {
                let from = usize::try_from(wanted.start() - here.start()).unwrap_or(bytes.len());
                let to = usize::try_from(wanted.end() - here.start()).unwrap_or(bytes.len());
                Segment::Data(bytes.slice(from..to))
            }
        });
    }
    kept
}

/// `base:allocation` in our words; equal neighbours become one. The bits that the protocol reserves are ignored.
fn allocated(extents: &[StatusExtent]) -> Vec<Extent> {
    let mut joined: Vec<Extent> = Vec::new();
    for extent in extents {
        let full = joined.len() == MAX_EXTENTS;
        let allocated = extent.flags & u64::from(allocation::HOLE) == 0;
        let zero = extent.flags & u64::from(allocation::ZERO) != 0;
        match joined.last_mut() {
            Some(last) if (last.allocated, last.zero) == (allocated, zero) => {
                last.range = ByteRange::between(last.range.start(), extent.range.end());
            }
            _ if full => break,
            _ => joined.push(Extent { range: extent.range, allocated, zero }),
        }
    }
    joined
}

#[cfg(test)]
mod tests;
