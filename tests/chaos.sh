#!/usr/bin/env bash
# The long form of the chaos tests: faults and load for MINUTES, drawn from SEED, in a release build.
# Prints a timeline and, for each part, figures; ends with 1 at the first part with a violation. Parts take 150 s; each eighth
# has faults of minutes and takes ten. So an hour has two of those.
set -euo pipefail
cd "$(dirname "$0")/.."

usage="usage: tests/chaos.sh MINUTES SEED"
CHAOS_MINUTES="${1:?$usage}" CHAOS_SEED="${2:?$usage}" \
  exec cargo test --locked --release --test chaos long_form -- --exact --nocapture
