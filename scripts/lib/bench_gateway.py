"""The data plane against other proxies, in turn, on one core. Run by scripts/bench_gateway.sh, which says how."""
import argparse, json, os, platform, shutil, signal, socket, statistics, sys, time
import mlp
from bench import ask
from gateways import CANARY, Envoy, Gateway, Haproxy, Nginx, Ours, Process, Tokens, Traefik, Upstream, client

ROUNDS = 3
CONNECTIONS, CONNECTIONS_1M, CONNECTIONS_MEMORY = 64, 16, 1_000
# How far the canary's part of the requests may be from its share, in percentage points: keys are 1,000, and whole blocks of them fall to one side.
SHARE_OFF_MAX = 5
# Answers that a proxy may break off, for each thousand.
BROKEN_PERMILLE_MAX = 1
# What else may run on the core that is measured, in percent of it, if a target is to be judged.
OTHERS_PERCENT_MAX = 20
# How often memory is looked at under load, in seconds.
SAMPLE_S = 0.25
PEERS = {"haproxy": Haproxy, "nginx": Nginx, "envoy": Envoy, "traefik": Traefik}
OURS = Ours.name

SMALL_ANSWER = b'{"model_name":"m","outputs":[{"name":"y","shape":[1,2],"datatype":"FP32","data":[0.25,0.75]}]}'


def tensor_of(size):
    """A request of exactly so many bytes."""
    def text(count):
        return '{"inputs":[{"name":"features","shape":[1,%d],"datatype":"FP32","data":[%s]}]}' % (count, ",".join(["0.5"] * count))
    count = max((size - len(text(1))) // 4, 1)
    while len(text(count)) > size:
        count -= 1
    return text(count).ljust(size).encode()


def progress(text):
    print(text, file=sys.stderr, flush=True)


def die(text):
    sys.exit(f"bench_gateway: {text}")


# Requests are made before: what is left to the load's program is to send them. Large ones are put together when they are sent.
LUA = """
local heads, bodies, at = {}, {}, 0
local function is_large(body) return #body >= 4000 end
function init(args)
  for line in io.lines(args[1]) do bodies[#bodies + 1] = line end
  for i = 1, 1000 do
    local body = bodies[i % #bodies + 1]
    local request = wrk.format("POST", "/predict", { ["content-type"] = "application/json", ["x-canary-key"] = "user-" .. i }, body)
    heads[i] = is_large(body) and request:sub(1, -1 - #body) or request
  end
end
function request()
  at = at % #heads + 1
  local body = bodies[at % #bodies + 1]
  return is_large(body) and heads[at] .. body or heads[at]
end
function done(summary, latency, requests)
  local e = summary.errors
  io.write(string.format('RESULT {"requests": %d, "us": %d, "p50_us": %d, "p99_us": %d, "not_connected": %d, "broken_reads": %d, "broken_writes": %d, "late": %d, "not_2xx": %d}\\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99), e.connect, e.read, e.write, e.timeout, e.status))
end
"""


class Direct(Gateway):
    """No gateway at all: what the load and the upstreams take by themselves."""
    name = "direct"

    def start(self, upstreams, cores, streaming=False):
        self.port = upstreams[0].port


class Bench:
    def __init__(self, given, gateways):
        self.given, self.work, self.gateways = given, given.work, gateways
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < 2:
            die("it needs two cores: one for what is measured, one for the load")
        self.load_core, self.core, self.two_cores = {cores[0]}, {cores[-1]}, set(cores[-2:])
        # With two cores only, the load has to share them with what runs on both.
        self.load_of_two = set(cores[:-2]) or set(cores)
        self.seconds, self.warm_seconds = (3, 1) if given.quick else (8, 2)
        self.running = []
        with open(f"{self.work}/load.lua", "w") as file:
            file.write(LUA)

    # Processes.

    def begin(self, what):
        self.running.append(what)
        return what

    def end(self, what):
        self.running.remove(what)
        what.stop()

    def close(self):
        while self.running:
            self.running.pop().stop()

    def upstreams(self, answer=SMALL_ANSWER, cores=None):
        return [self.begin(Upstream(self.work, name, answer, cores or self.load_core)) for name in ("stable", "canary")]

    def body(self, *bodies):
        """A file with these requests, one a line."""
        path = f"{self.work}/bodies"
        with open(path, "wb") as file:
            file.write(b"\n".join(bodies) + b"\n")
        return path

    def start(self, gateway, upstreams, cores=None, streaming=False):
        self.begin(gateway)
        gateway.start(upstreams, cores or self.core, streaming)

    def tool(self, words, cores=None, while_running=lambda: None):
        """Runs a program of the load to its end. Gives what it said."""
        out = f"{self.work}/load.out"
        open(out, "w").close()
        load = self.begin(Process(words[0], words, cores or self.load_core, out))
        while load.child.poll() is None:
            while_running()
            time.sleep(SAMPLE_S / 5)
        self.end(load)
        with open(out) as file:
            said = file.read()
        if load.child.returncode != 0:
            die(f"{words[0]} ended with {load.child.returncode}; it said:\n{said}")
        return said

    def wrk(self, gateway, body, connections, seconds, cores=None, while_running=lambda: None):
        """Load on every connection as fast as it is answered."""
        words = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s", "-s", f"{self.work}/load.lua", f"http://127.0.0.1:{gateway.port}", "--", body]
        said = self.tool(words, cores, while_running)
        results = [line for line in said.splitlines() if line.startswith("RESULT ")]
        if not results:
            die(f"wrk gave no result; it said:\n{said}")
        result = json.loads(results[0].removeprefix("RESULT "))
        wrong = {key: result[key] for key in ("not_connected", "broken_reads", "broken_writes", "late", "not_2xx") if result[key]}
        said = f"{gateway.name} did not answer all requests well: of {result['requests']}, " + ", ".join(f"{key} {count}" for key, count in wrong.items())
        # A proxy that breaks off one answer in a thousand can still be measured, and it is said. Of ours nothing is forgiven.
        forgiven = 0 if gateway.name == OURS else result["requests"] * BROKEN_PERMILLE_MAX / 1_000
        if result["not_2xx"] or sum(wrong.values()) > forgiven or not result["requests"]:
            die(said)
        if wrong:
            progress(f"  {said}")
        return result

    def paced(self, gateway, body, rate, seconds):
        return json.loads(self.tool([self.given.load, "paced", str(gateway.port), str(CONNECTIONS), f"{rate:.1f}", str(seconds), body]))

    # Measuring.

    def measured(self, gateway, upstreams, load, cores=None):
        """The figures of one run of the load on a gateway that is warm."""
        counts = (lambda: gateway.counts()) if isinstance(upstreams[0], str) else (lambda: [u.count() for u in upstreams])
        cores = cores or self.core
        pids, resident, looked = gateway.process.pids(), [], 0.0
        def sample():
            nonlocal looked
            if time.monotonic() - looked >= SAMPLE_S:
                looked = time.monotonic()
                resident.append(gateway.process.resident_mib(pids))
        before, cpu, core = counts(), gateway.process.cpu_us(), core_us(cores)
        result = load(sample)
        core, cpu = [now - then for now, then in zip(core_us(cores), core)], gateway.process.cpu_us() - cpu
        stable, canary = [now - then for now, then in zip(counts(), before)]
        share = canary / max(stable + canary, 1) * 100
        if abs(share - CANARY) > SHARE_OFF_MAX:
            die(f"{gateway.name} sent {share:.1f} % to the canary's model, and {CANARY} % was asked for ({stable:.0f} and {canary:.0f} requests)")
        return {
            "requests_per_s": result["requests"] / result["us"] * 1e6,
            "p50_ms": result["p50_us"] / 1e3,
            "p99_ms": result["p99_us"] / 1e3,
            "cpu_us": cpu / result["requests"],
            "resident_mib": max(resident),
            "canary_percent": share,
            "core_percent": core[0] / core[1] * 100,
            "others_percent": max(0, core[0] - cpu) / core[1] * 100,
        }

    def closed_loop(self, gateway, upstreams, body, connections, cores=None, load_cores=None, streaming=False):
        """One gateway's figures while every connection asks again as soon as it is answered."""
        self.start(gateway, upstreams, cores, streaming)
        self.wrk(gateway, body, connections, self.warm_seconds, load_cores)
        figures = self.measured(gateway, upstreams, lambda sample: self.wrk(gateway, body, connections, self.seconds, load_cores, sample), cores)
        self.end(gateway)
        return figures

    def in_turn(self, named, line):
        """Measures each once a round, every round beginning with another. `named` has a function of each name."""
        found, names = {name: [] for name in named}, list(named)
        for round in range(ROUNDS):
            at = round % len(names)
            for name in names[at:] + names[:at]:
                figures = named[name]()
                found[name].append(figures)
                progress(f"  round {round + 1}, {name}: " + ", ".join(f"{head} {format(figures[key], form)}" for key, head, form, _ in line if key in figures))
        return found

    def forwarding(self, body, answer, connections):
        upstreams = self.upstreams(answer)
        path = self.body(body)
        found = self.in_turn({g.name: lambda g=g: self.closed_loop(g, upstreams, path, connections) for g in self.gateways}, COLUMNS)
        for upstream in upstreams:
            self.end(upstream)
        return Case(f"{len(body)} bytes of request, {len(answer)} of answer, {connections} connections", COLUMNS, found)

    # The cases.

    def small(self):
        return self.forwarding(tensor_of(90), SMALL_ANSWER, CONNECTIONS)

    def bodies_10k(self):
        return self.forwarding(tensor_of(10_000), tensor_of(10_000), CONNECTIONS)

    def bodies_1m(self):
        return self.forwarding(tensor_of(1_000_000), tensor_of(1_000_000), CONNECTIONS_1M)

    def memory(self):
        return self.forwarding(tensor_of(90), SMALL_ANSWER, CONNECTIONS_MEMORY)

    def stream(self):
        upstreams = [self.begin(Tokens(self.work, name, self.given.load, self.load_core)) for name in ("stable", "canary")]
        body = self.body(tensor_of(90))
        def measure(gateway):
            figures = self.closed_loop(gateway, upstreams, body, CONNECTIONS, streaming=True)
            self.start(gateway, upstreams, streaming=True)
            figures.update(one_by_one(gateway))
            self.end(gateway)
            return figures
        found = self.in_turn({g.name: lambda g=g: measure(g) for g in self.gateways}, STREAM_COLUMNS)
        for upstream in upstreams:
            self.end(upstream)
        return Case(f"answers of {Tokens.TOKENS} tokens, one every {Tokens.GAP_US / 1e3:g} ms, {CONNECTIONS} connections (CPU µs of a whole answer); "
                    "one connection alone: when its first and last token came, in how many reads", STREAM_COLUMNS, found)

    def latency(self):
        """Added latency at half load: the same rate for all, which is half of what the slower of ours and nginx can do."""
        upstreams, body = self.upstreams(), self.body(tensor_of(90))
        most = {}
        for gateway in self.gateways:
            if gateway.name in (OURS, "nginx"):
                self.start(gateway, upstreams)
                self.wrk(gateway, body, CONNECTIONS, 1)
                most[gateway.name] = self.wrk(gateway, body, CONNECTIONS, self.seconds)["requests"] / self.seconds
                self.end(gateway)
        rate = min(most.values()) / 2
        progress("  at most " + ", ".join(f"{name} {value:.0f} requests/s" for name, value in most.items()) + f"; the rate is {rate:.0f}")
        direct = Direct(self.work)
        def measure(gateway):
            self.start(gateway, upstreams)
            self.wrk(gateway, body, CONNECTIONS, self.warm_seconds)
            own_us = lambda: gateway.process.cpu_us() if gateway.process else 0
            cpu, core = own_us(), core_us(self.core)
            result = self.paced(gateway, body, rate, self.seconds)
            core, cpu = [now - then for now, then in zip(core_us(self.core), core)], own_us() - cpu
            self.end(gateway)
            figures = {"requests_per_s": result["requests"] / result["us"] * 1e6, "late_ms": result["load_late_p99_us"] / 1e3, "unsent": result["unsent"],
                       "others_percent": max(0, core[0] - cpu) / core[1] * 100, **{f"{at}_ms": result[f"{at}_us"] / 1e3 for at in ("p50", "p99", "p999")}}
            return figures if gateway is direct else {**figures, "cpu_us": cpu / result["requests"]}
        found = self.in_turn({g.name: lambda g=g: measure(g) for g in [*self.gateways, direct]}, LATENCY_COLUMNS)
        for name, rounds in found.items():
            for figures, alone in zip(rounds, found["direct"]):
                if name != "direct":
                    figures["added_p50_ms"], figures["added_p99_ms"] = (figures[at] - alone[at] for at in ("p50_ms", "p99_ms"))
        for upstream in upstreams:
            self.end(upstream)
        return Case(f"latency at a steady {rate:.0f} requests/s on {CONNECTIONS} connections; added: above what it is without a gateway in the same round", LATENCY_COLUMNS, found, rate=rate)

    def inprocess(self):
        with open("models/requests.ndjson") as file:
            body = self.body(*(json.dumps(json.loads(line)["request"], separators=(",", ":")).encode() for line in file))
        ours = self.gateways[0]
        folder = f"{self.work}/models"
        os.makedirs(folder, exist_ok=True)
        shutil.copy("models/requests.ndjson", folder)
        for name in ("digits-v1", "digits-v2"):
            shutil.copy(f"models/{name}.onnx", folder)
        for seed in (1, 2):
            mlp.write(f"{folder}/mlp-v{seed}.onnx", MLP, seed)
            shutil.copy(f"{folder}/mlp-v{seed}.onnx", f"{folder}/batched-v{seed}.onnx")
            with open(f"{folder}/batched-v{seed}.config.json", "w") as file:
                json.dump(BATCHED, file)
        named = {}
        for kind in INPROCESS:
            files = [f"{folder}/{kind}-v{n}.onnx" for n in (1, 2)]
            def alone(kind=kind):
                said = self.tool([self.given.inference, str(self.seconds), folder, f"{kind}-v1", f"{kind}-v2"], self.core)
                result = json.loads(said)
                return {"requests_per_s": result["requests"] / result["us"] * 1e6, "cpu_us": result["cpu_us"]}
            named[f"{kind}: inference alone"] = alone
            named[f"{kind}: {OURS}"] = lambda files=files: self.closed_loop(ours, files, body, CONNECTIONS)
        found = self.in_turn(named, COLUMNS)
        for kind in INPROCESS:
            for figures, alone in zip(found[f"{kind}: {OURS}"], found[f"{kind}: inference alone"]):
                figures["own_us"] = figures["cpu_us"] - alone["cpu_us"]
                figures["of_alone_percent"] = alone["cpu_us"] / figures["cpu_us"] * 100
        return Case(f"models in the process, {CONNECTIONS} connections: digits are the demo's, mlp has layers of {'-'.join(map(str, MLP))}, and batched is mlp with {json.dumps(BATCHED)}; own: CPU µs a request beside the inference; "
                    "of alone: the throughput that is left of what inference alone does with the same CPU time", INPROCESS_COLUMNS, found)

    def cores(self):
        ours = self.gateways[0]
        upstreams, body = self.upstreams(), self.body(tensor_of(90))
        one = lambda: self.closed_loop(ours, upstreams, body, CONNECTIONS)
        # Elsewhere than the node where there are cores enough.
        spread = self.upstreams_of_two(upstreams)
        two = lambda: self.closed_loop(ours, spread, body, CONNECTIONS, self.two_cores, self.load_of_two)
        found = self.in_turn({"one core": one, "two cores": two}, COLUMNS)
        for first, both in zip(found["one core"], found["two cores"]):
            both["capacity"] = 2 * first["cpu_us"] / both["cpu_us"]
        for upstream in self.running[:]:
            self.end(upstream)
        return Case("our node on one core and on two, as many threads as cores; capacity: what two cores can forward for each request that one can, "
                    "2 x (CPU µs on one) / (CPU µs on two)", CORES_COLUMNS, found)

    def upstreams_of_two(self, upstreams):
        if self.load_of_two == self.load_core:
            return upstreams
        return [self.begin(Upstream(self.work, f"{name}-2", SMALL_ANSWER, self.load_of_two)) for name in ("stable", "canary")]


def one_by_one(gateway):
    """Whether a stream comes as it is made: when its first and its last token are there, and in how many parts it came."""
    key = 0
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=30) as connection:
        def answer():
            nonlocal key
            key += 1
            connection.sendall(b"POST /predict HTTP/1.1\r\nhost: 127.0.0.1\r\nx-canary-key: user-%d\r\ncontent-length: 2\r\n\r\n{}" % key)
            begun, came, read = time.perf_counter(), [], b""
            while not read.endswith(b"0\r\n\r\n"):
                part = connection.recv(65_536)
                if not part:
                    die(f"{gateway.name} closed a stream in the middle")
                read += part
                if b"data:" in part:
                    came.append((time.perf_counter() - begun) * 1e3)
            if read.count(b"data:") != Tokens.TOKENS:
                die(f"{gateway.name} passed on {read.count(b'data:')} of {Tokens.TOKENS} tokens")
            return {"first_ms": came[0], "last_ms": came[-1], "parts": len(came)}
        answers = [answer() for _ in range(10)]
    figures = {key: statistics.median(a[key] for a in answers) for key in answers[0]}
    if figures["first_ms"] > figures["last_ms"] / 2:
        die(f"{gateway.name} holds streams back: the first token of {Tokens.TOKENS} came after {figures['first_ms']:.1f} ms of {figures['last_ms']:.1f}")
    return figures


def core_us(cores):
    """Busy and whole time of some cores so far, in microseconds."""
    busy = whole = 0
    with open("/proc/stat") as file:
        for line in file:
            name, *ticks = line.split()
            if name in {f"cpu{core}" for core in cores}:
                ticks = [int(t) for t in ticks[:8]]
                whole += sum(ticks)
                busy += sum(ticks) - ticks[3] - ticks[4]
    us = 1_000_000 // os.sysconf("SC_CLK_TCK")
    return busy * us, whole * us


# Figure, heading, format, and whether its ratio to ours is of interest.
COLUMNS = [("requests_per_s", "requests/s", ".0f", True), ("p50_ms", "p50 ms", ".2f", True), ("p99_ms", "p99 ms", ".2f", True), ("cpu_us", "CPU µs", ".1f", True),
           ("resident_mib", "MiB", ".1f", True), ("canary_percent", "canary %", ".1f", False), ("core_percent", "core %", ".0f", False), ("others_percent", "others %", ".0f", False)]
STREAM_COLUMNS = [*COLUMNS, ("first_ms", "first ms", ".2f", False), ("last_ms", "last ms", ".2f", False), ("parts", "reads", ".0f", False)]
LATENCY_COLUMNS = [("requests_per_s", "requests/s", ".0f", False), ("p50_ms", "p50 ms", ".3f", True), ("p99_ms", "p99 ms", ".3f", True), ("p999_ms", "p99.9 ms", ".3f", True),
                   ("added_p50_ms", "added p50", ".3f", True), ("added_p99_ms", "added p99", ".3f", True), ("cpu_us", "CPU µs", ".1f", True), ("late_ms", "load late p99", ".3f", False), ("unsent", "unsent", ".0f", False), ("others_percent", "others %", ".0f", False)]
INPROCESS_COLUMNS = [*COLUMNS, ("own_us", "own µs", ".1f", False), ("of_alone_percent", "of alone %", ".0f", False)]
CORES_COLUMNS = [*COLUMNS, ("capacity", "capacity", ".2f", False)]
# A ranking or scoring model of usual size.
MLP = [64, 512, 512, 10]
# Its settings where requests that wait are computed together.
BATCHED = {"batch_rows_max": 32, "batch_wait_us": 0}
INPROCESS = ["digits", "mlp", "batched"]


class Case:
    def __init__(self, title, columns, rounds, **more):
        self.title, self.columns, self.rounds, self.more = title, columns, rounds, more

    def median(self, name, figure):
        """The median of the rounds; none if it was not measured there."""
        values = [figures[figure] for figures in self.rounds.get(name, []) if figure in figures]
        return statistics.median(values) if values else None

    def ratio(self, name, figure):
        """The median of its ratios to ours in the same round."""
        pairs = zip(self.rounds.get(name, []), self.rounds.get(OURS, []))
        ratios = [theirs[figure] / ours[figure] for theirs, ours in pairs if figure in theirs and ours.get(figure, 0) > 0]
        return statistics.median(ratios) if ratios else None

    def document(self):
        medians = {name: {figure: {"median": self.median(name, figure), "ratio": self.ratio(name, figure)} for figure in rounds[0]} for name, rounds in self.rounds.items()}
        return {"title": self.title, "medians": medians, "rounds": self.rounds, **self.more}

    def show(self, name):
        columns = [column for column in self.columns if any(column[0] in rounds[0] for rounds in self.rounds.values())]
        rows = [["", *(head for _, head, _, _ in columns)]]
        for row in self.rounds:
            cells = [row]
            for figure, _, form, compared in columns:
                value, ratio = self.median(row, figure), self.ratio(row, figure)
                cell = "-" if value is None else format(value, form)
                cells.append(f"{cell} ({ratio:.2f})" if compared and ratio is not None else cell)
            rows.append(cells)
        widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
        print(f"\n{name}: {self.title}")
        for row in rows:
            print("  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]).rstrip())
        sys.stdout.flush()


def targets(cases):
    """What was wanted, what was found, and whether it holds: none where too much else ran to say. Of what was measured only."""
    def judge(case, rows, what, found, ratio, holds):
        others = max(cases[case].median(row, "others_percent") for row in rows)
        if others > OTHERS_PERCENT_MAX:
            found, holds = f"{found}; others had {others:.0f} % of the core", None
        return {"what": what, "found": found, "ratio": ratio, "holds": holds}
    def against(case, figure, names, what, unit):
        for name in names:
            ours, theirs, ratio = cases[case].median(OURS, figure), cases[case].median(name, figure), cases[case].ratio(name, figure)
            if theirs is not None and ratio is not None:
                yield judge(case, [OURS, name], f"{what}, not above {name}'s", f"{ours:.2f} {unit}, theirs {theirs:.2f}; ours to theirs {1 / ratio:.2f}", 1 / ratio, ratio >= 1)
    found = []
    if "small" in cases:
        found += against("small", "cpu_us", PEERS, "CPU a forwarded request", "µs")
    if "latency" in cases:
        found += against("latency", "added_p99_ms", ["nginx"], "p99 that is added at half load", "ms")
    if "memory" in cases:
        found += against("memory", "resident_mib", ["envoy"], f"memory at {CONNECTIONS_MEMORY} connections", "MiB")
    if "cores" in cases:
        # On both cores the load is among the others, if there are no more.
        capacity = cases["cores"].median("two cores", "capacity")
        found.append(judge("cores", ["one core"], "two cores give at least 1.8 times one", f"{capacity:.2f} times", capacity / 1.8, capacity >= 1.8))
    if "inprocess" in cases:
        for kind in INPROCESS:
            case, ours = cases["inprocess"], f"{kind}: {OURS}"
            share, own = case.median(ours, "of_alone_percent"), case.median(ours, "own_us")
            alone = case.median(f"{kind}: inference alone", "cpu_us")
            text = f"{share:.0f} %, of {alone:.1f} µs"
            if kind != "batched":
                text += f"; {own:.1f} µs beside it, so 60 % from inferences of {1.5 * own:.0f} µs on"
            found.append(judge("inprocess", [ours], f"a model in the process, {kind}: at least 60 % of what inference alone does", text, share / 60, share >= 60))
    return found


def machine():
    with open("/proc/cpuinfo") as file:
        models = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return {"cores": os.cpu_count(), "cpu": models[0] if models else platform.machine(), "kernel": platform.release(), "load_before": round(os.getloadavg()[0], 2)}


def main(given):
    gateways = [Ours(given.work, given.binary), *(PEERS[name](given.work) for name in given.only.split(",") if name)]
    bench = Bench(given, gateways)
    # Not on the core of what is measured.
    os.sched_setaffinity(0, bench.load_core)
    Process.first = given.first
    functions = {"small": bench.small, "10k": bench.bodies_10k, "1m": bench.bodies_1m, "stream": bench.stream, "inprocess": bench.inprocess, "memory": bench.memory,
                 "latency": bench.latency, "cores": bench.cores}
    about = machine()
    versions = {gateway.name: gateway.version for gateway in gateways}
    if given.output == "table":
        print(f"{about['cores']} cores, {about['cpu']}, Linux {about['kernel']}, load average {about['load_before']:.2f} before; " + ", ".join(" ".join(both) for both in versions.items()))
        print(f"medians of {ROUNDS} rounds of {bench.seconds} s; in brackets the median of the ratios to {OURS} in the same round", flush=True)
    cases = {}
    try:
        for name in given.cases.split(","):
            progress(f"{name}: {ROUNDS} rounds of {bench.seconds} s")
            cases[name] = functions[name]()
            if given.output == "table":
                cases[name].show(name)
    finally:
        bench.close()
    judged = targets(cases)
    if given.output == "json":
        document = {"machine": about, "versions": versions, "rounds": ROUNDS, "seconds": bench.seconds, "cases": {name: case.document() for name, case in cases.items()}, "targets": judged}
        print(json.dumps(document, indent=1))
    elif judged:
        print("\ntargets")
        for target in judged:
            verdict = {True: "holds", False: "FAILS", None: "unclear"}[target["holds"]]
            print(f"  {verdict:7}  {target['what']}: {target['found']}")


if __name__ == "__main__":
    options = argparse.ArgumentParser()
    for option in ("only", "cases", "output", "binary", "work", "load", "inference"):
        options.add_argument(f"--{option}")
    for option in ("quick", "first"):
        options.add_argument(f"--{option}", action="store_true")
    for stop in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(stop, lambda *_: sys.exit(130))
    main(options.parse_args())
