#!/usr/bin/env bash
# The data plane against HAProxy and nginx: same machine, same run, same upstreams at 80/20, one core each, in turn.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
binary=${BIN:-${CARGO_TARGET_DIR:-target}/release/canary-mesh}
[[ -x $binary ]] || { echo "bench_gateway: $binary is not there; run: cargo build --release --locked" >&2; exit 1; }
work=$(mktemp -d "${BENCH_DIR:-.}/bench-gateway.XXXXXX")
work=$(cd "$work" && pwd)
trap 'rm -rf "$work"' EXIT
ulimit -n "$(ulimit -H -n)"
PATH=$PATH:/usr/sbin PYTHONPATH=scripts/lib PYTHONDONTWRITEBYTECODE=1 python3 scripts/lib/bench_gateway.py --binary "$binary" --work "$work" "$@"
