//! Foreign clients: libnbd's and QEMU's programs, and fio. A client that is missing fails its test.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use block::MemoryDevice;
use nbd_server::{Export, Server, ServerConfig};
use tempfile::TempDir;

/// How long a client may take before it counts as hung.
const PATIENCE_SECS: &str = "40";

/// A server with exports "disk" (writable, also the default) and "fixed" (read-only) on a Unix socket and on TCP.
struct Stage {
    server: Server,
    dir: TempDir,
    port: u16,
    disk: Arc<MemoryDevice>,
}

const SIZE: u64 = 8 << 20;

impl Stage {
    async fn new() -> Self {
        let disk = MemoryDevice::new(SIZE);
        let fixed = MemoryDevice::read_only(pattern(1 << 20));
        let server = Server::new(ServerConfig::default());
        let first = Export::new("disk", Arc::clone(&disk) as _);
        server.add_export(first.default_export(true).description("a first disk")).unwrap();
        server.add_export(Export::new("fixed", fixed)).unwrap();
        let dir = tempfile::tempdir().unwrap();
        server.listen_unix(&dir.path().join("socket")).await.unwrap();
        let address = server.listen_tcp("127.0.0.1:0".parse().unwrap()).await.unwrap();
        Self { server, dir, port: address.port(), disk }
    }

    fn unix(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.path("socket").display())
    }

    fn tcp(&self, export: &str) -> String {
        format!("nbd://127.0.0.1:{}/{export}", self.port)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs a client to its success; what it printed.
    async fn run(&self, program: &str, arguments: &[&str]) -> String {
        let output = run(program, arguments, self.dir.path()).await;
        let (out, err) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{program} {arguments:?}: {out}{err}");
        out.into_owned()
    }

    /// Runs a script of libnbd's Python shell with a handle `h` that is not yet connected, `uri`, and `socket`.
    async fn nbdsh(&self, script: &str) -> String {
        let prelude = format!(
            "uri = '{}'\nsocket = '{}'\n",
            self.unix("disk"),
            self.path("socket").display()
        );
        self.run("nbdsh", &["-c", &prelude, "-c", script]).await
    }
}

pub(crate) async fn run(program: &str, arguments: &[&str], dir: &Path) -> Output {
    let mut command = Command::new("timeout");
    command.args([PATIENCE_SECS, program]).args(arguments).current_dir(dir);
    // libnbd's Python module belongs to the system's interpreter, which need not be the first one in the path.
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("/usr/bin:{path}"));
    tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap()
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| u8::try_from(at / 512 % 251).unwrap() + 1).collect()
}

#[tokio::test]
async fn nbdinfo_lists_both_exports_with_their_abilities() {
    let stage = Stage::new().await;
    for base in [stage.unix(""), stage.tcp("")] {
        let json = stage.run("nbdinfo", &["--json", "--list", &base]).await;
        for text in [
            "\"structured\": true",
            "\"export-name\": \"disk\"",
            "\"export-name\": \"fixed\"",
            "\"description\": \"a first disk\"",
            "\"export-size\": 8388608",
            "\"can_multi_conn\": true",
            "\"can_fast_zero\": true",
            "\"can_df\": true",
            "\"can_cache\": true",
            "\"block_size_minimum\": 1",
            "\"block_size_maximum\": 33554432",
            "\"base:allocation\"",
        ] {
            assert!(json.contains(text), "{text} is not in {json}");
        }
    }
    assert_eq!(stage.run("nbdinfo", &["--size", &stage.tcp("")]).await.trim(), SIZE.to_string());
}

#[tokio::test]
async fn nbdinfo_maps_data_and_zeros() {
    let stage = Stage::new().await;
    stage.run("qemu-io", &["-f", "raw", "-c", "write -P 7 1M 64k", &stage.unix("disk")]).await;
    let map = stage.run("nbdinfo", &["--map", &stage.unix("disk")]).await;
    let lines: Vec<Vec<&str>> =
        map.lines().map(|line| line.split_whitespace().take(3).collect()).collect();
    let expected = [["0", "1048576", "2"], ["1048576", "65536", "0"], ["1114112", "7274496", "2"]];
    assert_eq!(lines, expected);
}

#[tokio::test]
async fn nbdcopy_brings_bytes_there_and_back() {
    let stage = Stage::new().await;
    let mut bytes = pattern(usize::try_from(SIZE).unwrap());
    bytes[1 << 20..3 << 20].fill(0);
    std::fs::write(stage.path("in"), &bytes).unwrap();
    stage.run("nbdcopy", &["--flush", "in", &stage.unix("disk")]).await;
    assert!(stage.disk.to_vec() == bytes);
    stage.run("nbdcopy", &[&stage.tcp("disk"), "out"]).await;
    assert!(std::fs::read(stage.path("out")).unwrap() == bytes);
    let counters = stage.server.exports()[0].counters;
    assert!(counters.connections >= 4, "several connections: {counters:?}");
    assert_eq!(counters.errors, 0);
}

#[tokio::test]
async fn qemu_img_converts_both_ways_and_maps() {
    let stage = Stage::new().await;
    let mut bytes = pattern(usize::try_from(SIZE).unwrap());
    bytes[4 << 20..6 << 20].fill(0);
    std::fs::write(stage.path("in"), &bytes).unwrap();
    let uri = stage.tcp("disk");
    let convert = ["convert", "-n", "-f", "raw", "-O", "raw", "in", &uri];
    stage.run("qemu-img", &convert).await;
    assert!(stage.disk.to_vec() == bytes);
    stage.run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &uri, "out"]).await;
    stage.run("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", "out", &uri]).await;
    let info = stage.run("qemu-img", &["info", "-f", "raw", "--output=json", &uri]).await;
    assert!(info.contains("\"virtual-size\": 8388608"), "{info}");
    let map = stage.run("qemu-img", &["map", "-f", "raw", "--output=json", &uri]).await;
    assert!(map.contains("\"zero\": true") && map.contains("\"zero\": false"), "{map}");
    let fixed = stage.unix("fixed");
    stage.run("qemu-img", &["convert", "-f", "raw", "-O", "raw", &fixed, "fixed"]).await;
    assert!(std::fs::read(stage.path("fixed")).unwrap() == pattern(1 << 20));
}

#[tokio::test]
async fn qemu_io_writes_zeroes_discards_flushes_and_reads_back() {
    let stage = Stage::new().await;
    let uri = stage.unix("");
    let mut arguments = vec!["-f", "raw", "-t", "writethrough", "-d", "unmap"];
    for command in [
        "write -P 17 1000 70000",
        "write -f -P 18 1M 512",
        "write -z 4k 8k",
        "write -z -u 32k 4k",
        "discard 16k 8k",
        "flush",
        "read -P 17 1000 3096",
        "read -P 0 4k 8k",
        "read -P 0 32k 4k",
        "read -P 17 12k 4k",
        "read -P 18 1M 512",
    ] {
        arguments.extend(["-c", command]);
    }
    arguments.push(&uri);
    let out = stage.run("qemu-io", &arguments).await;
    assert!(!out.contains("failed"), "{out}");
    let fixed = stage.unix("fixed");
    let refused =
        run("qemu-io", &["-f", "raw", "-c", "write 0 512", &fixed], stage.dir.path()).await;
    assert!(!refused.status.success());
}

#[tokio::test]
async fn libnbd_meets_the_documented_errors_when_it_is_not_strict() {
    let stage = Stage::new().await;
    let out = stage
        .nbdsh(
            r"
import errno
h.set_strict_mode(0)
h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
h.connect_uri(uri)
size = h.get_size()
def refused(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except nbd.Error as error:
        return errno.errorcode[error.errnum]
    return 'ok'
status = lambda *a: 0
assert refused(h.pread, 512, size) == 'EINVAL'
assert refused(h.pread, 512, 0, flags=1 << 14) == 'EINVAL'
assert refused(h.pwrite, b'x' * 512, size - 1) == 'ENOSPC'
assert refused(h.pwrite, b'x' * 512, 0, flags=nbd.CMD_FLAG_DF) == 'EINVAL'
assert refused(h.zero, 512, size) == 'ENOSPC'
assert refused(h.trim, 512, size) == 'EINVAL'
assert refused(h.cache, 512, size) == 'EINVAL'
assert refused(h.block_status, 512, size, status) == 'EINVAL'
assert refused(h.block_status, 0, 0, status) == 'EINVAL'
for flags in (0, nbd.CMD_FLAG_FUA):
    assert refused(h.pwrite, b'', 0, flags=flags) == 'ok'
    assert refused(h.pwrite, b'x' * 512, 0, flags=flags) == 'ok'
    assert refused(h.pread, 512, 0, flags=flags) == 'ok'
    assert refused(h.cache, 512, 0, flags=flags) == 'ok'
    assert refused(h.flush, flags=flags) == 'ok'
    assert refused(h.trim, 512, 0, flags=flags) == 'ok'
    assert refused(h.block_status, 512, 0, status, flags=flags) == 'ok'
assert refused(h.zero, size, 0, nbd.CMD_FLAG_NO_HOLE) == 'ok'
assert bytes(h.pread(512, 0)) == bytes(512)
h.shutdown()
r = nbd.NBD()
r.set_strict_mode(0)
r.set_export_name('fixed')
r.connect_unix(socket)
assert refused(r.pwrite, b'x' * 512, 0) == 'EPERM'
assert refused(r.zero, 512, 0) == 'EPERM'
assert refused(r.trim, 512, 0) == 'EPERM'
assert len(r.pread(512, 0)) == 512
r.shutdown()
print('passed')
",
        )
        .await;
    assert_eq!(out.trim(), "passed");
}

#[tokio::test]
async fn libnbd_haggles_in_every_way_it_can() {
    let stage = Stage::new().await;
    let out = stage
        .nbdsh(
            r"
for simple in (False, True):
    for flags in (0, nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE, 3):
        o = nbd.NBD()
        o.set_handshake_flags(flags)
        o.set_request_structured_replies(not simple)
        o.set_export_name('fixed')
        o.connect_unix(socket)
        assert o.get_size() == 1 << 20
        assert o.get_structured_replies_negotiated() == (not simple and flags & 1 == 1)
        assert o.pread(512, 512) == bytearray([2]) * 512
        o.shutdown()
h.set_opt_mode(True)
h.connect_unix(socket)
names = []
h.opt_list(lambda name, text: names.append((name, text)))
assert names == [('disk', 'a first disk'), ('fixed', '')], names
found = []
h.set_export_name('')
assert h.opt_list_meta_context(lambda name: found.append(name)) == 1
assert found == ['base:allocation']
h.set_full_info(True)
h.opt_info()
assert h.get_canonical_export_name() == 'disk'
assert h.get_export_description() == 'a first disk'
h.set_export_name('nosuch')
try:
    h.opt_go()
    assert False
except nbd.Error:
    pass
h.set_export_name('x' * 4096)
try:
    h.opt_info()
    assert False
except nbd.Error:
    pass
h.set_export_name('disk')
h.opt_go()
h.shutdown()
a = nbd.NBD()
a.set_opt_mode(True)
a.connect_unix(socket)
a.opt_abort()
print('passed')
",
        )
        .await;
    assert_eq!(out.trim(), "passed");
}

#[tokio::test(flavor = "multi_thread")]
async fn fio_verifies_what_it_wrote_at_random() {
    let stage = Stage::new().await;
    let uri = format!("--uri={}", stage.unix("disk"));
    let arguments = [
        "--name=verify",
        "--ioengine=nbd",
        &uri,
        "--rw=randwrite",
        "--bsrange=512-64k",
        "--blockalign=512",
        "--norandommap=0",
        "--size=8m",
        "--iodepth=32",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--do_verify=1",
    ];
    stage.run("fio", &arguments).await;
    let counters = stage.server.exports()[0].counters;
    assert_eq!(counters.errors, 0);
    assert!(counters.bytes_written >= SIZE && counters.bytes_read >= SIZE);
}
