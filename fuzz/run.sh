#!/usr/bin/env bash
# Fuzzes every decoder for some seconds each (default 60): fuzz/run.sh 300
# Needs cargo-fuzz (cargo install cargo-fuzz). Works on a stable toolchain: coverage comes from the compiler, and
# memory errors cannot happen, as the project forbids unsafe code.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-60}
for target in $(cargo fuzz list); do
    echo "== $target, $seconds s"
    # The corpus in the repository stays small: what is found goes to a folder of its own.
    mkdir -p "fuzz/target/found/$target"
    cargo fuzz run --sanitizer none "$target" "fuzz/target/found/$target" "fuzz/corpus/$target" -- \
        -max_total_time="$seconds" -max_len=65536 -rss_limit_mb=2048 -timeout=10 -print_final_stats=1
done
