"""The data plane against other proxies, in turn, on one core. Called by scripts/bench_gateway.sh."""
import argparse, json, os, platform, signal, statistics, subprocess, sys, time
from gateways import CANARY, Haproxy, Nginx, Ours, Process, Upstream

PEERS = {"haproxy": Haproxy, "nginx": Nginx}
CASES = ["small"]
ROUNDS = 3
# How far the canary's part of the requests may be from its share, in percentage points: keys are few.
SHARE_OFF_MAX = 5
CONNECTIONS = 64

options = argparse.ArgumentParser(prog="bench_gateway.sh", add_help=False, exit_on_error=False)
options.add_argument("--quick", action="store_true")
options.add_argument("--only", default=",".join(PEERS))
options.add_argument("--cases", default=",".join(CASES))
options.add_argument("--output", choices=["table", "json"], default="table")
options.add_argument("--binary", required=True)
options.add_argument("--work", required=True)


def progress(text):
    print(text, file=sys.stderr, flush=True)


def die(text):
    sys.exit(f"bench_gateway: {text}")


# A request a key, made before: what is left to the load's program is to send them. Large ones are put together when they are sent.
LUA = """
local heads, body, at = {}, "", 0
function init(args)
  body = io.open(args[1], "rb"):read("*a")
  for i = 1, 1000 do
    local headers = { ["content-type"] = "application/json", ["x-canary-key"] = "user-" .. i }
    heads[i] = wrk.format("POST", "/predict", headers, body)
    if #body >= 4000 then heads[i] = heads[i]:sub(1, -1 - #body) end
  end
end
function request()
  at = at % #heads + 1
  if #body < 4000 then return heads[at] end
  return heads[at] .. body
end
function done(summary, latency, requests)
  local e = summary.errors
  io.write(string.format('RESULT {"requests": %d, "us": %d, "p50_us": %d, "p99_us": %d, "bytes": %d, "broken": %d, "not_2xx": %d}\\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99), summary.bytes,
    e.connect + e.read + e.write + e.timeout, e.status))
end
"""


class Bench:
    def __init__(self, given):
        self.given, self.work = given, given.work
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < 2:
            die("it needs two cores: one for what is measured, one for the load")
        self.load_core, self.core = {cores[0]}, {cores[1]}
        self.seconds, self.warm_seconds = (3, 1) if given.quick else (8, 2)
        with open(f"{self.work}/load.lua", "w") as file:
            file.write(LUA)
        self.running = []

    def close(self):
        while self.running:
            self.running.pop().stop()

    def begin(self, what):
        self.running.append(what)
        return what

    def end(self, what):
        self.running.remove(what)
        what.stop()

    def wrk(self, port, body, connections, seconds):
        """Load on every connection as fast as it is answered."""
        words = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s", "-s", f"{self.work}/load.lua", f"http://127.0.0.1:{port}", "--", body]
        out = f"{self.work}/wrk.out"
        open(out, "w").close()
        load = self.begin(Process("wrk", words, self.load_core, out))
        load.child.wait()
        self.end(load)
        with open(out) as file:
            said = file.read()
        results = [line for line in said.splitlines() if line.startswith("RESULT ")]
        if load.child.returncode != 0 or not results:
            die(f"wrk ended with {load.child.returncode}; it said:\n{said}")
        result = json.loads(results[0].removeprefix("RESULT "))
        if result["broken"] or result["not_2xx"]:
            die(f"{result['broken']} requests were broken off and {result['not_2xx']} were not answered with 2xx, of {result['requests']}")
        return result

    def closed_loop(self, gateway, upstreams, body, connections):
        """One gateway's figures under a closed loop of so many connections."""
        self.begin(gateway)
        gateway.start(upstreams, self.core)
        self.wrk(gateway.port, body, connections, self.warm_seconds)
        counts, cpu, core = [u.count() for u in upstreams], gateway.process.cpu_us(), core_us(self.core)
        result = self.wrk(gateway.port, body, connections, self.seconds)
        cpu, core = gateway.process.cpu_us() - cpu, [now - then for now, then in zip(core_us(self.core), core)]
        resident = gateway.process.resident_mib()
        counts = [u.count() - before for u, before in zip(upstreams, counts)]
        share = counts[1] / max(sum(counts), 1) * 100
        if abs(share - CANARY) > SHARE_OFF_MAX:
            die(f"{gateway.name} sent {share:.1f} % to the canary's model server, and {CANARY} % was asked for ({counts[0]} and {counts[1]} requests)")
        self.end(gateway)
        return {
            "requests_per_s": result["requests"] / result["us"] * 1e6,
            "p50_ms": result["p50_us"] / 1e3,
            "p99_ms": result["p99_us"] / 1e3,
            # Those that were under way at the end are counted by the upstreams, and not by the load.
            "cpu_us": cpu / result["requests"],
            "resident_mib": resident,
            "canary_percent": share,
            "core_busy_percent": core[0] / core[1] * 100,
            "others_percent": max(0, core[0] - cpu) / core[1] * 100,
        }

    def in_turn(self, gateways, measure):
        """Every gateway once a round, each round beginning with another."""
        found = {gateway.name: [] for gateway in gateways}
        for round in range(ROUNDS):
            at = round % len(gateways)
            for gateway in gateways[at:] + gateways[:at]:
                figures = measure(gateway)
                found[gateway.name].append(figures)
                progress(f"  round {round + 1}, {gateway.name}: " + brief(figures))
        return found


def core_us(cores):
    """Busy and whole time of a core so far, in microseconds."""
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


def brief(figures):
    return (f"{figures['requests_per_s']:.0f} requests/s, p50 {figures['p50_ms']:.2f} ms, p99 {figures['p99_ms']:.2f} ms, "
            f"{figures['cpu_us']:.1f} CPU µs a request, {figures['resident_mib']:.1f} MiB; core {figures['core_busy_percent']:.0f} % busy, others {figures['others_percent']:.0f} %")


def medians(found):
    """Of each gateway and figure: the median of the rounds, and the median of its ratios to ours in the same round."""
    ours, table = found["canary-mesh"], {}
    for name, rounds in found.items():
        table[name] = {}
        for figure in rounds[0]:
            ratios = [theirs[figure] / mine[figure] for theirs, mine in zip(rounds, ours) if mine[figure]]
            table[name][figure] = {"median": statistics.median(r[figure] for r in rounds), "ratio": statistics.median(ratios) if ratios else None}
    return table


COLUMNS = [("requests_per_s", "requests/s", ".0f", True), ("p50_ms", "p50 ms", ".2f", True), ("p99_ms", "p99 ms", ".2f", True), ("cpu_us", "CPU µs", ".1f", True),
           ("resident_mib", "MiB", ".1f", True), ("canary_percent", "canary %", ".1f", False), ("core_busy_percent", "core %", ".0f", False), ("others_percent", "others %", ".0f", False)]


def show(title, found):
    print(f"\n{title}")
    rows = [["", *(head for _, head, _, _ in COLUMNS)]]
    for name, figures in medians(found).items():
        row = [name]
        for figure, _, form, compared in COLUMNS:
            cell = format(figures[figure]["median"], form)
            ratio = figures[figure]["ratio"]
            row.append(f"{cell} ({ratio:.2f})" if compared and ratio is not None else cell)
        rows.append(row)
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    for row in rows:
        print("  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]).rstrip())
    sys.stdout.flush()


def machine():
    with open("/proc/cpuinfo") as file:
        models = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return {"cores": os.cpu_count(), "cpu": models[0] if models else platform.machine(), "kernel": platform.release(), "load": os.getloadavg()[0]}


SMALL = b'{"inputs":[{"name":"features","shape":[1,8],"datatype":"FP32","data":[1,2,3,4,5,6,7,8]}]}\n'
SMALL_ANSWER = b'{"model_name":"m","outputs":[{"name":"y","shape":[1,2],"datatype":"FP32","data":[0.25,0.75]}]}'


def main(given):
    bench = Bench(given)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
    signal.signal(signal.SIGHUP, lambda *_: sys.exit(130))
    try:
        gateways = [Ours(given.work, given.binary), *(PEERS[name](given.work) for name in given.only.split(",") if name)]
        about = machine()
        header = f"{about['cores']} cores, {about['cpu']}, Linux {about['kernel']}, load {about['load']:.2f} before; " + ", ".join(f"{g.name} {g.version}" for g in gateways)
        results = {"machine": about, "versions": {g.name: g.version for g in gateways}, "seconds": bench.seconds, "cases": {}}
        if given.output == "table":
            print(header, flush=True)
        for case in given.cases.split(","):
            progress(f"{case}: {ROUNDS} rounds of {bench.seconds} s")
            body = f"{given.work}/body"
            with open(body, "wb") as file:
                file.write(SMALL)
            upstreams = [bench.begin(Upstream(given.work, name, SMALL_ANSWER, bench.load_core)) for name in ("stable", "canary")]
            found = bench.in_turn(gateways, lambda gateway: bench.closed_loop(gateway, upstreams, body, CONNECTIONS))
            for upstream in upstreams:
                bench.end(upstream)
            results["cases"][case] = {"rounds": found, "medians": medians(found)}
            if given.output == "table":
                show(f"{case}: {len(SMALL)} bytes, answer of {len(SMALL_ANSWER)}, {CONNECTIONS} connections", found)
        if given.output == "json":
            print(json.dumps(results, indent=1))
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        bench.close()


main(options.parse_args())
