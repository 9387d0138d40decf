"""Real nodes and model servers on free ports of the loopback, in a directory of theirs."""
import getpass, http.client, json, os, random, shutil, socket, subprocess, sys

from bench import ask, wait


def free_ports(count):
    """Below the range of outgoing connections: the port of a node that is down would be given away before it is back."""
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


class Fleet:
    def __init__(self, binary, work, ids, models, genesis):
        self.binary, self.work, self.ids, self.models = binary, work, ids, models
        ports = free_ports(2 * len(ids))
        self.control, self.data, self.nodes = ports[: len(ids)], ports[len(ids) :], []
        peers = [{"id": i, "control": f"127.0.0.1:{c}", "data": f"127.0.0.1:{d}"} for i, c, d in zip(ids, self.control, self.data)]
        with open(f"{work}/peers.json", "w") as file:
            json.dump({"mesh": "scripts", "genesis": genesis, "peers": peers}, file)

    def start(self):
        """Starts every node, and waits until all are ready and linked."""
        for id in self.ids:
            words = [self.binary, "serve", "--id", id, "--peers", f"{self.work}/peers.json"]
            words += ["--models", self.models, "--logs", f"{self.work}/logs"]
            with open(f"{self.work}/{id}.out", "a") as out:
                node = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
            self.nodes.append(node)
            with open(f"{self.work}/{id}.pid", "w") as file:
                file.write(str(node.pid))
        wait("all nodes to be ready", self.is_well)

    def is_well(self):
        for at, node in enumerate(self.nodes):
            if node.poll() is not None:
                raise SystemExit(f"{self.ids[at]} has ended:\n" + open(f"{self.work}/{self.ids[at]}.out").read())
        links = [peer["link"] for at in range(len(self.ids)) for peer in self.get(at, "/peers")["peers"]]
        ready = all(ask(self.client(at), "GET", "/readyz")[0].status == 200 for at in range(len(self.ids)))
        return ready and all(link == "up" for link in links) and self.agrees()

    def agrees(self):
        routing = [self.get(at, "/routing") for at in range(len(self.ids))]
        return len({(r["slot"], r["state_hash"]) for r in routing}) == 1 and all(r["open"] is None for r in routing)

    def stop(self):
        for node in self.nodes:
            node.kill()
            node.wait()

    def client(self, at):
        connection = http.client.HTTPConnection("127.0.0.1", self.data[at], timeout=30)
        connection.connect()
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def get(self, at, path):
        return json.loads(ask(self.client(at), "GET", path)[1])


class ModelServers:
    """Each answers with its name: an nginx where there is one, which costs least, and Python otherwise."""

    def __init__(self, work, names):
        self.ports, self.processes = dict(zip(names, free_ports(len(names)))), []
        nginx = os.environ.get("NGINX") or shutil.which("nginx") or "/usr/sbin/nginx"
        self.kind = "nginx" if os.access(nginx, os.X_OK) else "Python"
        if self.kind == "nginx":
            with open(f"{work}/nginx.conf", "w") as file:
                file.write(self.nginx_conf(work))
            self.start(work, "nginx", [nginx, "-p", work, "-c", f"{work}/nginx.conf"])
        else:
            for name, port in self.ports.items():
                self.start(work, name, [sys.executable, f"{os.path.dirname(__file__)}/model_server.py", name, str(port)])
        for port in self.ports.values():
            wait("the model servers to listen", lambda: socket.create_connection(("127.0.0.1", port)).close() or True)

    def start(self, work, what, words):
        with open(f"{work}/{what}.out", "w") as out:
            self.processes.append(subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=out, stderr=out))

    def nginx_conf(self, work):
        temporary = "".join(f"{kind}_temp_path {work}/t-{kind}; " for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        server = "server {{ listen 127.0.0.1:{1} backlog=1024; location / {{ return 200 {0}; }} }}\n"
        servers = "".join(server.format(name, port) for name, port in self.ports.items())
        user = f"user {getpass.getuser()};" if os.getuid() == 0 else ""
        return f"""{user} daemon off; worker_processes 1; pid {work}/nginx-server.pid; error_log {work}/nginx.error;
events {{ worker_connections 4096; }}
http {{ access_log off; client_max_body_size 0; keepalive_requests 1000000; {temporary}
{servers}}}
"""

    def stop(self):
        for process in self.processes:
            process.terminate()
            process.wait()


def write_models(work, servers):
    """A folder with a file for each of these model servers, by name and port."""
    os.makedirs(f"{work}/models")
    for name, port in servers.items():
        with open(f"{work}/models/{name}.json", "w") as file:
            json.dump({"http": f"http://127.0.0.1:{port}"}, file)
    return f"{work}/models"
