#!/usr/bin/env bash
# Everything that docs/PROOF.md has figures of, one after another: hours. A part that fails does not keep the others from running.
#
#   scripts/prove.sh [PART...]     tests sim cuts drivers mutants exhaustive images fuzz chaos; all of them unless said otherwise
#
#   SEEDS           seeds of the simulator (100000), from SEED (0) on
#   CUTS            seeds of one node cut off (10000)
#   DRIVERS         seeds of a rollout whose driver is killed (10000)
#   FUZZ_SECONDS    for each fuzz target (60)
#   CHAOS_MINUTES   with real nodes (60)
#
# Needs what `cargo test` needs; fuzz also cargo-fuzz and a C++ compiler. Ends with a line for each part, and with 1 if one failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
target=${CARGO_TARGET_DIR:-target}

tests() { cargo test --locked; }

sim() {
  cargo build --release --locked && "$target/release/canary-mesh" sim --seeds "${SEEDS:-100000}" --seed "${SEED:-0}" --jobs "$(nproc)"
}

cuts() {
  cargo build --release --locked && "$target/release/canary-mesh" sim --cuts --seeds "${CUTS:-10000}" --jobs "$(nproc)"
}

drivers() {
  cargo build --release --locked && "$target/release/canary-mesh" sim --drivers --seeds "${DRIVERS:-10000}" --jobs "$(nproc)"
}

mutants() {
  cargo build --profile sim --features mutants --locked && "$target/sim/canary-mesh" sim --mutants --jobs "$(nproc)"
}

exhaustive() { scripts/exhaustive.sh; }

images() { cargo test --release --locked --lib many_more_of_them -- --ignored --nocapture; }

fuzz() { scripts/fuzz.sh "${FUZZ_SECONDS:-60}"; }

chaos() { scripts/chaos.sh "${CHAOS_MINUTES:-60}"; }

all=(tests sim cuts drivers mutants exhaustive images fuzz chaos)
parts=("$@")
[[ $# -gt 0 ]] || parts=("${all[@]}")
for part in "${parts[@]}"; do
  [[ " ${all[*]} " == *" $part "* ]] || { echo "prove: there is no part $part; there are: ${all[*]}" >&2; exit 2; }
done

summary=() failed=0
for part in "${parts[@]}"; do
  printf '\n== %s\n' "$part"
  start=$SECONDS
  if "$part"; then word=ok; else word=FAILED failed=1; fi
  summary+=("$(printf '%-12s %-6s %6d s' "$part" "$word" $((SECONDS - start)))")
done
printf '\n'
printf '%s\n' "${summary[@]}"
exit "$failed"
