#!/usr/bin/env bash
# Stops the nodes that scripts/start_mesh.sh has started.
set -euo pipefail

end_wait_s_max=15

usage() {
  cat <<'END'
Usage: scripts/stop_mesh.sh [--force]

Asks every node that scripts/start_mesh.sh has started to end (SIGTERM), and waits up to 15 s for it. Logs are kept.

  --force   kills what has not ended by then (SIGKILL); a log stands that
  --help    this text

Exit codes: 0 nothing runs any more, 1 a node has not ended, 2 usage.
END
}

force=no
for word in "$@"; do
  case $word in
    --force) force=yes ;;
    --help | -h) usage && exit 0 ;;
    *) printf 'error: unknown option %s\n\n' "$word" >&2 && usage >&2 && exit 2 ;;
  esac
done

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/lib/nodes.sh
source scripts/lib/nodes.sh

# Keeps in `running` those that still run, and forgets the pid files of the others.
look_again() {
  local id still=()
  for id in "${running[@]}"; do
    if node_is_alive "$id"; then still+=("$id"); else rm -f "$logs/$id.pid"; fi
  done
  running=("${still[@]}")
}

# signal_all SIGNAL: to all that run.
signal_all() {
  local id
  for id in "${running[@]}"; do
    # It may have ended since.
    ! node_is_alive "$id" || kill "-$1" "$pid" 2>/dev/null || true
  done
}

# wait_all SECONDS: until none runs, or the time is over.
wait_all() {
  local end=$((SECONDS + $1))
  look_again
  while ((${#running[@]} > 0 && SECONDS < end)); do
    sleep 0.1
    look_again
  done
}

mapfile -t running < <(known_nodes)
look_again
if ((${#running[@]} == 0)); then
  say "Nothing to stop: no node of this folder is running."
  exit 0
fi
asked=("${running[@]}")
signal_all TERM
wait_all "$end_wait_s_max"
if ((${#running[@]} > 0)) && [[ $force == yes ]]; then
  say "Killing what has not ended after $end_wait_s_max s: ${running[*]}."
  signal_all KILL
  wait_all "$end_wait_s_max"
fi
for id in "${running[@]}"; do
  node_is_alive "$id" || continue
  say "error: $id (process $pid) has not ended after $end_wait_s_max s; see $logs/$id.out. scripts/stop_mesh.sh --force kills it." >&2
done
((${#running[@]} == 0)) || exit 1
say "Stopped ${asked[*]}."
