//! One cluster in, one stream out, and back. Which thread computes is the caller's choice; each keeps its contexts.

use std::cell::RefCell;

use flate2::{Compress, Decompress, FlushCompress, FlushDecompress, Status};
use zstd::zstd_safe::find_frame_compressed_size;

use crate::codec::Compression;
use crate::error::Corruption;

/// The base-2 logarithm of the window of a deflate stream that we write: QEMU reads with no larger one.
const WRITE_WINDOW_BITS: u8 = 12;
/// The largest window that deflate has, and that we read: other writers do not know QEMU's bound.
const READ_WINDOW_BITS: u8 = 15;

/// What a thread keeps between clusters: tables of several hundred KiB that are dear to make.
#[derive(Default)]
struct Contexts {
    deflate: Option<(u8, Compress)>,
    inflate: Option<Decompress>,
    zstd: Option<(u8, zstd::bulk::Compressor<'static>)>,
    unzstd: Option<zstd::bulk::Decompressor<'static>>,
}

thread_local! {
    static CONTEXTS: RefCell<Contexts> = RefCell::default();
}

/// Fills `into`, exactly one cluster, from the stream at the beginning of `input`. What follows the stream (the rest
/// of its last sector) is not looked at.
///
/// Takes no memory that depends on what the stream says of itself. Meant for [`block::on_cpu`].
///
/// # Errors
/// [`Corruption::CompressedGarbage`], [`Corruption::CompressedShort`]; what `into` holds then means nothing.
///
/// Source: qcow2 specification, "Compressed clusters".
pub(crate) fn decompress(
    kind: Compression,
    input: &[u8],
    into: &mut [u8],
) -> Result<(), Corruption> {
    CONTEXTS.with_borrow_mut(|contexts| match kind {
        Compression::Deflate => contexts.inflate(input, into),
        Compression::Zstd => contexts.unzstd(input, into),
    })
}

/// Compresses exactly one cluster at `level` (1 is fast; above [`Compression::max_level`] counts as that). `None`
/// where the stream would not be shorter than the cluster, or could not be made.
///
/// Meant for [`block::on_cpu`].
pub(crate) fn compress(kind: Compression, level: u8, cluster: &[u8]) -> Option<Vec<u8>> {
    let level = level.clamp(1, kind.max_level());
    // One byte less than the cluster: what does not fit does not shrink.
    let mut stream = vec![0; cluster.len().checked_sub(1)?];
    let len = CONTEXTS.with_borrow_mut(|contexts| match kind {
        Compression::Deflate => contexts.deflate(level, cluster, &mut stream),
        Compression::Zstd => contexts.zstd(level, cluster, &mut stream),
    })?;
    stream.truncate(len);
    // It may wait in a queue with many others.
    stream.shrink_to_fit();
    Some(stream)
}

impl Contexts {
    fn inflate(&mut self, input: &[u8], into: &mut [u8]) -> Result<(), Corruption> {
        let compression = Compression::Deflate;
        let inflate = self
            .inflate
            .get_or_insert_with(|| Decompress::new_with_window_bits(false, READ_WINDOW_BITS));
        inflate.reset(false);
        let status = inflate.decompress(input, into, FlushDecompress::Finish);
        let got = inflate.total_out();
        match status {
            // A full cluster is enough, whether or not the stream says that it ends here.
            Ok(_) if got == into.len() as u64 => Ok(()),
            Ok(_) => Err(short(compression, got, into)),
            Err(_) => Err(Corruption::CompressedGarbage { compression }),
        }
    }

    fn unzstd(&mut self, input: &[u8], into: &mut [u8]) -> Result<(), Corruption> {
        let compression = Compression::Zstd;
        let garbage = Corruption::CompressedGarbage { compression };
        let unzstd = match &mut self.unzstd {
            Some(unzstd) => unzstd,
            None => {
                self.unzstd.insert(zstd::bulk::Decompressor::new().map_err(|_| garbage.clone())?)
            }
        };
        let (mut rest, mut filled) = (input, 0);
        while filled < into.len() {
            if rest.is_empty() {
                return Err(short(compression, filled as u64, into));
            }
            // Frame by frame, each straight into its place: a window that a frame announces takes no memory.
            let len = find_frame_compressed_size(rest).map_err(|_| garbage.clone())?;
            let (frame, behind) = rest.split_at_checked(len).ok_or_else(|| garbage.clone())?;
            let room = into.get_mut(filled..).unwrap_or_default();
            filled += unzstd.decompress_to_buffer(frame, room).map_err(|_| garbage.clone())?;
            if frame.is_empty() {
                return Err(garbage);
            }
            rest = behind;
        }
        Ok(())
    }

    fn deflate(&mut self, level: u8, cluster: &[u8], stream: &mut [u8]) -> Option<usize> {
        let (_, deflate) = match &mut self.deflate {
            Some(context) if context.0 == level => {
                context.1.reset();
                context
            }
            context => {
                let level_of = flate2::Compression::new(u32::from(level));
                let new = Compress::new_with_window_bits(level_of, false, WRITE_WINDOW_BITS);
                context.insert((level, new))
            }
        };
        let status = deflate.compress(cluster, stream, FlushCompress::Finish);
        if let Ok(Status::StreamEnd) = status {
            return usize::try_from(deflate.total_out()).ok();
        }
        // A reset after a stream that did not fit leaves zlib-rs less and less room for what waits to be put out, until
        // it panics.
        self.deflate = None;
        None
    }

    fn zstd(&mut self, level: u8, cluster: &[u8], stream: &mut [u8]) -> Option<usize> {
        let (_, zstd) = match &mut self.zstd {
            Some(context) if context.0 == level => context,
            context => {
                let new = zstd::bulk::Compressor::new(i32::from(level)).ok()?;
                context.insert((level, new))
            }
        };
        zstd.compress_to_buffer(cluster, stream).ok()
    }
}

fn short(compression: Compression, bytes: u64, cluster: &[u8]) -> Corruption {
    Corruption::CompressedShort { compression, bytes, cluster: cluster.len() as u64 }
}
