#!/usr/bin/env bash
# Runs those of QEMU's own tests of images that need no emulator (its iotests, format qcow2) against our `qcow2` in the
# place of qemu-img, and counts. SOURCE is an unpacked source tree of QEMU (`apt-get source qemu`); nothing of it is part
# of this repository. qemu-io and qemu-nbd are the installed ones.
#
#   scripts/iotests.sh SOURCE [TEST...]
#   QEMU_IMG=/usr/bin/qemu-img scripts/iotests.sh SOURCE     what the original passes on this machine
set -euo pipefail
source=$(realpath "${1:?the folder of an unpacked QEMU source is missing}")
shift
cd "$(dirname "$0")/.."
out=$PWD/target/iotests
mkdir -p "$out"

if [ -z "${QEMU_IMG:-}" ]; then
    cargo build --locked -p qcow2-program
    # Its images refer to files of other folders.
    cat > "$out/qemu-img" <<WRAPPER
#!/bin/bash
case "\${1:-}" in --version | -h | --help | "") exec -a qemu-img "$PWD/target/debug/qcow2" "\$@" ;; esac
command=\$1
shift
exec -a qemu-img "$PWD/target/debug/qcow2" "\$command" --allow-references any "\$@"
WRAPPER
    chmod +x "$out/qemu-img"
    QEMU_IMG=$out/qemu-img
fi
# The runner asks an emulator which machines it knows before anything else.
cat > "$out/no-emulator" <<'EMULATOR'
#!/bin/sh
case "$*" in
*"-machine help"*) printf 'Supported machines are:\npc  Standard PC (default)\n' ;;
*"-device help"*) echo 'name "virtio-blk-pci"' ;;
*) exit 1 ;;
esac
EMULATOR
chmod +x "$out/no-emulator"
export QEMU_PROG=$out/no-emulator QSD_PROG=$out/no-emulator QEMU_IMG_PROG=$QEMU_IMG
export QEMU_IO_PROG=${QEMU_IO:-$(command -v qemu-io)} QEMU_NBD_PROG=${QEMU_NBD:-$(command -v qemu-nbd)}
export PYTHON=${PYTHON:-$(command -v python3)}

tests="
001 002 003 004 005 008 009 010 011 012 013 014 015 017 018 019 020 021 022 023 024 025 026 027 029 031 032 033 034
035 036 037 038 039 042 043 046 047 048 049 050 052 053 054 058 061 062 063 066 069 072 073 074 079 080 082 086 089
090 097 098 103 104 105 107 110 111 112 114 115 121 122 125 126 133 134 138 150 154 158 159 162 170 177 178 179 187
188 189 190 197 198 204 214 215 217 220 226 231 233 243 250 252 261 263 265 268 270 271 272 279 284 287 289 290 292
293 305 313 314
"
cd "$source/tests/qemu-iotests"
declare -A found=([pass]="" [fail]="" ["not run"]="")
# One at a time: a test whose output is no text ends the runner.
for number in ${*:-$tests}; do
    log=$out/$number.log
    export TEST_DIR=$out/$number
    mkdir -p "$TEST_DIR"
    timeout 600 ./check -qcow2 "$number" > "$log" 2>&1 || true
    rm -rf "$TEST_DIR"
    if grep -q '^Passed all 1 iotests' "$log"; then
        verdict=pass
    elif grep -q '^Not run:' "$log" && ! grep -q '^Failures:' "$log"; then
        verdict="not run"
    else
        verdict=fail
    fi
    found[$verdict]+=" $number"
    echo "$number $verdict"
done
for verdict in pass fail "not run"; do
    echo "$verdict: $(wc -w <<< "${found[$verdict]}"):${found[$verdict]}"
done
