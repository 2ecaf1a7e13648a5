#!/usr/bin/env bash
# The long form of the garbage test: on every subject for MINUTES, drawn from SEED.
set -euo pipefail
cd "$(dirname "$0")/.."

usage="usage: tests/abuse.sh MINUTES SEED"
ABUSE_MINUTES="${1:?$usage}" ABUSE_SEED="${2:?$usage}" \
  exec cargo test --locked --test abuse garbage::long_form -- --exact --nocapture
