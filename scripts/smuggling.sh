#!/usr/bin/env bash
# Whether nginx ever reads something else than a node passes on: every vector of tests/data/smuggling.json, at both.
set -euo pipefail

usage() {
  cat <<'END'
Usage: scripts/smuggling.sh

Sends every vector of tests/data/smuggling.json, with one more request behind it on the same connection, to a real nginx, and to a node
that has this nginx as its model server. Prints what each made of it. Fails if nginx, behind the node, reads another number of requests
than the node has passed on, or one with another body than the file says.

Needs python3, nginx and a build. Set by the environment:

  NGINX         the program (nginx)
  CANARY_MESH   the program (target/release/canary-mesh, or target/debug/canary-mesh)
  BENCH_DIR     where the directory goes that is taken away at the end (the project's folder)

Exit codes: 0 no request is read in two ways, 1 one is, or something failed, 2 usage.
END
}

case ${1:-} in
  --help | -h) usage && exit 0 ;;
esac
(($# == 0)) || { usage >&2 && exit 2; }
cd "$(dirname "${BASH_SOURCE[0]}")/.."

target=${CARGO_TARGET_DIR:-target}
binary=${CANARY_MESH:-$target/release/canary-mesh}
[[ -x $binary || -n ${CANARY_MESH:-} ]] || binary=$target/debug/canary-mesh
[[ -x $binary ]] || { echo "smuggling: $binary is not there; run: cargo build --locked" >&2; exit 1; }
nginx=${NGINX:-$(command -v nginx || echo /usr/sbin/nginx)}
[[ -x $nginx ]] || { echo "smuggling: there is no nginx; install it, or say in NGINX where it is" >&2; exit 1; }
work=$(mktemp -d "${BENCH_DIR:-.}/smuggling.XXXXXX")
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

PYTHONPATH=scripts/lib PYTHONDONTWRITEBYTECODE=1 python3 - "$binary" "$nginx" "$work" <<'PY'
import json, re, socket, subprocess, sys
from bench import wait
from fleet import Fleet, free_ports, write_models

binary, nginx, work = sys.argv[1:]
# How long an answer may take before it is said that nothing came.
SILENCE_S = 1
CANARY = b"POST /predict?canary HTTP/1.1\r\nHost: mesh\r\nContent-Length: 6\r\n\r\ncanary"
# What it is answered.
LAST = b"/predict?canary"

with open("tests/data/smuggling.json") as file:
    vectors = json.load(file)

# The first server waits for the whole body and passes it to the second, so that its log has the body as nginx has read it.
port, back = free_ports(2)
with open(f"{work}/nginx.conf", "w") as file:
    file.write(f"""
daemon off; worker_processes 1; pid {work}/nginx.pid; error_log {work}/nginx.error;
events {{ worker_connections 256; }}
http {{
  client_body_temp_path {work}/t1; proxy_temp_path {work}/t2; fastcgi_temp_path {work}/t3; uwsgi_temp_path {work}/t4; scgi_temp_path {work}/t5;
  log_format bodies escape=json '{{"status":$status,"request":"$request","body":"$request_body"}}';
  client_body_buffer_size 64k; client_body_in_single_buffer on; client_header_timeout 5; client_body_timeout 5;
  server {{
    listen 127.0.0.1:{port}; access_log {work}/requests bodies;
    location / {{ proxy_pass http://127.0.0.1:{back}; proxy_http_version 1.1; proxy_ignore_client_abort on; }}
  }}
  server {{ listen 127.0.0.1:{back}; access_log off; location / {{ return 200 $request_uri; }} }}
}}
""")
log = open(f"{work}/nginx.out", "w")
server = subprocess.Popen([nginx, "-p", work, "-c", f"{work}/nginx.conf"], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
fleet = Fleet(binary, work, ["node-a"], write_models(work, {"nginx": port}), {"default": {"stable_model_id": "nginx"}})

class Answers:
    """What comes back for these bytes, until the last request is answered, the connection ends, or nothing comes any more."""
    def __init__(self, port, sends, last):
        self.all, self.end = [], ""
        with socket.create_connection(("127.0.0.1", port)) as caller:
            caller.settimeout(SILENCE_S)
            caller.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            stream = caller.makefile("rb")
            try:
                caller.sendall(sends)
                while not self.end:
                    self.read(stream, last)
            except TimeoutError:
                self.end = "waits"
            except OSError:
                self.end = "closes"

    def read(self, stream, last):
        """One answer: its status, whether a model server gave it, and its body."""
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            line = stream.readline()
            if not line:
                self.end = "closes"
                return
            head += line
        length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.I)
        body = stream.read(int(length[1])) if length else b""
        if b" 100 " not in head[:13]:
            self.all.append((int(head[9:12]), b"\r\nx-canary-variant:" in head.lower(), body))
            self.end = "last" if body == last else ""

    def refusals(self):
        return [status for status, _, _ in self.all if status != 200]

place = 0
def logged(mark):
    """The requests that nginx has written down since the last time. One of our own with this mark comes last."""
    Answers(port, f"GET /{mark} HTTP/1.1\r\nHost: mesh\r\n\r\n".encode(), f"/{mark}".encode())
    lines = []
    def is_there():
        global place
        with open(f"{work}/requests", "rb") as file:
            file.seek(place)
            for line in file:
                if line.endswith(b"\n"):
                    place += len(line)
                    lines.append(json.loads(line.decode("latin-1")))
        return any(f" /{mark} " in line["request"] for line in lines)
    wait("nginx to write its log", is_there)
    return [line for line in lines if f" /{mark} " not in line["request"]]

def before_the_last(lines):
    """The bodies of what nginx has read and answered, without the request that was sent behind each vector."""
    return [line["body"] for line in lines if line["status"] == 200 and "?canary" not in line["request"]]

def in_words(bodies, answers):
    refusals = [f"refused {status}" for status in answers.refusals()]
    waits = ["waits"] if answers.end == "waits" else []
    return ", ".join([f"{len(body)} bytes" for body in bodies] + refusals + waits) or "closes"

def faults_of(vector, answers, lines):
    """Where nginx has read something else than the node has passed on."""
    passed = [status for status, by_model, _ in answers.all if by_model]
    read, bodies = [line for line in lines if line["status"] == 200], before_the_last(lines)
    if any(status != 200 for status in passed):
        yield f"nginx refused what was passed on to it: {passed}"
    if len(read) != len(passed):
        yield f"{len(passed)} were passed on, and nginx read {len(read)}: {read}"
    if len(bodies) > 1 or bodies and "body" in vector and bodies != [vector["body"]]:
        yield f"the body is {vector.get('body')!r}, and nginx read {bodies}"
    if len(read) > 2:
        yield f"more than two were read: {read}"

def main():
    wait("nginx to listen", lambda: socket.create_connection(("127.0.0.1", port)).close() or True)
    fleet.start()
    logged("begin")
    wrong, differ, refused = [], 0, 0
    print(f"{'':66}{'ours':18}{'nginx behind ours':20}nginx alone")
    for n, vector in enumerate(vectors):
        sends = vector["sends"].encode("latin-1") + CANARY
        through = Answers(fleet.data[0], sends, LAST)
        behind = logged(f"behind-{n}")
        alone = Answers(port, sends, LAST)
        direct = logged(f"alone-{n}")
        faults = list(faults_of(vector, through, behind))
        wrong += [f"{vector['name']}: {fault}" for fault in faults]
        refused += bool(through.refusals())
        # That a body which is taken is the one of the file has just been looked at.
        ours, theirs = in_words(before_the_last(behind), through), in_words(before_the_last(direct), alone)
        is_other = re.sub(r"refused \d+", "refused", ours) != re.sub(r"refused \d+", "refused", theirs)
        differ += is_other
        bodies = [f"{len(body)} bytes" for body in before_the_last(behind)]
        print(f"{vector['name'][:64]:66}{ours:18}{', '.join(bodies) or '-':20}{theirs}{' *' if is_other else ''}{'  WRONG' if faults else ''}")
    print(f"{len(vectors)} vectors, of which we refuse {refused}; nginx alone reads {differ} in another way (*), and behind us {len(wrong)}")
    if wrong:
        sys.exit("smuggling: read in two ways:\n" + "\n".join(wrong))

try:
    main()
finally:
    fleet.stop()
    server.terminate()
    server.wait()
PY
