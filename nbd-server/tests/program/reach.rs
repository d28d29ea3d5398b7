//! How clients reach the program, who may, and when it ends.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};

use super::{Running, image, run};

const EXPORT: &str = "--export=one=disk.img,format=raw";
const URI: &str = "nbd+unix:///one?socket=socket";

fn can_connect(dir: &Path, uri: &str) -> bool {
    let mut info = Command::new("timeout");
    info.args(["20", "nbdinfo", "--size", uri]).current_dir(dir);
    info.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap().success()
}

#[test]
fn once_ends_with_the_last_client_that_used_an_export() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    image(dir);
    let mut server = Running::start(dir, &["--listen=unix:socket", EXPORT, "--once"]);
    server.address();
    // Looking around is no use.
    run(dir, "nbdinfo", &["--list", "--no-content", "nbd+unix:///?socket=socket"]);
    run(dir, "qemu-io", &["-f", "raw", "-c", "write -P 9 0 4k", "-c", "flush", URI]);
    assert!(server.status().success());
    assert!(!dir.join("socket").exists());
    let mut server = Running::start(dir, &["--listen=unix:socket", EXPORT, "--persistent"]);
    server.address();
    for _ in 0..2 {
        run(dir, "qemu-io", &["-f", "raw", "-c", "read -P 9 0 4k", URI]);
    }
    assert!(server.stop());
}

#[test]
fn a_name_is_listened_on_with_all_its_addresses_on_one_port() {
    use std::net::{TcpListener, ToSocketAddrs};
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    image(dir);
    let mut expected: Vec<_> = ("localhost", 0).to_socket_addrs().unwrap().collect();
    expected.retain(|address| TcpListener::bind(address).is_ok());
    expected.dedup();
    let mut server = Running::start(dir, &["--listen=localhost:0", EXPORT]);
    let mut port = 0;
    for address in expected {
        let told: std::net::SocketAddr = server.address().parse().unwrap();
        assert_eq!(told.ip(), address.ip());
        assert!(port == 0 || port == told.port(), "{told}, and not {port}");
        port = told.port();
        assert!(can_connect(dir, &format!("nbd://{told}/one")));
    }
    assert!(server.stop());
}

#[test]
fn a_name_without_an_address_of_this_machine_is_refused_with_them() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    image(dir);
    let mut server = Running::start(dir, &["--listen=192.0.2.1:0", EXPORT]);
    assert!(!server.status().success());
    let errors = server.errors();
    assert!(errors.contains("cannot listen on 192.0.2.1:0: Cannot assign requested"), "{errors}");
}

#[test]
fn who_gets_no_connection_is_told_of_in_the_log_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    image(dir);
    let one = format!("{EXPORT},max-connections=1");
    let mut server = Running::start(dir, &["--listen=unix:socket", &one, "--log-format=json"]);
    server.address();
    let stays = super::stop::entered(dir);
    assert!(!can_connect(dir, URI));
    let log = server.log_until("a client gets no connection to the export").concat();
    assert!(log.contains(r#""why":"it has as many connections as it may have""#), "{log}");
    drop(stays);
    assert!(server.stop());
    let arguments = ["--listen=unix:socket", "--export=a=none", "--log-format=json"];
    let mut server = Running::start(dir, &arguments);
    assert!(!server.status().success());
    let errors = server.errors();
    assert!(errors.lines().all(|line| line.starts_with('{')), "{errors}");
    assert!(errors.contains("No such file"), "{errors}");
}

#[test]
fn a_unix_socket_has_the_mode_and_the_owner_that_are_said() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    image(dir);
    let owner = std::fs::metadata(dir).unwrap();
    let owner = format!("--unix-owner={}:{}", owner.uid(), owner.gid());
    let arguments = ["--listen=unix:socket", EXPORT, "--unix-mode=0600", &owner];
    let mut server = Running::start(dir, &arguments);
    server.address();
    assert_eq!(std::fs::metadata(dir.join("socket")).unwrap().mode() & 0o7777, 0o600);
    assert!(can_connect(dir, URI));
    assert!(server.stop());
}

#[test]
fn clients_are_allowed_and_denied_by_address_and_user() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    image(dir);
    let own = format!("--allow=uid:{}", std::fs::metadata(dir).unwrap().uid());
    for (rules, over_unix, over_tcp) in [
        (&["--allow=127.0.0.0/8"][..], false, true),
        (&[&own], true, false),
        (&["--allow=unix", "--allow=::1", "--deny=127.0.0.1"], true, false),
        (&["--deny=unix"], false, true),
        (&["--deny=uid:4000000000", "--deny=10.0.0.0/8"], true, true),
        (&["--allow=cid:3"], false, false),
    ] {
        let arguments =
            [&["--listen=unix:socket", "--listen=127.0.0.1:0", EXPORT][..], rules].concat();
        let mut server = Running::start(dir, &arguments);
        server.address();
        let tcp = format!("nbd://{}/one", server.address());
        assert_eq!(
            (can_connect(dir, URI), can_connect(dir, &tcp)),
            (over_unix, over_tcp),
            "{rules:?}"
        );
        assert!(server.stop());
    }
}

#[test]
fn an_export_can_be_kept_to_some_clients() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    image(dir);
    let config = "[generic]\nunixsock = socket\nallowlist = true\n[all]\nexportname = disk.img\n[some]\nexportname = \
                  disk.img\nauthfile = allow\n";
    std::fs::write(dir.join("config"), config).unwrap();
    std::fs::write(dir.join("allow"), "10.0.0.0/8\n").unwrap();
    let mut server = Running::start(dir, &["--config=config"]);
    server.address();
    let some = "nbd+unix:///some?socket=socket";
    let list = || run(dir, "nbdinfo", &["--list", "nbd+unix:///?socket=socket"]);
    assert!(can_connect(dir, "nbd+unix:///all?socket=socket") && !can_connect(dir, some));
    assert!(!list().contains("\"some\""));
    std::fs::write(dir.join("allow"), "10.0.0.0/8\nunix # the local ones\n").unwrap();
    server.signal("-HUP");
    server.log_until("reloaded");
    assert!(can_connect(dir, some) && list().contains("\"some\""));
    assert!(server.stop());
}

#[test]
fn sockets_that_systemd_hands_over_are_listened_on() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    image(dir);
    // What systemd does before it starts a service: sockets from 3 on, and their number.
    let script = "import os, socket, sys\n\
        one = socket.socket(socket.AF_UNIX); one.bind('socket'); one.listen()\n\
        two = socket.socket(); two.bind(('127.0.0.1', 0)); two.listen()\n\
        os.dup2(one.fileno(), 8); os.dup2(two.fileno(), 9)\n\
        os.dup2(8, 3); os.dup2(9, 4)\n\
        os.environ['LISTEN_PID'] = str(os.getpid()); os.environ['LISTEN_FDS'] = '2'\n\
        os.execv(sys.argv[1], sys.argv[1:])\n";
    let mut server = Running::launch(
        dir,
        "/usr/bin/python3",
        &["-c", script, env!("CARGO_BIN_EXE_nbd-server"), EXPORT],
    );
    assert_eq!(server.address(), "unix:socket");
    let tcp = format!("nbd://{}/one", server.address());
    assert!(can_connect(dir, URI) && can_connect(dir, &tcp));
    assert!(server.stop());
    assert!(dir.join("socket").exists(), "it is systemd's");
}

#[test]
fn virtual_machines_are_served_over_vsock() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    image(dir);
    let mut server = Running::start(dir, &["--listen=vsock:any:0", EXPORT]);
    if let Some(status) = server.ended_at_once() {
        let errors = server.errors();
        assert!(!status && errors.contains("cannot listen on vsock:any:0"), "{errors}");
        eprintln!("vsock is not tested: this kernel has none: {errors}");
        return;
    }
    let address = server.address();
    let port = address.strip_prefix("vsock:any:").unwrap();
    // 1 is this machine itself, where the kernel can do that.
    let uri = format!("nbd+vsock://1:{port}/one");
    if can_connect(dir, &uri) {
        run(dir, "nbdcopy", &[&uri, "copy.img"]);
        let same = std::fs::read(dir.join("copy.img")).unwrap()
            == std::fs::read(dir.join("disk.img")).unwrap();
        assert!(same);
    } else {
        eprintln!("vsock is tested up to listening: this kernel has no loopback for it");
    }
    assert!(server.stop());
}

#[test]
fn another_user_is_become_before_images_are_opened() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path();
    image(path);
    if std::fs::metadata("/proc/self").unwrap().uid() != 0 {
        eprintln!("becoming another user is not tested: it takes root");
        return;
    }
    let config = "[generic]\nunixsock = socket\nuser = nobody\n[one]\nexportname = disk.img\n";
    std::fs::write(path.join("config"), config).unwrap();
    // Only root may read it.
    run(path, "chmod", &["600", "disk.img"]);
    run(path, "chmod", &["755", "."]);
    let mut server = Running::start(path, &["--config=config"]);
    assert!(!server.status().success());
    assert!(server.errors().contains("ermission denied"));
    run(path, "chown", &["nobody", "disk.img", "."]);
    // A port that only root may take, as that of the metrics is before.
    let free = |port: &u16| std::net::TcpListener::bind(("127.0.0.1", *port)).is_ok();
    let port = (700..1000).find(free).unwrap();
    std::fs::write(path.join("config"), config.replace("user", &format!("metrics = {port}\nuser")))
        .unwrap();
    let mut server = Running::start(path, &["--config=config"]);
    server.address();
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.child.id())).unwrap();
    let ids = status.lines().find_map(|line| line.strip_prefix("Uid:")).unwrap();
    assert!(ids.split_whitespace().all(|id| id == "65534"), "{ids}");
    assert!(can_connect(path, URI));
    assert!(server.stop());
}
