use std::io::Write;
use std::process::{Command, Stdio};

use proptest::prelude::*;

use super::*;
use crate::error::Corruption;

const KINDS: [Compression; 2] = [Compression::Deflate, Compression::Zstd];

/// Bytes that shrink: runs, and distances of all lengths.
fn text(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut out: Vec<u8> = Vec::with_capacity(len + 64);
    while out.len() < len {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let (pick, back) = (state >> 60, usize::try_from(state >> 20 & 0xffff).unwrap());
        match pick {
            0..=9 if !out.is_empty() => {
                let from = out.len() - 1 - back % out.len();
                let copy: Vec<u8> = out[from..].iter().copied().take(40).collect();
                out.extend(copy);
            }
            _ => out.extend_from_slice(&state.to_le_bytes()),
        }
    }
    out.truncate(len);
    out
}

/// Bytes that do not shrink.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    (0..len).map(|_| next()).collect()
}

fn round_trip(kind: Compression, level: u8, cluster: &[u8]) -> Option<usize> {
    let stream = compress(kind, level, cluster)?;
    assert!(stream.len() < cluster.len());
    let mut back = vec![0xaa; cluster.len()];
    let padded = [stream.as_slice(), &[0x5a; 511]].concat();
    assert_eq!(decompress(kind, &padded, &mut back), Ok(()));
    assert!(back == cluster, "{kind} at level {level}");
    back.fill(0xaa);
    assert_eq!(decompress(kind, &stream, &mut back), Ok(()));
    assert!(back == cluster, "{kind} at level {level}, without padding");
    Some(stream.len())
}

/// Runs a line of python3 on `input`.
fn python(code: &str, input: &[u8]) -> Vec<u8> {
    let mut child = Command::new("python3")
        .args(["-c", code])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("python3 runs");
    child.stdin.take().unwrap().write_all(input).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    output.stdout
}

#[test]
fn every_cluster_size_and_level_comes_back() {
    for kind in KINDS {
        for bits in 9..=21 {
            let cluster = text(1 << bits, bits);
            assert!(round_trip(kind, kind.default_level(), &cluster).is_some(), "2^{bits}");
        }
        for level in [0, 1, 2, kind.max_level(), 255] {
            assert!(round_trip(kind, level, &text(65536, 5)).is_some(), "level {level}");
        }
        assert_eq!(Compression::from_type_byte(kind.type_byte()), Some(kind));
    }
    assert_eq!(Compression::from_type_byte(2), None);
}

#[test]
fn what_does_not_shrink_is_no_stream() {
    let noise = noise(65536, 1);
    for kind in KINDS {
        assert_eq!(compress(kind, 6, &noise), None);
        assert_eq!(compress(kind, 6, &noise[..512]), None);
        assert_eq!(compress(kind, 6, &[]), None);
        // The context is as good as new after a cluster that did not fit.
        assert!(round_trip(kind, 6, &text(65536, 9)).is_some());
    }
}

#[test]
fn clusters_that_do_not_shrink_leave_nothing_behind_for_the_next() {
    for size in [4096, 16 << 10, 65536] {
        // Each stops at another place of the stream, with something that waits to be put out.
        for n in 0..200u64 {
            let mut cluster = noise(size, n);
            let half = size * usize::try_from(n % 50).unwrap() / 100;
            cluster[..half].fill(0);
            let _ = compress(Compression::Deflate, 6, &cluster);
            assert!(round_trip(Compression::Deflate, 6, &text(size, n)).is_some());
        }
    }
}

#[test]
fn a_reader_with_a_window_of_12_bits_reads_our_deflate() {
    let code =
        "import sys, zlib; sys.stdout.buffer.write(zlib.decompress(sys.stdin.buffer.read(), -12))";
    for (bits, level) in [(9, 6), (12, 1), (16, 1), (16, 6), (16, 9), (21, 6)] {
        let cluster = text(1 << bits, 3);
        let stream = compress(Compression::Deflate, level, &cluster).unwrap();
        assert!(python(code, &stream) == cluster, "2^{bits} at level {level}");
    }
}

#[test]
fn deflate_with_any_window_is_read() {
    for window in [9, 12, 15] {
        let code = format!(
            "import sys, zlib; c = zlib.compressobj(9, 8, -{window}); \
             sys.stdout.buffer.write(c.compress(sys.stdin.buffer.read()) + c.flush())"
        );
        let cluster = text(65536, 11);
        let stream = python(&code, &cluster);
        let mut back = vec![0; cluster.len()];
        assert_eq!(decompress(Compression::Deflate, &stream, &mut back), Ok(()));
        assert!(back == cluster);
    }
}

#[test]
fn several_zstd_frames_make_one_cluster() {
    let cluster = text(65536, 21);
    let mut stream = Vec::new();
    for part in cluster.chunks(10_000) {
        stream.extend(zstd::bulk::compress(part, 3).unwrap());
        // A frame that readers skip.
        stream.extend([0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0, 1, 2, 3, 4]);
    }
    stream.extend([0; 300]);
    let mut back = vec![0; cluster.len()];
    assert_eq!(decompress(Compression::Zstd, &stream, &mut back), Ok(()));
    assert!(back == cluster);
}

#[test]
fn a_frame_that_announces_a_huge_window_takes_no_memory_for_it() {
    let cluster = text(65536, 22);
    let mut encoder = zstd::stream::Encoder::new(Vec::new(), 3).unwrap();
    encoder.window_log(30).unwrap();
    encoder.write_all(&cluster).unwrap();
    let stream = encoder.finish().unwrap();
    let mut back = vec![0; cluster.len()];
    assert_eq!(decompress(Compression::Zstd, &stream, &mut back), Ok(()));
    assert!(back == cluster);
}

#[test]
fn a_stream_that_ends_early_is_corruption_at_every_length() {
    let cluster = text(4096, 31);
    for compression in KINDS {
        let stream = compress(compression, 6, &cluster).unwrap();
        let mut back = vec![0; cluster.len()];
        for len in 0..stream.len() {
            // Deflate may have given the last byte before its last bits.
            if decompress(compression, &stream[..len], &mut back).is_ok() {
                assert!(back == cluster && len + 8 > stream.len(), "{compression} at {len}");
            }
        }
        let half = compress(compression, 6, &cluster[..2048]).unwrap();
        assert_eq!(
            decompress(compression, &half, &mut back),
            Err(Corruption::CompressedShort { compression, bytes: 2048, cluster: 4096 })
        );
    }
}

#[test]
fn a_zstd_stream_that_holds_more_than_a_cluster_is_corruption() {
    let stream = compress(Compression::Zstd, 3, &text(8192, 41)).unwrap();
    assert_eq!(
        decompress(Compression::Zstd, &stream, &mut [0; 4096]),
        Err(Corruption::CompressedGarbage { compression: Compression::Zstd })
    );
}

proptest! {
    #[test]
    fn any_cluster_comes_back(seed: u64, bits in 9u32..=16, level in 1u8..=9, zstd: bool) {
        let kind = if zstd { Compression::Zstd } else { Compression::Deflate };
        round_trip(kind, level, &text(1 << bits, seed));
    }

    #[test]
    fn garbage_is_refused_or_read_but_never_a_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..600), zstd: bool, magic: bool,
    ) {
        let kind = if zstd { Compression::Zstd } else { Compression::Deflate };
        let mut input = bytes;
        if magic {
            input.splice(0..0, [0x28, 0xb5, 0x2f, 0xfd]);
        }
        let _either = decompress(kind, &input, &mut vec![0; 65536]);
        // And the next one is read as ever.
        round_trip(kind, 1, &text(4096, 7));
    }

    #[test]
    fn flipped_bits_are_never_a_panic(
        flips in prop::collection::vec((any::<prop::sample::Index>(), 0u8..8), 1..6), zstd: bool,
    ) {
        let kind = if zstd { Compression::Zstd } else { Compression::Deflate };
        let mut stream = compress(kind, 3, &text(65536, 51)).unwrap();
        for (at, bit) in flips {
            let at = at.index(stream.len());
            stream[at] ^= 1 << bit;
        }
        let _either = decompress(kind, &stream, &mut vec![0; 65536]);
        round_trip(kind, 1, &text(4096, 7));
    }
}
