//! Whole pipelines in memory, against the simplest model there is: afterwards the target holds what the source does.

use std::path::Path;

use block::{HostFile, MemoryDevice, MemoryStorage, OpKind};
use proptest::prelude::*;
use uuid::Uuid;

use super::*;
use crate::change_id::StateId;
use crate::compare::{Baseline, Comparison};
use crate::digest_file::{DigestReader, DigestWriter, DiskIdentity, Header};
use crate::{DiskId, EventSender};

/// What a block holds: nothing, a byte repeated, or zeros with one byte at the end.
#[derive(Clone, Copy, Debug)]
enum Content {
    Zero,
    Filled(u8),
    LastByte(u8),
}

fn any_content() -> impl Strategy<Value = Content> {
    prop_oneof![
        3 => Just(Content::Zero),
        2 => (1u8..4).prop_map(Content::Filled),
        1 => (1u8..4).prop_map(Content::LastByte),
    ]
}

/// A disk of these blocks whose last one has `last_bytes`.
fn disk(blocks: &[Content], last_bytes: usize) -> Vec<u8> {
    let block_bytes = usize::try_from(BLOCK_BYTES).unwrap();
    let mut bytes = Vec::new();
    for (index, content) in blocks.iter().enumerate() {
        let len = if index + 1 == blocks.len() { last_bytes } else { block_bytes };
        let mut block = match content {
            Content::Filled(byte) => vec![*byte; len],
            Content::Zero | Content::LastByte(_) => vec![0; len],
        };
        if let Content::LastByte(byte) = content {
            block[len - 1] = *byte;
        }
        bytes.extend(block);
    }
    bytes
}

/// Sends `source` to `target`, comparing with `baseline`. Returns the new state, and the bytes sent.
async fn send(
    directory: &Path,
    source: Vec<u8>,
    target: Arc<MemoryDevice>,
    baseline: Option<StateId>,
    extent_bytes: u64,
) -> (StateId, u64) {
    let disk_bytes = source.len() as u64;
    let state = StateId::following(baseline);
    let header = Header { disk_bytes, state, lineage: Uuid::nil(), disk: DiskIdentity([0; 32]) };
    let comparison = match baseline {
        None => Comparison::Everything,
        Some(state) => {
            let reader = DigestReader::open(directory, state).unwrap();
            let old_bytes = reader.header().disk_bytes;
            Comparison::Against(Baseline::new(reader, old_bytes, disk_bytes))
        }
    };
    let writer = DigestWriter::create(directory, &header).unwrap();
    let ledger = Ledger::new(comparison, Some(writer), disk_bytes, extent_bytes);
    let disk = DiskId { index: 0, key: 0 };
    let progress = Arc::new(Progress::new(disk, disk_bytes, EventSender::discard()));
    let source = Source::of(MemoryDevice::read_only(source));
    let target: Arc<dyn BlockDevice> = target;
    let pipeline = Pipeline {
        source: &source,
        dirty_only: false,
        digests: true,
        extent_bytes,
        target: &target,
        connections: 1,
        progress: &progress,
    };
    let (alive, _) = mpsc::channel(1);
    match pipeline.run(ledger, alive).await {
        Ok(kept) => kept.unwrap().publish().unwrap(),
        Err(_) => panic!("nothing can fail in memory"),
    }
    let (_, data_sent, _) = progress.totals();
    (state, data_sent)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_target_follows_its_source_through_fulls_and_incrementals(
        states in proptest::collection::vec(proptest::collection::vec(any_content(), 1..24), 1..5),
        last_bytes in proptest::collection::vec(1..=65536usize, 4), extent in 0u32..4,
    ) {
        let directory = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let extent_bytes = BLOCK_BYTES << extent;
        let (mut held, mut previous) = (Vec::new(), None);
        let mut before: Vec<u8> = Vec::new();
        for (blocks, last_bytes) in states.iter().zip(last_bytes) {
            let wanted = disk(blocks, last_bytes);
            // Disks grow or stay; what shrank is sent as a full, which forgets the state before.
            if wanted.len() < before.len() {
                previous = None;
            }
            held.resize(wanted.len(), 0xee);
            let target = MemoryDevice::from_bytes(held);
            let sending = send(directory.path(), wanted.clone(), Arc::clone(&target), previous, extent_bytes);
            let (state, sent) = runtime.block_on(sending);
            held = target.to_vec();
            prop_assert!(held == wanted);
            // No block is sent that did not change, but for the one that the old end cut.
            let changed = (0..wanted.len()).step_by(65536).filter(|at| {
                let now = &wanted[*at..wanted.len().min(at + 65536)];
                now != before.get(*at..at + now.len()).unwrap_or_default() && now.iter().any(|byte| *byte != 0)
            });
            if previous.is_some() {
                prop_assert!(sent <= (changed.count() as u64 + 1) * BLOCK_BYTES);
            }
            (previous, before) = (Some(state), wanted);
        }
    }
}

/// Cuts a source of 8 MiB to `cut_bytes` while operations of this kind, from 4 MiB on or about all of the file, are on
/// their way. Returns how the pipeline ended, and the target, which held no zero before.
async fn cut_while_it_is_read(
    kind: OpKind,
    cut_bytes: u64,
) -> (Result<Option<Finished>, PipelineError>, Vec<u8>) {
    const SIZE: u64 = 8 << 20;
    let bytes = vec![7; usize::try_from(SIZE).unwrap()];
    let storage = MemoryStorage::from_bytes(bytes, 512);
    let open = || HostFile::from_storage("cut".as_ref(), storage.clone().into_dyn()).unwrap();
    let source = Source::of_file(open());
    let held = storage.hold(move |op| {
        op.kind == kind && (op.range.start() >= SIZE / 2 || op.range.len() == SIZE)
    });
    let target = MemoryDevice::from_bytes(vec![0xee; usize::try_from(SIZE).unwrap()]);
    let device: Arc<dyn BlockDevice> = target.clone();
    let disk = DiskId { index: 0, key: 0 };
    let progress = Arc::new(Progress::new(disk, SIZE, EventSender::discard()));
    let pipeline = Pipeline {
        source: &source,
        dirty_only: false,
        digests: false,
        extent_bytes: 1 << 20,
        target: &device,
        connections: 1,
        progress: &progress,
    };
    let comparison = Comparison::<DigestReader>::Everything;
    let ledger = Ledger::new(comparison, None, SIZE, 1 << 20);
    let (alive, _) = mpsc::channel(1);
    let cutting = async {
        while held.count() == 0 {
            tokio::task::yield_now().await;
        }
        open().set_len(cut_bytes).await.unwrap();
        drop(held);
    };
    let (ended, ()) = tokio::join!(pipeline.run(ledger, alive), cutting);
    (ended, target.to_vec())
}

#[tokio::test]
async fn a_source_that_is_cut_while_it_is_read_fails_and_its_lost_end_is_not_sent_as_zeros() {
    // Reads that pass the new end, and a map of the file that calls all of it a hole.
    for (kind, cut_bytes) in [(OpKind::Read, 5 << 20), (OpKind::Map, 0)] {
        let (ended, target) = cut_while_it_is_read(kind, cut_bytes).await;
        let Err(PipelineError::Read { range, cause }) = ended else { panic!("{kind:?}") };
        assert_eq!(range.end(), 8 << 20, "{kind:?}: {range}");
        let told = cause.to_string();
        assert!(
            told.contains(&format!("cut the file from 8388608 bytes to {cut_bytes}")),
            "{told}"
        );
        assert!(target.iter().all(|byte| *byte != 0), "{kind:?}");
    }
}
