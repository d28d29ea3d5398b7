//! Data of one image that goes into another without passing through memory: which bytes of which file they are. Plain
//! data only; what is compressed, encrypted or zero is read and written like any other content.

use std::sync::Arc;

use block::{ByteRange, Hold, HostFile, MAX_EXTENTS, RangeGuard, RawDevice};
use bytes::{Bytes, BytesMut};

use crate::data::{data_file, read_data, write_data, zero_data};
use crate::error::Error;
use crate::image::{Image, Inner, Live};
use crate::mapping::Place;
use crate::units::{HostOffset, index};
use crate::write::Reach;

/// A range of a disk that an image holds as plain data.
#[derive(Clone)]
pub(crate) struct Lent {
    live: Arc<Live>,
    /// Guest ranges and where their first bytes lie, in order, without gaps.
    extents: Vec<(ByteRange, HostOffset)>,
    /// Keeps everybody from changing or dropping it.
    guard: Arc<RangeGuard>,
}

impl Image {
    /// Lends a range of the disk; `None` where any of it is something else than plain data of this layer.
    pub(crate) async fn lend(&self, range: ByteRange) -> Result<Option<Lent>, Error> {
        let inner = &self.inner;
        let guard = Arc::new(inner.guests.lock_shared(inner.widen(range)).await);
        let live = inner.live()?;
        if live.cipher.is_some() {
            return Ok(None);
        }
        let (mut extents, mut rest) = (Vec::new(), range);
        while !rest.is_empty() {
            let found = inner.step(&live, |core| core.lookup(rest, MAX_EXTENTS)).await?;
            let end = found.last().map_or(rest.end(), |last| last.range.end());
            for extent in found {
                let Place::Data { host, .. } = extent.place else { return Ok(None) };
                extents.push((extent.range, host));
            }
            rest = ByteRange::between(end, rest.end());
        }
        Ok(Some(Lent { live, extents, guard }))
    }
}

impl Lent {
    /// The parts of a range within, and where they lie.
    fn parts(&self, range: ByteRange) -> impl Iterator<Item = (ByteRange, HostOffset)> {
        self.extents.iter().filter_map(move |(extent, host)| {
            let part = extent.intersection(range);
            let at = HostOffset(host.0 + (part.start().max(extent.start()) - extent.start()));
            (!part.is_empty()).then_some((part, at))
        })
    }

    /// The bytes of a range within.
    pub(crate) async fn read(&self, range: ByteRange) -> Result<Bytes, Error> {
        let mut all = BytesMut::with_capacity(index(range.len()));
        for (part, host) in self.parts(range) {
            let at = ByteRange::between(host.0, host.0 + part.len());
            all.extend_from_slice(&read_data(&self.live, at).await?);
        }
        Ok(all.freeze())
    }

    /// Copies a range within to `to` of a file, by the host alone where it can. Says how much went that way.
    pub(crate) async fn copy_to(
        &self,
        file: &HostFile,
        range: ByteRange,
        to: u64,
        hold: &Hold,
    ) -> Result<u64, Error> {
        let hold: Hold = Some(Arc::new((Arc::clone(&self.guard), hold.clone())));
        let mut by_host = 0;
        for (part, host) in self.parts(range) {
            let to = to + (part.start() - range.start());
            let source = data_file(&self.live);
            if file.copy_from(source, host.0, to, part.len(), hold.clone()).await? {
                by_host += part.len();
                continue;
            }
            let at = ByteRange::between(host.0, host.0 + part.len());
            let bytes = read_data(&self.live, at).await?;
            file.write(to, bytes, hold.clone()).await?;
        }
        Ok(by_host)
    }
}

/// What takes lent data.
#[derive(Clone)]
pub(crate) enum Taker {
    /// An image, in normal clusters.
    Image(Image),
    /// A raw disk.
    Raw(Arc<RawDevice>),
}

impl Taker {
    /// Writes what is lent to the same range of the disk. Says how much of it the host copied alone.
    pub(crate) async fn take(&self, range: ByteRange, lent: &Lent) -> Result<u64, Error> {
        match self {
            Self::Image(image) => image.inner.write_lent(range, lent).await,
            Self::Raw(device) => lent.copy_to(device.file(), range, range.start(), &None).await,
        }
    }
}

/// What a write writes.
pub(crate) enum Content<'a> {
    /// These bytes, the first of which belong to this place on the disk.
    Bytes(u64, &'a Bytes),
    /// What another image has in the same place.
    Lent(&'a Lent),
    /// Zeros that the host makes: in space of their own if it `keeps` space for them, by holes otherwise.
    Zeros {
        /// Whether space is taken.
        keeps: bool,
    },
}

impl Content<'_> {
    /// The bytes of a range.
    pub(crate) async fn read(&self, range: ByteRange) -> Result<Bytes, Error> {
        match self {
            Self::Bytes(start, bytes) => Ok(crate::plan::slice_of(bytes, *start, range)),
            Self::Lent(lent) => lent.read(range).await,
            Self::Zeros { .. } => Ok(Bytes::from(vec![0; index(range.len())])),
        }
    }

    /// Whether a range is known to be zeros.
    pub(crate) fn is_zero(&self, range: ByteRange) -> bool {
        match self {
            Self::Bytes(start, bytes) => {
                block::is_zero(&crate::plan::slice_of(bytes, *start, range))
            }
            Self::Lent(_) => false,
            Self::Zeros { .. } => true,
        }
    }

    /// Writes a range to its place on the host. Says how much of it the host copied alone.
    pub(crate) async fn write(
        &self,
        live: &Live,
        range: ByteRange,
        host: HostOffset,
        hold: &Hold,
    ) -> Result<u64, Error> {
        match self {
            Self::Lent(lent) if live.cipher.is_none() => {
                lent.copy_to(data_file(live), range, host.0, hold).await
            }
            Self::Zeros { keeps } if live.cipher.is_none() => {
                let at = ByteRange::between(host.0, host.0.saturating_add(range.len()));
                if !keeps {
                    // What a failed write has left behind the end must not show, and holes are made before it.
                    data_file(live).ensure_len(at.end()).await?;
                }
                zero_data(live, at, *keeps, hold).await?;
                Ok(0)
            }
            _ => {
                let bytes = self.read(range).await?;
                write_data(live, host, bytes, hold).await?;
                Ok(0)
            }
        }
    }
}

impl Inner {
    /// Writes what another image lends, as it is: zeros in it are data like any other. Says how much of it the host
    /// copied alone.
    pub(crate) async fn write_lent(&self, range: ByteRange, lent: &Lent) -> Result<u64, Error> {
        let live = self.live()?;
        self.before_change(&live).await?;
        let mut by_host = 0;
        for piece in range.pieces(self.info.l2_coverage) {
            by_host += self.write_piece(piece, &Content::Lent(lent), false, Reach::Disk).await?;
        }
        Ok(by_host)
    }
}
