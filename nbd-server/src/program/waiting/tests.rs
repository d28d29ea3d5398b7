use proptest::prelude::*;

use super::*;
use crate::program::made::Made;

/// The last block is short.
const SIZE: u64 = 21 * BLOCK_BYTES + 1000;

#[derive(Clone, Debug)]
enum Step {
    Write(u64, u64, u8),
    Zero(u64, u64),
    Discard(u64, u64),
    /// Flushed, dropped and opened again.
    Crash,
}

fn any_range() -> impl Strategy<Value = (u64, u64)> {
    let whole = (0..SIZE.div_ceil(BLOCK_BYTES), 1..6_u64)
        .prop_map(|(block, blocks)| (block * BLOCK_BYTES, blocks * BLOCK_BYTES));
    let any = (0..SIZE, 1..3 * BLOCK_BYTES);
    prop_oneof![3 => whole, 1 => any].prop_map(|(at, len)| (at, len.min(SIZE - at)))
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (any_range(), 1_u8..).prop_map(|((at, len), byte)| Step::Write(at, len, byte)),
        3 => any_range().prop_map(|(at, len)| Step::Zero(at, len)),
        1 => any_range().prop_map(|(at, len)| Step::Discard(at, len)),
        1 => Just(Step::Crash),
    ]
}

fn place(at: u64, len: u64) -> std::ops::Range<usize> {
    usize::try_from(at).unwrap()..usize::try_from(at + len).unwrap()
}

/// What is known of the disk.
struct Model(Vec<Option<u8>>);

impl Model {
    /// Whether every block that the range covers in part is known; then it is what `byte` says.
    fn take(&mut self, at: u64, len: u64, byte: u8) -> bool {
        let range = ByteRange::new(at, len).unwrap();
        let takes = range.widen(BLOCK_BYTES).pieces(BLOCK_BYTES).all(|block| {
            let block = block.intersection(ByteRange::between(0, SIZE));
            let covered = block.start() >= range.start() && block.end() <= range.end();
            covered || self.0[place(block.start(), block.len())].iter().all(Option::is_some)
        });
        if takes {
            self.0[place(at, len)].fill(Some(byte));
        }
        takes
    }

    async fn is_shown_by(&self, device: &Waiting) {
        for block in ByteRange::between(0, SIZE).pieces(BLOCK_BYTES) {
            let known: Option<Vec<u8>> =
                self.0[place(block.start(), block.len())].iter().copied().collect();
            match (known, device.read(block).await) {
                (Some(known), Ok(read)) => assert!(read.to_vec() == known, "{block}"),
                (None, Err(error)) => {
                    assert_eq!(error.kind(), block::ErrorKind::Io);
                    assert!(error.to_string().starts_with("the image has not come"), "{error}");
                }
                (known, read) => panic!("{block}: {:?} {}", known.is_some(), read.is_ok()),
            }
        }
        let all_known = self.0.iter().all(Option::is_some);
        assert_eq!(device.read(ByteRange::between(0, SIZE)).await.is_ok(), all_known);
    }
}

fn spec(dir: &std::path::Path) -> ExportSpec {
    let path = dir.join("disk");
    ExportSpec { path, waits: true, raw_unless_said: true, size: Some(SIZE), ..Default::default() }
}

async fn open(spec: &ExportSpec) -> anyhow::Result<Arc<Waiting>> {
    let (how, mut made) = (Opening::default(), Made::default());
    let key = diff::find(spec, &how, &mut made).await?.unwrap();
    let waiting = Waiting::open(spec, &key, &how).await?;
    made.keep();
    Ok(waiting)
}

async fn imitate(steps: Vec<Step>) {
    let dir = tempfile::tempdir().unwrap();
    let spec = spec(dir.path());
    let mut device = open(&spec).await.unwrap();
    let mut model = Model(vec![None; usize::try_from(SIZE).unwrap()]);
    for step in steps {
        let (done, takes) = match step {
            Step::Write(at, len, byte) => {
                let data = vec![byte; usize::try_from(len).unwrap()];
                let done = device.write(at, data.into(), Durability::Deferred).await;
                (done, model.take(at, len, byte))
            }
            Step::Zero(at, len) => {
                let (range, mode) = (ByteRange::new(at, len).unwrap(), ZeroMode::default());
                let done = device.write_zeroes(range, mode, Durability::Deferred).await;
                (done, model.take(at, len, 0))
            }
            Step::Discard(at, len) => {
                let range = ByteRange::new(at, len).unwrap();
                (device.discard(range, Durability::Deferred).await, true)
            }
            Step::Crash => {
                device.flush().await.unwrap();
                drop(device);
                device = open(&spec).await.unwrap();
                (Ok(()), true)
            }
        };
        assert_eq!(done.is_ok(), takes, "{done:?}");
        if let Err(error) = done {
            assert!(error.to_string().contains("whole blocks of 4096 bytes"), "{error}");
        }
    }
    model.is_shown_by(&device).await;
    let before: Vec<u8> = (1..=255).cycle().take(usize::try_from(SIZE).unwrap()).collect();
    std::fs::write(&spec.path, &before).unwrap();
    let bytes = device.merge(&Opening::default()).await.unwrap();
    assert_eq!(bytes, model.0.iter().flatten().count() as u64);
    let expected: Vec<u8> =
        model.0.iter().zip(&before).map(|(known, before)| known.unwrap_or(*before)).collect();
    assert!(std::fs::read(&spec.path).unwrap() == expected);
    assert!(device.read(ByteRange::between(0, SIZE)).await.unwrap().to_vec() == expected);
    device.write(5, Bytes::from_static(b"ab"), Durability::Deferred).await.unwrap();
    device.close().await.unwrap();
    assert_eq!(std::fs::read(&spec.path).unwrap()[5..7], *b"ab");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "the image alone");
}

#[tokio::test]
async fn the_file_of_another_disk_or_of_somebody_else_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let spec = spec(dir.path());
    let waiting = open(&spec).await.unwrap();
    let error = open(&spec).await.err().unwrap();
    assert!(format!("{error:#}").contains("cannot lock"), "one has it: {error:#}");
    waiting.close().await.unwrap();
    let larger = ExportSpec { size: Some(SIZE + 1), ..spec.clone() };
    let error = open(&larger).await.err().unwrap().to_string();
    assert!(error.ends_with("filesize says 87017"), "{error}");
    // One folder for the writes to two images of one name.
    let diff_folder = Some(dir.path().to_owned());
    let other = ExportSpec { path: "/elsewhere/disk".into(), diff_folder, ..spec.clone() };
    let error = open(&other).await.err().unwrap().to_string();
    assert!(error.ends_with("the image ./disk, and not /elsewhere/disk"), "{error}");
    let path = diff::path_of(&spec);
    std::fs::write(&path, "a text").unwrap();
    let error = format!("{:#}", open(&spec).await.err().unwrap());
    assert!(error.contains("keeps writes") && error.contains("remove it"), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), b"a text");
    std::fs::write(&path, "").unwrap();
    open(&spec).await.unwrap().close().await.unwrap();
}

#[tokio::test]
async fn a_merge_that_fails_leaves_the_file_and_those_who_wait() {
    let dir = tempfile::tempdir().unwrap();
    let (spec, how) = (spec(dir.path()), Opening::default());
    let device = open(&spec).await.unwrap();
    let block = ByteRange::between(0, BLOCK_BYTES);
    device.write(0, vec![7; 4096].into(), Durability::Deferred).await.unwrap();
    let error = format!("{:#}", device.merge(&how).await.unwrap_err());
    assert!(error.contains("cannot open") && error.contains("No such file"), "{error}");
    std::fs::write(&spec.path, [1; 5000]).unwrap();
    let error = format!("{:#}", device.merge(&how).await.unwrap_err());
    assert!(error.contains("has 5000 bytes, and filesize says 87016"), "{error}");
    assert_eq!(std::fs::read(&spec.path).unwrap(), [1; 5000]);
    assert!(!device.has_come() && device.read(block).await.unwrap().to_vec() == [7; 4096]);
    // Nobody is left in the way.
    std::fs::File::options().write(true).open(&spec.path).unwrap().set_len(SIZE).unwrap();
    assert_eq!(device.merge(&how).await.unwrap(), BLOCK_BYTES);
    assert!(device.has_come());
    device.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn nothing_is_lost_of_what_is_written_while_it_merges() {
    let dir = tempfile::tempdir().unwrap();
    let spec = spec(dir.path());
    let device = open(&spec).await.unwrap();
    let all = vec![1; usize::try_from(SIZE).unwrap()];
    device.write(0, all.into(), Durability::Deferred).await.unwrap();
    std::fs::write(&spec.path, vec![9; usize::try_from(SIZE).unwrap()]).unwrap();
    let writers: Vec<_> = (0..20)
        .map(|block| {
            let device = Arc::clone(&device);
            tokio::spawn(async move {
                let (mut last, mut behind) = (1, 0);
                // Some more behind the merge, so that both sides of it are written.
                while behind < 3 {
                    behind += u8::from(device.has_come());
                    last = last % 250 + 1;
                    let data = Bytes::from(vec![last; 4096]);
                    device.write(block * BLOCK_BYTES, data, Durability::Deferred).await.unwrap();
                    let range = ByteRange::new(block * BLOCK_BYTES, 4096).unwrap();
                    assert_eq!(device.read(range).await.unwrap().to_vec(), vec![last; 4096]);
                }
                last
            })
        })
        .collect();
    device.merge(&Opening::default()).await.unwrap();
    let mut expected = vec![1; usize::try_from(SIZE).unwrap()];
    for (block, writer) in (0..).zip(writers) {
        expected[place(block * BLOCK_BYTES, BLOCK_BYTES)].fill(writer.await.unwrap());
    }
    device.close().await.unwrap();
    assert!(std::fs::read(&spec.path).unwrap() == expected);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn what_was_written_is_known_and_gets_into_the_image(
        steps in proptest::collection::vec(any_step(), 0..24),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(imitate(steps));
    }
}
