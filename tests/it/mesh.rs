//! A mesh of real processes on ephemeral ports of the loopback, in a directory of its own that goes with it.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

/// How long anything may take before a test gives up. Generous: no test depends on being fast.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub const BINARY: &str = env!("CARGO_BIN_EXE_canary-mesh");
pub const MODELS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models");

pub struct Mesh {
    pub dir: TempDir,
    pub nodes: Vec<Node>,
    peers: Value,
}

pub struct Node {
    pub id: String,
    pub control: u16,
    pub data: u16,
    pub models: PathBuf,
    pub logs: PathBuf,
    /// Its own peers.json, or the one of all.
    pub peers: PathBuf,
    process: Option<Child>,
}

/// An answer over HTTP.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("not JSON: {self:?}"))
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        let line = self.head.lines().find(|line| line.to_ascii_lowercase().starts_with(&format!("{name}:")))?;
        line.split_once(':').map(|(_, value)| value.trim())
    }
}

/// Ports that are free now; the listeners are held together so that they differ. Below the range that the system gives to outgoing
/// connections: the port of a node that is down would be given away before it is back.
fn free_ports(count: usize) -> Vec<u16> {
    let range = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let outgoing_from = range.split_whitespace().next().and_then(|port| port.parse().ok()).unwrap_or(32_768);
    let mut listeners = Vec::new();
    while listeners.len() < count {
        let port = if outgoing_from > 12_000 { fastrand::u16(10_000..outgoing_from) } else { 0 };
        listeners.extend(TcpListener::bind(("127.0.0.1", port)).ok());
    }
    listeners.iter().map(|listener| listener.local_addr().unwrap().port()).collect()
}

/// A whole file at once, as an editor that renames does it.
pub fn write_whole(path: &Path, json: &Value) {
    let beside = path.with_extension("json.new");
    fs::write(&beside, serde_json::to_string_pretty(json).unwrap()).unwrap();
    fs::rename(beside, path).unwrap();
}

pub fn wait_for(what: &str, mut ready: impl FnMut() -> bool) {
    let start = Instant::now();
    while !ready() {
        assert!(start.elapsed() < PATIENCE, "waited {PATIENCE:?} in vain: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

impl Node {
    fn new(id: &str, ports: &[u16], dir: &Path) -> Node {
        Node {
            id: id.to_owned(),
            control: ports[0],
            data: ports[1],
            models: PathBuf::from(MODELS),
            logs: dir.join("logs"),
            peers: dir.join("peers.json"),
            process: None,
        }
    }

    fn peer(&self) -> Value {
        json!({"id": self.id, "control": format!("127.0.0.1:{}", self.control), "data": format!("127.0.0.1:{}", self.data)})
    }
}

impl Mesh {
    /// A mesh that is not started yet, with a heartbeat of 200 ms and votes within 1 s.
    pub fn new(ids: &[&str]) -> Mesh {
        let timing = json!({"heartbeat_ms": 200, "prepare_timeout_ms": 1000, "lease_ms": 600});
        Mesh::with(TempDir::new().unwrap(), ids, &timing, &json!({}))
    }

    /// With this timing, and these limits of the gate.
    pub fn with(dir: TempDir, ids: &[&str], timing: &Value, gate: &Value) -> Mesh {
        Mesh::with_genesis(dir, ids, timing, &json!({"default": {"stable_model_id": "digits-v1", "gate": gate}}))
    }

    /// With this timing, and these routes.
    pub fn with_genesis(dir: TempDir, ids: &[&str], timing: &Value, genesis: &Value) -> Mesh {
        let ports = free_ports(ids.len() * 2);
        let nodes: Vec<_> = ids.iter().zip(ports.chunks(2)).map(|(id, ports)| Node::new(id, ports, dir.path())).collect();
        let peers = json!({
            "mesh": "test",
            "timing": timing,
            "advance_votes": "unfenced",
            "genesis": genesis,
            "peers": nodes.iter().map(Node::peer).collect::<Vec<_>>(),
        });
        let mesh = Mesh { dir, nodes, peers };
        mesh.write_peers(&mesh.peers);
        mesh
    }

    /// Three nodes, ready.
    pub fn started() -> Mesh {
        let mut mesh = Mesh::new(&["node-a", "node-b", "node-c"]);
        for at in 0..mesh.nodes.len() {
            mesh.start(at, &[]);
        }
        mesh.wait_ready();
        mesh
    }

    /// A node more, in peers.json but not started; its place.
    pub fn add_node(&mut self, id: &str) -> usize {
        let node = Node::new(id, &free_ports(2), self.dir.path());
        self.peers["peers"].as_array_mut().unwrap().push(node.peer());
        self.write_peers(&self.peers);
        self.nodes.push(node);
        self.nodes.len() - 1
    }

    pub fn peers_file(&self) -> PathBuf {
        self.dir.path().join("peers.json")
    }

    pub fn logs(&self) -> PathBuf {
        self.dir.path().join("logs")
    }

    pub fn log_of(&self, at: usize) -> PathBuf {
        self.nodes[at].logs.join(format!("{}.log", self.nodes[at].id))
    }

    pub fn events_of(&self, at: usize) -> String {
        let path = self.nodes[at].logs.join(format!("{}.events.ndjson", self.nodes[at].id));
        String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
    }

    /// The file as it is when nothing is cut.
    pub fn peers(&self) -> &Value {
        &self.peers
    }

    pub fn write_peers(&self, peers: &Value) {
        write_whole(&self.peers_file(), peers);
    }

    pub fn cut(&self, groups: &[&[&str]]) {
        let mut peers = self.peers.clone();
        peers["partitions"] = json!(groups);
        self.write_peers(&peers);
    }

    pub fn heal(&self) {
        self.write_peers(&self.peers);
    }

    pub fn command(&self, at: usize, flags: &[&str]) -> Command {
        let node = &self.nodes[at];
        let mut command = Command::new(BINARY);
        command.args(["serve", "--id", &node.id, "--peers"]).arg(&node.peers);
        command.arg("--models").arg(&node.models).arg("--logs").arg(&node.logs).args(flags);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        command
    }

    pub fn start(&mut self, at: usize, flags: &[&str]) {
        let command = self.command(at, flags);
        self.start_as(at, command);
    }

    pub fn start_as(&mut self, at: usize, mut command: Command) {
        self.nodes[at].process = Some(command.spawn().unwrap());
    }

    /// How a node ended, if it has by itself.
    pub fn has_ended(&mut self, at: usize) -> Option<ExitStatus> {
        self.nodes[at].process.as_mut().and_then(|child| child.try_wait().unwrap())
    }

    pub fn pid(&self, at: usize) -> Option<u32> {
        self.nodes[at].process.as_ref().map(Child::id)
    }

    /// Runs a node that is expected to refuse to start; its exit code and what it says.
    pub fn refused_start(&self, at: usize) -> (i32, String) {
        self.refused_start_with(at, &[])
    }

    pub fn refused_start_with(&self, at: usize, flags: &[&str]) -> (i32, String) {
        let output = self.command(at, flags).output().unwrap();
        (output.status.code().unwrap_or(-1), String::from_utf8(output.stderr).unwrap())
    }

    pub fn kill(&mut self, at: usize) {
        if let Some(mut child) = self.nodes[at].process.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    pub fn signal(&self, at: usize, signal: rustix::process::Signal) {
        let child = self.nodes[at].process.as_ref().unwrap();
        rustix::process::kill_process(rustix::process::Pid::from_child(child), signal).unwrap();
    }

    /// Waits for a process to end by itself.
    pub fn ended(&mut self, at: usize) -> ExitStatus {
        let mut child = self.nodes[at].process.take().unwrap();
        let start = Instant::now();
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                return status;
            }
            assert!(start.elapsed() < PATIENCE, "{} did not end", self.nodes[at].id);
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub fn get(&self, at: usize, path: &str) -> Option<Answer> {
        request(self.nodes[at].data, "GET", path, &[], b"")
    }

    pub fn get_quickly(&self, at: usize, path: &str) -> Option<Answer> {
        request_within(Duration::from_millis(300), self.nodes[at].data, "GET", path, &[], b"")
    }

    pub fn post(&self, at: usize, path: &str, body: &Value) -> Option<Answer> {
        request(self.nodes[at].data, "POST", path, &[], body.to_string().as_bytes())
    }

    pub fn json(&self, at: usize, path: &str) -> Value {
        self.get(at, path).unwrap_or_else(|| panic!("{} does not answer", self.nodes[at].id)).json()
    }

    /// All nodes ready, and every link up: a node that was restarted is ready with one link, and the others may still be waiting
    /// to dial it again.
    pub fn wait_ready(&self) {
        for at in 0..self.nodes.len() {
            self.wait_node_ready(at);
            wait_for(&format!("the links of {}", self.nodes[at].id), || {
                self.json(at, "/peers")["peers"].as_array().unwrap().iter().all(|peer| peer["link"] == "up")
            });
        }
    }

    pub fn wait_node_ready(&self, at: usize) {
        let id = &self.nodes[at].id;
        wait_for(&format!("{id} ready"), || self.get(at, "/readyz").is_some_and(|answer| answer.status == 200));
    }

    pub fn advance(&self, at: usize, canary: &str, percent: f64) -> Option<Answer> {
        let weights = json!({"stable": 100.0 - percent, "canary": percent});
        let changes = json!({"default": {"canary_model_id": canary, "weights": weights}});
        self.post(at, "/transactions", &json!({"kind": "advance", "changes": changes}))
    }

    pub fn wait_agreement(&self) {
        wait_for("all nodes at one slot, version and hash", || {
            let heads = (0..self.nodes.len()).map(|at| self.get(at, "/routing").map(|answer| answer.json()));
            let heads: Option<Vec<_>> = heads.collect();
            let Some(heads) = heads else { return false };
            let same: BTreeSet<_> = heads.iter().map(|r| format!("{} {} {}", r["slot"], r["version"], r["state_hash"])).collect();
            same.len() == 1 && heads.iter().all(|routing| routing["open"].is_null())
        });
    }

    pub fn history(&self, at: usize) -> Vec<Value> {
        let mut from = 0;
        let mut all = Vec::new();
        loop {
            let page = self.json(at, &format!("/history?from={from}&limit=1000"));
            let page = page["decisions"].as_array().unwrap().clone();
            let Some(last) = page.last() else { return all };
            from = last["slot"].as_u64().unwrap() + 1;
            all.extend(page);
        }
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        for at in 0..self.nodes.len() {
            if std::thread::panicking() {
                let events = self.events_of(at);
                let lines: Vec<_> = events.lines().rev().take(30).collect();
                eprintln!("--- last events of {}", self.nodes[at].id);
                lines.iter().rev().for_each(|line| eprintln!("{line}"));
            }
            self.kill(at);
        }
    }
}

/// One request on a connection of its own; `None` where no whole answer came.
pub fn request(port: u16, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Option<Answer> {
    request_within(PATIENCE, port, method, path, headers, body)
}

/// The same for a caller who hangs up when nothing has come for so long.
pub fn request_within(patience: Duration, port: u16, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Option<Answer> {
    request_on(connect(patience, port)?, method, path, headers, body)
}

/// A connection; `None` where nobody listens.
pub fn connect(patience: Duration, port: u16) -> Option<TcpStream> {
    let stream = TcpStream::connect_timeout(&SocketAddr::from(([127, 0, 0, 1], port)), patience).ok()?;
    stream.set_read_timeout(Some(patience)).ok()?;
    Some(stream)
}

pub fn request_on(stream: TcpStream, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Option<Answer> {
    let mut head = format!("{method} {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\ncontent-length: {}\r\n", body.len());
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    head += "\r\n";
    raw_on(stream, &[head.as_bytes(), body].concat())
}

/// These bytes on a connection of their own, and the one answer to them.
pub fn raw(port: u16, bytes: &[u8]) -> Option<Answer> {
    raw_on(connect(PATIENCE, port)?, bytes)
}

pub fn raw_on(mut stream: TcpStream, bytes: &[u8]) -> Option<Answer> {
    // The node may answer and close before it has read everything.
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n")?;
    let head = String::from_utf8(answer[..end].to_vec()).ok()?;
    let status = head.split_whitespace().nth(1)?.parse().ok()?;
    let body = answer[end + 4..].to_vec();
    let whole = Answer { status, head, body };
    match whole.header("content-length") {
        Some(length) if length.parse() != Ok(whole.body.len()) => None,
        _ => Some(whole),
    }
}

pub fn requests() -> Vec<Value> {
    let text = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/models/requests.ndjson")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}
