//! Models in the process: ONNX files, computed by rten.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use rten::{DataType, Dimension, Model, NodeId, RunOptions, Value, ValueOrView, ValueType};
use rten_tensor::prelude::*;

use crate::api::ModelMetadata;
use crate::core::ids::{Digest, ModelId, RouteName};
use crate::gateway::BODY_BYTES_MAX;
use crate::gateway::elements::{Datatype, Elements};
use crate::gateway::here::{self, Pace};
use crate::gateway::onnx_file;
use crate::gateway::request::{Answer, Call, Form, InferRequest, Output};
use crate::gateway::settings::{Batching, Settings, check_rows};
use crate::gateway::tensor::{Dim, Tensor, TensorSpec};
use crate::gateway::workers::{Work, WorkError, Workers, said};

/// Elements of one input that a warm-up inference sends at most. No request holds more: each takes two bytes of JSON.
const WARM_UP_ELEMENTS_MAX: usize = BODY_BYTES_MAX / 2;

/// The protocol's word for what models here are.
const PLATFORM: &str = "onnx_onnxv1";

/// Why there is no answer.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub(crate) enum InferError {
    /// The request does not fit the model: the caller's to correct.
    #[error("{0}")]
    Malformed(String),
    /// The model failed on a request that fits it.
    #[error("it failed: {0}")]
    Failed(String),
    /// No answer, or none in time.
    #[error(transparent)]
    Work(#[from] WorkError),
}

/// A loaded model with its threads.
#[derive(Debug)]
pub(crate) struct Onnx {
    graph: Arc<Graph>,
    workers: Workers<Graph>,
}

impl Onnx {
    /// Loads a model from its file's bytes. The error is for an operator.
    pub(crate) fn load(id: &ModelId, digest: Digest, bytes: Vec<u8>, settings: Settings) -> Result<Onnx, String> {
        let graph = Arc::new(Graph::load(id, digest, bytes, settings)?);
        let workers = Workers::start(&format!("model-{id}"), Arc::clone(&graph));
        let workers = workers.map_err(|error| format!("cannot start threads for it: {error}"))?;
        Ok(Onnx { graph, workers })
    }

    /// Answers a request: at once, if the model is small and this thread is one that computes, and otherwise on the model's own threads.
    pub(crate) async fn infer(&self, call: Call) -> Result<Answer, InferError> {
        match here::options().filter(|_| self.graph.is_quick(&call)) {
            Some(options) => self.graph.answer_here(call, &options),
            None => self.workers.run(call).await?,
        }
    }

    /// What answers call its version.
    pub(crate) fn version(&self) -> &str {
        &self.graph.version
    }

    /// What it is, for those who ask for this route's model.
    pub(crate) fn metadata(&self, route: &RouteName) -> ModelMetadata {
        let Graph { inputs, outputs, version, .. } = &*self.graph;
        ModelMetadata {
            name: route.to_string(),
            versions: vec![version.clone()],
            platform: PLATFORM.to_owned(),
            inputs: inputs.iter().map(TensorSpec::metadata).collect(),
            outputs: outputs.iter().map(TensorSpec::metadata).collect(),
        }
    }

    /// One inference of zeros, with every open dimension 1: the same way that requests go.
    pub(crate) async fn warm_up(&self) -> Result<(), String> {
        self.infer_zeros(1).await?;
        if self.graph.batching.is_some() {
            let answer = self.infer_zeros(2).await?;
            self.graph.check_rows(&answer, 2)?;
        }
        Ok(())
    }

    async fn infer_zeros(&self, rows: usize) -> Result<Answer, String> {
        let body = Bytes::from(self.graph.zeros(rows)?);
        let answer = self.infer(Call { form: Form::V2(None), body }).await;
        answer.map_err(|error| format!("its warm-up inference of zeros gave no answer: {error}"))
    }
}

/// A model and what its file declares.
#[derive(Debug)]
struct Graph {
    id: ModelId,
    /// What answers call its version: the first digits of its file's digest.
    version: String,
    model: Model,
    input_ids: Vec<NodeId>,
    output_ids: Vec<NodeId>,
    inputs: Vec<TensorSpec>,
    outputs: Vec<TensorSpec>,
    batching: Option<Batching>,
    pace: Pace,
}

impl Graph {
    fn load(id: &ModelId, digest: Digest, bytes: Vec<u8>, settings: Settings) -> Result<Graph, String> {
        let declared = onnx_file::check(&bytes).map_err(|error| error.to_string())?;
        let model = Model::load(bytes).map_err(|error| format!("it cannot be read as an ONNX model: {error}"))?;
        let (input_ids, output_ids) = (model.input_ids().to_vec(), model.output_ids().to_vec());
        let specs = |ids: &[NodeId]| ids.iter().map(|id| spec(&model, *id, &declared)).collect::<Result<Vec<_>, _>>();
        let (inputs, outputs) = (specs(&input_ids)?, specs(&output_ids)?);
        if outputs.is_empty() {
            return Err("it has no outputs".to_owned());
        }
        let batching = settings.batching;
        if batching.is_some() {
            check_rows(&inputs, &outputs).map_err(|why| format!("its settings ask for batch_rows_max, and {why}"))?;
        }
        Ok(Graph {
            id: id.clone(),
            version: digest.short(),
            inputs,
            outputs,
            input_ids,
            output_ids,
            model,
            batching,
            pace: Pace::default(),
        })
    }

    /// All outputs, always in the same order: rten remembers its plan for one selection only.
    fn run(&self, inputs: Vec<Tensor>, options: &RunOptions) -> Result<Vec<Tensor>, String> {
        let values: Vec<Value> = inputs.into_iter().map(value).collect::<Result<_, _>>()?;
        let inputs = self.input_ids.iter().copied().zip(values.into_iter().map(ValueOrView::from)).collect();
        let results = self.model.run(inputs, &self.output_ids, Some(options.clone())).map_err(|error| error.to_string())?;
        results.into_iter().map(tensor).collect()
    }

    fn read_call(&self, call: &Call) -> Result<InferRequest, InferError> {
        InferRequest::read(call, &self.inputs, &self.outputs).map_err(InferError::Malformed)
    }

    /// One request's answer, if these are its results.
    fn answer(&self, request: &InferRequest, outputs: &[Output<'_>]) -> Result<Answer, InferError> {
        request.answer(self.id.as_str(), &self.version, outputs).map_err(InferError::Malformed)
    }

    fn answer_alone(&self, mut request: InferRequest, options: &RunOptions) -> Result<Answer, InferError> {
        let begun = Instant::now();
        let results = self.run(std::mem::take(&mut request.tensors), options);
        self.pace.took(begun.elapsed());
        let results = results.map_err(InferError::Failed)?;
        self.answer(&request, &Output::whole(&self.outputs, &results))
    }

    /// Whether this request may hold up the thread that has read it. One that waits for others does not.
    fn is_quick(&self, call: &Call) -> bool {
        self.batching.is_none() && self.pace.is_quick(call.body.len())
    }

    fn answer_here(&self, call: Call, options: &RunOptions) -> Result<Answer, InferError> {
        // A model's state is read only while it runs, so there is nothing half-changed behind a panic.
        let answered = catch_unwind(AssertUnwindSafe(|| self.answer_alone(self.read_call(&call)?, options)));
        answered.unwrap_or_else(|panic| Err(WorkError::Panicked(said(panic.as_ref())).into()))
    }

    /// Answers all of them by one run; nothing if that fails, whoever's fault it is.
    fn answer_together(&self, batch: &[InferRequest], options: &RunOptions) -> Option<Vec<Result<Answer, InferError>>> {
        let mut requests = batch.iter();
        let mut together = requests.next()?.tensors.clone();
        for request in requests {
            for (all, tensor) in together.iter_mut().zip(&request.tensors) {
                *all.shape.first_mut()? += tensor.shape.first()?;
                all.elements.append(&tensor.elements);
            }
        }
        let rows = *together.first()?.shape.first()?;
        let results = catch_unwind(AssertUnwindSafe(|| self.run(together, options))).ok()?.ok()?;
        if results.iter().any(|result| result.shape.first() != Some(&rows)) {
            return None;
        }
        let mut from = 0;
        let mut answers = Vec::with_capacity(batch.len());
        for request in batch {
            let rows = request.rows()?;
            let outputs: Vec<_> = self.outputs.iter().zip(&results).map(|(spec, result)| Output::rows(spec, result, from, rows)).collect();
            answers.push(self.answer(request, &outputs));
            from += rows;
        }
        Some(answers)
    }

    /// Says if an answer to a request of so many rows has other numbers of rows.
    fn check_rows(&self, answer: &Answer, rows: usize) -> Result<(), String> {
        let answer: serde_json::Value = serde_json::from_slice(&answer.body).unwrap_or_default();
        let shape = |index: usize| answer.pointer(&format!("/outputs/{index}/shape"));
        let given = |index: usize| shape(index).and_then(|shape| shape.get(0)?.as_u64());
        match self.outputs.iter().enumerate().find(|(index, _)| given(*index) != Some(rows as u64)) {
            None => Ok(()),
            Some((index, spec)) => {
                let shape = shape(index).cloned().unwrap_or_default();
                Err(format!("its settings ask for batch_rows_max, and for {rows} rows its output {} has shape {shape}", spec.name))
            }
        }
    }

    /// A request of so many rows of zeros; all other open dimensions are 1.
    fn zeros(&self, rows: usize) -> Result<String, String> {
        let input = |spec: &TensorSpec| {
            let size = |(index, dim): (usize, &Dim)| match dim {
                Dim::Fixed(size) => *size,
                Dim::Named(_) if index == 0 => rows,
                Dim::Named(_) => 1,
            };
            let shape: Vec<usize> = spec.shape.as_ref().map_or(vec![1], |dims| dims.iter().enumerate().map(size).collect());
            let elements = shape.iter().try_fold(1usize, |product, size| product.checked_mul(*size));
            let elements = elements.filter(|elements| *elements <= WARM_UP_ELEMENTS_MAX);
            let elements = elements.ok_or_else(|| format!("its input {spec} is larger than any request"))?;
            let data = vec![0u8; elements];
            Ok(serde_json::json!({ "name": spec.name, "shape": shape, "datatype": spec.datatype.as_str(), "data": data }))
        };
        let inputs = self.inputs.iter().map(input).collect::<Result<Vec<_>, String>>()?;
        Ok(serde_json::json!({ "inputs": inputs }).to_string())
    }
}

impl Work for Graph {
    type Call = Call;
    type Read = InferRequest;
    type Answer = Result<Answer, InferError>;

    fn read(&self, call: Call) -> Result<InferRequest, Result<Answer, InferError>> {
        self.read_call(&call).map_err(Err)
    }

    fn compute(&self, batch: Vec<InferRequest>, options: &RunOptions) -> Vec<Result<Answer, InferError>> {
        let together = if batch.len() > 1 { self.answer_together(&batch, options) } else { None };
        // One that fails alone is nothing to the others.
        let alone = |request| match catch_unwind(AssertUnwindSafe(|| self.answer_alone(request, options))) {
            Ok(answer) => answer,
            Err(panic) => Err(WorkError::Panicked(said(panic.as_ref())).into()),
        };
        together.unwrap_or_else(|| batch.into_iter().map(alone).collect())
    }

    fn wait(&self) -> Option<Duration> {
        self.batching.map(|batching| batching.wait)
    }

    fn has_room(&self, batch: &[InferRequest]) -> bool {
        let rows = batch.iter().try_fold(0usize, |rows, request| rows.checked_add(request.rows()?));
        self.batching.zip(rows).is_some_and(|(batching, rows)| (1..batching.rows_max).contains(&rows))
    }

    fn may_join(&self, batch: &[InferRequest], next: &InferRequest) -> bool {
        let inner = |tensor: &Tensor| tensor.shape.get(1..).map(<[usize]>::to_vec);
        let alike = |first: &InferRequest| first.tensors.iter().map(inner).eq(next.tensors.iter().map(inner));
        let rows = batch.iter().chain([next]).try_fold(0usize, |rows, request| rows.checked_add(request.rows()?));
        self.batching.zip(rows).is_some_and(|(batching, rows)| rows <= batching.rows_max)
            && next.rows() != Some(0)
            && batch.first().is_some_and(alike)
    }
}

fn value(tensor: Tensor) -> Result<Value, String> {
    let Tensor { shape, elements } = tensor;
    let unfit = |error: &dyn std::fmt::Display| error.to_string();
    match elements {
        Elements::F32(data) => Value::from_shape(&shape, data).map_err(|error| unfit(&error)),
        Elements::I32(data) => Value::from_shape(&shape, data).map_err(|error| unfit(&error)),
        Elements::I8(data) => Value::from_shape(&shape, data).map_err(|error| unfit(&error)),
        Elements::U8(data) => Value::from_shape(&shape, data).map_err(|error| unfit(&error)),
    }
}

fn tensor(value: Value) -> Result<Tensor, String> {
    let shape = value.shape().to_vec();
    let elements = match value {
        Value::FloatTensor(tensor) => Elements::F32(tensor.into_data()),
        Value::Int32Tensor(tensor) => Elements::I32(tensor.into_data()),
        Value::Int8Tensor(tensor) => Elements::I8(tensor.into_data()),
        Value::UInt8Tensor(tensor) => Elements::U8(tensor.into_data()),
        other => return Err(format!("it answers with a {}, and the protocol knows tensors only", other.dtype())),
    };
    Ok(Tensor { shape, elements })
}

/// What the file says of one input or output. rten knows its shape, but not, for instance, an INT64 from an INT32.
fn spec(model: &Model, id: NodeId, declared: &BTreeMap<String, u64>) -> Result<TensorSpec, String> {
    let node = model.node_info(id).ok_or("it names an input or output that is not in its graph")?;
    let name = node.name().unwrap_or_default().to_owned();
    let computed = match node.dtype() {
        Some(ValueType::Tensor(DataType::Int32)) => Some(Datatype::Int32),
        Some(ValueType::Tensor(DataType::Int8)) => Some(Datatype::Int8),
        Some(ValueType::Tensor(DataType::UInt8)) => Some(Datatype::Uint8),
        Some(ValueType::Tensor(DataType::Float)) => Some(Datatype::Fp32),
        _ => None,
    };
    let datatype = match declared.get(&name) {
        Some(onnx_type) => {
            Some(datatype(*onnx_type).map_err(|named| format!("its {name} is of type {named}, which is not computed here"))?)
        }
        None => computed,
    };
    let datatype = datatype.ok_or_else(|| format!("its {name} has no element type"))?;
    let dim = |dim: Dimension| match dim {
        Dimension::Fixed(size) => Dim::Fixed(size),
        Dimension::Symbolic(name) => Dim::Named(name),
    };
    let shape = node.shape().map(|dims| dims.into_iter().map(dim).collect());
    Ok(TensorSpec { name, datatype, shape })
}

/// The protocol's type for a number of ONNX's TensorProto.DataType, or its name if rten has no way to compute with it.
fn datatype(onnx_type: u64) -> Result<Datatype, String> {
    Ok(match onnx_type {
        1 => Datatype::Fp32,
        2 => Datatype::Uint8,
        3 => Datatype::Int8,
        6 => Datatype::Int32,
        7 => Datatype::Int64,
        9 => Datatype::Bool,
        10 => Datatype::Fp16,
        11 => Datatype::Fp64,
        4 => return Err("UINT16".to_owned()),
        5 => return Err("INT16".to_owned()),
        8 => return Err("STRING".to_owned()),
        12 => return Err("UINT32".to_owned()),
        13 => return Err("UINT64".to_owned()),
        other => return Err(format!("{other} (of TensorProto.DataType)")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn graph(rows_max: usize) -> Graph {
        let batching = Some(Batching { rows_max, wait: Duration::ZERO });
        let bytes = std::fs::read("models/digits-v2.onnx").unwrap();
        Graph::load(&ModelId::new("digits-v2").unwrap(), Digest([7; 32]), bytes, Settings { batching }).unwrap()
    }

    fn request(graph: &Graph, rows: &[f32]) -> InferRequest {
        let data: Vec<f32> = rows.iter().flat_map(|row| [*row; 64]).collect();
        let input = serde_json::json!({ "name": "pixels", "shape": [rows.len(), 64], "datatype": "FP32", "data": data });
        let body = serde_json::json!({ "inputs": [input] }).to_string();
        graph.read(Call { form: Form::V2(None), body: body.into() }).unwrap()
    }

    #[test]
    fn requests_join_up_to_the_rows_that_the_settings_say() {
        let graph = graph(5);
        let [none, one, two, five] = [&[][..], &[1.0], &[1.0, 2.0], &[1.0; 5]].map(|rows| request(&graph, rows));
        assert!(graph.may_join(&[request(&graph, &[1.0])], &two));
        assert!(graph.may_join(&[request(&graph, &[1.0]), request(&graph, &[1.0, 2.0])], &two));
        assert!(!graph.may_join(&[request(&graph, &[1.0; 4])], &two), "six rows");
        assert!(!graph.may_join(&[request(&graph, &[1.0])], &none), "without rows there is nothing to join");
        assert!(graph.has_room(&[one]) && graph.has_room(&[two]) && !graph.has_room(&[five]) && !graph.has_room(&[none]));
        let mut wider = request(&graph, &[1.0]);
        wider.tensors[0].shape = vec![1, 1, 64];
        assert!(!graph.may_join(&[request(&graph, &[1.0])], &wider), "rows of another shape");
    }

    #[test]
    fn a_run_for_several_gives_each_its_own_rows() {
        let graph = graph(8);
        let options = RunOptions::default();
        let rows: [&[f32]; 3] = [&[1.0, 16.0], &[5.0], &[0.0, 3.0, 9.0]];
        let batch = rows.map(|rows| request(&graph, rows));
        let together = graph.answer_together(&batch, &options).unwrap();
        for (together, request) in together.into_iter().zip(batch) {
            let numbers = |answer: Result<Answer, InferError>| -> Vec<f32> {
                let answer: serde_json::Value = serde_json::from_slice(&answer.unwrap().body).unwrap();
                serde_json::from_value(answer["outputs"][0]["data"].clone()).unwrap()
            };
            let (together, alone) = (numbers(together), numbers(graph.answer_alone(request, &options)));
            assert_eq!(together.len(), alone.len());
            assert!(together.iter().zip(&alone).all(|(a, b)| (a - b).abs() < 1e-5), "{together:?} and {alone:?}");
        }
    }
}
