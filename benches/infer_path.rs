//! What a model in the process costs beside its inference: `cargo bench --bench infer_path`.
//!
//! For each model: rten's run alone, and the whole way from a request's bytes to its answer's through [`Gateway::predict`], with one
//! request at a time and with many. What is counted is the processor's time, which others on the machine disturb least. The last column
//! is the share of a core's throughput that the inference alone would allow. No sockets; what those cost, `canary-mesh bench` shows.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a benchmark that fails says where, and prints its figures")]

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_std::task::block_on;
use bytes::Bytes;
use canary_mesh::core::gate::Gate;
use canary_mesh::core::ids::{MeshId, ModelId, NodeId, RouteName};
use canary_mesh::core::state::RoutingState;
use canary_mesh::gateway::Gateway;
use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full};
use rten::{Model, RunOptions, ThreadPool, Value, ValueOrView};

/// How long each figure is measured.
const MEASURED: Duration = Duration::from_secs(2);
const MODELS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models");

fn main() {
    // As `cargo bench --bench infer_path -- "×32"`: only what has this in its name. Cargo adds words of its own that begin with dashes.
    let only = std::env::args().skip(1).find(|word| !word.starts_with('-')).unwrap_or_default();
    println!("{:<14}{:<26}{:>10}{:>12}{:>9}", "model", "what", "CPU µs", "per core·s", "share");
    for (model, rows) in [("digits-v1", 1), ("digits-v2", 1), ("digits-v2", 32)] {
        let name = format!("{model}×{rows}");
        if !name.contains(&only) {
            continue;
        }
        let alone = alone(model, rows);
        let line = |what: &str, each: f64| println!("{name:<14}{what:<26}{each:>10.2}{:>12.0}{:>8.0}%", 1e6 / each, 100.0 * alone / each);
        line("inference alone", alone);
        let gateway = gateway(model);
        let body = body(rows);
        line("gateway, 1 at a time", through(&gateway, &body, 1));
        line("gateway, 64 at a time", through(&gateway, &body, 64));
    }
}

/// The first of the demo's requests, its image this many times.
fn body(rows: usize) -> Bytes {
    let line: serde_json::Value =
        serde_json::from_str(std::fs::read_to_string(format!("{MODELS}/requests.ndjson")).unwrap().lines().next().unwrap()).unwrap();
    let mut request = line.get("request").unwrap().clone();
    let input = request.pointer_mut("/inputs/0").unwrap();
    let image = input.get("data").unwrap().as_array().unwrap().clone();
    let data: Vec<_> = std::iter::repeat_n(image, rows).flatten().collect();
    *input.get_mut("shape").unwrap() = serde_json::json!([rows, 64]);
    *input.get_mut("data").unwrap() = data.into();
    Bytes::from(request.to_string())
}

/// CPU microseconds of one run of rten.
fn alone(model: &str, rows: usize) -> f64 {
    let model = Model::load(std::fs::read(format!("{MODELS}/{model}.onnx")).unwrap()).unwrap();
    let pool = Arc::new(ThreadPool::with_num_threads(1));
    let options = RunOptions::default().with_thread_pool(Some(Arc::clone(&pool)));
    let (inputs, outputs) = (model.input_ids().to_vec(), model.output_ids().to_vec());
    pool.run(|| {
        each(|| {
            let value = Value::from_shape(&[rows, 64], vec![7.0_f32; rows * 64]).unwrap();
            let inputs = inputs.iter().map(|id| (*id, ValueOrView::from(value.clone()))).collect();
            model.run(inputs, &outputs, Some(options.clone())).unwrap();
        })
    })
}

fn gateway(model: &str) -> Arc<Gateway> {
    let node = NodeId::new("bench").unwrap();
    let routes = [(RouteName::new("default").unwrap(), (ModelId::new(model).unwrap(), Gate::default()))];
    let state = RoutingState::genesis(&MeshId::new("bench").unwrap(), [node.clone()], routes.into());
    let gateway = Gateway::new(node, PathBuf::from(MODELS));
    block_on(gateway.prepare(&state.routes.values().next().unwrap().stable)).unwrap();
    gateway.route(&state);
    gateway
}

/// CPU microseconds of one request, with so many under way at once, all of them from one thread.
fn through(gateway: &Arc<Gateway>, body: &Bytes, at_once: usize) -> f64 {
    let route = RouteName::new("default").unwrap();
    let ask = || async {
        let request = Request::post("/predict").body(Full::new(body.clone())).unwrap();
        let answer: Response<_> = gateway.predict(&route, request).await;
        assert_eq!(answer.status(), 200);
        answer.into_body().collect().await.unwrap().to_bytes().len()
    };
    block_on(async {
        let mut under_way: FuturesUnordered<_> = (0..at_once).map(|_| ask()).collect();
        let (mut begun, mut cpu, mut answered, mut warm) = (Instant::now(), cpu_us(), 0_u32, false);
        while under_way.next().await.is_some() {
            answered += 1;
            under_way.push(ask());
            if begun.elapsed() >= MEASURED {
                if warm {
                    break;
                }
                // The first round warms everything up.
                (begun, cpu, answered, warm) = (Instant::now(), cpu_us(), 0, true);
            }
        }
        (cpu_us() - cpu) / f64::from(answered)
    })
}

/// The processor's time that this process has had, in microseconds.
fn cpu_us() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 * 1e6 + time.tv_nsec as f64 / 1e3
}

/// CPU microseconds of one call.
fn each(mut call: impl FnMut()) -> f64 {
    (0..1_000).for_each(|_| call());
    let (begun, cpu, mut calls) = (Instant::now(), cpu_us(), 0_u32);
    while begun.elapsed() < MEASURED {
        (0..100).for_each(|_| call());
        calls += 100;
    }
    (cpu_us() - cpu) / f64::from(calls)
}
