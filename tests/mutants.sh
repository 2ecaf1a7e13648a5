#!/usr/bin/env bash
# Breaks the node program on purpose, one defect after the other (feature `mutants`), and runs the short
# chaos scenarios against each until one of them notices. Ends with 1 if a defect goes unnoticed.
# The last of these is the counter-check: damaged chunks alone, with nothing else broken, must hurt nobody.
# Then the simulation and the models try their own defects, the rare ones too, in a release build.
set -euo pipefail
cd "$(dirname "$0")/.."

scenarios=("one_nats_server 1" "three_nats_servers 2" "single_replicas_that_move 1" "single_replicas_that_move 2")
mutants=(ack-early no-dedup session-early no-fencing chunk-unchecked,corrupt-chunks)
[ $# -eq 0 ] || mutants=("$@")

logs="$(mktemp -d)"
cargo build --locked --features mutants
cp "$(cargo metadata --format-version 1 --no-deps | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')/debug/ruvector-cluster" "$logs/broken"
cargo test --locked --test chaos --no-run

# run MUTANT TEST SEED
run() {
  RUVECTOR_TEST_MUTANT="$1" CHAOS_PROGRAM="$logs/broken" CHAOS_SEED="$3" \
    cargo test --locked --test chaos "$2" -- --exact --nocapture >"$logs/$1-$2-$3.log" 2>&1
}

missed=0
for mutant in "${mutants[@]}"; do
  caught=""
  for scenario in "${scenarios[@]}"; do
    read -r name seed <<<"$scenario"
    if ! run "$mutant" "$name" "$seed"; then
      caught="$name, seed $seed: $(grep -m1 -A1 '^VIOLATION' "$logs/$mutant-$name-$seed.log" | cut -c1-160 | tr '\n' ' ')"
      break
    fi
  done
  if [ -n "$caught" ]; then echo "caught      $mutant ($caught)"; else echo "NOT CAUGHT  $mutant"; missed=1; fi
done
if [ $# -eq 0 ]; then
  if run corrupt-chunks three_nats_servers 2; then
    echo "unharmed    corrupt-chunks"
  else
    echo "HARMED BY   corrupt-chunks"
    missed=1
  fi
fi
if [ $# -eq 0 ]; then
  if RUVECTOR_SIM_MUTANT=all RUVECTOR_SIM_SEEDS=100000 cargo test --locked --release --lib -- \
    --nocapture --test-threads=1 sim_notices sim_model >"$logs/simulation.log" 2>&1; then
    grep ': seed \|: [0-9]* states' "$logs/simulation.log" | cut -c1-120 | sed 's/^.*\.\.\. //; s/^/simulated   /'
  else
    echo "NOT CAUGHT  in the simulation: $(grep -m1 'not noticed' "$logs/simulation.log")"
    missed=1
  fi
fi
echo "logs: $logs"
exit "$missed"
