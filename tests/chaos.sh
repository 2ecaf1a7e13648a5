#!/usr/bin/env bash
# The long form of the chaos tests: faults and load for MINUTES, drawn from SEED, in a release build.
# Prints a timeline and figures of each part, and in the end of all together: operations, faults by kind, violations. A part
# with a violation keeps its folder; three of them end the run, and one is enough for it to end with 1. Parts take 150 s of
# faults; each eighth has faults of minutes and takes ten minutes. So an hour has two of those, and takes some ten minutes more.
set -euo pipefail
cd "$(dirname "$0")/.."

usage="usage: tests/chaos.sh MINUTES SEED"
CHAOS_MINUTES="${1:?$usage}" CHAOS_SEED="${2:?$usage}" \
  exec cargo test --locked --release --test chaos long_form -- --exact --nocapture
