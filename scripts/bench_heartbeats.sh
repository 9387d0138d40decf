#!/usr/bin/env bash
# Whether a node whose models compute all the time is late for the mesh: how long the others hear nothing of it, and how long commits take.
set -euo pipefail

usage() {
  cat <<'END'
Usage: scripts/bench_heartbeats.sh [SECONDS]

Starts three nodes on free ports of the loopback with models in the process, and measures each of these for SECONDS (20):

  at rest        nobody asks anything
  small models   64 connections ask node-a without a pause; its models take some ten microseconds, and are computed on its event loops
  large models   the same; they take some milliseconds, and are computed on threads of their own

Printed are the requests/s of node-a; for how long at most node-b heard nothing of node-a, while there was nothing to say but beats (one is
sent every 2,000 ms, a peer counts as alive for three of them, and a lease lasts as long); and then, still under load, how long 30 commits
took from a proposal at node-b to its receipt, with all three votes: a canary is given a tenth, half, or nothing.

Needs python3, wrk and a release build. Set by the environment:

  CANARY_MESH   the program (target/release/canary-mesh)
  BENCH_DIR     where the nodes' directory goes, which is synced to and goes at the end (the project's folder)

Exit codes: 0 measured, 1 something failed, or a node was taken for dead or lost its lease, 2 usage.
END
}

case ${1:-} in
  --help | -h) usage && exit 0 ;;
esac
seconds=${1:-20}
[[ $# -le 1 && $seconds =~ ^[1-9][0-9]*$ ]] || { usage >&2 && exit 2; }
cd "$(dirname "${BASH_SOURCE[0]}")/.."

binary=${CANARY_MESH:-${CARGO_TARGET_DIR:-target}/release/canary-mesh}
[[ -x $binary ]] || { echo "bench_heartbeats: $binary is not there; run: cargo build --release --locked" >&2; exit 1; }
command -v wrk >/dev/null || { echo "bench_heartbeats: wrk is not there; install Debian's package wrk" >&2; exit 1; }
work=$(mktemp -d "${BENCH_DIR:-.}/bench-heartbeats.XXXXXX")
work=$(cd "$work" && pwd)

# Processes of this directory whose id was written down, and no others.
finish() {
  local file pid
  for file in "$work"/*.pid; do
    pid=$(cat "$file" 2>/dev/null) && [[ $pid =~ ^[1-9][0-9]*$ ]] || continue
    tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -qF -- " $work/" && kill -TERM "$pid" 2>/dev/null || true
  done
  rm -rf "$work"
}
trap finish EXIT
trap 'exit 130' HUP INT TERM

PYTHONPATH=scripts/lib PYTHONDONTWRITEBYTECODE=1 python3 - "$binary" "$work" "$seconds" <<'PY'
import json, os, re, signal, subprocess, sys, time
import mlp
from bench import ask, show
from fleet import Fleet

binary, work, seconds = sys.argv[1], sys.argv[2], int(sys.argv[3])
CONNECTIONS = 64
SAMPLE_S, COMMITS = 0.02, 30
# Layers, and what it is.
MODELS = {"small models": (64, 256, 10), "large models": (64, 4096, 2048, 10)}
SHARES = (10, 50, None)

folder = f"{work}/models"
os.makedirs(folder)
names = {}
for kind, layers in MODELS.items():
    names[kind] = [f"{kind.split()[0]}-v{n}" for n in (1, 2)]
    for n, name in enumerate(names[kind]):
        mlp.write(f"{folder}/{name}.onnx", layers, n + 1)
with open("models/requests.ndjson") as file:
    request = json.loads(file.readline())["request"]
with open(f"{work}/wrk.lua", "w") as file:
    file.write(f"wrk.method = 'POST'\nwrk.headers['content-type'] = 'application/json'\nwrk.body = [[{json.dumps(request)}]]\n")

routes = {kind.split()[0]: kind for kind in MODELS}
genesis = {route: {"stable_model_id": names[kind][0], "gate": {"latency_ms_max": 60_000}} for route, kind in routes.items()}
fleet = Fleet(binary, work, ["node-a", "node-b", "node-c"], folder, genesis)

def commit(step, kind):
    """Gives how long it took, in milliseconds."""
    share, route = SHARES[step % 3], kind.split()[0]
    change = {"canary_model_id": names[kind][1], "weights": {"stable": 100 - (share or 0), "canary": share}}
    path, body = ("/rollback", {"route": route}) if share is None else ("/transactions", {"kind": "advance", "changes": {route: change}})
    began = time.perf_counter()
    reply, said = ask(fleet.client(1), "POST", path, body)
    if reply.status != 200:
        sys.exit(f"bench_heartbeats: {path}: {said.decode()}")
    return (time.perf_counter() - began) * 1e3

def measure(name, kind):
    load = None
    if name != "at rest":
        url = f"http://127.0.0.1:{fleet.data[0]}/v2/models/{kind.split()[0]}/infer"
        # Ended when enough is known.
        words = ["wrk", "-t1", f"-c{CONNECTIONS}", "-d600", "-s", f"{work}/wrk.lua", url]
        load = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        time.sleep(1)
    silences, begun = [], time.time()
    while time.time() < begun + seconds:
        [peer] = [peer for peer in fleet.get(1, "/peers")["peers"] if peer["node"] == "node-a"]
        if not peer["alive"] or peer["link"] != "up":
            sys.exit(f"bench_heartbeats: {name}: node-a was taken for dead: {peer}")
        silences.append(peer["heard_ms_ago"])
        time.sleep(SAMPLE_S)
    commits = [commit(step, kind) for step in range(COMMITS)]
    rate = ""
    if load:
        load.send_signal(signal.SIGINT)
        said = load.communicate()[0]
        if "Non-2xx" in said or "Socket errors" in said:
            sys.exit(f"bench_heartbeats: {name}: {said}")
        rate = float(re.search(r"Requests/sec: *(\S+)", said)[1])
        rate = f"{rate:,.0f} requests/s"
    print(f"{name:13} {rate:>18}  nothing heard for at most {max(silences):5} ms  ", end="")
    show("commits", commits)

try:
    fleet.start()
    measure("at rest", "small models")
    for kind in MODELS:
        measure(kind, kind)
finally:
    fleet.stop()
PY
