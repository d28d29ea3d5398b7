//! The program itself: exit codes, what it prints, and its talk with a hub.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use agent::{Address, DiskReport, Event, RunReport};
use serde_json::{Value, json};

use crate::fake_hub::{FakeHub, problem};
use crate::support::{BLOCK, Bench, Disk, Peer, assert_same};

/// The program, in an environment that says nothing to it.
fn program(bench: &Bench, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sendense-agent"));
    command.arg("migrate").args(arguments).env("XDG_STATE_HOME", bench.path());
    for name in ["SENDENSE_JOB_ID", "MIGRATEKIT_JOB_ID", "SENDENSE_HUB", "OMA_API_URL", "RUST_LOG"]
    {
        command.env_remove(name);
    }
    command
}

fn finish(mut command: Command, code: i32) -> (String, String) {
    let output: Output = command.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(code), "{stdout}{stderr}");
    (stdout, stderr)
}

fn socket(server: &Peer) -> String {
    let Address::Unix(path) = server.target("").address else { panic!("a Unix socket") };
    path.to_str().unwrap().to_owned()
}

fn source_and_target(bench: &Bench) -> (Disk, Disk) {
    let source = Disk::sparse(bench.path(), "source", 40 * BLOCK);
    source.fill(0..20, 1);
    (source, Disk::sparse(bench.path(), "target", 40 * BLOCK))
}

#[test]
fn a_run_without_a_job_id_is_refused() {
    let bench = Bench::new();
    let arguments = ["--source", "file:/dev/null", "--export", "e"];
    let (_, told) = finish(program(&bench, &arguments), 2);
    assert!(told.contains("job id"), "{told}");
    let mut empty = program(&bench, &arguments);
    empty.env("MIGRATEKIT_JOB_ID", " ");
    finish(empty, 2);
    let no_source = program(&bench, &["--job-id", "j"]);
    let (_, told) = finish(no_source, 2);
    assert!(told.contains("--source"), "{told}");
    finish(program(&bench, &["--job-id", "j", "--source", "/dev/null", "--export", "e"]), 2);
}

#[test]
fn a_full_and_an_incremental_by_flags() {
    let bench = Bench::new();
    let (source, target) = source_and_target(&bench);
    let server = bench.serve("server", &target);
    let (spec, socket) = (source.spec().to_string(), socket(&server));
    let report = bench.path().join("report.json");
    let flags = [
        "--source",
        &spec,
        "--export",
        "",
        "--nbd-socket",
        &socket,
        "--report",
        report.to_str().unwrap(),
    ];
    let mut full = program(&bench, &flags);
    full.env("MIGRATEKIT_JOB_ID", "job-7").args(["--progress", "json"]);
    let (stdout, stderr) = finish(full, 0);
    assert_eq!(stderr, "");
    let events: Vec<Event> =
        stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(matches!(events.first(), Some(Event::DiskStarted { disk_key: 2000, .. })));
    let read = |path| serde_json::from_slice::<RunReport>(&fs::read(path).unwrap()).unwrap();
    let done = read(&report);
    assert!(matches!(events.last(), Some(Event::RunFinished { report }) if *report == done));
    assert_eq!(done.job_id, "job-7");
    assert_same(&source, &target);
    assert_eq!(fs::read_dir(bench.path().join("sendense/agent")).unwrap().count(), 1);

    source.fill([3], 2);
    let id = &done.disks[0].change_id;
    let mut changed = program(&bench, &flags);
    changed.args(["--job-id", "job-8", "--previous-change-id", id]);
    let (stdout, _) = finish(changed, 0);
    assert_eq!(stdout, "", "nothing is shown where nobody looks");
    assert_eq!(read(&report).disks[0].data_bytes_sent, BLOCK);
    assert_same(&source, &target);

    // A baseline that is gone: done, but not as asked for.
    fs::remove_dir_all(bench.path().join("sendense")).unwrap();
    let mut lost = program(&bench, &flags);
    lost.args(["--job-id", "job-9", "--previous-change-id", id]);
    let (_, told) = finish(lost, 3);
    assert!(told.contains("there are no digests"), "{told}");
}

#[test]
fn a_failure_is_told_in_words_and_in_the_report() {
    let bench = Bench::new();
    let nobody = bench.path().join("nobody");
    let source = Disk::sparse(bench.path(), "source", BLOCK);
    let failing = program(
        &bench,
        &[
            "--job-id",
            "j",
            "--source",
            &source.spec().to_string(),
            "--report",
            "-",
            "--nbd-targets",
            &format!("2000:nbd+unix:///e?socket={}", nobody.display()),
        ],
    );
    let (stdout, stderr) = finish(failing, 1);
    let report: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(report["job_id"], "j");
    for text in [report["error"].as_str().unwrap(), &stderr] {
        assert!(text.contains("disk 0 (key 2000): cannot connect"), "{text}");
    }
}

/// What a hub says of a job whose one disk is this.
fn assignment(step: &str, source: &Disk, previous: Option<&str>) -> Value {
    json!({
        "backup_id": "job-1", "vm_name": "vm", "backup_type": "full", "status": "running", "step": step, "nbd": null,
        "disks": [{
            "disk_index": 0, "disk_key": 2016, "kind": "full", "full": previous.is_none(), "export_name": "",
            "source": source.spec(), "previous_change_id": previous, "capacity_bytes": 40 * BLOCK,
        }],
    })
}

#[test]
fn a_hub_is_asked_what_to_do_and_told_how_it_went() {
    let bench = Bench::new();
    let (source, target) = source_and_target(&bench);
    let server = bench.serve("server", &target);
    let token = bench.path().join("token");
    fs::write(&token, "secret\n").unwrap();
    let asked = AtomicU32::new(0);
    let wish = |step| assignment(step, &source, None);
    let steps = [wish("layers"), wish("agent")];
    let hub = FakeHub::start(Box::new(move |call| match call.what.split_once(' ') {
        Some(("GET", "/api/v1/backups/job-1")) => {
            let step = asked.fetch_add(1, Ordering::Relaxed).min(1);
            (200, steps[usize::try_from(step).unwrap()].clone())
        }
        Some(("POST", "/api/v1/backups/job-1/progress")) => {
            (200, json!({"status": "running", "cancel": false}))
        }
        Some(("POST", "/api/v1/backups/job-1/complete")) => (202, json!({"status": "running"})),
        _ => problem(404, "nothing here"),
    }));
    let mut command = program(&bench, &["--job-id", "job-1", "--nbd-socket", &socket(&server)]);
    command.env("OMA_API_URL", &hub.url).arg("--token-file").arg(&token);
    finish(command, 0);
    assert_same(&source, &target);
    let calls = hub.calls();
    assert!(calls.iter().all(|call| call.authorization == "Bearer secret"), "{calls:?}");
    assert_eq!(calls.iter().filter(|call| call.what.starts_with("GET")).count(), 2);
    let told: Vec<Event> = calls
        .iter()
        .filter(|call| call.what.ends_with("/progress"))
        .flat_map(|call| serde_json::from_value::<Vec<Event>>(call.body.clone()).unwrap())
        .collect();
    assert!(told.iter().any(|event| matches!(event, Event::DiskStarted { disk_key: 2016, .. })));
    let finished = told.iter().find_map(|event| match event {
        Event::DiskFinished { report } => Some(report.clone()),
        _ => None,
    });
    let last = calls.last().unwrap();
    assert_eq!(last.what, "POST /api/v1/backups/job-1/complete");
    let report: RunReport = serde_json::from_value(last.body.clone()).unwrap();
    assert_eq!(report.disks.first(), finished.as_ref());
    let DiskReport { disk_key, data_bytes_sent, .. } = &report.disks[0];
    assert_eq!((*disk_key, *data_bytes_sent), (2016, 20 * BLOCK));
}

/// The end of a pipe that nobody reads.
fn broken_pipe() -> Stdio {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    writer.into()
}

/// Runs a disk, whose baseline is lost, for a hub that fails all progress, with both outputs read by nobody.
fn run_unheard(flags: &[&str]) -> (Option<i32>, Vec<String>) {
    let bench = Bench::new();
    let (source, target) = source_and_target(&bench);
    let server = bench.serve("server", &target);
    let wish = assignment("agent", &source, Some("0190f1c2-7e7e-4d9a-8f00-0123456789ab/4"));
    let hub = FakeHub::start(Box::new(move |call| match call.what.split_once(' ') {
        Some(("GET", _)) => (200, wish.clone()),
        Some((_, path)) if path.ends_with("/progress") => problem(500, "no room"),
        _ => (200, json!({"status": "running"})),
    }));
    let arguments = ["--job-id", "job-1", "--nbd-socket", &socket(&server), "--hub", &hub.url];
    let mut command = program(&bench, &arguments);
    let status = command.args(flags).stdout(broken_pipe()).stderr(broken_pipe()).status().unwrap();
    assert_same(&source, &target);
    (status.code(), hub.calls().into_iter().map(|call| call.what).collect())
}

#[test]
fn nobody_reading_the_output_decides_nothing() {
    for style in ["none", "json", "bar"] {
        let (code, calls) = run_unheard(&["--progress", style, "--report", "-"]);
        assert_eq!(code, Some(3), "{style}: {calls:?}");
        assert_eq!(calls.last().unwrap(), "POST /api/v1/backups/job-1/complete");
        assert!(calls.iter().any(|call| call.ends_with("/progress")), "{style}: {calls:?}");
    }
}

#[test]
fn a_failure_that_nobody_reads_has_its_exit_code() {
    let bench = Bench::new();
    for (arguments, code) in [
        (&["--job-id", "j"][..], 2),
        (&["--job-id", "j", "--source", "file:/nonexistent", "--export", "e", "--report", "-"], 1),
    ] {
        let mut command = program(&bench, arguments);
        let status = command.stdout(broken_pipe()).stderr(broken_pipe()).status().unwrap();
        assert_eq!(status.code(), Some(code), "{arguments:?}");
    }
}

#[test]
fn a_hub_that_ends_the_job_stops_the_agent() {
    let bench = Bench::new();
    let source = Disk::sparse(bench.path(), "source", 40 * BLOCK);
    source.fill(0..40, 1);
    // The target never answers: the run can only end by being stopped.
    let stuck =
        Peer::nbdkit(bench.path(), "stuck", &["--filter=delay", "memory", "2560k", "wdelay=3600"]);
    let wish = assignment("agent", &source, None);
    let claimed = AtomicBool::new(false);
    let hub = FakeHub::start(Box::new(move |call| match call.what.split_once('/') {
        Some(("GET ", _)) => (200, wish.clone()),
        _ if !claimed.swap(true, Ordering::SeqCst) => (200, json!({"status": "running"})),
        _ => problem(409, "the job has ended"),
    }));
    let arguments = ["--job-id", "job-1", "--nbd-socket", &socket(&stuck), "--hub", &hub.url];
    let (_, told) = finish(program(&bench, &arguments), 1);
    assert!(told.contains("cancelled"), "{told}");
}

#[test]
fn an_agent_whose_job_is_taken_sends_nothing() {
    let bench = Bench::new();
    let source = Disk::sparse(bench.path(), "source", 4 * BLOCK);
    source.fill(0..4, 1);
    let target = Disk::sparse(bench.path(), "target", 4 * BLOCK);
    let server = bench.serve("server", &target);
    let wish = assignment("agent", &source, None);
    let hub = FakeHub::start(Box::new(move |call| match call.what.split_once('/') {
        Some(("GET ", _)) => (200, wish.clone()),
        _ => problem(409, "another agent does this job"),
    }));
    let arguments = ["--job-id", "job-1", "--nbd-socket", &socket(&server), "--hub", &hub.url];
    let (_, told) = finish(program(&bench, &arguments), 1);
    assert!(told.contains("another agent does this job"), "{told}");
    assert!(std::fs::read(&target.path).unwrap().iter().all(|byte| *byte == 0));
    assert!(!hub.calls().iter().any(|call| call.what.ends_with("/fail")), "not its job to fail");
}

#[test]
fn a_signal_cancels_the_run_and_the_hub_is_told() {
    let bench = Bench::new();
    let source = Disk::sparse(bench.path(), "source", 40 * BLOCK);
    source.fill(0..40, 1);
    let stuck =
        Peer::nbdkit(bench.path(), "stuck", &["--filter=delay", "memory", "2560k", "wdelay=3600"]);
    let wish = assignment("agent", &source, None);
    let hub = FakeHub::start(Box::new(move |call| match call.what.split_once('/') {
        Some(("GET ", _)) => (200, wish.clone()),
        _ => (200, json!({"status": "running", "cancel": false})),
    }));
    let mut command = program(
        &bench,
        &[
            "--job-id",
            "job-1",
            "--nbd-socket",
            &socket(&stuck),
            "--hub",
            &hub.url,
            "--progress",
            "json",
        ],
    );
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.next().unwrap().unwrap().contains("disk_started"));
    let kill = Command::new("kill").arg(child.id().to_string()).status().unwrap();
    assert!(kill.success());
    hub.wait_for("/fail");
    assert_eq!(child.wait().unwrap().code(), Some(1));
    assert_eq!(hub.calls().last().unwrap().body, json!({"error": "cancelled"}));
    let state = bench.path().join("sendense/agent");
    assert_eq!(fs::read_dir(state).map_or(0, Iterator::count), 0);
}

#[test]
fn a_job_that_is_over_is_not_begun() {
    let bench = Bench::new();
    let hub = FakeHub::start(Box::new(|call| match call.what.starts_with("GET") {
        true => (200, json!({"status": "cancelled", "disks": []})),
        false => problem(409, "the job has ended"),
    }));
    let (_, told) = finish(program(&bench, &["--job-id", "j", "--hub", &hub.url]), 1);
    assert!(told.contains("the job is cancelled already"), "{told}");
    let unknown = FakeHub::start(Box::new(|_| problem(404, "no backup 'j'")));
    let (_, told) = finish(program(&bench, &["--job-id", "j", "--hub", &unknown.url]), 1);
    assert!(told.contains("no backup 'j'"), "{told}");
}
