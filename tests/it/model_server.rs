//! A model server that writes down what it is sent, and reads it so strictly that nothing which could be read in two ways passes.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use serde_json::json;
use tempfile::TempDir;

use crate::mesh::Mesh;

/// A request that came whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// `POST /predict HTTP/1.1`
    pub line: String,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

/// What came on a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    Request(Request),
    /// It was closed in the middle of a request, of which this much had come.
    CutOff(String),
    /// What came is not a request, or is not framed in exactly one way.
    Malformed(String),
}

type Answerer = dyn Fn(&Request, &mut TcpStream) -> io::Result<()> + Send + Sync;

pub struct ModelServer {
    pub port: u16,
    heard: Arc<Mutex<Vec<Heard>>>,
}

impl ModelServer {
    /// Answers every request with 200 and this name.
    pub fn named(name: &'static str) -> ModelServer {
        ModelServer::answering(move |_, stream| write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{name}", name.len()))
    }

    /// Answers as it is told. Whether it is ready, which a node asks, is answered yes and not written down.
    pub fn answering(answer: impl Fn(&Request, &mut TcpStream) -> io::Result<()> + Send + Sync + 'static) -> ModelServer {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let heard: Arc<Mutex<Vec<Heard>>> = Arc::default();
        let (told, answer): (_, Arc<Answerer>) = (heard.clone(), Arc::new(answer));
        // Lives as long as the test's process.
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (told, answer) = (told.clone(), answer.clone());
                std::thread::spawn(move || listen(stream, &told, answer.as_ref()));
            }
        });
        ModelServer { port, heard }
    }

    /// What has come since this was asked last.
    pub fn take(&self) -> Vec<Heard> {
        std::mem::take(&mut *self.heard.lock().unwrap())
    }

    /// A node, ready, whose only model is this server.
    pub fn behind_a_node(&self) -> Mesh {
        let dir = TempDir::new().unwrap();
        write_models(dir.path(), &[("server", self)]);
        let timing = json!({"heartbeat_ms": 200, "prepare_timeout_ms": 1000, "lease_ms": 600});
        let mut mesh = Mesh::with_genesis(dir, &["node-a"], &timing, &json!({"default": {"stable_model_id": "server"}}));
        mesh.nodes[0].models = mesh.dir.path().join("models");
        mesh.start(0, &[]);
        mesh.wait_ready();
        mesh
    }
}

/// A folder `models` with a file for each of these.
pub fn write_models(folder: &Path, servers: &[(&str, &ModelServer)]) {
    let models = folder.join("models");
    fs::create_dir(&models).unwrap();
    for (name, server) in servers {
        fs::write(models.join(format!("{name}.json")), json!({"http": format!("http://127.0.0.1:{}", server.port)}).to_string()).unwrap();
    }
}

fn listen(stream: TcpStream, told: &Mutex<Vec<Heard>>, answer: &Answerer) {
    let _ = stream.set_nodelay(true);
    let mut reader = Reader { stream: BufReader::new(stream), seen: Vec::new() };
    loop {
        reader.seen.clear();
        let heard = match reader.request() {
            Ok(None) => return,
            Ok(Some(request)) => Heard::Request(request),
            Err(Fault::Gone) => Heard::CutOff(String::from_utf8_lossy(&reader.seen).into_owned()),
            Err(Fault::Malformed(why)) => Heard::Malformed(format!("{why}: {:?}", String::from_utf8_lossy(&reader.seen))),
        };
        let Heard::Request(request) = &heard else {
            told.lock().unwrap().push(heard);
            return;
        };
        let asks_for_readiness = request.line.starts_with("GET /v2/health/ready ");
        if !asks_for_readiness {
            told.lock().unwrap().push(heard.clone());
        }
        let stream = reader.stream.get_mut();
        let answered = match asks_for_readiness {
            true => stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"),
            false => answer(request, stream),
        };
        if answered.is_err() {
            return;
        }
    }
}

enum Fault {
    Gone,
    Malformed(&'static str),
}

struct Reader {
    stream: BufReader<TcpStream>,
    /// What has come of the request at hand.
    seen: Vec<u8>,
}

impl Reader {
    /// `None` at the end of the connection.
    fn request(&mut self) -> Result<Option<Request>, Fault> {
        let line = match self.line() {
            Err(Fault::Gone) if self.seen.is_empty() => return Ok(None),
            line => line?,
        };
        let words: Vec<_> = line.split(' ').collect();
        if !matches!(words[..], [method, path, "HTTP/1.1"] if is_token(method) && path.starts_with('/')) {
            return Err(Fault::Malformed("not a request line"));
        }
        let mut headers = Vec::new();
        loop {
            let line = self.line()?;
            if line.is_empty() {
                break;
            }
            let (name, value) = line.split_once(':').ok_or(Fault::Malformed("a header without a colon"))?;
            if !is_token(name) || value.contains(|c: char| c.is_ascii_control() && c != '\t') {
                return Err(Fault::Malformed("a malformed header"));
            }
            headers.push((name.to_ascii_lowercase(), value.trim_matches([' ', '\t']).to_owned()));
        }
        let all = |name: &str| headers.iter().filter(|(other, _)| other == name).map(|(_, value)| value.as_str()).collect::<Vec<_>>();
        if all("host").len() != 1 {
            return Err(Fault::Malformed("not one Host"));
        }
        let body = match (&all("content-length")[..], &all("transfer-encoding")[..]) {
            ([], []) => Vec::new(),
            ([length], []) if length.bytes().all(|byte| byte.is_ascii_digit()) => {
                let length = length.parse().map_err(|_| Fault::Malformed("too long a body"))?;
                self.bytes(length)?
            }
            ([], ["chunked"]) => self.chunks()?,
            _ => return Err(Fault::Malformed("not one way of framing")),
        };
        Ok(Some(Request { line, headers, body }))
    }

    /// A line without its end, which is CRLF and nothing else.
    fn line(&mut self) -> Result<String, Fault> {
        let mut line = Vec::new();
        let read = self.stream.read_until(b'\n', &mut line);
        self.seen.extend_from_slice(&line);
        match read {
            Ok(_) if line.ends_with(b"\n") => {}
            _ => return Err(Fault::Gone),
        }
        let line = line.strip_suffix(b"\r\n").filter(|line| !line.contains(&b'\r'));
        // Values may be Latin-1.
        line.map(|line| line.iter().map(|byte| char::from(*byte)).collect()).ok_or(Fault::Malformed("a line does not end with CRLF"))
    }

    fn bytes(&mut self, length: usize) -> Result<Vec<u8>, Fault> {
        let mut bytes = Vec::new();
        let read = (&mut self.stream).take(length as u64).read_to_end(&mut bytes);
        self.seen.extend_from_slice(&bytes);
        if read.is_ok() && bytes.len() == length { Ok(bytes) } else { Err(Fault::Gone) }
    }

    fn chunks(&mut self) -> Result<Vec<u8>, Fault> {
        let mut body = Vec::new();
        loop {
            let size = self.line()?;
            let plain = !size.is_empty() && size.bytes().all(|byte| byte.is_ascii_hexdigit());
            let length = usize::from_str_radix(&size, 16).ok().filter(|_| plain).ok_or(Fault::Malformed("not a chunk's size"))?;
            let mut chunk = self.bytes(length)?;
            if chunk.is_empty() {
                // The trailer: lines of which none says how the message is framed.
                loop {
                    let line = self.line()?;
                    match line.split_once(':') {
                        _ if line.is_empty() => return Ok(body),
                        Some((name, _)) if !["content-length", "transfer-encoding"].contains(&name.to_lowercase().as_str()) => {}
                        _ => return Err(Fault::Malformed("a trailer that may not be")),
                    }
                }
            }
            if !self.line()?.is_empty() {
                return Err(Fault::Malformed("a chunk does not end where its size says"));
            }
            body.append(&mut chunk);
        }
    }
}

fn is_token(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte))
}
