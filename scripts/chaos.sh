#!/usr/bin/env bash
# Real nodes under faults for as long as asked: tests/it/chaos.rs with a clock.
set -euo pipefail

usage() {
  cat <<'END'
Usage: scripts/chaos.sh [MINUTES] [SEED]

Builds in release, and runs meshes of three and of five nodes by turns. Nodes are killed, stopped, cut apart and out of disk at random
while callers change the routing; after each mesh, all that anybody was told is held against every node's record. MINUTES is 60 if it
is left out; it begins with SEED, or with a random one, and each mesh has the next. As root, one node of each has its logs on a small
tmpfs; else a limit on file sizes stands in for the full disk.

  CHAOS_STEPS   faults per mesh (150)
  CHAOS_DIR     where the nodes' directories go (a new one below /tmp)

Exit codes: 0 nothing disagreed, 1 something did: its logs are kept, and how to run it again is said. 2 usage, 130 interrupted; nothing
is left behind.
END
}

minutes=${1:-60} seed=${2:-}
case $minutes in
  --help | -h) usage && exit 0 ;;
esac
[[ $# -le 2 && $minutes =~ ^[0-9]+$ && $seed =~ ^[0-9]*$ ]] || { usage >&2 && exit 2; }
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PATH=$PATH:${CARGO_HOME:-${HOME:-}/.cargo}/bin

dir=$(mktemp -d "${CHAOS_DIR:-/tmp}/chaos.XXXXXX")
# The test's process, while it runs.
test=''
keep=no

# kill_nodes: those whose process ids the test wrote down, if they still are nodes of this directory.
kill_nodes() {
  local file pid
  for file in "$dir"/*/*.pid; do
    pid=$(cat "$file" 2>/dev/null) && [[ $pid =~ ^[1-9][0-9]*$ ]] || continue
    while tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -qF -- " --logs $dir/"; do
      kill -KILL "$pid" 2>/dev/null || true
      sleep 0.05
    done
  done
}

# The test tidies up after itself, also when it is interrupted. This is for one that was killed.
finish() {
  local code=$? mount
  trap - EXIT
  trap '' HUP INT PIPE TERM
  if [[ -n $test ]] && kill -TERM "$test" 2>/dev/null; then
    wait "$test" || true
  fi
  kill_nodes
  for mount in "$dir"/*/small-disk; do
    grep -qF " $mount " /proc/mounts || continue
    [[ $keep == no ]] || cp -r "$mount" "$mount.kept" || true
    umount "$mount" || umount --lazy "$mount" || true
  done
  if [[ $keep == yes ]]; then
    printf 'The logs are kept in %s.\n' "$dir" >&2
  else
    rm -rf "$dir"
  fi
  exit "$code"
}
trap finish EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 141' PIPE
trap 'exit 143' TERM

echo "Building; the first time takes some minutes."
built=$(cargo test --release --locked --test it --no-run --message-format=json-render-diagnostics)
binary=$(sed -n 's/.*"executable":"\([^"]*\)".*"name":"it".*/\1/p; s/.*"name":"it".*"executable":"\([^"]*\)".*/\1/p' <<<"$built" | head -n 1)
[[ -x $binary ]] || { echo "error: cargo did not say where the test is." >&2 && exit 1; }

export CHAOS_DIR=$dir CHAOS_MINUTES=$minutes
[[ -z $seed ]] || export CHAOS_SEED=$seed
"$binary" chaos::chaos_for_as_long_as_asked --ignored --exact --nocapture &
test=$!
code=0
wait "$test" || code=$?
test=''
((code == 0)) && exit 0
# 130: the test was interrupted itself, and has tidied up.
((code == 130)) || keep=yes
((code == 130)) || code=1
exit "$code"
