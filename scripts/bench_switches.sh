#!/usr/bin/env bash
# Weight changes under full load: how many commits a second, and that no request fails and none sees two versions.
set -euo pipefail

usage() {
  cat <<'END'
Usage: scripts/bench_switches.sh [COMMITS]

Starts three nodes and two model servers on free ports of the loopback, and keeps every node busy on several kept connections, while the
canary's weight is changed COMMITS times (1000), by one node after the other. Every answer is checked:

- it is 200, and names one routing version, which is never below the one before on the same connection;
- its variant is one that this version's weights allow, as the receipts say them: no canary at 0 %, no stable at 100 % but where the
  node had no lease or could not reach the canary, which it says then;
- the model, and the model server that has answered, are that variant's.

Needs python3 and a release build; takes nginx for the model servers where there is one. Set by the environment:

  CONNECTIONS   to each node (8)
  COMMITS_PER_S the most commits a second, 0 for as many as there can be (0)
  NGINX         the program
  CANARY_MESH   the program (target/release/canary-mesh)
  BENCH_DIR     where the nodes' directory goes, which is synced to and goes at the end (the project's folder)

Exit codes: 0 all held, 1 something did not, 2 usage.
END
}

case ${1:-} in
  --help | -h) usage && exit 0 ;;
esac
commits=${1:-1000}
[[ $# -le 1 && $commits =~ ^[1-9][0-9]*$ ]] || { usage >&2 && exit 2; }
cd "$(dirname "${BASH_SOURCE[0]}")/.."

binary=${CANARY_MESH:-${CARGO_TARGET_DIR:-target}/release/canary-mesh}
[[ -x $binary ]] || { echo "bench_switches: $binary is not there; run: cargo build --release --locked" >&2; exit 1; }
work=$(mktemp -d "${BENCH_DIR:-.}/bench-switches.XXXXXX")
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

PYTHONPATH=scripts/lib PYTHONDONTWRITEBYTECODE=1 python3 - "$binary" "$work" "$commits" "${CONNECTIONS:-8}" "${COMMITS_PER_S:-0}" <<'PY'
import collections, json, multiprocessing, re, socket, sys, time
from bench import ask, show
from fleet import Fleet, ModelServers, write_models

binary, work, *numbers = sys.argv[1:]
commits, connections, commits_per_s = map(int, numbers)
# The canary's share, one commit after another, in percent.
SHARES = [100, 0, 50, 0, 100, 10]
REQUEST = b"POST /predict HTTP/1.1\r\nhost: bench\r\ncontent-length: 8\r\n\r\nquestion"
SAYS = {name: re.compile(rb"\r\n" + name + rb": *([^\r]*)\r\n", re.I) for name in (b"x-canary-version", b"x-canary-variant", b"x-canary-model", b"x-canary-reason")}
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.I)
FAILURES_SHOWN_MAX = 10

def answer(caller):
    """One answer's head and body, or what is wrong with it."""
    came = b""
    while (end := came.find(b"\r\n\r\n") + 4) < 4:
        piece = caller.recv(65536)
        if not piece:
            raise OSError(f"closed after {came!r}")
        came += piece
    length = LENGTH.search(came[:end])
    if not length:
        raise OSError(f"no length: {came!r}")
    while len(came) < end + int(length[1]):
        piece = caller.recv(65536)
        if not piece:
            raise OSError(f"closed after {came!r}")
        came += piece
    if len(came) > end + int(length[1]):
        raise OSError(f"more than one answer: {came!r}")
    return came[:end], came[end:]

def keep_busy(port, stop, told):
    """Asks on all connections at once, and again when all have been answered. Tells how often answers have said what."""
    seen, failures, asked = collections.Counter(), [], 0
    callers = []
    try:
        for _ in range(connections):
            caller = socket.create_connection(("127.0.0.1", port), timeout=30)
            caller.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            callers.append([caller, 0])
        while not stop.is_set():
            for caller, _ in callers:
                caller.sendall(REQUEST)
                asked += 1
            for kept in callers:
                head, body = answer(kept[0])
                said = [pattern.findall(head) for pattern in SAYS.values()]
                if not head.startswith(b"HTTP/1.1 200 ") or any(len(values) != 1 for values in said):
                    failures.append(f"{head!r} {body!r}")
                    continue
                [[version], *_] = said
                if int(version) < kept[1]:
                    failures.append(f"version {int(version)} behind version {kept[1]} on one connection")
                kept[1] = int(version)
                seen[(int(version), *(value.decode() for [value] in said[1:]), body.decode())] += 1
    except OSError as error:
        failures.append(f"a request failed: {error}")
    told.put((port, asked, list(seen.items()), failures))

def what_is_wrong(shares, version, variant, model, reason, server):
    if version not in shares:
        return "nobody was told of this version"
    share = shares[version]
    if variant == "canary" and share == 0 or variant not in ("stable", "canary"):
        return f"the canary's share is {share} %"
    if variant == "stable" and share == 100 and reason not in ("lease-expired", "fallback"):
        return f"the canary's share is {share} %"
    if (model, server) != (f"model-{variant}", model):
        return f"{server} has answered"

servers = ModelServers(work, ["model-stable", "model-canary"])
# What takes long here says something of this machine, not of a model.
genesis = {"default": {"stable_model_id": "model-stable", "gate": {"latency_ms_max": 60_000}}}
fleet = Fleet(binary, work, ["node-a", "node-b", "node-c"], write_models(work, servers.ports), genesis)

def main():
    fleet.start()
    stop, told = multiprocessing.Event(), multiprocessing.Queue()
    busy = [multiprocessing.Process(target=keep_busy, args=(port, stop, told), daemon=True) for port in fleet.data]
    for process in busy:
        process.start()
    askers, shares, took, refused = [fleet.client(at) for at in range(3)], {0: 0}, [], collections.Counter()
    begun = time.perf_counter()
    while len(took) < commits:
        share = SHARES[len(took) % len(SHARES)]
        change = {"canary_model_id": "model-canary", "weights": {"stable": 100 - share, "canary": share}}
        sent = time.perf_counter()
        reply, body = ask(askers[len(took) % 3], "POST", "/transactions", {"kind": "advance", "changes": {"default": change}})
        receipt = json.loads(body)
        if reply.status != 200:
            # A vote that did not come in time, on a machine that has more to do than it can. It is nobody's failed request.
            refused[f"{reply.status} {receipt.get('error_code')}"] += 1
            if reply.status not in (409, 503) or sum(refused.values()) > commits // 10:
                stop.set()
                sys.exit(f"bench_switches: a commit was refused: {body.decode()}")
            continue
        took.append((time.perf_counter() - sent) * 1e3)
        shares[receipt["version"]] = share
        if commits_per_s:
            time.sleep(max(0, begun + len(took) / commits_per_s - time.perf_counter()))
    seconds = time.perf_counter() - begun
    stop.set()
    seen, failures, asked = collections.Counter(), [], 0
    for _ in busy:
        port, count, says, failed = told.get(timeout=60)
        asked += count
        seen.update(dict(says))
        failures += [f"{fleet.ids[fleet.data.index(port)]}: {failure}" for failure in failed]
    for process in busy:
        process.join()
    for says, count in seen.items():
        if wrong := what_is_wrong(shares, *says):
            failures.append(f"{count} answers say {says}, and {wrong}")
    of = lambda place, value: sum(count for says, count in seen.items() if says[place] == value)
    print(f"{len(took)} commits in {seconds:.1f} s, {len(took) / seconds:.0f} a second" + (f"; asked again after {dict(refused)}" if refused else ""))
    show("commit under load", took)
    answers = sum(seen.values())
    print(f"{asked} requests to three nodes on {connections} connections each, {answers / seconds:.0f} answers a second (model servers: {servers.kind})")
    reasons = ", ".join(f"{reason} {of(3, reason)}" for reason in sorted({says[3] for says in seen}))
    print(f"answered by stable {of(1, 'stable')}, by the canary {of(1, 'canary')}, under {len({says[0] for says in seen})} versions; {reasons}")
    print(f"failures: {len(failures)}")
    if not of(1, "canary") or not of(1, "stable"):
        failures.append("one of the variants has not answered at all")
    if failures:
        sys.exit("\n".join(["bench_switches: not all held:"] + failures[:FAILURES_SHOWN_MAX]))

try:
    main()
finally:
    fleet.stop()
    servers.stop()
PY
