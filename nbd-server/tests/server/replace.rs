//! Tables of exports replaced under clients: what stays loses nothing, what goes is closed once it is unused.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use block::{BlockDevice, ByteRange, DeviceError, Durability, MemoryDevice};
use bytes::Bytes;
use nbd_server::client::{Address, ClientOptions, NbdDevice};
use nbd_server::{
    Admission, Export, ExportError, ExtentSource, FlaggedExtent, Peer, Removal, Replacement,
    Server, ServerConfig,
};
use tokio::task::JoinHandle;

use crate::raw::Raw;
use nbd_server::wire::{command, option, reply};

const SIZE: u64 = 256 << 10;

/// A server on a socket of its own.
struct Served {
    server: Server,
    path: PathBuf,
    _dir: tempfile::TempDir,
}

impl Served {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let server = Server::new(ServerConfig::default());
        server.listen_unix(&path).await.unwrap();
        Self { server, path, _dir: dir }
    }

    async fn connect(&self, name: &str) -> Result<Arc<NbdDevice>, nbd_server::client::ClientError> {
        let address = Address::Unix(self.path.clone());
        NbdDevice::connect(&address, name, ClientOptions::default()).await
    }

    fn names(&self) -> Vec<String> {
        self.server.exports().into_iter().map(|export| export.name).collect()
    }
}

fn disk() -> Arc<dyn BlockDevice> {
    MemoryDevice::new(SIZE)
}

fn export(name: &str, device: &Arc<dyn BlockDevice>) -> Export {
    Export::new(name, Arc::clone(device))
}

async fn write(device: &NbdDevice, at: u64, byte: u8) {
    device.write(at, Bytes::from(vec![byte; 512]), Durability::Deferred).await.unwrap();
}

async fn read(device: &dyn BlockDevice, at: u64) -> Vec<u8> {
    device.read(ByteRange::between(at, at + 512)).await.unwrap().to_vec()
}

#[tokio::test]
async fn a_table_is_taken_whole_or_not_at_all() {
    let served = Served::new().await;
    let (one, two) = (disk(), disk());
    served.server.add_export(export("one", &one).default_export(true)).unwrap();
    let broken = [export("two", &two), export("one", &two), export("two", &one)];
    let error = served.server.replace_exports(broken, Removal::Cut).unwrap_err();
    assert_eq!(error, ExportError::Duplicate("two".into()));
    let broken = [export("two", &two).default_export(true), export("", &one)];
    let error = served.server.replace_exports(broken, Removal::Cut).unwrap_err();
    assert_eq!(error, ExportError::DefaultTaken("two".into()));
    assert_eq!(served.names(), ["one"]);
    let client = served.connect("").await.unwrap();
    write(&client, 0, 7).await;
    assert_eq!(read(&*one, 0).await, [7; 512]);
}

#[tokio::test]
async fn what_stays_is_kept_and_what_changed_is_for_new_connections() {
    let served = Served::new().await;
    let (stays, before, after, goes) = (disk(), disk(), disk(), disk());
    let first = [export("stays", &stays), export("changes", &before), export("goes", &goes)];
    let added = served.server.replace_exports(first, Removal::Drain).unwrap();
    assert_eq!(added.added, ["changes", "goes", "stays"]);
    let (old, going) =
        (served.connect("changes").await.unwrap(), served.connect("goes").await.unwrap());
    let staying = served.connect("stays").await.unwrap();
    write(&staying, 0, 1).await;
    let next = [export("changes", &after), export("stays", &stays), export("new", &goes)];
    let replaced = served.server.replace_exports(next, Removal::Drain).unwrap();
    assert_eq!((replaced.added, replaced.changed), (vec!["new".into()], vec!["changes".into()]));
    assert_eq!((replaced.removed, replaced.kept), (vec!["goes".into()], vec!["stays".into()]));
    let counted = served.server.exports().into_iter().find(|one| one.name == "stays").unwrap();
    assert!(counted.connections > 0 && counted.counters.bytes_written == 512);
    let new = served.connect("changes").await.unwrap();
    write(&old, 0, 2).await;
    write(&new, 0, 3).await;
    write(&going, 0, 4).await;
    write(&staying, 512, 5).await;
    assert_eq!((read(&*before, 0).await, read(&*after, 0).await), (vec![2; 512], vec![3; 512]));
    assert!(served.connect("goes").await.is_err());
    drop((old, going));
    for retired in &replaced.retired {
        retired.unused().await;
        retired.device().close().await.unwrap();
    }
    assert_eq!(read(&*new, 0).await, [3; 512]);
    assert_eq!(read(&*staying, 512).await, [5; 512]);
    // The same again changes nothing; another default alone is told.
    let same = [export("changes", &after), export("stays", &stays), export("new", &goes)];
    assert!(served.server.replace_exports(same, Removal::Drain).unwrap().is_empty());
    let same = [export("changes", &after), export("stays", &stays).default_export(true)];
    let replaced = served.server.replace_exports(same, Removal::Drain).unwrap();
    assert!(replaced.default_changed && replaced.changed.is_empty());
    assert_eq!(replaced.removed, ["new"]);
}

#[tokio::test]
async fn cut_connections_end_and_the_device_is_free() {
    let served = Served::new().await;
    let goes = disk();
    served.server.add_export(export("goes", &goes)).unwrap();
    let client = served.connect("goes").await.unwrap();
    write(&client, 0, 1).await;
    let replaced = served.server.replace_exports([], Removal::Cut).unwrap();
    replaced.retired[0].unused().await;
    assert_eq!(replaced.retired[0].connections(), 0);
    assert!(client.read(ByteRange::between(0, 1)).await.is_err());
}

#[tokio::test]
async fn connections_from_before_a_change_go_with_the_export() {
    for at_once in [true, false] {
        let (served, device) = (Served::new().await, disk());
        served.server.add_export(export("disk", &device)).unwrap();
        let mut clients = vec![served.connect("disk").await.unwrap()];
        for text in ["one", "two"] {
            let changed = export("disk", &device).description(text);
            served.server.replace_exports([changed], Removal::Cut).unwrap();
            write(&clients[0], 0, 1).await;
            clients.push(served.connect("disk").await.unwrap());
        }
        if at_once {
            served.server.replace_exports([], Removal::Cut).unwrap();
        } else {
            served.server.remove_export("disk", Removal::Cut).await.unwrap();
        }
        for client in &clients {
            assert!(client.read(ByteRange::between(0, 1)).await.is_err());
        }
    }
}

#[tokio::test]
async fn an_export_is_not_given_back_while_a_client_from_before_a_change_has_its_device() {
    let (served, device) = (Served::new().await, disk());
    served.server.add_export(export("disk", &device)).unwrap();
    let client = served.connect("disk").await.unwrap();
    let changed = export("disk", &device).description("new");
    served.server.replace_exports([changed], Removal::Drain).unwrap();
    let mut removing = Box::pin(served.server.remove_export("disk", Removal::Drain));
    assert!(futures_util::poll!(&mut removing).is_pending());
    write(&client, 0, 1).await;
    assert!(futures_util::poll!(&mut removing).is_pending());
    drop(client);
    removing.await.unwrap();
}

/// Writes and reads back until told to stop; how often it wrote.
fn load(client: Arc<NbdDevice>, region: u64, stop: Arc<AtomicBool>) -> JoinHandle<u64> {
    tokio::spawn(async move {
        let mut round = 0_u64;
        while !stop.load(Ordering::Relaxed) || round == 0 {
            let at = region * 8192 + round % 16 * 512;
            let byte = u8::try_from(round % 251).unwrap() + 1;
            write(&client, at, byte).await;
            assert!(read(&*client, at).await == vec![byte; 512], "region {region}, round {round}");
            round += 1;
        }
        round
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_of_replacements_under_load_loses_nothing() {
    let served = Served::new().await;
    let stays = disk();
    let table = |round: usize| {
        let mut exports = vec![export("stays", &stays)];
        let passing = (0..8).filter(|index| round >> index & 1 == 1);
        exports.extend(passing.map(|index| export(&format!("passing{index}"), &disk())));
        exports
    };
    served.server.replace_exports(table(0), Removal::Drain).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let mut writers = Vec::new();
    for region in 0..4 {
        let client = served.connect("stays").await.unwrap();
        writers.push(load(client, region, Arc::clone(&stop)));
    }
    let mut retired = Vec::new();
    for round in 1..2000_usize {
        let how = if round % 2 == 0 { Removal::Drain } else { Removal::Cut };
        let replaced = served.server.replace_exports(table(round), how).unwrap();
        assert_eq!(replaced.kept, ["stays"]);
        retired.extend(replaced.retired);
        // What does not work changes nothing, and clients come and go all the while.
        let twice = [export("stays", &stays), export("stays", &stays)];
        assert!(served.server.replace_exports(twice, how).is_err());
        if round % 51 == 0 {
            let client = served.connect("stays").await.unwrap();
            write(&client, SIZE - 512, 9).await;
            let passing = served.connect("passing0").await;
            assert_eq!(passing.is_ok(), round & 1 == 1);
        }
    }
    for gone in retired {
        gone.unused().await;
    }
    stop.store(true, Ordering::Relaxed);
    for writer in writers {
        assert!(writer.await.unwrap() > 0);
    }
    let expected: Vec<_> = table(1999).iter().map(|export| export.name().to_owned()).collect();
    let mut names = served.names();
    names.rotate_right(1);
    assert_eq!(names, expected);
}

#[tokio::test]
async fn who_may_not_use_an_export_neither_sees_it_nor_gets_in() {
    let served = Served::new().await;
    let rules = Admission::default().allow(["uid:7".parse().unwrap()]);
    served.server.add_export(export("all", &disk())).unwrap();
    served.server.add_export(export("seven", &disk()).admission(rules)).unwrap();
    for (uid, listed, answer) in [(7, 3, reply::ACK), (8, 2, reply::ERR_POLICY)] {
        let mut raw = Raw::of(&served.server, Peer::Unix { uid });
        raw.greet(3).await;
        assert_eq!(raw.option(option::LIST, &[]).await.len(), listed);
        let told = raw.option(option::INFO, &crate::raw::go("seven")).await;
        assert_eq!(told.last().unwrap().0, answer);
    }
    served.server.set_listing(false);
    let mut raw = Raw::new(&served.server);
    raw.greet(3).await;
    assert_eq!(raw.option(option::LIST, &[]).await[0].0, reply::ERR_POLICY);
    served.server.set_admission(Admission::nobody());
    let mut raw = Raw::new(&served.server);
    assert!(raw.rest().await.is_empty());
}

#[tokio::test]
async fn exports_and_who_may_have_them_change_at_one_stroke() {
    let served = Served::new().await;
    served.server.add_export(export("old", &disk())).unwrap();
    let seven = || Admission::default().allow(["uid:7".parse().unwrap()]);
    // Connected, and let in, before.
    let mut clients = Vec::new();
    for uid in [7, 8] {
        let mut raw = Raw::of(&served.server, Peer::Unix { uid });
        raw.greet(3).await;
        clients.push(raw);
    }
    let broken = [export("twice", &disk()), export("twice", &disk())];
    let refused = served.server.replace(Replacement::of(broken).admission(seven()).listing(false));
    assert_eq!(refused.unwrap_err(), ExportError::Duplicate("twice".into()));
    for raw in &mut clients {
        assert_eq!(raw.option(option::LIST, &[]).await.len(), 2, "nothing has changed");
    }
    let next = Replacement::of([export("new", &disk())]).admission(seven());
    served.server.replace(next).unwrap();
    for (raw, (listed, answer)) in clients.iter_mut().zip([(2, reply::ACK), (1, reply::ERR_POLICY)])
    {
        assert_eq!(raw.option(option::LIST, &[]).await.len(), listed);
        let told = raw.option(option::GO, &crate::raw::go("new")).await;
        assert_eq!(told.last().unwrap().0, answer);
    }
    assert!(Raw::of(&served.server, Peer::Unix { uid: 8 }).rest().await.is_empty());
}

/// Knows one flag of everything.
struct Flagged;

#[async_trait]
impl ExtentSource for Flagged {
    async fn extents(&self, range: ByteRange) -> Result<Vec<FlaggedExtent>, DeviceError> {
        Ok(vec![FlaggedExtent { range, flags: 1 }])
    }
}

#[tokio::test]
async fn a_context_that_is_gone_when_its_export_is_entered_is_not_told_of() {
    let device = disk();
    let server = Server::new(ServerConfig::default());
    let export = || Export::new("disk", Arc::clone(&device));
    server.add_export(export().context("x:y", Arc::new(Flagged))).unwrap();
    let mut raw = Raw::new(&server);
    raw.greet(3).await;
    raw.option(option::STRUCTURED_REPLY, &[]).await;
    let data = b"\0\0\0\x04disk\0\0\0\x02\0\0\0\x03x:y\0\0\0\x0fbase:allocation";
    assert_eq!(raw.option(option::SET_META_CONTEXT, data).await.len(), 3);
    server.replace_exports([export()], Removal::Drain).unwrap();
    raw.go("disk").await;
    raw.request(command::BLOCK_STATUS, 0, 1, 0, 4096).await;
    let reply = raw.reply().await;
    assert_eq!((reply.error, reply.content.len()), (0, 1), "{}", reply.text);
}
