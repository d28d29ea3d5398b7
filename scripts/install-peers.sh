#!/usr/bin/env bash
# Installs the programs that the tests and benchmarks judge against. Does nothing where all of them are there.
set -euo pipefail

# One line a program: the command that must exist, and the Debian package that has it.
peers="
cc gcc
debugfs e2fsprogs
fio fio
mkfs.ext4 e2fsprogs
nbdcopy libnbd-bin
nbdinfo libnbd-bin
nbdkit nbdkit
nbdsh python3-libnbd
python3 python3
qemu-img qemu-utils
qemu-io qemu-utils
qemu-nbd qemu-utils
"

export PATH="$PATH:/usr/sbin:/sbin"
missing=""
while read -r command package; do
    [ -n "$command" ] || continue
    command -v "$command" >/dev/null || missing="$missing $package"
done <<<"$peers"
[ -n "$missing" ] || exit 0

packages=$(tr ' ' '\n' <<<"$missing" | sort -u | tr '\n' ' ')
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "missing programs; install them with: apt-get install -y $packages" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -q
# shellcheck disable=SC2086 # A list of package names.
apt-get install -yq --no-install-recommends $packages
