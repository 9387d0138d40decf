#!/bin/sh
# Explores the core exhaustively: every run of tests/exhaustive, one after another, in a release build, then the mutants.
# EXHAUSTIVE_SECONDS is the longest that one run may take (1200); EXHAUSTIVE_GIB the most memory (16). A name, or a part of one, runs only that.
set -eu
cd "$(dirname "$0")/.."
ulimit -v $(( ${EXHAUSTIVE_GIB:-16} * 1024 * 1024 ))
cargo test --locked --release --test exhaustive -- --include-ignored --nocapture --test-threads 1 "$@"
cargo test --locked --release --features mutants --test exhaustive -- --nocapture --test-threads 1 mutants::
