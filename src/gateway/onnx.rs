//! Models in the process: ONNX files, computed by rten.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use rten::{DataType, Dimension, Model, NodeId, RunOptions, Value, ValueOrView, ValueType};
use rten_tensor::prelude::*;

use crate::api::ModelMetadata;
use crate::core::ids::{Digest, ModelId, RouteName};
use crate::gateway::BODY_BYTES_MAX;
use crate::gateway::elements::{Datatype, Elements};
use crate::gateway::onnx_file;
use crate::gateway::request::{Answer, Call, Form, InferRequest, Output};
use crate::gateway::tensor::{Dim, Tensor, TensorSpec};
use crate::gateway::workers::{Work, WorkError, Workers};

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
    pub(crate) fn load(id: &ModelId, digest: Digest, bytes: Vec<u8>) -> Result<Onnx, String> {
        let graph = Arc::new(Graph::load(id, digest, bytes)?);
        let workers = Workers::start(&format!("model-{id}"), Arc::clone(&graph));
        let workers = workers.map_err(|error| format!("cannot start threads for it: {error}"))?;
        Ok(Onnx { graph, workers })
    }

    /// Answers a request.
    pub(crate) async fn infer(&self, call: Call) -> Result<Answer, InferError> {
        self.workers.run(call).await?
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
        let request = self.graph.zeros()?;
        match self.infer(Call { form: Form::V2(None), body: Bytes::from(request) }).await {
            Ok(_) => Ok(()),
            Err(error) => Err(format!("its warm-up inference of zeros gave no answer: {error}")),
        }
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
}

impl Graph {
    fn load(id: &ModelId, digest: Digest, bytes: Vec<u8>) -> Result<Graph, String> {
        let declared = onnx_file::check(&bytes).map_err(|error| error.to_string())?;
        let model = Model::load(bytes).map_err(|error| format!("it cannot be read as an ONNX model: {error}"))?;
        let (input_ids, output_ids) = (model.input_ids().to_vec(), model.output_ids().to_vec());
        let specs = |ids: &[NodeId]| ids.iter().map(|id| spec(&model, *id, &declared)).collect::<Result<Vec<_>, _>>();
        let (inputs, outputs) = (specs(&input_ids)?, specs(&output_ids)?);
        if outputs.is_empty() {
            return Err("it has no outputs".to_owned());
        }
        Ok(Graph { id: id.clone(), version: digest.short(), inputs, outputs, input_ids, output_ids, model })
    }

    /// All outputs, always in the same order: rten remembers its plan for one selection only.
    fn run(&self, inputs: Vec<Tensor>, options: &RunOptions) -> Result<Vec<Tensor>, String> {
        let values: Vec<Value> = inputs.into_iter().map(value).collect::<Result<_, _>>()?;
        let inputs = self.input_ids.iter().copied().zip(values.into_iter().map(ValueOrView::from)).collect();
        let results = self.model.run(inputs, &self.output_ids, Some(options.clone())).map_err(|error| error.to_string())?;
        results.into_iter().map(tensor).collect()
    }

    fn zeros(&self) -> Result<String, String> {
        let input = |spec: &TensorSpec| {
            let size = |dim: &Dim| match dim {
                Dim::Fixed(size) => *size,
                Dim::Named(_) => 1,
            };
            let shape: Vec<usize> = spec.shape.as_ref().map_or(vec![1], |dims| dims.iter().map(size).collect());
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
        InferRequest::read(&call, &self.inputs, &self.outputs).map_err(|why| Err(InferError::Malformed(why)))
    }

    fn compute(&self, mut request: InferRequest, options: &RunOptions) -> Result<Answer, InferError> {
        let results = self.run(std::mem::take(&mut request.tensors), options).map_err(InferError::Failed)?;
        request.answer(self.id.as_str(), &self.version, &Output::whole(&self.outputs, &results)).map_err(InferError::Malformed)
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
