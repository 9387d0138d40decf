#!/usr/bin/env bash
# One node under all kinds of load for an hour: its memory and its open files do not grow.
set -euo pipefail

usage() {
  cat <<'END'
Usage: scripts/soak.sh [MINUTES]

Starts one node and two model servers on free ports of the loopback, and for MINUTES (60) sends it all at once: small requests, bodies of
1 MB, chunked ones, broken ones (tests/data/smuggling.json), connections that are cut in the middle, slow heads, bodies and readers,
streams of events, and the node's other resources; while a canary is rolled out and back. Every 10 s a line tells memory and open files.

After the first tenth of the time, and in the end, the load pauses, and what the node holds then is compared. Fails if it is more in the
end, by more than the tolerances below, or if a sound request was not answered as it should be.

Needs python3 and a release build; takes nginx for the model servers where there is one. Set by the environment:

  RSS_GROWTH_KIB_MAX   tolerance of the resident memory (16384)
  FDS_GROWTH_MAX       tolerance of the open files (64: the idle connections that are kept to two model servers)
  NGINX                the program
  CANARY_MESH          the program (target/release/canary-mesh)
  BENCH_DIR            where the node's directory goes that is taken away at the end (the project's folder)

Exit codes: 0 no growth, 1 growth, or something failed, 2 usage.
END
}

case ${1:-} in
  --help | -h) usage && exit 0 ;;
esac
minutes=${1:-60}
[[ $# -le 1 && $minutes =~ ^[1-9][0-9]*$ ]] || { usage >&2 && exit 2; }
cd "$(dirname "${BASH_SOURCE[0]}")/.."

binary=${CANARY_MESH:-${CARGO_TARGET_DIR:-target}/release/canary-mesh}
[[ -x $binary ]] || { echo "soak: $binary is not there; run: cargo build --release --locked" >&2; exit 1; }
work=$(mktemp -d "${BENCH_DIR:-.}/soak.XXXXXX")
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

PYTHONPATH=scripts/lib PYTHONDONTWRITEBYTECODE=1 python3 - \
  "$binary" "$work" "$minutes" "${RSS_GROWTH_KIB_MAX:-16384}" "${FDS_GROWTH_MAX:-64}" <<'PY'
import collections, json, os, random, re, socket, struct, sys, threading, time
from bench import ask, wait
from fleet import Fleet, ModelServers, write_models

binary, work, *numbers = sys.argv[1:]
minutes, rss_growth_kib_max, fds_growth_max = map(int, numbers)
SAMPLE_S = 10
# Callers at once, by what they do.
CALLERS = {"small": 6, "large": 2, "chunked": 2, "broken": 2, "cut": 4, "slow": 8, "resource": 2, "events": 2}
# A caller that is not answered for so long has failed.
PATIENCE_S = 30
FAILURES_SHOWN_MAX = 10

with open("tests/data/smuggling.json") as file:
    vectors = [vector["sends"].encode("latin-1") for vector in json.load(file)]
servers = ModelServers(work, ["model-stable", "model-canary"])
# What takes long here says something of this machine, not of a model; and a cut request is nobody's fault.
genesis = {"default": {"stable_model_id": "model-stable", "gate": {"latency_ms_max": 60_000}}}
fleet = Fleet(binary, work, ["node-a"], write_models(work, servers.ports), genesis)
[port] = fleet.data

class Failed(Exception):
    pass

def connect():
    caller = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
    caller.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return caller

def answer(caller, pause_s=0):
    """One answer's status, head and body; read with pauses, if any."""
    stream = caller.makefile("rb", buffering=0 if pause_s else -1)
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        line = stream.readline()
        if not line:
            raise Failed(f"closed after {head!r}")
        head += line
        time.sleep(pause_s)
    length = re.search(rb"\r\ncontent-length: *(\d+)\r\n", head, re.I)
    if not length:
        raise Failed(f"no length: {head!r}")
    body = stream.read(int(length[1]))
    return int(head[9:12]), head.lower(), body

def sound(caller, pause_s=0):
    """The answer of a model server, which is the one that the head names."""
    status, head, body = answer(caller, pause_s)
    if status != 200 or b"\r\nx-canary-model: " + body + b"\r\n" not in head:
        raise Failed(f"{head!r} {body!r}")

def post(framing, body=b""):
    return b"POST /predict HTTP/1.1\r\nhost: soak\r\n" + framing + b"\r\n\r\n" + body

def with_length(body):
    return post(b"content-length: %d" % len(body), body)

def chunked(body):
    pieces = [body[at : at + 7001] for at in range(0, len(body), 7001)]
    return post(b"transfer-encoding: chunked", b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n")

LARGE, MEDIUM = with_length(b"x" * 1_000_000), chunked(b"x" * 300_000)
RESOURCES = [b"/health", b"/metrics", b"/routing", b"/routing/state", b"/history?limit=10", b"/peers", b"/", b"/nowhere"]

def small():
    with connect() as caller:
        for n in range(50):
            caller.sendall(with_length(b"x" * n))
            sound(caller)

def large():
    with connect() as caller:
        for _ in range(3):
            caller.sendall(LARGE)
            sound(caller)

def medium():
    with connect() as caller:
        for _ in range(3):
            caller.sendall(MEDIUM)
            sound(caller)

def broken():
    with connect() as caller:
        try:
            caller.sendall(random.choice(vectors) + b"POST / HTTP/1.1\r\nX: ")
            caller.settimeout(0.2)
            while caller.recv(65536):
                pass
        except OSError:
            # Whatever becomes of it is right, but for what it costs.
            pass

def cut():
    """Goes away within a head, within a body, or before the answer; and half of the times without a proper end."""
    with connect() as caller:
        sends = random.choice([LARGE, MEDIUM, with_length(b"x" * 100)])
        try:
            caller.sendall(sends[: random.choice([20, 60, 5_000, len(sends) // 2, len(sends)])])
            time.sleep(random.choice([0, 0.001, 0.05]))
        except OSError:
            pass
        if random.random() < 0.5:
            caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

def slow():
    with connect() as caller:
        request = with_length(b"x" * 50)
        for at in range(0, len(request), 8):
            caller.sendall(request[at : at + 8])
            time.sleep(0.1)
        sound(caller, pause_s=0.02)
        # And some that only sit there.
        time.sleep(random.choice([0, 2]))

def resource():
    with connect() as caller:
        for path in RESOURCES:
            caller.sendall(b"GET " + path + b" HTTP/1.1\r\nhost: soak\r\n\r\n")
            status, head, _ = answer(caller)
            if status != (404 if path == b"/nowhere" else 200):
                raise Failed(f"GET {path!r}: {head!r}")

def events():
    with connect() as caller:
        caller.sendall(b"GET /events HTTP/1.1\r\nhost: soak\r\n\r\n")
        end = time.time() + 3
        while (left := end - time.time()) > 0:
            caller.settimeout(left)
            try:
                if not caller.recv(65536):
                    raise Failed("the stream of events has ended")
            except TimeoutError:
                return

class Callers:
    """One thread for each, which can be told to pause."""
    def __init__(self):
        self.counts, self.failures = collections.Counter(), []
        self.may_run = threading.Event()
        self.threads = []
        self.resting = threading.Condition()
        self.at_rest = 0
        acts = {"chunked": medium, **{name: globals()[name] for name in CALLERS if name != "chunked"}}
        for name, count in CALLERS.items():
            self.threads += [threading.Thread(target=self.run, args=(name, acts[name]), daemon=True) for _ in range(count)]
        self.threads.append(threading.Thread(target=self.run, args=("commits", Roller()), daemon=True))
        for thread in self.threads:
            thread.start()

    def run(self, name, act):
        while True:
            if not self.may_run.is_set():
                with self.resting:
                    self.at_rest += 1
                    self.resting.notify_all()
                self.may_run.wait()
                with self.resting:
                    self.at_rest -= 1
            try:
                act()
                self.counts[name] += 1
            except (Failed, OSError, ValueError) as error:
                self.failures.append(f"{name}: {error!r}")
                time.sleep(0.1)

    def pause(self):
        self.may_run.clear()
        with self.resting:
            if not self.resting.wait_for(lambda: self.at_rest == len(self.threads), timeout=2 * PATIENCE_S):
                sys.exit("soak: a caller does not come back")

class Roller:
    """A canary at a tenth, at half, and away again."""
    def __init__(self):
        self.step = 0

    def __call__(self):
        share = (10, 50, None)[self.step % 3]
        change = {"canary_model_id": "model-canary", "weights": {"stable": 100 - (share or 0), "canary": share}}
        path, body = ("/rollback", {}) if share is None else ("/transactions", {"kind": "advance", "changes": {"default": change}})
        reply, said = ask(fleet.client(0), "POST", path, body)
        if reply.status != 200:
            raise Failed(f"{path}: {said.decode()}")
        self.step += 1
        time.sleep(0.5)

def held():
    """What the node holds: memory in KiB, open files, threads."""
    pid = fleet.nodes[0].pid
    with open(f"/proc/{pid}/status") as file:
        status = dict(line.split(":", 1) for line in file)
    return int(status["VmRSS"].split()[0]), len(os.listdir(f"/proc/{pid}/fd")), int(status["Threads"])

def connections():
    text = ask(fleet.client(0), "GET", "/metrics")[1].decode()
    return float(re.search(r"^canary_mesh_http_connections (\S+)$", text, re.M)[1])

def at_rest(callers):
    """What it holds when nobody asks anything: the one connection is the one that asks."""
    callers.pause()
    wait("the connections of callers who have gone to be closed", lambda: connections() <= 1)
    rss, fds, threads = held()
    callers.may_run.set()
    return rss, fds, threads

def line(second, name, rss, fds, threads, callers):
    done = "  ".join(f"{callers.counts[kind]:>8}" for kind in [*CALLERS, "commits"])
    print(f"{second:>6.0f}  {name:8}{rss:>9}{fds:>7}{threads:>9}  {done}{len(callers.failures):>10}", flush=True)

def main():
    fleet.start()
    callers = Callers()
    callers.may_run.set()
    begun, end = time.time(), time.time() + 60 * minutes
    print(f"a node and two model servers ({servers.kind}), {minutes} min; counts are of callers who have done what they do")
    kinds = "  ".join(f"{kind:>8}" for kind in [*CALLERS, "commits"])
    print(f"{'second':>6}  {'':8}{'RSS KiB':>9}{'files':>7}{'threads':>9}  {kinds}{'failures':>10}")
    first, due = None, begun
    while time.time() < end:
        due += SAMPLE_S
        time.sleep(max(0, min(due, end) - time.time()))
        if fleet.nodes[0].poll() is not None:
            sys.exit(f"soak: the node has ended: {open(f'{work}/node-a.out').read()}")
        line(time.time() - begun, "", *held(), callers)
        if first is None and time.time() - begun >= 6 * minutes:
            first = at_rest(callers)
            line(time.time() - begun, "at rest", *first, callers)
    last = at_rest(callers)
    line(time.time() - begun, "at rest", *last, callers)
    log_kib = sum(os.path.getsize(f"{work}/logs/{name}") for name in os.listdir(f"{work}/logs")) // 1024
    rss, fds = last[0] - first[0], last[1] - first[1]
    print(f"from the first tenth to the end: RSS {rss:+} KiB (tolerance {rss_growth_kib_max}), open files {fds:+} (tolerance {fds_growth_max}); logs {log_kib} KiB")
    wrong = [f"the resident memory grew by {rss} KiB"] if rss > rss_growth_kib_max else []
    wrong += [f"{fds} more files are open"] if fds > fds_growth_max else []
    wrong += [f"{len(callers.failures)} callers were not answered as they should be:", *callers.failures[:FAILURES_SHOWN_MAX]] if callers.failures else []
    wrong += [f"nobody has done this: {kind}" for kind in [*CALLERS, "commits"] if not callers.counts[kind]]
    if wrong:
        sys.exit("soak: " + "\n".join(wrong))

try:
    main()
finally:
    fleet.stop()
    servers.stop()
PY
