//! Models in the process.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt as _;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::Frame;
use rten_onnx::onnx::{
    AttributeProto, AttributeType, DataType, Dimension, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto,
    TensorShapeProto, TypeProto, TypeProtoTensor, ValueInfoProto,
};
use serde_json::{Value, json};

use super::rig::{
    Answer, Server, ask, demo, digits, full, gateway_to, model, node, post, route_loaded, route_name, run, state, until, whole,
};
use crate::api::{ModelMetadata, TensorMetadata};
use crate::gateway::{Gateway, Options, Served};

fn arg_max(row: &[Value]) -> u64 {
    let mut best = (0, f64::MIN);
    for (index, value) in row.iter().enumerate() {
        let value = value.as_f64().unwrap();
        if value > best.1 {
            best = (index as u64, value);
        }
    }
    best.0
}

#[test]
fn the_demo_models_are_as_accurate_as_their_report_says() {
    let report: Value = serde_json::from_str(&std::fs::read_to_string("models/report.json").unwrap()).unwrap();
    let digits = digits();
    assert_eq!(digits.len(), 400);
    let gateway = demo();
    for (version, id) in [(1, "digits-v1"), (2, "digits-v2"), (3, "digits-v3")] {
        route_loaded(&gateway, &state(version, id, None));
        let right = |(label, request): &&(u64, String)| {
            let answer = ask(&gateway, post(request.clone())).json();
            assert_eq!(answer["outputs"][0]["shape"], json!([1, 10]));
            arg_max(answer["outputs"][0]["data"].as_array().unwrap()) == *label
        };
        let accuracy = digits.iter().filter(right).count() as f64 / digits.len() as f64;
        assert_eq!(accuracy, report["held_out_accuracy"][id].as_f64().unwrap(), "{id}");
    }
}

#[test]
fn a_batch_is_answered_like_its_parts() {
    let gateway = demo();
    route_loaded(&gateway, &state(1, "digits-v2", None));
    let requests: Vec<Value> = digits().iter().map(|(_, request)| serde_json::from_str(request).unwrap()).collect();
    let rows: Vec<&Value> = requests.iter().map(|request| &request["inputs"][0]["data"]).collect();
    let batch = json!({ "inputs": [{ "name": "pixels", "shape": [rows.len(), 64], "datatype": "UINT8", "data": rows }] });
    let together = ask(&gateway, post(batch.to_string())).json();
    assert_eq!(together["outputs"][0]["shape"], json!([400, 10]));
    let together = together["outputs"][0]["data"].as_array().unwrap();
    for (request, row) in requests.iter().zip(together.chunks(10)) {
        let alone = ask(&gateway, post(request.to_string())).json();
        assert_eq!(arg_max(alone["outputs"][0]["data"].as_array().unwrap()), arg_max(row));
    }
}

#[test]
fn an_answer_says_what_it_is_and_who_gave_it() {
    let gateway = demo();
    route_loaded(&gateway, &state(7, "digits-v2", None));
    let digest = run(gateway.digest(&model("digits-v2").id)).unwrap().short();
    let answer = ask(&gateway, post(digits()[0].1.clone()));
    let json = answer.json();
    assert_eq!((answer.status, answer.header("content-type")), (200, "application/json"));
    assert_eq!(json["model_name"], "digits-v2");
    assert_eq!(json["model_version"], digest.as_str());
    assert_eq!(json["id"], "digit-0");
    assert_eq!(json["outputs"][0]["name"], "probabilities");
    assert_eq!(json["outputs"][0]["datatype"], "FP32");
    assert_eq!(answer.chosen(), ["stable", "digits-v2", "7", "node-a", "split"]);
}

#[test]
fn a_request_that_does_not_fit_is_answered_400_in_both_forms() {
    let gateway = demo();
    route_loaded(&gateway, &state(1, "digits-v1", None));
    let body = r#"{"inputs":[{"name":"pixels","shape":[1,63],"datatype":"FP32","data":[0]}]}"#;
    let mut request = post(body);
    request.headers_mut().insert("x-request-id", "mine-7".parse().unwrap());
    let answer = ask(&gateway, request);
    let message = "input pixels: shape [1, 63] has 63 in dimension 1, not 64; the model wants pixels FP32 [batch, 64]";
    assert_eq!(answer.status, 400);
    assert_eq!(answer.json(), json!({ "error": message, "error_code": "invalid_request", "message": message, "request_id": "mine-7" }));
    assert_eq!(answer.chosen(), ["stable", "digits-v1", "1", "node-a", "split"]);
    let totals = gateway.totals();
    assert_eq!((totals[0].requests, totals[0].refused), (0, 1), "no model was asked");
}

#[test]
fn a_body_over_the_limit_is_answered_413_announced_or_not() {
    let options = Options { body_bytes_max: 1_000, ..Options::default() };
    let gateway = Gateway::with_options(node(), "models".into(), options);
    route_loaded(&gateway, &state(1, "digits-v1", None));
    let mut announced = post(vec![b' '; 1_001]);
    announced.headers_mut().insert("content-length", "1001".parse().unwrap());
    let parts = futures::stream::repeat(()).take(1_000_000);
    let parts = parts.map(|()| Ok::<_, std::io::Error>(Frame::data(Bytes::from_static(&[b' '; 100]))));
    let unannounced = Request::post("/predict").body(StreamBody::new(parts).boxed_unsync()).unwrap();
    let unannounced = run(async { whole(gateway.predict(&route_name(), unannounced).await).await });
    for answer in [ask(&gateway, announced), unannounced] {
        assert_eq!((answer.status, answer.error_code().as_str()), (413, "body_too_large"));
        assert_eq!(answer.message(), "the body is over 1000 bytes; send smaller batches");
    }
    let fits = digits()[0].1.clone();
    assert_eq!(ask(&gateway, post(fits)).status, 200);
}

#[test]
fn only_post_is_answered_by_a_model_in_the_process() {
    let gateway = demo();
    route_loaded(&gateway, &state(1, "digits-v1", None));
    let get = Request::get("/predict").body(Full::new(Bytes::new())).unwrap();
    let answer = ask(&gateway, get);
    assert_eq!((answer.status, answer.header("allow"), answer.error_code().as_str()), (405, "POST", "method_not_allowed"));
}

fn post_to(path: &str, body: impl Into<Bytes>) -> Request<Full<Bytes>> {
    Request::post(path).body(Full::new(body.into())).unwrap()
}

#[test]
fn v1_is_answered_on_its_path_and_says_the_same_as_v2() {
    let gateway = demo();
    route_loaded(&gateway, &state(1, "digits-v2", None));
    let v2: Vec<Value> = digits()[..2].iter().map(|(_, request)| serde_json::from_str(request).unwrap()).collect();
    let rows: Vec<&Value> = v2.iter().map(|request| &request["inputs"][0]["data"]).collect();
    let said: Vec<Value> = v2.iter().map(|request| ask(&gateway, post(request.to_string())).json()["outputs"][0]["data"].clone()).collect();
    let path = "/v1/models/default:predict";
    for (request, key) in [
        (json!({ "instances": rows }), "predictions"),
        (json!({ "instances": [{ "pixels": rows[0] }, { "pixels": rows[1] }] }), "predictions"),
        (json!({ "inputs": rows }), "outputs"),
        (json!({ "inputs": { "pixels": rows } }), "outputs"),
    ] {
        let answer = ask(&gateway, post_to(path, request.to_string()));
        assert_eq!((answer.status, answer.header("content-type")), (200, "application/json"), "{request}");
        let answered = answer.json()[key].clone();
        assert_eq!(answered.as_array().unwrap().len(), 2);
        for (row, said) in answered.as_array().unwrap().iter().zip(&said) {
            assert_eq!(arg_max(row.as_array().unwrap()), arg_max(said.as_array().unwrap()));
        }
    }
    let refused = ask(&gateway, post_to(path, v2[0].to_string()));
    assert_eq!((refused.status, refused.error_code().as_str()), (400, "invalid_request"));
    assert_eq!(refused.json()["error"], refused.json()["message"], "V1's form of an error, too");
    let other = ask(&gateway, post(r#"{"instances": [[0]]}"#));
    assert_eq!(other.status, 400, "/predict takes V2");
}

#[test]
fn binary_data_comes_and_goes_beside_the_json() {
    let gateway = demo();
    route_loaded(&gateway, &state(1, "digits-v2", None));
    let (_, request) = &digits()[0];
    let said = ask(&gateway, post(request.clone())).json();
    let request: Value = serde_json::from_str(request).unwrap();
    let pixels: Vec<u8> = request["inputs"][0]["data"].as_array().unwrap().iter().map(|pixel| pixel.as_u64().unwrap() as u8).collect();
    let input = json!({ "name": "pixels", "shape": [1, 64], "datatype": "UINT8", "parameters": { "binary_data_size": 64 } });
    let json = json!({ "parameters": { "binary_data_output": true }, "inputs": [input] }).to_string();
    let ask_with = |json_bytes: &str| {
        let mut request = post_to("/v2/models/default/infer", [json.as_bytes(), &pixels].concat());
        request.headers_mut().insert("inference-header-content-length", json_bytes.parse().unwrap());
        ask(&gateway, request)
    };
    let answer = ask_with(&json.len().to_string());
    assert_eq!((answer.status, answer.header("content-type")), (200, "application/octet-stream"));
    let json_bytes: usize = answer.header("inference-header-content-length").parse().unwrap();
    let head: Value = serde_json::from_slice(&answer.body[..json_bytes]).unwrap();
    let output = json!({ "name": "probabilities", "shape": [1, 10], "datatype": "FP32", "parameters": { "binary_data_size": 40 } });
    assert_eq!(head["outputs"][0], output);
    let reals: Vec<f32> = answer.body[json_bytes..].chunks(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect();
    let wanted: Vec<f32> = serde_json::from_value(said["outputs"][0]["data"].clone()).unwrap();
    assert_eq!(reals, wanted);
    for wrong in ["-1", "+5", "x", "99999999999999999999999"] {
        let refused = ask_with(wrong);
        assert_eq!((refused.status, refused.error_code().as_str()), (400, "invalid_request"));
        assert!(refused.message().contains("header inference-header-content-length must be a number of bytes"), "{}", refused.message());
    }
}

#[test]
fn what_a_model_wants_and_gives_is_known_as_soon_as_it_is_loaded() {
    let gateway = demo();
    let server = Server::start(|_| std::future::ready(Response::new(full("{}"))));
    assert_eq!(gateway.served(&route_name()), None, "no route yet");
    route_loaded(&gateway, &state(1, "digits-v1", Some(("digits-v2", 100))));
    let tensor = |name: &str, size| TensorMetadata { name: name.into(), datatype: "FP32".into(), shape: vec![-1, size] };
    let versions = ["digits-v1", "digits-v2"].map(|id| run(gateway.digest(&model(id).id)).unwrap().short());
    let expected = ModelMetadata {
        name: "default".into(),
        versions: versions.to_vec(),
        platform: "onnx_onnxv1".into(),
        inputs: vec![tensor("pixels", 64)],
        outputs: vec![tensor("probabilities", 10)],
    };
    assert_eq!(gateway.served(&route_name()), Some(Served::Here(expected.clone())));
    route_loaded(&gateway, &state(2, "digits-v1", Some(("digits-v2", 0))));
    let alone = ModelMetadata { versions: versions[..1].to_vec(), ..expected };
    assert_eq!(gateway.served(&route_name()), Some(Served::Here(alone)), "a canary without a share answers nobody");
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(gateway_to(&server, dir.path(), "").served(&route_name()), Some(Served::Elsewhere));
    gateway.route(&state(3, "missing", None));
    until(
        "it is known to be missing",
        || matches!(gateway.served(&route_name()), Some(Served::Missing(why)) if why.contains("model missing is not in models/")),
    );
}

/// Writes a model of one operator: `y = op(inputs)`.
fn write_model(dir: &Path, id: &str, op: &str, inputs: &[(&str, DataType)], output: DataType) {
    write_model_with(dir, id, op, None, inputs, output);
}

/// A model that gives 10, 20, 30 or 40 for an index of 0 to 3, and fails on every other.
fn write_gather(dir: &Path, id: &str) {
    let table = TensorProto {
        dims: vec![4],
        data_type: Some(DataType::INT64),
        int64_data: vec![10, 20, 30, 40],
        name: Some("table".into()),
        ..TensorProto::default()
    };
    write_model_with(dir, id, "Gather", Some(table), &[("x", DataType::INT64)], DataType::INT64);
}

/// The same with a constant before the inputs.
fn write_model_with(dir: &Path, id: &str, op: &str, constant: Option<TensorProto>, inputs: &[(&str, DataType)], output: DataType) {
    let info = |(name, datatype): (&str, DataType)| {
        let dims = vec![Dimension { dim_value: None, dim_param: Some(format!("n_{name}")) }];
        let tensor = TypeProtoTensor { elem_type: Some(datatype), shape: Some(TensorShapeProto { dim: dims }) };
        let kind = TypeProto { tensor_type: Some(tensor), sequence: None };
        ValueInfoProto { name: Some(name.into()), r#type: Some(kind) }
    };
    let axis = AttributeProto { name: Some("axis".into()), i: Some(0), r#type: Some(AttributeType::INT), ..AttributeProto::default() };
    let node = NodeProto {
        op_type: Some(op.into()),
        name: Some("the-op".into()),
        input: constant
            .iter()
            .filter_map(|constant| constant.name.clone())
            .chain(inputs.iter().map(|(name, _)| (*name).to_owned()))
            .collect(),
        output: vec!["y".into()],
        attribute: if op == "Concat" { vec![axis] } else { Vec::new() },
        ..NodeProto::default()
    };
    let graph = GraphProto {
        node: vec![node],
        initializer: constant.into_iter().collect(),
        input: inputs.iter().copied().map(info).collect(),
        output: vec![info(("y", output))],
        ..GraphProto::default()
    };
    let opset = OperatorSetIdProto { domain: None, version: Some(13) };
    let model = ModelProto { ir_version: Some(8), graph: Some(graph), opset_import: vec![opset], ..ModelProto::default() };
    std::fs::write(dir.join(format!("{id}.onnx")), model.write_buf().unwrap()).unwrap();
}

fn one_input(datatype: &str, data: Value) -> String {
    let length = data.as_array().unwrap().len();
    json!({ "inputs": [{ "name": "x", "shape": [length], "datatype": datatype, "data": data }] }).to_string()
}

#[test]
fn a_models_own_types_come_and_go_as_its_file_declares_them() {
    let dir = tempfile::tempdir().unwrap();
    let gateway = Gateway::new(node(), dir.path().to_owned());
    for (version, (onnx_type, datatype, data)) in [
        (DataType::INT64, "INT64", json!([-5, 7, 2147483647])),
        (DataType::INT32, "INT32", json!([-5, 7])),
        (DataType::INT8, "INT8", json!([-128, 127])),
        (DataType::UINT8, "UINT8", json!([0, 255])),
        (DataType::BOOL, "BOOL", json!([true, false])),
        (DataType::FLOAT, "FP32", json!([0.5, -1.25])),
        (DataType::DOUBLE, "FP64", json!([0.5, -1.25])),
        (DataType::FLOAT16, "FP16", json!([0.5, -1.25])),
    ]
    .into_iter()
    .enumerate()
    {
        let id = datatype.to_lowercase();
        write_model(dir.path(), &id, "Identity", &[("x", onnx_type)], onnx_type);
        run(gateway.prepare(&model(&id))).unwrap();
        route_loaded(&gateway, &state(version as u64, &id, None));
        let output = ask(&gateway, post(one_input(datatype, data.clone()))).json()["outputs"][0].clone();
        assert_eq!((&output["datatype"], &output["data"]), (&json!(datatype), &data));
    }
}

#[test]
fn a_model_of_a_type_that_is_not_computed_is_refused_when_it_is_loaded() {
    let dir = tempfile::tempdir().unwrap();
    let gateway = Gateway::new(node(), dir.path().to_owned());
    write_model(dir.path(), "text", "Identity", &[("x", DataType::STRING)], DataType::STRING);
    let refused = run(gateway.prepare(&model("text"))).unwrap_err();
    assert!(refused.ends_with("text.onnx: its x is of type STRING, which is not computed here"), "{refused}");
}

#[test]
fn a_model_that_fails_is_answered_500_with_its_name_and_counts() {
    let dir = tempfile::tempdir().unwrap();
    let gateway = Gateway::new(node(), dir.path().to_owned());
    write_model(dir.path(), "sum", "Add", &[("a", DataType::FLOAT), ("b", DataType::FLOAT)], DataType::FLOAT);
    route_loaded(&gateway, &state(1, "sum", None));
    let add = |b: Value| -> Answer {
        let length = b.as_array().unwrap().len();
        let a = json!({ "name": "a", "shape": [2], "datatype": "FP32", "data": [1, 2] });
        let b = json!({ "name": "b", "shape": [length], "datatype": "FP32", "data": b });
        ask(&gateway, post(json!({ "inputs": [b, a] }).to_string()))
    };
    assert_eq!(add(json!([10, 20])).json()["outputs"][0]["data"], json!([11.0, 22.0]));
    let failed = add(json!([1, 2, 3]));
    assert_eq!((failed.status, failed.error_code().as_str()), (500, "inference_failed"));
    assert!(failed.message().starts_with("stable sum of route default: it failed: "), "{}", failed.message());
    assert_eq!(failed.chosen(), ["stable", "sum", "1", "node-a", "split"]);
    let stable = gateway.evidence()[0].stable;
    assert_eq!((stable.requests, stable.bad), (2, 1));
}

#[test]
fn an_empty_batch_harms_nobody() {
    let gateway = demo();
    route_loaded(&gateway, &state(1, "digits-v2", None));
    let answer = ask(&gateway, post(r#"{"inputs":[{"name":"pixels","shape":[0,64],"datatype":"FP32","data":[]}]}"#));
    assert_eq!((answer.status, &answer.json()["outputs"][0]["shape"]), (200, &json!([0, 10])));
}

/// The demo's model, computed in batches by these settings.
fn batched(settings: &Value) -> (tempfile::TempDir, Arc<Gateway>) {
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy("models/digits-v2.onnx", dir.path().join("digits-v2.onnx")).unwrap();
    std::fs::write(dir.path().join("digits-v2.config.json"), settings.to_string()).unwrap();
    let gateway = Gateway::new(node(), dir.path().to_owned());
    run(gateway.prepare(&model("digits-v2"))).unwrap();
    route_loaded(&gateway, &state(1, "digits-v2", None));
    (dir, gateway)
}

/// All of these at once.
fn ask_all(gateway: &Gateway, requests: impl IntoIterator<Item = Request<Full<Bytes>>>) -> Vec<Answer> {
    let route = route_name();
    let asked = requests.into_iter().map(|request| async { whole(gateway.predict(&route, request).await).await });
    run(futures::future::join_all(asked))
}

#[test]
fn requests_that_are_computed_together_are_answered_like_those_that_are_not() {
    let alone = demo();
    route_loaded(&alone, &state(1, "digits-v2", None));
    let digits = digits();
    let row = |at: usize| serde_json::from_str::<Value>(&digits[at].1).unwrap()["inputs"][0]["data"].clone();
    // In every form, of one row and of several, of none, and wrong ones among them.
    let requests = || {
        (0..60).map(|at| match at % 6 {
            0 => post(json!({ "id": at.to_string(), "inputs": [{ "name": "pixels", "shape": [2, 64], "datatype": "FP32", "data": [row(at), row(at + 1)] }] }).to_string()),
            1 => post_to("/v1/models/default:predict", json!({ "instances": [row(at)] }).to_string()),
            2 => post(r#"{"inputs":[{"name":"pixels","shape":[1,63],"datatype":"FP32","data":[0]}]}"#),
            3 => post(r#"{"inputs":[{"name":"pixels","shape":[0,64],"datatype":"FP32","data":[]}]}"#),
            _ => post(digits[at].1.clone()),
        })
    };
    for settings in [json!({ "batch_rows_max": 7 }), json!({ "batch_rows_max": 64, "batch_wait_us": 2_000 })] {
        let (_dir, gateway) = batched(&settings);
        for (at, (together, request)) in ask_all(&gateway, requests()).iter().zip(requests()).enumerate() {
            let alone = ask(&alone, request);
            assert_eq!(together.status, alone.status, "{at}");
            if alone.status != 200 {
                assert_eq!(together.message(), alone.message());
                continue;
            }
            let (mut together, mut alone) = (together.json(), alone.json());
            let numbers = |json: &mut Value| -> Vec<f64> {
                let data = json.pointer_mut("/outputs/0/data").map(Value::take);
                let data = data.unwrap_or_else(|| json["predictions"].take()[0].take());
                data.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
            };
            // A larger matrix may be summed in another order.
            let (some, others) = (numbers(&mut together), numbers(&mut alone));
            assert_eq!(some.len(), others.len());
            assert!(some.iter().zip(&others).all(|(a, b)| (a - b).abs() < 1e-5), "{at}: {some:?} and {others:?}");
            assert_eq!(together, alone, "everything else is the same");
        }
    }
}

#[test]
fn settings_that_a_model_cannot_keep_are_refused_when_it_is_loaded() {
    let dir = tempfile::tempdir().unwrap();
    let gateway = Gateway::new(node(), dir.path().to_owned());
    let prepared = |id: &str| {
        std::fs::write(dir.path().join(format!("{id}.config.json")), r#"{"batch_rows_max": 4}"#).unwrap();
        run(gateway.prepare(&model(id)))
    };
    write_model(dir.path(), "identity", "Identity", &[("x", DataType::FLOAT)], DataType::FLOAT);
    assert_eq!(prepared("identity"), Ok(()));
    write_model(dir.path(), "shape", "Shape", &[("x", DataType::FLOAT)], DataType::INT64);
    let refused = prepared("shape").unwrap_err();
    assert!(refused.ends_with("its settings ask for batch_rows_max, and output y INT64 [1] has no open first dimension"), "{refused}");
    // A row more than it was given, which its file does not say.
    let one = TensorProto {
        dims: vec![1],
        data_type: Some(DataType::FLOAT),
        float_data: vec![1.0],
        name: Some("one".into()),
        ..TensorProto::default()
    };
    write_model_with(dir.path(), "longer", "Concat", Some(one), &[("x", DataType::FLOAT)], DataType::FLOAT);
    let refused = prepared("longer").unwrap_err();
    assert!(refused.ends_with("its settings ask for batch_rows_max, and for 2 rows its output y has shape [3]"), "{refused}");
}

#[test]
fn a_request_that_fails_does_not_fail_those_that_it_was_computed_with() {
    let dir = tempfile::tempdir().unwrap();
    // Gathers x's elements out of four: an index beyond them fails the run.
    let gateway = Gateway::new(node(), dir.path().to_owned());
    write_gather(dir.path(), "gather");
    std::fs::write(dir.path().join("gather.config.json"), r#"{"batch_rows_max": 16, "batch_wait_us": 20000}"#).unwrap();
    run(gateway.prepare(&model("gather"))).unwrap();
    route_loaded(&gateway, &state(1, "gather", None));
    let indices = [0, 1, 2, 9, 3, 0, 9, 1];
    let requests = indices.map(|index| post(one_input("INT64", json!([index]))));
    for (index, answer) in indices.iter().zip(ask_all(&gateway, requests)) {
        if *index == 9 {
            assert_eq!((answer.status, answer.error_code().as_str()), (500, "inference_failed"));
        } else {
            assert_eq!(answer.json()["outputs"][0]["data"], json!([10 * (index + 1)]));
        }
    }
}
