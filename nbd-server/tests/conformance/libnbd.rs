//! The same through libnbd with its own checks switched off, as far as that library goes: it sends what it is told, and
//! closes its handle when a reply breaks the protocol. QEMU's client speaks extended headers, which an old libnbd does
//! not.

use std::process::Command;

use crate::stage::{Stage, Transport};

/// How long a client may take before it counts as hung.
const PATIENCE_SECS: &str = "60";

/// Runs a client to its success; what it printed.
async fn run(stage: &Stage, program: &str, arguments: &[&str]) -> String {
    let mut command = Command::new("timeout");
    command.args([PATIENCE_SECS, program]).args(arguments);
    command.current_dir(stage.socket().parent().unwrap());
    // libnbd's Python module belongs to the system's interpreter, which need not be the first one in the path.
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("/usr/bin:{path}"));
    let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    let told = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (told(&output.stdout), told(&output.stderr));
    assert!(output.status.success(), "{program} {arguments:?}: {out}{err}");
    out
}

fn uri(stage: &Stage, transport: Transport, export: &str) -> String {
    match transport {
        Transport::Unix => format!("nbd+unix:///{export}?socket={}", stage.socket().display()),
        Transport::Tcp => format!("nbd://127.0.0.1:{}/{export}", stage.port()),
        #[cfg(feature = "tls")]
        Transport::Tls => panic!("what libnbd does over TLS is told in the server's tests"),
    }
}

/// What every script begins with: handles in each of the ways, without libnbd's own checks.
const PRELUDE: &str = "
import errno

def handles():
    for extended in (False, True):
        for structured in (False, True):
            h = nbd.NBD()
            h.set_strict_mode(0)
            h.set_request_structured_replies(structured)
            if extended:
                if not hasattr(h, 'set_request_extended_headers'):
                    continue
                h.set_request_extended_headers(True)
            elif hasattr(h, 'set_request_extended_headers'):
                h.set_request_extended_headers(False)
            chunks = structured or extended
            if chunks:
                h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
                h.add_meta_context('x-test:stripes')
            yield h, chunks, extended

def told(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except nbd.Error as error:
        return errno.errorcode[error.errnum]
    return 'ok'

status = lambda context, offset, entries, error: 0
";

/// Runs a script over both transports, with `uri` and `fixed`.
async fn nbdsh(script: &str) {
    let stage = Stage::new().await;
    for transport in Transport::ALL {
        let places = format!(
            "uri = '{}'\nfixed = '{}'\n",
            uri(&stage, transport, "disk"),
            uri(&stage, transport, "fixed")
        );
        let arguments = ["-c", PRELUDE, "-c", &places, "-c", script, "-c", "print('passed')"];
        assert_eq!(run(&stage, "nbdsh", &arguments).await.trim(), "passed");
    }
}

#[tokio::test]
async fn libnbd_meets_the_documented_errors_in_every_way() {
    nbdsh(
        r"
for h, chunks, extended in handles():
    h.connect_uri(uri)
    size = h.get_size()
    for at, len in ((size, 1), (size - 1, 2), (2**63 - 512, 512)):
        assert told(h.pread, len, at) == 'EINVAL'
        assert told(h.trim, len, at) == 'EINVAL'
        assert told(h.cache, len, at) == 'EINVAL'
        assert told(h.zero, len, at) == 'ENOSPC'
        assert told(h.pwrite, b'x' * len, at) == 'ENOSPC'
        if chunks:
            assert told(h.block_status, len, at, status) == 'EINVAL'
    for bit in (2, 8, 16, 1 << 14):
        assert told(h.pread, 512, 0, flags=bit) == 'EINVAL', bit
    for bit in (2, 4, 8, 16, 1 << 14):
        assert told(h.pwrite, b'x' * 512, 0, flags=bit) == 'EINVAL', bit
        assert told(h.trim, 512, 0, flags=bit) == 'EINVAL', bit
        assert told(h.cache, 512, 0, flags=bit) == 'EINVAL', bit
        assert told(h.flush, flags=bit) == 'EINVAL', bit
    for bit in (4, 8, 1 << 14):
        assert told(h.zero, 512, 0, flags=bit) == 'EINVAL', bit
    assert told(h.pread, 0, 0) == 'ok'
    assert told(h.pwrite, b'', 0) == 'ok'
    assert told(h.trim, 0, 0) == 'ok'
    assert told(h.zero, 0, 0) == 'ok'
    assert bytes(h.pread(size, 0)) == bytes(size)
    h.shutdown()
    h = nbd.NBD()
    h.set_strict_mode(0)
    h.connect_uri(fixed)
    assert h.is_read_only()
    assert told(h.pwrite, b'x' * 512, 0) == 'EPERM'
    assert told(h.zero, 512, 0) == 'EPERM'
    assert told(h.trim, 512, 0) == 'EPERM'
    assert told(h.flush) == 'ok'
    h.shutdown()
",
    )
    .await;
}

#[tokio::test]
async fn libnbd_finds_no_fault_with_what_works() {
    nbdsh(
        r"
for h, chunks, extended in handles():
    h.connect_uri(uri)
    assert h.get_structured_replies_negotiated() == chunks
    assert h.can_df() == chunks
    assert h.can_multi_conn() and h.can_flush() and h.can_fua() and h.can_cache()
    assert h.can_trim() and h.can_zero() and h.can_fast_zero()
    fua = nbd.CMD_FLAG_FUA
    for flags in (0, fua):
        h.pwrite(b'\x07' * 70000, 1000, flags)
        h.zero(8192, 4096, flags | nbd.CMD_FLAG_NO_HOLE)
        h.zero(8192, 16384, flags | nbd.CMD_FLAG_FAST_ZERO)
        h.trim(4096, 32768, flags)
        h.cache(65536, 0, flags)
        h.flush(flags)
        assert told(h.zero, 100, 100, nbd.CMD_FLAG_FAST_ZERO | flags) == 'ENOTSUP'
        expected = bytearray(b'\0' * 1000 + b'\x07' * 70000)
        for at, count in ((4096, 8192), (16384, 8192), (32768, 4096)):
            expected[at:at + count] = bytes(count)
        assert h.pread(71000, 0, flags) == expected
        if not chunks:
            continue
        assert h.pread(65536, 0, flags | nbd.CMD_FLAG_DF) == expected[:65536]
        pieces = []
        def piece(data, at, kind, error):
            pieces.append((at, len(data), kind))
        h.pread_structured(71000, 0, piece, flags)
        assert sum(count for at, count, kind in pieces) == 71000
        assert {kind for at, count, kind in pieces} == {nbd.READ_DATA, nbd.READ_HOLE}
        found = {}
        def note(context, offset, entries, error):
            assert context not in found
            found[context] = list(entries)
        h.block_status(h.get_size(), 0, note, flags)
        assert set(found) == {'base:allocation', 'x-test:stripes'}
        assert found['x-test:stripes'][:4] == [65536, 0, 65536, 1]
        assert sum(found['base:allocation'][::2]) == h.get_size()
        found.clear()
        h.block_status(1000, 100, note, flags | nbd.CMD_FLAG_REQ_ONE)
        assert all(len(entries) == 2 for entries in found.values())
    h.zero(h.get_size(), 0)
    h.shutdown()
",
    )
    .await;
}

#[tokio::test]
async fn libnbd_haggles_with_every_option_it_has() {
    nbdsh(
        r"
for h, chunks, extended in handles():
    h.set_opt_mode(True)
    h.set_full_info(True)
    h.connect_uri(uri)
    names = []
    assert h.opt_list(lambda name, text: names.append((name, text))) == 3
    assert names == [('disk', 'a disk'), ('fixed', ''), ('giant', '')], names
    h.set_export_name('')
    h.opt_info()
    assert h.get_canonical_export_name() == 'disk'
    assert h.get_export_description() == 'a disk'
    assert h.get_size() == 1 << 20
    assert h.get_block_size(nbd.SIZE_MAXIMUM) == 32 << 20
    for name in ('none', 'x' * 4096):
        h.set_export_name(name)
        assert told(h.opt_info) == 'ENOENT', told(h.opt_info)
        assert told(h.opt_go) == 'ENOENT'
    h.set_export_name('disk')
    if chunks:
        found = []
        h.opt_list_meta_context(lambda name: found.append(name))
        assert set(found) == {'base:allocation', 'x-test:stripes'}, found
    h.opt_go()
    if chunks:
        assert h.can_meta_context('base:allocation')
    h.shutdown()
    a = nbd.NBD()
    a.set_opt_mode(True)
    a.connect_uri(uri)
    a.opt_abort()
for flags in range(4):
    h = nbd.NBD()
    h.set_strict_mode(0)
    h.set_handshake_flags(flags)
    h.connect_uri(uri)
    h.pwrite(b'x', 0)
    assert h.get_structured_replies_negotiated() == (flags & 1 == 1)
    assert h.get_protocol() == ('newstyle-fixed' if flags & 1 else 'newstyle')
    h.shutdown()
",
    )
    .await;
}

#[tokio::test]
async fn qemu_negotiates_extended_headers_and_writes_reads_and_maps_with_them() {
    let stage = Stage::new().await;
    for transport in Transport::ALL {
        let disk = uri(&stage, transport, "disk");
        let mut arguments = vec!["-f", "raw", "-t", "none", "-d", "unmap"];
        for command in [
            "write -P 17 1000 70000",
            "write -f -P 18 512k 512",
            "write -z 4k 8k",
            "write -z -u 32k 4k",
            "discard 16k 8k",
            "flush",
            "read -P 17 1000 3096",
            "read -P 0 4k 8k",
            "read -P 0 32k 4k",
            "read -P 18 512k 512",
        ] {
            arguments.extend(["-c", command]);
        }
        arguments.push(&disk);
        let out = run(&stage, "qemu-io", &arguments).await;
        assert!(!out.contains("failed"), "{out}");
        let map = run(&stage, "qemu-img", &["map", "-f", "raw", "--output=json", &disk]).await;
        assert!(map.contains("\"zero\": true") && map.contains("\"zero\": false"), "{map}");
        // 64 TiB in one answer, and one request of more than 4 GiB: both need 64-bit lengths.
        let giant = uri(&stage, transport, "giant");
        let map = run(&stage, "qemu-img", &["map", "-f", "raw", "--output=json", &giant]).await;
        assert!(map.contains("\"length\": 70368744177664"), "{map}");
        assert_eq!(map.lines().count(), 1, "{map}");
        let zeroes = ["-f", "raw", "-d", "unmap", "-c", "write -z -n -u 1T 8G", &giant];
        run(&stage, "qemu-io", &zeroes).await;
        let done = stage.giant.changes();
        let total: u64 = done.iter().map(|(_, range)| range.len()).sum();
        assert_eq!(total % (8 << 30), 0, "{done:?}");
    }
}
