#!/usr/bin/env bash
# The main job, from nothing to a restored disk, under ./demo. Needs mkfs.ext4, which it installs as root or names.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PATH:/usr/sbin:/sbin"

if ! command -v mkfs.ext4 >/dev/null || ! command -v debugfs >/dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        export DEBIAN_FRONTEND=noninteractive
        apt-get update -q
        apt-get install -yq --no-install-recommends e2fsprogs
    else
        echo "mkfs.ext4 is missing; install it with: apt-get install -y e2fsprogs" >&2
        exit 1
    fi
fi
exec "${CARGO_TARGET_DIR:-target}/release/sendense-hub" demo --dir demo
