//! What inference alone takes: the demo's models on one thread, on requests that have been decoded before, with the options that a node
//! gives them. `inference [SECONDS FOLDER STABLE CANARY]`; scripts/bench_gateway.sh holds a node's whole answers against it.
//!
//! FOLDER has both models and requests.ndjson. Four inferences of STABLE, one of CANARY, as a split of 80 to 20 has it.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a benchmark that fails says where, and prints its figures")]

use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rten::{Model, NodeId, RunOptions, ThreadPool, Value};
use rustix::time::{ClockId, clock_gettime};

/// Inferences between two looks at the clock.
const AT_ONCE: usize = 100;

/// A model with the names of its ends.
struct Loaded {
    model: Model,
    input: NodeId,
    outputs: Vec<NodeId>,
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let (seconds, folder, stable, canary) = match args.as_slice() {
        [seconds, folder, stable, canary] => (*seconds, *folder, *stable, *canary),
        _ => ("3", concat!(env!("CARGO_MANIFEST_DIR"), "/models"), "digits-v1", "digits-v2"),
    };
    let (time, models) = (Duration::from_secs(seconds.parse().unwrap()), Path::new(folder));
    let requests: Vec<Vec<f32>> = std::fs::read_to_string(models.join("requests.ndjson")).unwrap().lines().map(pixels).collect();
    let [stable, canary] = [stable, canary].map(|id| load(&models.join(format!("{id}.onnx"))));
    // As in `gateway::workers`: a pool of one thread, so that the loop below computes in it and wakes nobody.
    let pool = Arc::new(ThreadPool::with_num_threads(1));
    let options = RunOptions::default().with_thread_pool(Some(Arc::clone(&pool)));
    let (done, took, cpu) = pool.run(|| {
        let mut draw = (0..).zip(requests.iter().cycle());
        let mut infer = |count: usize| {
            for (n, pixels) in draw.by_ref().take(count) {
                let loaded = if n % 5 == 4 { &canary } else { &stable };
                // A node's decoder makes such a vector of every request, and gives it away.
                let input = Value::from_shape(&[1, pixels.len()], pixels.clone()).unwrap();
                black_box(loaded.model.run(vec![(loaded.input, input.into())], &loaded.outputs, Some(options.clone())).unwrap());
            }
        };
        infer(10 * AT_ONCE);
        let (begun, cpu) = (Instant::now(), cpu_time());
        let mut done = 0;
        while begun.elapsed() < time {
            infer(AT_ONCE);
            done += AT_ONCE;
        }
        (done, begun.elapsed(), cpu_time() - cpu)
    });
    let each = |time: Duration| time.as_secs_f64() * 1e6 / done as f64;
    println!(r#"{{"requests": {done}, "us": {}, "cpu_us": {:.3}, "wall_us": {:.3}}}"#, took.as_micros(), each(cpu), each(took));
}

fn load(file: &Path) -> Loaded {
    let model = Model::load(std::fs::read(file).unwrap()).unwrap();
    let (input, outputs) = (*model.input_ids().first().unwrap(), model.output_ids().to_vec());
    Loaded { model, input, outputs }
}

fn pixels(line: &str) -> Vec<f32> {
    let line: serde_json::Value = serde_json::from_str(line).unwrap();
    let data = line.pointer("/request/inputs/0/data").unwrap();
    serde_json::from_value(data.clone()).unwrap()
}

fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec.try_into().unwrap(), time.tv_nsec.try_into().unwrap())
}
