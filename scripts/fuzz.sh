#!/usr/bin/env bash
# Runs every fuzz target (or those named behind it) for SECONDS (the first argument, 60 unless told), beginning from its
# committed corpus.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-60}
shift || true

if ! cargo fuzz --version >/dev/null 2>&1; then
    echo "cargo-fuzz is missing; installing it (cargo install --locked cargo-fuzz)" >&2
    cargo install --locked cargo-fuzz
fi
for target in ${*:-$(cargo fuzz list)}; do
    echo "== $target, $seconds seconds"
    # An operation is a few bytes; an image needs some clusters.
    max_len=4096
    if [ "$target" = qcow2_image ] || [ "$target" = vmdk ]; then max_len=200000; fi
    # New inputs go to the first folder, which is not committed; the second is read only.
    mkdir -p "fuzz/artifacts/corpus/$target"
    cargo fuzz run --sanitizer none "$target" \
        "fuzz/artifacts/corpus/$target" "fuzz/corpus/$target" -- \
        -max_total_time="$seconds" -max_len="$max_len" -rss_limit_mb=512 -timeout=30 -print_final_stats=1
done
