//! Virtual machines and their disks. What is backed up of them lives in [`super::backups`].

use jiff::Timestamp;
use rusqlite::{Connection, Row, params};

use super::backups::require_idle;
use super::rows::{all, first, optional_size, parsed, sql_size, sql_time};
use super::{Database, DbResult, Refusal};
use crate::model::{AgentKind, Vm, VmDisk};

/// A virtual machine to be added.
#[derive(Clone, Debug)]
pub struct NewVm {
    /// Its identity.
    pub context_id: String,
    /// Its name.
    pub name: String,
    /// Who reads its disks.
    pub agent: AgentKind,
    /// Its disks, by index.
    pub disks: Vec<NewVmDisk>,
    /// The time.
    pub now: Timestamp,
}

/// A disk of a virtual machine to be added.
#[derive(Clone, Debug)]
pub struct NewVmDisk {
    /// The hypervisor's key.
    pub key: i64,
    /// Where the agent reads it.
    pub source: String,
    /// Its size, where known.
    pub capacity_bytes: Option<u64>,
}

/// What a disk of a virtual machine shall be from now on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChangedDisk {
    /// Which.
    pub index: u32,
    /// Where the agent reads it.
    pub source: String,
    /// Its size, where known.
    pub capacity_bytes: Option<u64>,
    /// Whether nothing can be put on its latest backup: its chains end, and the next backup of it is a full.
    pub starts_over: bool,
}

impl Database {
    /// Adds a virtual machine.
    ///
    /// # Errors
    /// [`Refusal::Exists`] where the name is taken.
    pub async fn insert_vm(&self, vm: NewVm) -> DbResult<Vm> {
        self.call(move |connection| {
            let tx = connection.transaction()?;
            if find(&tx, &vm.name)?.is_some() {
                return Err(Refusal::Exists { what: "virtual machine", name: vm.name }.into());
            }
            let now = sql_time(vm.now);
            tx.execute(
                "INSERT INTO vm_contexts (context_id, vm_name, agent, created_at, updated_at)
                 VALUES (?1, ?2, ?3, ?4, ?4)",
                params![vm.context_id, vm.name, vm.agent.as_str(), now],
            )?;
            for (index, disk) in vm.disks.iter().enumerate() {
                tx.execute(
                    "INSERT INTO vm_disks (vm_context_id, disk_index, disk_key, source, capacity_bytes)
                     VALUES (?1, ?2, ?3, ?4, ?5)",
                    params![
                        vm.context_id,
                        sql_size(index as u64),
                        disk.key,
                        disk.source,
                        disk.capacity_bytes.map(sql_size)
                    ],
                )?;
            }
            let stored = require(&tx, &vm.name)?;
            tx.commit()?;
            Ok(stored)
        })
        .await
    }

    /// Changes disks of a virtual machine.
    ///
    /// # Errors
    /// [`Refusal::Unknown`] where it, or a disk of it, is not there any more; [`Refusal::Active`] while a backup of it
    /// is in work.
    pub async fn change_vm(
        &self,
        context_id: &str,
        name: &str,
        disks: Vec<ChangedDisk>,
        now: Timestamp,
    ) -> DbResult<Vm> {
        let (context_id, name) = (context_id.to_owned(), name.to_owned());
        self.call(move |connection| {
            let tx = connection.transaction()?;
            let vm = require(&tx, &name)?;
            require_idle(&tx, &vm)?;
            let now = sql_time(now);
            for disk in disks {
                let changed = tx.execute(
                    "UPDATE vm_disks SET source = ?3, capacity_bytes = ?4
                     WHERE vm_context_id = ?1 AND disk_index = ?2",
                    params![context_id, disk.index, disk.source, disk.capacity_bytes.map(sql_size)],
                )?;
                if changed != 1 {
                    let name = format!("{} of {name}", disk.index);
                    return Err(Refusal::Unknown { what: "disk", name }.into());
                }
                if disk.starts_over {
                    tx.execute(
                        "UPDATE backup_chains SET active = 0, updated_at = ?3
                         WHERE vm_context_id = ?1 AND disk_id = ?2 AND active = 1",
                        params![context_id, disk.index, now],
                    )?;
                }
            }
            tx.execute(
                "UPDATE vm_contexts SET updated_at = ?2 WHERE context_id = ?1",
                params![context_id, now],
            )?;
            let stored = require(&tx, &name)?;
            tx.commit()?;
            Ok(stored)
        })
        .await
    }

    /// All virtual machines, by name.
    ///
    /// # Errors
    /// Where the database fails.
    pub async fn vms(&self) -> DbResult<Vec<Vm>> {
        self.call(|connection| {
            let names: Vec<String> =
                all(connection, "SELECT vm_name FROM vm_contexts ORDER BY vm_name", [], |row| {
                    row.get(0)
                })?;
            names.iter().map(|name| require(connection, name)).collect()
        })
        .await
    }

    /// The virtual machine of that name.
    ///
    /// # Errors
    /// [`Refusal::Unknown`].
    pub async fn vm(&self, name: &str) -> DbResult<Vm> {
        let name = name.to_owned();
        self.call(move |connection| require(connection, &name)).await
    }

    /// Forgets a virtual machine and its failed jobs.
    ///
    /// # Errors
    /// [`Refusal::Unknown`]; [`Refusal::HasBackups`] while a backup or a job in work belongs to it.
    pub async fn delete_vm(&self, name: &str) -> DbResult<()> {
        let name = name.to_owned();
        self.call(move |connection| {
            let tx = connection.transaction()?;
            let vm = require(&tx, &name)?;
            let backups: i64 = tx.query_row(
                "SELECT count(*) FROM backup_jobs
                 WHERE vm_context_id = ?1 AND status IN ('pending', 'running', 'completed')",
                [&vm.context_id],
                |row| row.get(0),
            )?;
            if let Ok(backups @ 1..) = u64::try_from(backups) {
                return Err(Refusal::HasBackups { vm: name, backups }.into());
            }
            tx.execute("DELETE FROM vm_contexts WHERE context_id = ?1", [&vm.context_id])?;
            tx.commit()?;
            Ok(())
        })
        .await
    }
}

/// The virtual machine of that name, or the refusal that names it.
pub(super) fn require(connection: &Connection, name: &str) -> DbResult<Vm> {
    find(connection, name)?
        .ok_or_else(|| Refusal::Unknown { what: "virtual machine", name: name.to_owned() }.into())
}

fn find(connection: &Connection, name: &str) -> DbResult<Option<Vm>> {
    let vm = first(
        connection,
        "SELECT context_id, vm_name, agent, created_at FROM vm_contexts WHERE vm_name = ?1",
        [name],
        |row| {
            Ok(Vm {
                context_id: row.get("context_id")?,
                name: row.get("vm_name")?,
                agent: parsed(row, "agent")?,
                created_at: parsed(row, "created_at")?,
                disks: Vec::new(),
            })
        },
    )?;
    let Some(mut vm) = vm else { return Ok(None) };
    vm.disks = all(
        connection,
        "SELECT disk_index, disk_key, source, capacity_bytes FROM vm_disks
         WHERE vm_context_id = ?1 ORDER BY disk_index",
        [&vm.context_id],
        disk,
    )?;
    Ok(Some(vm))
}

fn disk(row: &Row<'_>) -> rusqlite::Result<VmDisk> {
    Ok(VmDisk {
        index: row.get("disk_index")?,
        key: row.get("disk_key")?,
        source: row.get("source")?,
        capacity_bytes: optional_size(row, "capacity_bytes")?,
    })
}
