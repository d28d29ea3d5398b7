//! Writing compressed clusters: all processors compress, the streams of a batch go to the host in one write, and only
//! then their entries become visible. Where streams lie is decided in `pack`, reading them is done in `streams`.

use std::sync::Arc;

use block::{
    BufferPool, ByteRange, DeviceError, Hold, RangeGuard, ZeroMode, is_zero, on_cpu, try_join_all,
};
use bytes::Bytes;
use parking_lot::Mutex;

use crate::codec::{CAN_COMPRESS, Compression, compress};
use crate::core::Core;
use crate::error::{Error, Feature};
use crate::image::{Image, Inner};
use crate::pack::StreamPlan;
use crate::plan::slice_of;
use crate::units::{GuestOffset, HostOffset, index};
use crate::write::Reach;

/// How many bytes of the disk become one write of streams: enough to spread over the processors.
const BATCH_BYTES: u64 = 2 << 20;
/// How many bytes one job compresses at least: a job costs as much as a few KiB.
const JOB_BYTES: u64 = 64 << 10;

/// What a cluster has become.
enum Packed {
    /// It holds only zeros.
    Zero,
    Stream(Vec<u8>),
    /// It would not be shorter.
    Plain,
}

/// What the host operation of a batch holds: the lock on its clusters and the room for its streams. Whoever lets go
/// last gives back what was not published, and only then the lock.
struct Ticket {
    core: Arc<Mutex<Core>>,
    plan: Mutex<Option<StreamPlan>>,
    _guard: RangeGuard,
}

impl Ticket {
    fn publish(&self) {
        if let Some(plan) = self.plan.lock().take() {
            self.core.lock().publish(&plan.reservation);
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if let Some(plan) = self.plan.get_mut().take() {
            self.core.lock().undo_streams(&plan);
        }
    }
}

impl Image {
    /// Writes whole clusters, compressed by the algorithm that the image names: as [`block::BlockDevice::write`], but
    /// `offset` and the length are multiples of the cluster size, only the last cluster of the disk may be shorter.
    ///
    /// Clusters of zeros take no space, and those that do not shrink are written as they are. Compresses on all
    /// processors at once, and best in calls of several MiB: the streams of 2 MiB lie behind each other without a gap,
    /// and the next ones begin at the next sector. A later write to a part of a compressed cluster makes a normal one
    /// of it.
    ///
    /// # Errors
    /// As [`block::BlockDevice::write`]; [`DeviceError::NotSupported`] for parts of clusters;
    /// [`Error::Unsupported`] for images that are encrypted or have a data file of their own, and in a build without
    /// the feature `compression`.
    pub async fn write_compressed(&self, offset: u64, data: Bytes) -> Result<(), Error> {
        self.inner.write_compressed(offset, data, None).await
    }
}

impl Inner {
    /// As [`Image::write_compressed`], at a level from 1 (fast) to [`Compression::max_level`].
    pub(crate) async fn write_compressed(
        &self,
        at: u64,
        data: Bytes,
        level: Option<u8>,
    ) -> Result<(), Error> {
        let range = self.limits().write_range(at, data.len())?;
        if !self.is_whole(range) {
            let what = "compressed writes of parts of clusters";
            return Err(Error::Request(DeviceError::NotSupported { what }));
        }
        if !CAN_COMPRESS {
            let feature = Feature::CompressionLeftOut;
            return Err(Error::Unsupported { file: self.path.clone(), feature });
        }
        let live = self.live()?;
        if live.data.is_some() || live.cipher.is_some() {
            let feature = Feature::CompressedWrites;
            return Err(Error::Unsupported { file: self.path.clone(), feature });
        }
        self.before_change(&live).await?;
        let kind = self.info.compression;
        let level = level.unwrap_or(kind.default_level());
        // Each batch within one L2 table.
        let batch = BATCH_BYTES.max(self.cluster_bytes()).min(self.info.l2_coverage);
        let batches = range.pieces(batch).map(|piece| {
            let data = slice_of(&data, at, piece);
            self.write_batch(piece, data, kind, level)
        });
        try_join_all(batches).await.map(drop)
    }

    /// Whether a range consists of whole clusters, the last one of the disk as it is.
    fn is_whole(&self, range: ByteRange) -> bool {
        let cluster = self.cluster_bytes();
        range.start().is_multiple_of(cluster)
            && (range.end().is_multiple_of(cluster) || range.end() == self.limits().size_bytes)
    }

    async fn write_batch(
        &self,
        range: ByteRange,
        data: Bytes,
        kind: Compression,
        level: u8,
    ) -> Result<(), Error> {
        let cluster = self.cluster_bytes();
        let jobs = range.pieces(JOB_BYTES.max(cluster)).map(|piece| {
            let data = slice_of(&data, range.start(), piece);
            on_cpu(move || pack_all(kind, level, &data, index(cluster)))
        });
        let packed = try_join_all(jobs).await;
        let packed = packed.map_err(|source| Error::Cpu { file: self.path.clone(), source })?;
        let mut packed: Vec<(ByteRange, Packed)> =
            range.pieces(cluster).zip(packed.into_iter().flatten()).collect();
        if !self.write_streams(range, &packed).await?
            && let Some((_, last)) = packed.last_mut()
        {
            *last = Packed::Plain;
            self.write_streams(range, &packed).await?;
        }
        let mut runs: Vec<(ByteRange, bool)> = Vec::new();
        for (piece, packed) in &packed {
            let zero = match packed {
                Packed::Stream(_) => continue,
                Packed::Zero => true,
                Packed::Plain => false,
            };
            match runs.last_mut() {
                Some((last, same)) if *same == zero && last.end() == piece.start() => {
                    *last = ByteRange::between(last.start(), piece.end());
                }
                _ => runs.push((*piece, zero)),
            }
        }
        for (run, zero) in runs {
            if zero {
                self.write_zeroes(run, ZeroMode::default(), Reach::Disk).await?;
            } else {
                self.write(run.start(), slice_of(&data, range.start(), run)).await?;
            }
        }
        Ok(())
    }

    /// Writes what has become streams, all of it within one L2 table. Writes nothing, and says so, where the last one is
    /// of a part of a cluster alone: because the disk ended there when it was asked for, and has grown since.
    async fn write_streams(
        &self,
        range: ByteRange,
        packed: &[(ByteRange, Packed)],
    ) -> Result<bool, Error> {
        let streams: Vec<(u64, &[u8])> = packed
            .iter()
            .filter_map(|(piece, packed)| match packed {
                Packed::Stream(bytes) => Some((piece.start(), bytes.as_slice())),
                Packed::Zero | Packed::Plain => None,
            })
            .collect();
        if streams.is_empty() {
            return Ok(true);
        }
        let guard = self.guests.lock_exclusive(self.widen(range)).await;
        let live = self.live()?;
        self.check_inside(range, Reach::Disk)?;
        if matches!(packed.last(), Some((_, Packed::Stream(_)))) && !self.is_whole(range) {
            return Ok(false);
        }
        self.record_change(&live, range).await?;
        let plan = self
            .change(&live, |core| {
                let geometry = core.geometry;
                let of = |(at, bytes): &(u64, &[u8])| {
                    (geometry.l2_index(GuestOffset(*at)), bytes.len() as u64)
                };
                let lens: Vec<_> = streams.iter().map(of).collect();
                core.plan_streams(geometry.l1_index(GuestOffset(range.start())), &lens)
            })
            .await?;
        let start = plan.places.first().copied().unwrap_or(plan.end);
        let bytes = lay_down(start, &plan, &streams);
        let ticket = Arc::new(Ticket {
            core: Arc::clone(&self.core),
            plan: Mutex::new(Some(plan)),
            _guard: guard,
        });
        let hold: Hold = Some(Arc::clone(&ticket) as _);
        live.file.write(start.0, bytes, hold).await?;
        ticket.publish();
        Ok(true)
    }
}

/// The bytes of a plan from `start` on, with zeros where no stream lies.
fn lay_down(start: HostOffset, plan: &StreamPlan, streams: &[(u64, &[u8])]) -> Bytes {
    // Never waits: what is compressed was in memory before.
    let mut buffer = BufferPool::shared().get_now(index(plan.end.0 - start.0));
    let mut filled = 0;
    for (at, (_, bytes)) in plan.places.iter().zip(streams) {
        let at = index(at.0 - start.0);
        buffer[filled..at].fill(0);
        buffer[at..at + bytes.len()].copy_from_slice(bytes);
        filled = at + bytes.len();
    }
    buffer[filled..].fill(0);
    buffer.freeze()
}

/// Compresses each cluster of `data`; the last may be short, and is filled up with zeros.
fn pack_all(kind: Compression, level: u8, data: &[u8], cluster: usize) -> Vec<Packed> {
    let pack = |bytes: &[u8]| {
        if is_zero(bytes) {
            return Packed::Zero;
        }
        let stream = if bytes.len() == cluster {
            compress(kind, level, bytes)
        } else {
            let mut whole = bytes.to_vec();
            whole.resize(cluster, 0);
            compress(kind, level, &whole)
        };
        stream.map_or(Packed::Plain, Packed::Stream)
    };
    data.chunks(cluster).map(pack).collect()
}
