#!/usr/bin/env bash
# Runs what depends on the nats-server against each of the given ones, one after the other: on one server and on
# three. Prints a line for each version and test binary; ends with 1 if any failed.
#
#   tests/matrix.sh ~/.cache/ruvector-cluster/bin/nats-server /opt/nats-2.10.27/nats-server
set -euo pipefail
cd "$(dirname "$0")/.."

[ $# -gt 0 ] || { echo "usage: tests/matrix.sh NATS_SERVER..." >&2; exit 2; }
binaries=(contract nats_setup log_loss migrations chaos)
logs="$(mktemp -d)"
flags=()
for binary in "${binaries[@]}"; do flags+=(--test "$binary"); done
cargo test --locked --no-run "${flags[@]}"

failed=0
printf '| %-11s | %-10s | %-6s | %6s | %6s | %7s |\n' nats-server tests result passed failed seconds
echo "|---|---|---|---|---|---|"
for server in "$@"; do
  # "nats-server: v2.10.27"
  version="$("$server" --version)"
  version="${version##*v}"
  for binary in "${binaries[@]}"; do
    log="$logs/$version-$binary.log"
    began=$SECONDS
    result=passed
    NATS_SERVER="$(realpath "$server")" cargo test --locked --test "$binary" -- --test-threads 2 >"$log" 2>&1 || result=FAILED
    # "test result: ok. 6 passed; 0 failed; …"; nothing if it did not get so far.
    counts="$(sed -n 's/^test result: .* \([0-9]*\) passed; \([0-9]*\) failed;.*/\1 \2/p' "$log" | tail -1)"
    read -r passed broken <<<"${counts:-0 0}"
    [ "$result" = passed ] && [ "$passed" -gt 0 ] || { result=FAILED; failed=1; }
    printf '| %-11s | %-10s | %-6s | %6s | %6s | %7s |\n' "$version" "$binary" "$result" "$passed" "$broken" "$((SECONDS - began))"
  done
done
echo "logs: $logs"
exit "$failed"
