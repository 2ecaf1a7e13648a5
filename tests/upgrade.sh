#!/usr/bin/env bash
# A rolling upgrade from an older revision of this repository to what is here, and one step back, under load.
#
#   tests/upgrade.sh OLD_REV
set -euo pipefail
cd "$(dirname "$0")/.."

old="$(git rev-parse --verify "${1:?usage: tests/upgrade.sh OLD_REV}^{commit}")"
folder="$(mktemp -d)"
trap 'git worktree remove --force "$folder/source"; rm -rf "$folder"' EXIT
git worktree add --detach "$folder/source" "$old"
(cd "$folder/source" && CARGO_TARGET_DIR="$folder/target" cargo build --locked --bin ruvector-cluster)
UPGRADE_FROM="$folder/target/debug/ruvector-cluster" cargo test --locked --test upgrade -- --nocapture
