//! External gates: somebody outside who is asked before each next step.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::sync::{Arc, Mutex};

use serde_json::json;

use super::*;

/// What the server answers with.
#[derive(Clone)]
enum Reply {
    Say(u16, String),
    /// Nothing, for as long as the other side waits.
    Hang,
}

/// A server outside of the mesh.
struct Outside {
    address: String,
    reply: Arc<Mutex<Reply>>,
    /// The request lines and bodies.
    told: Arc<Mutex<Vec<(String, Value)>>>,
}

impl Outside {
    fn answering(status: u16, body: &str) -> Outside {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (reply, told) = (Arc::new(Mutex::new(Reply::Say(status, body.to_owned()))), Arc::new(Mutex::new(Vec::new())));
        let outside = Outside { address, reply: Arc::clone(&reply), told: Arc::clone(&told) };
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (reply, told) = (Arc::clone(&reply), Arc::clone(&told));
                std::thread::spawn(move || {
                    let mut stream = BufReader::new(stream);
                    let (mut head, mut line) = (String::new(), String::new());
                    while stream.read_line(&mut line).is_ok_and(|read| read > 2) {
                        head += &std::mem::take(&mut line).to_ascii_lowercase();
                    }
                    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.trim().parse().ok()).unwrap_or(0);
                    let mut body = vec![0; length];
                    if stream.read_exact(&mut body).is_err() {
                        return;
                    }
                    let first = head.lines().next().unwrap_or_default().to_owned();
                    told.lock().unwrap().push((first, serde_json::from_slice(&body).unwrap_or_default()));
                    let reply = reply.lock().unwrap().clone();
                    // Whoever asked may have hung up.
                    let _ = match reply {
                        Reply::Hang => stream.read(&mut [0]).map(drop),
                        Reply::Say(status, body) => {
                            let head = format!("HTTP/1.1 {status} x\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", body.len());
                            stream.get_mut().write_all(format!("{head}{body}").as_bytes())
                        }
                    };
                });
            }
        });
        outside
    }

    fn answer(&self, reply: Reply) {
        *self.reply.lock().unwrap() = reply;
    }

    fn told(&self) -> Vec<(String, Value)> {
        self.told.lock().unwrap().clone()
    }
}

/// What the node that drives says that the rollout waits for.
fn waits_for(mesh: &Mesh, id: &str) -> String {
    let views = (0..3).map(|at| rollout(mesh, at, id));
    views.filter_map(|view| view["waits_for"].as_str().map(str::to_owned)).collect::<Vec<_>>().join("; ")
}

#[test]
fn a_webhook_is_asked_before_each_step_and_its_no_takes_the_rollout_back_with_its_words() {
    let mesh = started(&json!({}));
    let traffic = Traffic::begin(&mesh);
    let bell = Outside::answering(200, "fine");
    let line = |model: &str| {
        format!(
            "rollout start --model {model} --steps 50,100 --bake 100ms --bake-max 1h --webhook bell=http://{}/ring --watch",
            bell.address
        )
    };
    let promoted = done(&mesh, &line("digits-v2"));
    assert_eq!(promoted["outcome"], "promoted");
    let told = bell.told();
    let expected = |phase: &str, weight: f64, version: u64, node: &Value| {
        json!({
            "name": "bell", "rollout": "r1", "routes": {"default": "digits-v2"}, "route": "default",
            "phase": phase, "weight": weight, "version": version, "node": node,
        })
    };
    assert_eq!(told.len(), 2, "{told:?}");
    for ((line, document), (phase, weight, version)) in told.iter().zip([("step", 50.0, 1), ("promotion", 100.0, 2)]) {
        assert_eq!(line, "post /ring http/1.1");
        assert_eq!(*document, expected(phase, weight, version, &document["node"]));
        assert!(mesh.nodes.iter().any(|node| document["node"] == node.id), "{document}");
    }

    bell.answer(Reply::Say(403, "the load test is red".into()));
    let (code, document, said) = command(&mesh, &line("digits-v1"));
    assert_eq!((code, &document["outcome"]), (1, &json!("rolled_back")), "{said}");
    wait_status(&mesh, &[0, 1, 2], "r2", "rolled_back");
    for at in 0..3 {
        assert_eq!(rollout(&mesh, at, "r2")["reason"], "gate bell: no (403, the load test is red)");
    }
    wait_stable(&mesh, &[0, 1, 2], "digits-v2");
    let other = traffic.end().into_iter().find(|seen| seen.status != Some(200));
    assert!(other.is_none(), "{other:?}");
}

#[test]
fn a_webhook_that_does_not_answer_holds_the_rollout_until_it_does() {
    let mesh = started(&json!({}));
    let _traffic = Traffic::begin(&mesh);
    let bell = Outside::answering(200, "");
    bell.answer(Reply::Hang);
    let line = format!(
        "rollout start --model digits-v2 --steps 50,100 --bake 100ms --bake-max 200ms --webhook http://{} --gate-timeout 300ms",
        bell.address
    );
    done(&mesh, &line);
    let sentence = format!("gate webhook: {} has not answered in time", bell.address);
    wait_for("it says what it waits for", || waits_for(&mesh, "r1") == sentence);
    wait_for("by the command line, too", || text(&run(&mesh, &["rollout", "show", "r1"])).contains(&sentence));
    assert_eq!((0..3).map(|at| rollout(&mesh, at, "r1")["step"].clone()).collect::<Vec<_>>(), [0, 0, 0].map(|step| json!(step)));
    bell.answer(Reply::Say(202, String::new()));
    wait_status(&mesh, &[0, 1, 2], "r1", "promoted");
    wait_stable(&mesh, &[0, 1, 2], "digits-v2");
}

#[test]
fn a_figure_of_prometheus_that_is_too_high_takes_the_rollout_back() {
    let mesh = started(&json!({}));
    let answer = |value: &str| {
        let result = json!([{"metric": {}, "value": [1_732_308_843.123, value]}]);
        json!({"status": "success", "data": {"resultType": "vector", "result": result}}).to_string()
    };
    let prometheus = Outside::answering(200, &answer("0.07"));
    let errors = format!("errors=http://{}|sum(rate(errors_total[1m]))|<=0.05", prometheus.address);
    let start = ["--output", "json", "rollout", "start", "--model", "digits-v2", "--bake", "100ms", "--prometheus", &errors, "--watch"];
    let (code, document, said) = read(&run(&mesh, &start));
    assert_eq!(
        (code, &document["outcome"], &document["reason"]),
        (1, &json!("rolled_back"), &json!("gate errors: 0.07 is above 0.05")),
        "{said}"
    );
    assert_eq!(prometheus.told()[0].0, "get /api/v1/query?query=sum%28rate%28errors_total%5b1m%5d%29%29 http/1.1");
    wait_stable(&mesh, &[0, 1, 2], "digits-v1");

    // A good figure lets it go on as far as the mesh's own gate does.
    prometheus.answer(Reply::Say(200, answer("0.01")));
    let mut start = start.to_vec();
    start.splice(start.len() - 1.., ["--on-inconclusive", "advance", "--bake-max", "100ms", "--watch"]);
    let (code, document, said) = read(&run(&mesh, &start));
    assert_eq!((code, &document["outcome"]), (0, &json!("promoted")), "{said}");
}
