//! From flags, or from what the hub says, to the disks of a run. Pure; every refusal is a sentence for people.

use std::collections::HashSet;

use agent::{Address, DiskJob, SourceSpec, Target};
use anyhow::{Context, Result, bail, ensure};

use super::arguments::{Keyed, Migrate};
use super::hub::Assignment;

/// The key of the first disk where nothing else is said: that of the first unit of the first SCSI controller.
const FIRST_KEY: i64 = 2000;
const DEFAULT_HOST: &str = "127.0.0.1";
const DEFAULT_PORT: u16 = 10808;

/// The disks that the flags describe.
pub(crate) fn from_flags(flags: &Migrate) -> Result<Vec<DiskJob>> {
    ensure!(!flags.sources.is_empty(), "name at least one --source, or a --hub that knows them");
    let keys = keys_of(&flags.sources)?;
    let targets = targets_of(flags, &keys)?;
    let mut previous = vec![None; keys.len()];
    for (place, id) in flags.previous_change_ids.iter().enumerate() {
        let disk = match id.key {
            Some(key) => place_of(&keys, key)?,
            None => place,
        };
        let slot = previous.get_mut(disk).context("more --previous-change-id than --source")?;
        ensure!(slot.is_none(), "two --previous-change-id for one disk");
        *slot = Some(id.value.clone());
    }
    let disks = (0u32..).zip(keys).zip(&flags.sources).zip(targets).zip(previous);
    Ok(disks
        .map(|((((index, key), source), target), previous)| DiskJob {
            index,
            key,
            source: source.value.clone(),
            target,
            // An empty one stands for a disk that has none.
            previous_change_id: previous.filter(|id| !id.is_empty()),
            full: flags.full,
        })
        .collect())
}

/// The disks that the hub describes; a `--source` replaces that of its key or place, and an address that of the hub.
pub(crate) fn from_hub(
    flags: &Migrate,
    assignment: &Assignment,
    hub_host: &str,
) -> Result<Vec<DiskJob>> {
    ensure!(!assignment.disks.is_empty(), "the hub names no disks for this job");
    let address = hub_address(flags, assignment, hub_host)?;
    let keys: Vec<_> = assignment.disks.iter().map(|disk| disk.disk_key).collect();
    let mut replaced: Vec<Option<&SourceSpec>> = vec![None; keys.len()];
    for (place, source) in flags.sources.iter().enumerate() {
        let disk = match source.key {
            Some(key) => place_of(&keys, key)?,
            None => place,
        };
        let slot = replaced.get_mut(disk).context("more --source than the job has disks")?;
        *slot = Some(&source.value);
    }
    let disks = assignment.disks.iter().zip(replaced);
    disks
        .map(|(disk, replaced)| {
            let source = match (replaced, &disk.source) {
                (Some(source), _) => source.clone(),
                (None, Some(text)) => text
                    .parse()
                    .with_context(|| format!("the hub's source of disk {}", disk.disk_index))?,
                (None, None) => bail!("the hub names no source of disk {}", disk.disk_index),
            };
            Ok(DiskJob {
                index: disk.disk_index,
                key: disk.disk_key,
                source,
                target: Target {
                    address: address.clone(),
                    export: disk.export_name.clone(),
                    tls: None,
                },
                previous_change_id: disk.previous_change_id.clone(),
                full: flags.full || disk.full,
            })
        })
        .collect()
}

fn keys_of(sources: &[Keyed<SourceSpec>]) -> Result<Vec<i64>> {
    let keys: Vec<_> =
        sources.iter().zip(FIRST_KEY..).map(|(source, key)| source.key.unwrap_or(key)).collect();
    let mut seen = HashSet::new();
    for key in &keys {
        ensure!(seen.insert(*key), "two disks with the key {key}");
    }
    Ok(keys)
}

fn place_of(keys: &[i64], key: i64) -> Result<usize> {
    keys.iter()
        .position(|known| *known == key)
        .with_context(|| format!("no disk has the key {key}"))
}

fn targets_of(flags: &Migrate, keys: &[i64]) -> Result<Vec<Target>> {
    if !flags.nbd_targets.is_empty() {
        let target_of = |key: &i64| {
            let mut named = flags.nbd_targets.iter().filter(|target| target.key == *key);
            let target = named.next().with_context(|| format!("--nbd-targets lacks disk {key}"))?;
            ensure!(named.next().is_none(), "--nbd-targets names disk {key} twice");
            Ok(target.target.clone())
        };
        return keys.iter().map(target_of).collect();
    }
    ensure!(
        flags.exports.len() == keys.len(),
        "name one --export for each --source ({} for {}), or --nbd-targets",
        flags.exports.len(),
        keys.len()
    );
    let address = flagged_address(flags).unwrap_or_else(|| Address::Tcp {
        host: flags.nbd_host.clone().unwrap_or_else(|| DEFAULT_HOST.to_owned()),
        port: flags.nbd_port.unwrap_or(DEFAULT_PORT),
    });
    let target =
        |export: &String| Target { address: address.clone(), export: export.clone(), tls: None };
    Ok(flags.exports.iter().map(target).collect())
}

/// The address that the flags name in full.
fn flagged_address(flags: &Migrate) -> Option<Address> {
    match (&flags.nbd_socket, &flags.nbd_host, flags.nbd_port) {
        (Some(path), ..) => Some(Address::Unix(path.clone())),
        (None, Some(host), Some(port)) => Some(Address::Tcp { host: host.clone(), port }),
        _ => None,
    }
}

/// Where the hub's NBD server is reached. Flags win: between them and the hub there may be a tunnel.
fn hub_address(flags: &Migrate, assignment: &Assignment, hub_host: &str) -> Result<Address> {
    if let Some(address) = flagged_address(flags) {
        return Ok(address);
    }
    let told = assignment.nbd.as_ref();
    let told_host = told.map(|nbd| match nbd.host.as_str() {
        // It listens on all its addresses: we know one of them.
        "" | "0.0.0.0" | "::" => hub_host,
        host => host,
    });
    let host = flags.nbd_host.as_deref().or(told_host);
    let port = flags.nbd_port.or(told.map(|nbd| nbd.port));
    match (host, port) {
        (Some(host), Some(port)) => Ok(Address::Tcp { host: host.to_owned(), port }),
        _ => bail!(
            "the hub has no NBD port for agents: start it with one, or name --nbd-host and --nbd-port, or --nbd-socket"
        ),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::program::Arguments;
    use crate::program::arguments::Command;

    fn flags(arguments: &[&str]) -> Migrate {
        let all = ["sendense-agent", "migrate"].iter().chain(arguments);
        let Command::Migrate(migrate) = Arguments::try_parse_from(all).unwrap().command;
        migrate
    }

    fn assignment() -> Assignment {
        serde_json::from_value(serde_json::json!({
            "status": "running", "step": "agent", "nbd": {"host": "0.0.0.0", "port": 10900}, "vm_name": "ignored",
            "disks": [
                {"disk_index": 0, "disk_key": 2000, "full": false, "kind": "incremental", "source": "file:/a",
                 "export_name": "e0", "previous_change_id": "p0", "capacity_bytes": 1},
                {"disk_index": 1, "disk_key": 16000, "full": true, "source": "file:/b", "export_name": "e1",
                 "previous_change_id": null}
            ]
        })).unwrap()
    }

    #[test]
    fn flags_describe_disks_in_order() {
        let flags = flags(&[
            "--source",
            "file:/a",
            "--source",
            "3000=file:/b",
            "--source",
            "file:/c",
            "--export",
            "ea",
            "--export",
            "eb",
            "--export",
            "ec",
            "--previous-change-id",
            "first",
            "--previous-change-id",
            "2002=third",
        ]);
        let disks = from_flags(&flags).unwrap();
        let found: Vec<_> = disks
            .iter()
            .map(|disk| {
                (disk.index, disk.key, disk.target.to_string(), disk.previous_change_id.as_deref())
            })
            .collect();
        assert_eq!(
            found,
            [
                (0, 2000, "nbd://127.0.0.1:10808/ea".to_owned(), Some("first")),
                (1, 3000, "nbd://127.0.0.1:10808/eb".to_owned(), None),
                (2, 2002, "nbd://127.0.0.1:10808/ec".to_owned(), Some("third")),
            ]
        );
    }

    #[test]
    fn what_does_not_fit_together_is_refused() {
        for arguments in [
            &["--export", "a"][..],
            &["--source", "file:/a"],
            &["--source", "file:/a", "--export", "a", "--export", "b"],
            &["--source", "2001=file:/a", "--source", "file:/b", "--export", "a", "--export", "b"],
            &["--source", "file:/a", "--nbd-targets", "2001:nbd://h/e"],
            &["--source", "file:/a", "--nbd-targets", "2000:nbd://h/e,2000:nbd://h/f"],
            &["--source", "file:/a", "--export", "a", "--previous-change-id", "5=x"],
            &[
                "--source",
                "file:/a",
                "--export",
                "a",
                "--previous-change-id",
                "x",
                "--previous-change-id",
                "y",
            ],
        ] {
            assert!(from_flags(&flags(arguments)).is_err(), "{arguments:?}");
        }
    }

    #[test]
    fn the_hub_says_what_flags_do_not() {
        let disks = from_hub(&flags(&[]), &assignment(), "hub.example").unwrap();
        assert_eq!(disks[0].target.to_string(), "nbd://hub.example:10900/e0");
        assert_eq!((disks[0].full, disks[0].previous_change_id.as_deref()), (false, Some("p0")));
        assert_eq!(
            (disks[1].full, disks[1].key, &disks[1].previous_change_id),
            (true, 16000, &None)
        );
        let tunnelled = flags(&[
            "--nbd-host",
            "::1",
            "--nbd-port",
            "7",
            "--source",
            "16000=file:/other",
            "--full",
        ]);
        let disks = from_hub(&tunnelled, &assignment(), "hub.example").unwrap();
        assert_eq!(disks[1].target.to_string(), "nbd://[::1]:7/e1");
        assert_eq!(
            (disks[0].source.to_string(), disks[1].source.to_string()),
            ("file:/a".into(), "file:/other".into())
        );
        assert!(disks[0].full);
    }

    #[test]
    fn a_hub_without_an_nbd_port_needs_an_address() {
        let mut closed = assignment();
        closed.nbd = None;
        assert!(from_hub(&flags(&[]), &closed, "h").is_err());
        let disks = from_hub(&flags(&["--nbd-socket", "/s"]), &closed, "h").unwrap();
        assert_eq!(disks[0].target.address, Address::Unix("/s".into()));
    }
}
