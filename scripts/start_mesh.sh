#!/usr/bin/env bash
# Builds canary-mesh, starts the nodes of peers.json, and tells the story of scripts/lib/story.sh with them.
set -euo pipefail

usage() {
  cat <<'END'
Usage: scripts/start_mesh.sh [--no-demo] [--fresh]

Builds in release, starts every node of peers.json, and waits until all are ready. Then a story of about a minute shows what the
mesh does, also when a node is killed or cut off, and checks all that it says. The mesh is left running; scripts/stop_mesh.sh
stops it. If anything fails, it is stopped at once.

  --no-demo   only starts the mesh; it goes on from the logs that are there
  --fresh     first moves the nodes' old logs to logs/old-<time>/
  --help      this text

Exit codes: 0 the mesh runs, 1 something failed and nothing was left running, 2 usage.
END
}

demo=yes fresh=no
for word in "$@"; do
  case $word in
    --no-demo) demo=no ;;
    --fresh) fresh=yes ;;
    --help | -h) usage && exit 0 ;;
    *) printf 'error: unknown option %s\n\n' "$word" >&2 && usage >&2 && exit 2 ;;
  esac
done

# Closed from the start, it would be taken by the next file that is opened.
[[ -e /dev/fd/1 ]] || exec >/dev/null
began_in=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/lib/nodes.sh
source scripts/lib/nodes.sh
# shellcheck source=scripts/lib/story.sh
source scripts/lib/story.sh

# Longest wait for anything that the mesh does by itself, in seconds.
wait_s_max=30
# The program, as it is typed in this folder.
binary=''
# The nodes, ordered by id, and of each: addresses, folder of models, and process while it should run.
ids=()
declare -A control=() data=() models=() process=()
# Whether this run has started nodes that are to be stopped if it fails.
in_charge=no

# However this ends, peers.json is whole and no mesh is half started.
finish() {
  local code=$?
  trap - EXIT
  trap '' HUP INT PIPE TERM
  heal_links || true
  hush
  if [[ $in_charge == yes ]]; then
    say "Stopping the mesh. Its logs are in $PWD/$logs/." >&2
    scripts/stop_mesh.sh --force >&2 || true
    # A process that was about to become a node is not known as one yet.
    kill "${process[@]}" 2>/dev/null || true
  fi
  exit "$code"
}
trap finish EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 141' PIPE
trap 'exit 143' TERM

check_tools() {
  local tool
  for tool in flock setsid; do
    command -v "$tool" >/dev/null || die "there is no $tool; it comes with util-linux."
  done
}

# Holds off a second run until this one ends. The nodes outlive it, so they must not inherit the lock.
lock() {
  mkdir -p "$logs"
  exec 9>"$logs/start_mesh.lock"
  flock -n 9 || die "scripts/start_mesh.sh is at work already in this folder; wait for it, or interrupt it."
}

refuse_running() {
  local id
  for id in $(known_nodes); do
    ! node_is_alive "$id" || die "the mesh is running already: $id is process $pid. Stop it with scripts/stop_mesh.sh."
  done
}

refuse_old_logs() {
  [[ $demo == yes && $fresh == no ]] || return 0
  if compgen -G "$logs/*.log" >/dev/null || compgen -G "$logs/*.events.ndjson" >/dev/null; then
    die "$logs/ holds an earlier run, and the story begins at version 0. Move it aside with --fresh, or go on from it with --no-demo."
  fi
}

build() {
  PATH=$PATH:${CARGO_HOME:-${HOME:-}/.cargo}/bin
  if ! command -v cargo >/dev/null; then
    binary=${CARGO_TARGET_DIR:-target}/release/canary-mesh
    [[ -x $binary ]] || die "there is no cargo, and $binary is not built yet. Get Rust from https://rustup.rs and start this again."
    say "There is no cargo; $binary is taken as it is."
    return
  fi
  say "Building; the first time takes some minutes."
  local built
  if ! built=$(cargo build --release --locked --message-format=json-render-diagnostics 9>&-); then
    command -v cc >/dev/null || die "the build failed, and there is no cc, by which Rust links: install gcc or clang."
    die "the build failed; cargo's words are above."
  fi
  # Only cargo knows where its settings make it build to.
  binary=$(sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' <<<"$built")
  binary=${binary#"$PWD/"}
}

read_peers() {
  local summary line value id=''
  summary=$("$binary" peers check --output json) || exit 1
  while read -r line; do
    value=${line#*: \"} value=${value%\"*}
    case $line in
      '"id": '*) id=$value ids+=("$value") models[$value]=models ;;
      '"control": '*) control[$id]=$value ;;
      '"data": '*) data[$id]=$value ;;
    esac
  done <<<"$summary"
  mapfile -t ids < <(printf '%s\n' "${ids[@]}" | LC_ALL=C sort)
}

refuse_taken_ports() {
  local id address host taken=''
  for id in "${ids[@]}"; do
    for address in "${control[$id]}" "${data[$id]}"; do
      host=${address%:*} host=${host#[} host=${host%]}
      ! (exec 3<>"/dev/tcp/$host/${address##*:}") 2>/dev/null || taken+=", $address ($id)"
    done
  done
  [[ -z $taken ]] || die "in use by another process: ${taken#, }. If that is the mesh of another folder, stop it there; 'ss -ltnp' \
shows who it is. Or write other addresses into peers.json."
}

move_old_logs() {
  [[ $fresh == yes ]] || return 0
  local id file folder old=()
  for id in "${ids[@]}"; do
    for file in "$logs/$id".*; do
      [[ ! -e $file ]] || old+=("$file")
    done
  done
  ((${#old[@]} > 0)) || return 0
  folder=$logs/old-$(date +%Y%m%d-%H%M%S)
  mkdir "$folder"
  mv "${old[@]}" "$folder/"
  say "The old logs are in $folder/."
}

# start_node ID [OPTION…]
start_node() {
  local id=$1
  shift
  nohup setsid "$binary" serve --id "$id" --peers peers.json --models "${models[$id]}" --logs "$logs" "$@" \
    >>"$logs/$id.out" 2>&1 </dev/null 9>&- &
  process[$id]=$!
  say "$!" >"$logs/$id.pid"
}

# stop_node ID: in order.
stop_node() {
  kill "${process[$1]}"
  await_end "$1"
  ((ended == 0)) || die "$1 was asked to stop, and ended with $ended; see $logs/$1.out."
}

# await_end ID: waits until this node has ended, and sets `ended` to its exit code.
await_end() {
  ended=0
  # That a child was killed is told by the story, not by the shell.
  { wait "${process[$1]}" || ended=$?; } 2>/dev/null
  unset "process[$1]"
  rm -f "$logs/$1.pid"
}

# wait_for WHAT COMMAND…: until it succeeds; fails when a node ends that should not, or when it takes too long.
wait_for() {
  local what=$1 id end=$((SECONDS + wait_s_max))
  shift
  until "$@"; do
    for id in "${!process[@]}"; do
      kill -0 "${process[$id]}" 2>/dev/null || die "$id has ended; the end of $logs/$id.out:"$'\n'"$(tail -n 5 "$logs/$id.out")"
    done
    if ((SECONDS >= end)); then
      "$binary" status >&2 || true
      die "waited $wait_s_max s in vain for $what."
    fi
    sleep 0.1
  done
}

all_well() {
  "$binary" status >/dev/null 2>&1
}

# The story and its commands ask the nodes of peers.json, whatever this says.
unset CANARY_MESH_ENDPOINT
check_tools
lock
refuse_running
refuse_old_logs
mend_peers_file
build
read_peers
[[ $demo == no ]] || refuse_other_mesh
refuse_taken_ports
move_old_logs
[[ $demo == no ]] || make_poor_models
SECONDS=0
in_charge=yes
for id in "${ids[@]}"; do
  start_node "$id"
done
wait_for "all nodes to be ready" all_well
where=''
for id in "${ids[@]}"; do
  where+=", $id at ${data[$id]}"
done
say "${#ids[@]} nodes are ready: ${where#, }."
[[ $began_in == "$PWD" ]] || say "All commands below are typed in $PWD."
[[ $demo == no ]] || tell_story
in_charge=no

say "
The mesh is left running.
  look    $binary status --watch
          curl http://${data[${ids[0]}]}/routing/state
  ask     $binary load --file models/requests.ndjson
  change  $binary propose --help
  read    tail -f $logs/${ids[0]}.events.ndjson
  stop    scripts/stop_mesh.sh"
