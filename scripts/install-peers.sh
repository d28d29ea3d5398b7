#!/usr/bin/env bash
# Installs the programs that the tests and benchmarks judge against. Does nothing where all of them are there.
set -euo pipefail
cd "$(dirname "$0")/.."

# One line a program: the command that must exist, and the Debian package that has it. The reference nbd-server has the
# name of ours.
peers="
cc gcc
debugfs e2fsprogs
fio fio
mkfs.ext4 e2fsprogs
mkfs.xfs xfsprogs
/usr/bin/nbd-server nbd-server
nbdcopy libnbd-bin
nbdinfo libnbd-bin
nbdkit nbdkit
nbdsh python3-libnbd
python3 python3
qemu-img qemu-utils
qemu-io qemu-utils
qemu-nbd qemu-utils
qemu-storage-daemon qemu-utils
strace strace
"

# Readers of QCOW2 in Python, with all that they need; they get an environment of their own beside what cargo builds.
readers="
dissect.hypervisor==3.21
dissect.cstruct==4.7
dissect.util==3.24
defusedxml==0.7.1
backports.zstd==1.8.0;python_version<'3.14'
"

export PATH="$PATH:/usr/sbin:/sbin"

install_packages() {
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        echo "missing programs; install them with: apt-get install -y $*" >&2
        return 1
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -q
    apt-get install -yq --no-install-recommends "$@"
}

install_programs() {
    local missing=""
    while read -r command package; do
        [ -n "$command" ] || continue
        command -v "$command" >/dev/null || missing="$missing $package"
    done <<<"$peers"
    [ -n "$missing" ] || return 0
    # shellcheck disable=SC2046 # A list of package names.
    install_packages $(tr ' ' '\n' <<<"$missing" | sort -u)
}

# Debian's python3 has no way to make an environment with pip in it before its package of that name is there; any other
# may not either. One without pip takes its packages from the pip outside.
make_environment() {
    rm -rf "$1"
    python3 -m venv "$1" >/dev/null 2>&1 && return 0
    rm -rf "$1"
    if python3 -m virtualenv --version >/dev/null 2>&1; then
        python3 -m virtualenv -q "$1"
        return
    fi
    if python3 -m pip --python "$(command -v python3)" --version >/dev/null 2>&1; then
        python3 -m venv --without-pip "$1" >/dev/null 2>&1 && return 0
        rm -rf "$1"
    fi
    install_packages python3-venv && python3 -m venv "$1"
}

pip_install() {
    local environment="$1"
    shift
    if "$environment/bin/python3" -m pip --version >/dev/null 2>&1; then
        "$environment/bin/python3" -m pip install "$@"
    else
        python3 -m pip --python "$environment/bin/python3" install "$@"
    fi
}

install_readers() {
    local folder="${CARGO_TARGET_DIR:-target}/peers"
    # What is in there, from when it was complete; a new list or a broken interpreter makes it anew.
    if printf '%s' "$readers" | cmp -s - "$folder/readers" &&
        "$folder/bin/python3" -c 'import dissect.hypervisor.disk.qcow2' 2>/dev/null; then
        return 0
    fi
    make_environment "$folder"
    printf '%s' "$readers" >"$folder/requirements.txt"
    pip_install "$folder" -q --disable-pip-version-check --no-deps -r "$folder/requirements.txt"
    mv "$folder/requirements.txt" "$folder/readers"
}

install_programs
install_readers
