#!/usr/bin/env bash
# Fuzzes every target in fuzz/ for some seconds each, and fails on the first crash.
#
#   scripts/fuzz.sh [SECONDS] [TARGET...]     60 seconds and all targets unless said otherwise
#
# Needs cargo-fuzz (`cargo install cargo-fuzz --locked`) and a C++ compiler. No sanitizer: this package has no unsafe code, and what is
# looked for are panics, failed assertions, endless loops and memory without bounds. A crash is left in fuzz/artifacts. What is found new
# stays in fuzz/target/found; to keep it, copy it to fuzz/corpus/TARGET and run, in fuzz/, RUSTC_BOOTSTRAP=1 cargo fuzz cmin -s none TARGET.
# The seeds come from `cargo test --lib write_seeds -- --ignored`. `cargo test` runs the whole corpus through its targets, without a fuzzer.
set -euo pipefail
cd "$(dirname "$0")/../fuzz"

seconds=${1:-60}
shift || true
# cargo-fuzz asks for flags that a stable compiler has, but does not offer.
export RUSTC_BOOTSTRAP=1
targets=("$@")
[ ${#targets[@]} -gt 0 ] || mapfile -t targets < <(cargo fuzz list)

cargo fuzz build -s none
for target in "${targets[@]}"; do
    found=target/found/$target
    mkdir -p "$found"
    echo "fuzz $target for $seconds s"
    cargo fuzz run -s none "$target" "$found" "corpus/$target" -- \
        -max_total_time="$seconds" -timeout=10 -rss_limit_mb=1024 -print_final_stats=1 -verbosity=1 2>&1 |
        tee "target/found/$target.txt" | grep -E '^(==|SUMMARY|stat::|thread|assertion|artifact_prefix|#[0-9]+.*DONE)' || true
    # The pipe's first command is the fuzzer.
    if ! grep -q '^Done ' "target/found/$target.txt"; then
        echo "fuzz $target: failed; the whole output is in fuzz/target/found/$target.txt" >&2
        exit 1
    fi
done
