//! Compressed clusters on their way to a reader: read from the file, inflated on the processors, and the last few kept
//! for whoever reads a cluster bit by bit. The algorithms are the codec's, writing is not done here.

use std::collections::HashMap;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

use block::{BufferPool, ByteRange, on_cpu};
use bytes::Bytes;
use parking_lot::Mutex;

use crate::codec::{CAN_COMPRESS, decompress};
use crate::entry::Stream;
use crate::error::{Error, Fault, Feature};
use crate::image::{Inner, Live};
use crate::units::{HostOffset, Run, index};

/// How much inflated data the process keeps, in bytes.
const INFLATED_CACHE_BYTES: usize = 16 << 20;
/// How many inflated clusters the process keeps.
const INFLATED_CACHE_CLUSTERS: usize = 256;

/// Names an open image in the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ImageId(u64);

impl ImageId {
    /// One that nobody else has.
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// Inflated clusters of all images of the process, by image and place of the stream.
#[derive(Default)]
struct Inflated {
    clusters: HashMap<(ImageId, HostOffset), (u64, Bytes)>,
    bytes: usize,
    clock: u64,
}

static INFLATED: LazyLock<Mutex<Inflated>> = LazyLock::new(Mutex::default);

impl Inflated {
    fn get(&mut self, image: ImageId, at: HostOffset) -> Option<Bytes> {
        self.clock += 1;
        let (used, bytes) = self.clusters.get_mut(&(image, at))?;
        *used = self.clock;
        Some(bytes.clone())
    }

    fn insert(&mut self, image: ImageId, at: HostOffset, bytes: Bytes) {
        self.clock += 1;
        self.bytes += bytes.len();
        if let Some((_, old)) = self.clusters.insert((image, at), (self.clock, bytes)) {
            self.bytes -= old.len();
        }
        while self.clusters.len() > INFLATED_CACHE_CLUSTERS || self.bytes > INFLATED_CACHE_BYTES {
            let oldest = self.clusters.iter().min_by_key(|(_, (used, _))| *used);
            let Some(oldest) = oldest.map(|(place, _)| *place) else { return };
            self.remove(oldest);
        }
    }

    fn remove(&mut self, place: (ImageId, HostOffset)) {
        if let Some((_, old)) = self.clusters.remove(&place) {
            self.bytes -= old.len();
        }
    }
}

/// Forgets what streams that start in host bytes `range` were: others may lie there soon.
pub(crate) fn forget(image: ImageId, range: ByteRange) {
    let mut inflated = INFLATED.lock();
    let inside = |at: HostOffset| range.start() <= at.0 && at.0 < range.end();
    let gone: Vec<_> =
        inflated.clusters.keys().filter(|(of, at)| *of == image && inside(*at)).copied().collect();
    for place in gone {
        inflated.remove(place);
    }
}

/// Forgets all of an image.
pub(crate) fn forget_image(image: ImageId) {
    forget(image, ByteRange::between(0, u64::MAX));
}

impl Inner {
    /// The part `range` of the disk, which lies in the one cluster that `stream` is.
    pub(crate) async fn inflate(
        &self,
        live: &Live,
        stream: Stream,
        range: ByteRange,
    ) -> Result<Bytes, Error> {
        if !CAN_COMPRESS {
            return Err(self.fault(Fault::Unsupported(Feature::CompressionLeftOut)));
        }
        let cluster_bytes = self.cluster_bytes();
        let within = index(range.start() & (cluster_bytes - 1));
        let part = within..within + index(range.len());
        let image = self.core.lock().id;
        let kept = INFLATED.lock().get(image, stream.at);
        if let Some(cluster) = kept {
            return Ok(cluster.slice(part));
        }
        let at = ByteRange::between(stream.at.0, stream.at.0.saturating_add(stream.len));
        let compressed = live.file.read(at).await?;
        let compression = self.info.compression;
        let inflated = on_cpu(move || {
            // Never waits: the request that this belongs to has been admitted already.
            let mut cluster = BufferPool::shared().get_now(index(cluster_bytes));
            decompress(compression, &compressed, &mut cluster).map(|()| cluster.freeze())
        });
        let inflated = inflated.await;
        let inflated = inflated.map_err(|source| Error::Cpu { file: self.path.clone(), source })?;
        let cluster =
            inflated.map_err(|what| self.fault(Fault::Corrupt { at: stream.at, what }))?;
        // Whoever reads all of it does not come back soon.
        if range.len() < cluster_bytes {
            INFLATED.lock().insert(image, stream.at, cluster.clone());
        }
        Ok(cluster.slice(part))
    }
}

impl crate::core::Core {
    /// Forgets inflated clusters whose streams are no longer the mapping's.
    pub(crate) fn forget_streams(&self, run: Run) {
        forget(self.id, self.geometry.host_range(run));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_bounded_and_belongs_to_one_image() {
        let (one, two) = (ImageId::new(), ImageId::new());
        let mut cache = Inflated::default();
        for at in 0..2 * INFLATED_CACHE_CLUSTERS as u64 {
            cache.insert(one, HostOffset(at), Bytes::from_static(&[1; 512]));
            assert!(cache.get(one, HostOffset(0)).is_some(), "what is used stays");
        }
        assert_eq!(cache.clusters.len(), INFLATED_CACHE_CLUSTERS);
        assert!(cache.get(two, HostOffset(0)).is_none());
        cache.insert(two, HostOffset(0), Bytes::from(vec![0; INFLATED_CACHE_BYTES]));
        assert_eq!((cache.clusters.len(), cache.bytes), (1, INFLATED_CACHE_BYTES));
    }
}
