"""What the benchmarks of nodes share: asking over HTTP, waiting, and how figures are printed."""
import http.client, json, statistics, sys, time

# Longest wait for anything, in seconds.
WAIT_S_MAX = 60


def ask(connection, method, path, body=None, headers={}):
    """Sends a document, or bytes as they are. Gives the answer's head and its whole body."""
    body = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method, path, body, {"content-type": "application/json", **headers})
    answer = connection.getresponse()
    return answer, answer.read()


def wait(what, ready):
    end = time.time() + WAIT_S_MAX
    while time.time() < end:
        try:
            if ready():
                return
        except (OSError, http.client.HTTPException, ValueError):
            pass
        time.sleep(0.02)
    sys.exit(f"after {WAIT_S_MAX} s still waiting for this: {what}")


def show(name, values, rest=""):
    """A line of figures in milliseconds."""
    values = sorted(values)
    p50, p99 = statistics.median(values), values[len(values) * 99 // 100]
    print(f"{name} p50 {p50:6.2f} ms  p99 {p99:6.2f} ms  max {values[-1]:6.2f} ms  n {len(values)}{rest}", flush=True)


def spread(ratios):
    return f"median {statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}"
