//! The tables and how they come about: versioned migrations, up and down. Queries live in the sibling modules.

use rusqlite_migration::{M, Migrations};

/// Every version of the schema, oldest first.
pub(super) fn migrations() -> Migrations<'static> {
    Migrations::new(vec![M::up(CORE_UP).down(CORE_DOWN), M::up(RESTORES_UP).down(RESTORES_DOWN)])
}

/// Chains refer to backups without `CASCADE`: deleting goes through the chain, never around it.
const CORE_UP: &str = "
CREATE TABLE vm_contexts (
    context_id TEXT NOT NULL PRIMARY KEY,
    vm_name TEXT NOT NULL UNIQUE CHECK (length(vm_name) > 0),
    agent TEXT NOT NULL CHECK (agent IN ('local', 'external')),
    created_at TEXT NOT NULL,
    updated_at TEXT NOT NULL
) STRICT;

CREATE TABLE vm_disks (
    id INTEGER PRIMARY KEY,
    vm_context_id TEXT NOT NULL REFERENCES vm_contexts (context_id) ON DELETE CASCADE,
    disk_index INTEGER NOT NULL CHECK (disk_index >= 0),
    disk_key INTEGER NOT NULL,
    source TEXT NOT NULL CHECK (length(source) > 0),
    capacity_bytes INTEGER CHECK (capacity_bytes > 0),
    datastore TEXT,
    vmdk_path TEXT,
    nbd_port INTEGER CHECK (nbd_port BETWEEN 1 AND 65535),
    qcow2_path TEXT,
    UNIQUE (vm_context_id, disk_index),
    UNIQUE (vm_context_id, disk_key)
) STRICT;

CREATE TABLE backup_repositories (
    id TEXT NOT NULL PRIMARY KEY,
    name TEXT NOT NULL UNIQUE CHECK (length(name) > 0),
    repository_type TEXT NOT NULL
        CHECK (repository_type IN ('local', 'nfs', 'cifs', 's3', 'azure')),
    config TEXT NOT NULL CHECK (json_valid(config)),
    enabled INTEGER NOT NULL DEFAULT 1 CHECK (enabled IN (0, 1)),
    total_size_bytes INTEGER NOT NULL DEFAULT 0 CHECK (total_size_bytes >= 0),
    available_size_bytes INTEGER NOT NULL DEFAULT 0 CHECK (available_size_bytes >= 0),
    created_at TEXT NOT NULL,
    updated_at TEXT NOT NULL
) STRICT;
CREATE INDEX backup_repositories_by_type ON backup_repositories (repository_type);

CREATE TABLE backup_jobs (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE CHECK (length(id) BETWEEN 1 AND 191),
    vm_context_id TEXT NOT NULL REFERENCES vm_contexts (context_id) ON DELETE CASCADE,
    vm_name TEXT NOT NULL,
    backup_type TEXT NOT NULL CHECK (backup_type IN ('full', 'incremental', 'differential')),
    status TEXT NOT NULL DEFAULT 'pending'
        CHECK (status IN ('pending', 'running', 'completed', 'failed', 'cancelled')),
    repository_id TEXT NOT NULL REFERENCES backup_repositories (id),
    repository_type TEXT NOT NULL,
    repository_path TEXT NOT NULL,
    parent_backup_id TEXT REFERENCES backup_jobs (id) ON DELETE SET NULL,
    change_id TEXT,
    bytes_transferred INTEGER NOT NULL DEFAULT 0 CHECK (bytes_transferred >= 0),
    total_bytes INTEGER NOT NULL DEFAULT 0 CHECK (total_bytes >= 0),
    compression_enabled INTEGER NOT NULL DEFAULT 1 CHECK (compression_enabled IN (0, 1)),
    error_message TEXT,
    step TEXT,
    stamp TEXT NOT NULL,
    deleting INTEGER NOT NULL DEFAULT 0 CHECK (deleting IN (0, 1)),
    created_at TEXT NOT NULL,
    started_at TEXT,
    completed_at TEXT,
    UNIQUE (vm_context_id, stamp),
    CHECK (status IN ('pending', 'running') OR completed_at IS NOT NULL),
    CHECK (status <> 'completed' OR error_message IS NULL),
    CHECK (deleting = 0 OR status = 'completed')
) STRICT;
CREATE INDEX backup_jobs_by_vm ON backup_jobs (vm_context_id, sequence);
CREATE INDEX backup_jobs_by_status ON backup_jobs (status, sequence);
CREATE INDEX backup_jobs_by_creation ON backup_jobs (created_at);
CREATE INDEX backup_jobs_by_repository ON backup_jobs (repository_id);
CREATE INDEX backup_jobs_by_parent ON backup_jobs (parent_backup_id);
CREATE UNIQUE INDEX backup_jobs_one_active_per_vm ON backup_jobs (vm_context_id)
    WHERE status IN ('pending', 'running');

CREATE TABLE backup_chains (
    id INTEGER PRIMARY KEY,
    vm_context_id TEXT NOT NULL REFERENCES vm_contexts (context_id) ON DELETE CASCADE,
    disk_id INTEGER NOT NULL CHECK (disk_id >= 0),
    repository_id TEXT NOT NULL REFERENCES backup_repositories (id),
    full_backup_id TEXT NOT NULL REFERENCES backup_jobs (id) DEFERRABLE INITIALLY DEFERRED,
    latest_backup_id TEXT NOT NULL REFERENCES backup_jobs (id) DEFERRABLE INITIALLY DEFERRED,
    active INTEGER NOT NULL DEFAULT 1 CHECK (active IN (0, 1)),
    total_backups INTEGER NOT NULL DEFAULT 1 CHECK (total_backups > 0),
    total_size_bytes INTEGER NOT NULL DEFAULT 0 CHECK (total_size_bytes >= 0),
    created_at TEXT NOT NULL,
    updated_at TEXT NOT NULL
) STRICT;
CREATE UNIQUE INDEX backup_chains_one_active ON backup_chains (vm_context_id, disk_id, repository_id)
    WHERE active = 1;
CREATE INDEX backup_chains_by_latest ON backup_chains (latest_backup_id);
CREATE INDEX backup_chains_by_full ON backup_chains (full_backup_id);

CREATE TABLE backup_disks (
    id INTEGER PRIMARY KEY,
    backup_id TEXT NOT NULL REFERENCES backup_jobs (id) ON DELETE CASCADE,
    disk_index INTEGER NOT NULL CHECK (disk_index >= 0),
    disk_key INTEGER NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('full', 'incremental', 'differential')),
    full_reason TEXT,
    status TEXT NOT NULL DEFAULT 'pending'
        CHECK (status IN ('pending', 'running', 'completed', 'failed', 'cancelled')),
    parent_backup_id TEXT REFERENCES backup_jobs (id) DEFERRABLE INITIALLY DEFERRED,
    chain_id INTEGER REFERENCES backup_chains (id) ON DELETE SET NULL,
    change_id TEXT,
    previous_change_id TEXT,
    capacity_bytes INTEGER NOT NULL CHECK (capacity_bytes > 0),
    path TEXT NOT NULL,
    export_name TEXT NOT NULL,
    bytes_transferred INTEGER NOT NULL DEFAULT 0 CHECK (bytes_transferred >= 0),
    bytes_read INTEGER NOT NULL DEFAULT 0 CHECK (bytes_read >= 0),
    stored_bytes INTEGER NOT NULL DEFAULT 0 CHECK (stored_bytes >= 0),
    UNIQUE (backup_id, disk_index),
    UNIQUE (backup_id, disk_key),
    CHECK (kind <> 'full' OR parent_backup_id IS NULL),
    CHECK (status <> 'completed' OR change_id IS NOT NULL)
) STRICT;
CREATE INDEX backup_disks_by_parent ON backup_disks (parent_backup_id);
CREATE INDEX backup_disks_by_chain ON backup_disks (chain_id);

CREATE TABLE job_events (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    backup_id TEXT NOT NULL REFERENCES backup_jobs (id) ON DELETE CASCADE,
    at TEXT NOT NULL,
    step TEXT,
    level TEXT NOT NULL CHECK (level IN ('info', 'warning', 'error')),
    message TEXT NOT NULL
) STRICT;
CREATE INDEX job_events_by_backup ON job_events (backup_id, id);
";

const CORE_DOWN: &str = "
DROP TABLE job_events;
DROP TABLE backup_disks;
DROP TABLE backup_chains;
DROP TABLE backup_jobs;
DROP TABLE backup_repositories;
DROP TABLE vm_disks;
DROP TABLE vm_contexts;
";

/// Files that restores are writing, so that what a killed hub leaves of one is found. Paths are bytes, as the host has
/// them.
const RESTORES_UP: &str = "
CREATE TABLE restore_partials (
    path BLOB NOT NULL PRIMARY KEY CHECK (length(path) > 0),
    created_at TEXT NOT NULL
) STRICT;
";

const RESTORES_DOWN: &str = "
DROP TABLE restore_partials;
";
