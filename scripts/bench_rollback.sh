#!/usr/bin/env bash
# What a rollback costs on the worst day: three real nodes on loopback, one of them dead, stopped or cut off.
set -euo pipefail

usage() {
  cat <<'END'
Usage: scripts/bench_rollback.sh

Starts three nodes on free ports of the loopback, and measures at a caller with one kept HTTP connection:

1. the median time of a committed reduce with all nodes alive, and with one of the three killed, stopped (SIGSTOP), and cut off by
   partitions, one after the other in every round; and the ratio of each to all alive in the same round.
2. from the receipt of a rollback at its caller to the last canary answer on any node, under steady requests for the canary to all
   of them. Below 0: the last one came before the receipt.

Needs python3 and a release build. Set by the environment:

  ROUNDS        rounds of part 1 (5)
  PER_ROUND     reduces in each situation of a round (40)
  ROLLBACKS     rollbacks of part 2 (25)
  RATE          requests per second to each node in part 2 (200)
  CANARY_MESH   the program (target/release/canary-mesh)
  BENCH_DIR     where the nodes' directory goes, which is synced to and goes at the end (the project's folder)

Exit codes: 0 measured, 1 something failed, or a canary answered 100 ms after a rollback's receipt or later. 2 usage.
END
}

case ${1:-} in
  --help | -h) usage && exit 0 ;;
esac
(($# == 0)) || { usage >&2 && exit 2; }
cd "$(dirname "${BASH_SOURCE[0]}")/.."

binary=${CANARY_MESH:-${CARGO_TARGET_DIR:-target}/release/canary-mesh}
[[ -x $binary ]] || { echo "bench_rollback: $binary is not there; run: cargo build --release --locked" >&2; exit 1; }
work=$(mktemp -d "${BENCH_DIR:-.}/bench-rollback.XXXXXX")
work=$(cd "$work" && pwd)

# A node of this directory whose process id was written down, and no other process.
finish() {
  local file pid
  for file in "$work"/*.pid; do
    pid=$(cat "$file" 2>/dev/null) && [[ $pid =~ ^[1-9][0-9]*$ ]] || continue
    tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -qF -- " --logs $work/" && kill -KILL "$pid" 2>/dev/null || true
  done
  rm -rf "$work"
}
trap finish EXIT
trap 'exit 130' HUP INT TERM

PYTHONPATH=scripts/lib PYTHONDONTWRITEBYTECODE=1 python3 - "$binary" "$work" "${ROUNDS:-5}" "${PER_ROUND:-40}" "${ROLLBACKS:-25}" "${RATE:-200}" <<'PY'
import http.client, json, os, random, signal, socket, statistics, subprocess, sys, threading, time
from bench import ask, show, spread, wait

binary, work, *numbers = sys.argv[1:]
rounds, per_round, rollbacks, rate = map(int, numbers)
ids = ["node-a", "node-b", "node-c"]
# Below the range of outgoing connections: the port of a node that is down would be given away before it is back.
held = []
while len(held) < 6:
    try:
        held.append(socket.create_server(("127.0.0.1", random.randrange(10_000, 32_000))))
    except OSError:
        pass
ports = [s.getsockname()[1] for s in held]
for s in held:
    s.close()
control, data = ports[:3], ports[3:]
peers_file, nodes = f"{work}/peers.json", {}
AWAY_MS_MAX = 100

def write_peers(**more):
    peers = [{"id": i, "control": f"127.0.0.1:{c}", "data": f"127.0.0.1:{d}"} for i, c, d in zip(ids, control, data)]
    with open(peers_file + ".new", "w") as file:
        json.dump({"mesh": "bench", "genesis": {"default": {"stable_model_id": "digits-v1"}}, "peers": peers, **more}, file)
    os.rename(peers_file + ".new", peers_file)

def start(at):
    words = [binary, "serve", "--id", ids[at], "--peers", peers_file, "--models", "models", "--logs", f"{work}/logs"]
    with open(f"{work}/{ids[at]}.out", "a") as out:
        nodes[at] = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    with open(f"{work}/{ids[at]}.pid", "w") as file:
        file.write(str(nodes[at].pid))

def client(at):
    connection = http.client.HTTPConnection("127.0.0.1", data[at], timeout=30)
    connection.connect()
    connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection

def get(at, path):
    return json.loads(ask(client(at), "GET", path)[1])

def is_well():
    routing = [get(at, "/routing") for at in range(3)]
    links = [peer["link"] for at in range(3) for peer in get(at, "/peers")["peers"]]
    agree = len({(r["slot"], r["state_hash"]) for r in routing}) == 1 and all(r["open"] is None for r in routing)
    return agree and links == ["up"] * 6 and all(r["lease"]["held"] and not r["fenced"] for r in routing)

def commit(connection, kind, change):
    answer, body = ask(connection, "POST", "/transactions", {"kind": kind, "changes": {"default": change}})
    if answer.status != 200:
        sys.exit(f"bench_rollback: {kind} was answered {answer.status}: {body.decode()}")
    return json.loads(body)

def weights(canary_bp):
    return {"weights": {"stable": (10_000 - canary_bp) / 100, "canary": canary_bp / 100}}

def kill():
    nodes[2].kill()
    nodes[2].wait()

def cut():
    write_peers(partitions=[["node-a", "node-b"], ["node-c"]])
    is_cut = lambda at: any(p["node"] == "node-c" and p["link"] == "cut" for p in get(at, "/peers")["peers"])
    wait("node-c to be cut off", lambda: is_cut(0) and is_cut(1))

nothing = lambda: None
situations = {
    "all alive": (nothing, nothing),
    "one killed": (kill, lambda: start(2)),
    "one stopped": (lambda: nodes[2].send_signal(signal.SIGSTOP), lambda: nodes[2].send_signal(signal.SIGCONT)),
    "one cut off": (cut, write_peers),
}

def part_one():
    times, ratios = {name: [] for name in situations}, {name: [] for name in situations}
    wait("all nodes to be well", is_well)
    caller = client(0)
    for round in range(rounds):
        medians = {}
        names = list(situations)
        for name in names[round % 4:] + names[:round % 4]:
            fault, mend = situations[name]
            wait("all nodes to be well", is_well)
            share = 5_000
            commit(caller, "advance", {"canary_model_id": "digits-v2", **weights(share)})
            fault()
            ms = []
            for _ in range(per_round):
                share -= 1
                begun = time.perf_counter()
                receipt = commit(caller, "reduce", weights(share))
                ms.append((time.perf_counter() - begun) * 1e3)
            if name != "all alive" and "node-c" not in receipt["waiting"]:
                sys.exit(f"bench_rollback: {name}, and yet node-c has applied it: {receipt}")
            mend()
            medians[name] = statistics.median(ms)
            times[name] += ms
        for name in names:
            ratios[name].append(medians[name] / medians["all alive"])
        print(f"round {round + 1}: p50 " + ", ".join(f"{name} {medians[name]:.2f} ms" for name in names), flush=True)
    for name, ms in times.items():
        ratio = "" if name == "all alive" else f"  ratio of medians to all alive: {spread(ratios[name])}"
        show(f"reduce, {name:12}", ms, ratio)

with open("models/requests.ndjson") as file:
    digit = json.dumps(json.loads(file.readline())["request"]).encode()

class Caller(threading.Thread):
    """Asks one node for its canary at a steady rate, and remembers the last time that it got one."""
    def __init__(self, at):
        super().__init__(daemon=True)
        self.at, self.answers, self.last, self.stop = at, 0, 0.0, False
        self.failed = None

    def run(self):
        try:
            connection, due = client(self.at), time.perf_counter()
            while not self.stop:
                due = max(due + 1 / rate, time.perf_counter() - 1 / rate)
                time.sleep(max(0, due - time.perf_counter()))
                answer, body = ask(connection, "POST", "/predict", digit, {"x-canary-variant": "canary"})
                if answer.status != 200:
                    raise OSError(f"{answer.status}: {body!r}")
                if answer.getheader("x-canary-variant") == "canary":
                    self.last = time.perf_counter()
                self.answers += 1
        except (OSError, http.client.HTTPException) as error:
            self.failed = error

def part_two():
    wait("all nodes to be well", is_well)
    askers = [client(at) for at in range(3)]
    ask(askers[0], "POST", "/rollback", {})
    callers = [Caller(at) for at in range(3)]
    for caller in callers:
        caller.start()
    aways, took, during = [], [], 0
    for n in range(rollbacks):
        begun = time.perf_counter()
        commit(askers[n % 3], "advance", {"canary_model_id": "digits-v2", **weights(5_000)})
        wait("canary answers of all nodes", lambda: all(caller.last > begun or caller.failed for caller in callers))
        # At another moment of the callers' beat each time.
        time.sleep(0.05 + (n * 7 % 10) / 10 / rate)
        sent, before = time.perf_counter(), [caller.answers for caller in callers]
        answer, body = ask(askers[n % 3], "POST", "/rollback", {})
        told = time.perf_counter()
        if answer.status != 200:
            sys.exit(f"bench_rollback: a rollback was answered {answer.status}: {body.decode()}")
        time.sleep(2 * AWAY_MS_MAX / 1e3)
        failed = [caller.failed for caller in callers if caller.failed]
        if failed:
            sys.exit(f"bench_rollback: a request failed: {failed[0]}")
        during += sum(caller.answers - count for caller, count in zip(callers, before))
        aways.append((max(caller.last for caller in callers) - told) * 1e3)
        took.append((told - sent) * 1e3)
        wait("all nodes to be well", is_well)
    for caller in callers:
        caller.stop = True
    aways.sort()
    print(f"rollback under {3 * rate} requests/s: receipt after p50 {statistics.median(took):.2f} ms, max {max(took):.2f} ms")
    print(f"receipt to the last canary answer on any node: p50 {statistics.median(aways):.2f} ms, max {aways[-1]:.2f} ms, n {len(aways)} ({during} requests in the {2 * AWAY_MS_MAX} ms after each)")
    if aways[-1] >= AWAY_MS_MAX:
        sys.exit(f"bench_rollback: a canary answered {aways[-1]:.1f} ms after the receipt; it must be less than {AWAY_MS_MAX} ms")

write_peers()
for at in range(3):
    start(at)
try:
    part_one()
    part_two()
finally:
    for node in nodes.values():
        node.kill()
        node.wait()
PY
