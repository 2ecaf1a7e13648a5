#!/usr/bin/env bash
# The long form of the load test in a release build: finds the highest rate that holds, holds it for MINUTES while
# memory, files, tasks, streams and consumers are sampled, then offers three times as much for a minute.
set -euo pipefail
cd "$(dirname "$0")/.."

LOAD_MINUTES="${1:?usage: tests/load.sh MINUTES}" \
  exec cargo test --locked --release --test load long_form -- --exact --nocapture
