//! The same extended requests to this server and to qemu-nbd: where the document leaves no choice, both answer alike.
//! What both answer is held against the rules of all replies by `peer`, which so is judged itself.

use std::path::PathBuf;
use std::process::Command;

use nbd_server::wire::{Headers, command, command_flag as flag, error};
use tempfile::TempDir;
use tokio::net::UnixStream;

use crate::peer::{FIXED, Peer, Reply};
use crate::stage::{SIZE, STRIPES, Stage, Transport};

/// A running qemu-nbd that exports a raw image as "disk", ended when dropped.
struct Qemu {
    dir: TempDir,
}

impl Qemu {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("disk"), vec![0; usize::try_from(SIZE).unwrap()]).unwrap();
        let status = Command::new("qemu-nbd")
            .args([
                "--fork",
                "--persistent",
                "--format=raw",
                "--export-name=disk",
                "--discard=unmap",
            ])
            .args(["--allocation-depth", "--pid-file=pid", "--socket"])
            .args([dir.path().join("socket"), PathBuf::from("disk")])
            .current_dir(dir.path())
            .status()
            .expect("qemu-nbd (qemu-utils) must be installed");
        assert!(status.success());
        Self { dir }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let pid = std::fs::read_to_string(self.dir.path().join("pid")).unwrap_or_default();
        let _ = Command::new("kill").args(["-KILL", pid.trim()]).output();
    }
}

/// What was asked, with the payload of what is no WRITE.
type Question = (u16, u16, u64, u64, Vec<u8>);

/// Requests whose answers the document fixes; `ids` are two contexts.
fn questions(ids: [u32; 2]) -> Vec<Question> {
    let payload = flag::PAYLOAD_LEN;
    let bare = |command, flags, offset, len| (command, flags, offset, len, Vec::new());
    let mut all = Vec::new();
    for (offset, len) in [(0, 4096), (100, 70_000), (SIZE - 1, 1), (SIZE, 1), (SIZE - 1, 2)] {
        let data = vec![5; usize::try_from(len).unwrap()];
        all.push((command::WRITE, payload, offset, len, data));
        for command in [command::READ, command::CACHE, command::TRIM, command::WRITE_ZEROES] {
            all.push(bare(command, 0, offset, len));
        }
    }
    for command in [command::READ, command::TRIM, command::WRITE_ZEROES, command::CACHE] {
        for (offset, len) in [(0, SIZE + 1), (0, 1 << 40), (1, u64::MAX), (u64::MAX, 1)] {
            all.push(bare(command, 0, offset, len));
        }
        all.push(bare(command, 1 << 15, 0, 512));
        all.push((command, payload, 0, 100, vec![1; 100]));
    }
    all.push(bare(command::FLUSH, 0, 0, 0));
    all.push((99, payload, 0, 100, vec![1; 100]));
    all.push(bare(99, 0, 0, 512));
    // No flags: what the clients of qemu-nbd send.
    all.push((command::WRITE, 0, 8192, 512, vec![6; 512]));
    all.push(bare(command::READ, 0, 8192, 512));
    all.push(bare(command::BLOCK_STATUS, flag::REQ_ONE, 0, SIZE));
    all.push(bare(command::BLOCK_STATUS, 0, 0, SIZE + 1));
    let unknown = ids[0].max(ids[1]) + 1;
    for wanted in [&ids[..1], &ids[1..], &[ids[1], ids[0]], &[ids[0]; 2], &[unknown]] {
        let mut list = 512_u64.to_be_bytes().to_vec();
        wanted.iter().for_each(|id| list.extend(id.to_be_bytes()));
        all.push((command::BLOCK_STATUS, payload, 0, list.len() as u64, list));
    }
    for len in [1, 7, 9, 13, 100] {
        all.push((command::BLOCK_STATUS, payload, 0, len as u64, vec![0; len]));
    }
    all
}

/// The answers to all questions of a client that has negotiated extended headers and two contexts.
async fn answers(mut peer: Peer, contexts: [&str; 2]) -> Vec<(Question, Reply)> {
    peer.negotiate(Headers::Extended).await;
    let selected = peer.select("disk", &contexts).await;
    let [(first, _), (second, _)] = selected[..] else { panic!("{selected:?}") };
    peer.go("disk").await;
    let mut all = Vec::new();
    for question in questions([first, second]) {
        let (command, flags, offset, len, payload) = &question;
        let asked = peer.start(*command, *flags, *offset, *len).await;
        peer.send(payload).await;
        let (_, reply) = peer.reply(&[asked]).await;
        all.push((question, reply));
    }
    all
}

#[tokio::test]
async fn qemu_nbd_answers_extended_requests_alike() {
    let (stage, qemu) = (Stage::new().await, Qemu::start());
    let ours = Peer::fixed(&stage, Transport::Unix).await;
    let stream = UnixStream::connect(qemu.dir.path().join("socket")).await.unwrap();
    let mut theirs = Peer::on(Box::new(stream));
    theirs.greet(FIXED).await;
    let ours = answers(ours, ["base:allocation", STRIPES]).await;
    let theirs = answers(theirs, ["base:allocation", "qemu:allocation-depth"]).await;
    assert_eq!(ours.len(), theirs.len());
    let mut different = Vec::new();
    for ((question, ours), (_, theirs)) in ours.iter().zip(&theirs) {
        let (command, flags, offset, len, _) = question;
        // The document wants ENOSPC for a write past the end; qemu-nbd 10.0 says EINVAL.
        let is_past_end = (ours.error, theirs.error) == (error::ENOSPC, error::EINVAL);
        let is_alike = (ours.error == theirs.error || is_past_end)
            && ours.data == theirs.data
            && ours.status.len() == theirs.status.len();
        if !is_alike {
            let told = |reply: &Reply| format!("{} {:?}", reply.error, reply.text);
            let (ours, theirs) = (told(ours), told(theirs));
            let asked = format!("{command} with {flags:#x}: {len} at {offset}");
            different.push(format!("{asked}: ours {ours}, theirs {theirs}"));
        }
    }
    assert!(different.is_empty(), "{different:#?}");
}
