# shellcheck shell=bash
# What the scripts know of the nodes. Sourced; the present folder is the project's.

# Where each node's log, events, output and process id are.
logs=logs
# What is being done, for errors.
step=''

# Printed even if nobody listens any more: what is under way has to be finished.
say() {
  printf '%s\n' "$@" 2>/dev/null || true
}

die() {
  say "error: ${step:+$step: }$*" >&2
  exit 1
}

# The nodes that have a pid file.
known_nodes() {
  local file
  for file in "$logs"/*.pid; do
    [[ ! -f $file ]] || basename "$file" .pid
  done
}

# node_is_alive ID: whether the process of its pid file runs and is this node. Sets `pid`.
node_is_alive() {
  pid=$(cat "$logs/$1.pid" 2>/dev/null) && [[ $pid =~ ^[1-9][0-9]*$ ]] && kill -0 "$pid" 2>/dev/null || return 1
  # Process ids are used again, and a process that has ended may still wait for its parent: its arguments tell.
  [[ ! -d /proc/self ]] || tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -qF -- " serve --id $1 "
}
