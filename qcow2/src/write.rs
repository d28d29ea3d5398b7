//! Writing: a request becomes plans, one for each L2 table; the bytes of a plan go to the host at once, and only then
//! its entries become visible. Zeros and discards change entries alone.

use std::sync::Arc;

use block::{BufferPool, ByteRange, Hold, HostFile, RangeGuard, Segment, ZeroMode, try_join_all};
use bytes::Bytes;
use parking_lot::Mutex;

use crate::clear::Clear;
use crate::core::Core;
use crate::data::{needs_whole_sectors, read_data, write_data, zero_data};
use crate::error::Error;
use crate::image::{Inner, Live};
use crate::lend::Content;
use crate::plan::{Area, Fill, Move, Reservation};
use crate::units::index;

/// The longest single write of zeros as data, in bytes.
const ZEROS_BYTES: u64 = 2 << 20;
/// The most that is reserved at once, in bytes: others wait for it.
const RESERVED_BYTES: u64 = 64 << 20;

/// How far a change may reach, once it has its lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reach {
    /// To the end of the disk as it is then: requests, which a disk that shrank meanwhile refuses.
    Disk,
    /// As far as the tables map, like changes of the image itself.
    Tables,
}

/// What every host operation of a planned write holds: the lock on its clusters, and the clusters that it reserved.
/// The last one to let go gives back what was not published, and only then the lock.
struct Ticket {
    core: Arc<Mutex<Core>>,
    reservation: Mutex<Option<Reservation>>,
    _guard: RangeGuard,
}

impl Ticket {
    fn publish(&self) {
        if let Some(reservation) = self.reservation.lock().take() {
            self.core.lock().publish(&reservation);
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if let Some(reservation) = self.reservation.get_mut().take() {
            self.core.lock().undo(&reservation);
        }
    }
}

impl Inner {
    /// Writes `data` at `at`, a range of the disk.
    ///
    /// Whole clusters of zeros are stored as such, without data, where no host cluster is theirs yet; where one is,
    /// it is overwritten, so that what is allocated stays.
    pub(crate) async fn write(&self, at: u64, data: Bytes) -> Result<(), Error> {
        let range = ByteRange::between(at, at.saturating_add(data.len() as u64));
        let live = self.live()?;
        self.before_change(&live).await?;
        let coverage = self.info.l2_coverage;
        for piece in range.pieces(coverage) {
            self.write_piece(piece, &Content::Bytes(at, &data), false, Reach::Disk).await?;
        }
        Ok(())
    }

    /// Writes within one L2 table. `allocate` makes zeros take space. Says how much the host copied alone.
    pub(crate) async fn write_piece(
        &self,
        range: ByteRange,
        content: &Content<'_>,
        allocate: bool,
        reach: Reach,
    ) -> Result<u64, Error> {
        if let Some(by_host) = self.write_in_place(range, content, reach).await? {
            return Ok(by_host);
        }
        // Raw data reads like the disk, whatever entries say.
        let as_data = allocate || self.info.raw_data;
        let zeros: Vec<bool> = range
            .pieces(self.info.subcluster_bytes)
            .map(|piece| !as_data && content.is_zero(piece))
            .collect();
        let guard = self.guests.lock_exclusive(self.widen(range)).await;
        let live = self.live()?;
        self.check_inside(range, reach)?;
        self.record_change(&live, range).await?;
        let plan = self.change(&live, |core| core.plan_write(range, &zeros)).await?;
        let ticket = Arc::new(Ticket {
            core: Arc::clone(&self.core),
            reservation: Mutex::new(Some(plan.reservation)),
            _guard: guard,
        });
        let hold: Hold = Some(Arc::clone(&ticket) as _);
        let by_host = self.run_moves(&live, &plan.moves, content, &hold).await?;
        ticket.publish();
        Ok(by_host)
    }

    /// Overwrites what is there, if all of it is; `None` if metadata has to change.
    async fn write_in_place(
        &self,
        range: ByteRange,
        content: &Content<'_>,
        reach: Reach,
    ) -> Result<Option<u64>, Error> {
        if !self.core.lock().is_in_place(range) {
            return Ok(None);
        }
        let live = self.live()?;
        let wide = self.widen(range);
        let guard = if needs_whole_sectors(&live, range) {
            // Read, changed and written: nobody else may do so at the same time.
            self.guests.lock_exclusive(wide).await
        } else {
            self.guests.lock_shared(wide).await
        };
        let live = self.live()?;
        self.check_inside(range, reach)?;
        self.record_change(&live, range).await?;
        // Another request may have changed the mapping before the lock was ours.
        let plan = self.change(&live, |core| core.plan_in_place(range)).await?;
        let Some(moves) = plan else { return Ok(None) };
        // Overwrites of the same bytes take turns: one whose future was dropped must not land behind a later one.
        let turn = self.overwrites.lock_exclusive(range).await;
        let hold: Hold = Some(Arc::new((guard, turn)));
        self.run_moves(&live, &moves, content, &hold).await.map(Some)
    }

    /// All I/O of a plan, at once. Says how much of it the host copied alone.
    async fn run_moves(
        &self,
        live: &Live,
        moves: &[Move],
        content: &Content<'_>,
        hold: &Hold,
    ) -> Result<u64, Error> {
        match moves {
            [] => Ok(0),
            [one] => self.run_move(live, one, content, hold).await,
            many => {
                let all = many.iter().map(|one| self.run_move(live, one, content, hold));
                Ok(try_join_all(all).await?.into_iter().sum())
            }
        }
    }

    async fn run_move(
        &self,
        live: &Live,
        one: &Move,
        content: &Content<'_>,
        hold: &Hold,
    ) -> Result<u64, Error> {
        match one {
            Move::Payload { guest, host } => content.write(live, *guest, *host, hold).await,
            Move::Patch { area, host } => {
                let payload = content.read(area.payload).await?;
                let bytes = self.patched(live, area, &payload).await?;
                write_data(live, *host, bytes, hold).await?;
                Ok(0)
            }
        }
    }

    /// All bytes of an area: `payload` at its place, and around it what fills it.
    async fn patched(&self, live: &Live, area: &Area, payload: &Bytes) -> Result<Bytes, Error> {
        let place = |range: ByteRange| {
            index(range.start() - area.range.start())..index(range.end() - area.range.start())
        };
        // Never waits: the request that this belongs to has been admitted already.
        let mut buffer = BufferPool::shared().get_now(index(area.range.len()));
        for (part, fill) in &area.fills {
            let room = &mut buffer[place(*part)];
            match fill {
                Fill::Zero => room.fill(0),
                Fill::Backing => self.read_backing(live, *part, room).await?,
                Fill::Copy(host) => {
                    let at = host.0 + (part.start() & (self.cluster_bytes() - 1));
                    let at = ByteRange::between(at, at + part.len());
                    room.copy_from_slice(&read_data(live, at).await?);
                }
                Fill::Inflate(stream) => {
                    room.copy_from_slice(&self.inflate(live, *stream, *part).await?);
                }
            }
        }
        if !payload.is_empty() {
            buffer[place(area.payload)].copy_from_slice(payload);
        }
        Ok(buffer.freeze())
    }

    /// Fills `room` with guest bytes of the backing device, and zeros behind its end.
    async fn read_backing(
        &self,
        live: &Live,
        range: ByteRange,
        room: &mut [u8],
    ) -> Result<(), Error> {
        room.fill(0);
        let Some(backing) = &live.backing else { return Ok(()) };
        let end = backing.limits().size_bytes.min(self.limits().size_bytes);
        let range = range.intersection(ByteRange::between(0, end));
        if range.is_empty() {
            return Ok(());
        }
        let segments = backing.read(range).await.map_err(|error| self.backing_error(error))?;
        let mut at = 0;
        for segment in segments.0 {
            let len = index(segment.len());
            if let Segment::Data(bytes) = segment
                && let Some(place) = room.get_mut(at..at + len)
            {
                place.copy_from_slice(&bytes);
            }
            at += len;
        }
        Ok(())
    }

    /// Makes a range of the disk read as zeros.
    pub(crate) async fn write_zeroes(
        &self,
        range: ByteRange,
        mode: ZeroMode,
        reach: Reach,
    ) -> Result<(), Error> {
        let (head, middle, tail) = self.whole_subclusters(range);
        let how = if mode.keep_allocated { Clear::AllocatedZeroes } else { Clear::Zeroes };
        let live = self.live()?;
        if mode.fast_only {
            let raw = self.info.raw_data;
            let writes = !(head.is_empty() && tail.is_empty())
                || (raw && !live.data.as_ref().is_some_and(HostFile::has_fast_zeroes))
                || self.change(&live, |core| core.clearing_writes(middle, how)).await?;
            if writes {
                let what = "zeroing without writing";
                return Err(Error::Request(block::DeviceError::NotSupported { what }));
            }
        }
        self.before_change(&live).await?;
        for part in [head, tail] {
            self.write_zeros_as_data(part, mode.keep_allocated, reach).await?;
        }
        self.clear(middle, how, reach).await
    }

    /// Gives up the content of a range of the disk: whole subclusters are dropped, parts of them stay.
    pub(crate) async fn discard(&self, range: ByteRange, reach: Reach) -> Result<(), Error> {
        let (_, middle, _) = self.whole_subclusters(range);
        let live = self.live()?;
        self.before_change(&live).await?;
        self.clear(middle, Clear::Discard, reach).await
    }

    /// Makes this layer say nothing about any of the disk, so that what lies below shows, and gives its space back. Only
    /// for a disk that reads the same through what lies below: bitmaps are not told.
    pub(crate) async fn forget_all(&self) -> Result<(), Error> {
        let live = self.live()?;
        self.before_change(&live).await?;
        let all = ByteRange::between(0, self.limits().size_bytes);
        self.clear(all, Clear::Reveal, Reach::Tables).await
    }

    /// Refuses a range that leaves the disk, which may have become smaller while a request waited. The lock on the range
    /// must be held.
    pub(crate) fn check_inside(&self, range: ByteRange, reach: Reach) -> Result<(), Error> {
        let (size_bytes, end) = {
            let core = self.core.lock();
            let mapped_bytes = core.header.l1_entries.saturating_mul(self.info.l2_coverage);
            let end = match reach {
                Reach::Disk => core.size_bytes,
                Reach::Tables => mapped_bytes.max(core.size_bytes),
            };
            (core.size_bytes, end)
        };
        if range.end() > end {
            return Err(Error::Request(block::DeviceError::WritePastEnd { range, size_bytes }));
        }
        Ok(())
    }

    /// Clears whole subclusters, table by table: who waits for one of them does not wait for a whole disk.
    async fn clear(&self, range: ByteRange, how: Clear, reach: Reach) -> Result<(), Error> {
        for piece in range.pieces(self.info.l2_coverage) {
            let guard = self.guests.lock_exclusive(self.widen(piece)).await;
            let live = self.live()?;
            self.check_inside(piece, reach)?;
            if how != Clear::Reveal {
                self.record_change(&live, piece).await?;
            }
            if self.info.raw_data && live.cipher.is_none() {
                // The data file must read like the disk; what entries say is right already: what is mapped stays
                // mapped, what is not reads as zeros, because no backing file goes with such a data file.
                let keeps = how == Clear::AllocatedZeroes;
                zero_data(&live, piece, keeps, &Some(Arc::new(guard))).await?;
                continue;
            }
            let (whole, part) = self.split_at_end(piece);
            let mut rest = self.change(&live, |core| core.clear(whole, how)).await?;
            drop(guard);
            if !matches!(how, Clear::Discard | Clear::Reveal) {
                rest.push(part);
            }
            for part in rest {
                self.write_zeros_as_data(part, how == Clear::AllocatedZeroes, reach).await?;
            }
        }
        Ok(())
    }

    /// Gives a range host clusters with zeros that nobody writes, as data: with space on the host if it `keeps` some,
    /// otherwise as holes. Parts of clusters are written.
    pub(crate) async fn reserve_zeros(
        &self,
        range: ByteRange,
        keeps: bool,
        reach: Reach,
    ) -> Result<(), Error> {
        for piece in range.pieces(RESERVED_BYTES) {
            for piece in piece.pieces(self.info.l2_coverage) {
                self.write_piece(piece, &Content::Zeros { keeps }, true, reach).await?;
            }
        }
        Ok(())
    }

    /// Cuts off the part of a subcluster at the end of a range: where the disk ended there when it was asked for, and
    /// has grown since. The lock on the range must be held.
    fn split_at_end(&self, range: ByteRange) -> (ByteRange, ByteRange) {
        let end = if range.end() >= self.core.lock().size_bytes {
            range.end()
        } else {
            (range.end() - range.end() % self.info.subcluster_bytes).max(range.start())
        };
        (ByteRange::between(range.start(), end), ByteRange::between(end, range.end()))
    }

    pub(crate) async fn write_zeros_as_data(
        &self,
        range: ByteRange,
        allocate: bool,
        reach: Reach,
    ) -> Result<(), Error> {
        let mut zeros = Bytes::new();
        for piece in range.pieces(ZEROS_BYTES) {
            if zeros.len() < index(piece.len()) {
                zeros = Bytes::from(vec![0; index(piece.len())]);
            }
            // Clusters and tables are whole multiples of a piece, or the other way round.
            for piece in piece.pieces(self.info.l2_coverage) {
                let zeros = zeros.slice(..index(piece.len()));
                let content = Content::Bytes(piece.start(), &zeros);
                self.write_piece(piece, &content, allocate, reach).await?;
            }
        }
        Ok(())
    }

    /// Cuts a range into a part of a subcluster, whole subclusters and a part of a subcluster. The last one of the disk
    /// is whole where the disk ends.
    fn whole_subclusters(&self, range: ByteRange) -> (ByteRange, ByteRange, ByteRange) {
        let unit = self.info.subcluster_bytes;
        let start = range.start().next_multiple_of(unit);
        let at_end = range.end() == self.limits().size_bytes;
        let end = if at_end { range.end() } else { range.end() - range.end() % unit };
        if start >= end {
            // At most two subclusters are touched, and none is whole.
            let middle = start.min(range.end());
            return (
                ByteRange::between(range.start(), middle),
                ByteRange::between(middle, middle),
                ByteRange::between(middle, range.end()),
            );
        }
        (
            ByteRange::between(range.start(), start),
            ByteRange::between(start, end),
            ByteRange::between(end, range.end()),
        )
    }
}
