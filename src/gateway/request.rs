//! A request to a model in the process, in whichever way it is written, and its answer, written the same way.

use bytes::Bytes;
use http::Response;
use http::header::{CONTENT_TYPE, HeaderName, HeaderValue};

use crate::gateway::elements::Slice;
use crate::gateway::headers::Fields;
use crate::gateway::tensor::{Tensor, TensorSpec};
use crate::gateway::{v1, v2};

/// Where the JSON of a body ends, in bytes, if binary data follows it: a header of requests and answers.
pub(crate) const JSON_BYTES_HEADER: &str = "inference-header-content-length";

/// How a request is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Form {
    /// The V1 protocol, which is that of TensorFlow Serving.
    V1,
    /// The Open Inference Protocol V2. With binary data: the bytes of its JSON.
    V2(Option<usize>),
}

impl Form {
    /// The form that a request's path and headers say. The error is for its caller.
    pub(crate) fn of(path: &str, headers: &impl Fields) -> Result<Form, String> {
        if path.starts_with("/v1/") {
            return Ok(Form::V1);
        }
        json_bytes(headers).map(Form::V2)
    }
}

/// What [`JSON_BYTES_HEADER`] says, if it is there.
pub(crate) fn json_bytes(headers: &impl Fields) -> Result<Option<usize>, String> {
    let mut values = headers.values(JSON_BYTES_HEADER);
    let Some(value) = values.next() else { return Ok(None) };
    // A sign would be taken, too.
    let digits = std::str::from_utf8(value).ok().filter(|value| value.bytes().all(|byte| byte.is_ascii_digit()));
    match (digits.and_then(|digits| digits.parse().ok()), values.next()) {
        (Some(bytes), None) => Ok(Some(bytes)),
        _ => Err(format!("header {JSON_BYTES_HEADER} must be a number of bytes, once; it is {:?}", String::from_utf8_lossy(value))),
    }
}

/// A request as it came.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) form: Form,
    pub(crate) body: Bytes,
}

/// A request that fits its model.
#[derive(Debug)]
pub(crate) struct InferRequest {
    /// In the order of the model's inputs.
    pub(crate) tensors: Vec<Tensor>,
    wanted: Wanted,
}

/// What the answer is to hold, and how.
#[derive(Debug)]
enum Wanted {
    V1(v1::Wanted),
    V2(v2::Wanted),
}

impl InferRequest {
    /// Reads a request for a model with these inputs and outputs. The error says what was got and what is wanted.
    pub(crate) fn read(call: &Call, inputs: &[TensorSpec], outputs: &[TensorSpec]) -> Result<InferRequest, String> {
        let (tensors, wanted) = match call.form {
            Form::V1 => v1::read(&call.body, inputs).map(|(tensors, wanted)| (tensors, Wanted::V1(wanted)))?,
            Form::V2(json_bytes) => {
                v2::read(&call.body, json_bytes, inputs, outputs).map(|(tensors, wanted)| (tensors, Wanted::V2(wanted)))?
            }
        };
        Ok(InferRequest { tensors, wanted })
    }

    /// How many rows it has: the size of every input's first dimension, if that is the same.
    pub(crate) fn rows(&self) -> Option<usize> {
        let mut rows = self.tensors.iter().map(|tensor| tensor.shape.first());
        let first = rows.next()?.copied()?;
        rows.all(|rows| rows == Some(&first)).then_some(first)
    }

    /// Writes the answer: of all the model's outputs those that were asked for. The error is for the caller.
    pub(crate) fn answer(&self, model: &str, version: &str, outputs: &[Output<'_>]) -> Result<Answer, String> {
        match &self.wanted {
            Wanted::V1(wanted) => wanted.answer(outputs),
            Wanted::V2(wanted) => Ok(wanted.answer(model, version, outputs)),
        }
    }
}

/// One of the model's outputs, as far as it belongs to one request.
#[derive(Clone, Debug)]
pub(crate) struct Output<'a> {
    pub(crate) spec: &'a TensorSpec,
    pub(crate) shape: Vec<usize>,
    pub(crate) elements: Slice<'a>,
}

impl<'a> Output<'a> {
    /// All of these outputs' results.
    pub(crate) fn whole(specs: &'a [TensorSpec], results: &'a [Tensor]) -> Vec<Output<'a>> {
        let output =
            |(spec, result): (&'a TensorSpec, &'a Tensor)| Output { spec, shape: result.shape.clone(), elements: result.elements.slice() };
        specs.iter().zip(results).map(output).collect()
    }

    /// So many rows of a result, from this one on.
    pub(crate) fn rows(spec: &'a TensorSpec, result: &'a Tensor, from: usize, rows: usize) -> Output<'a> {
        let inner = result.shape.get(1..).unwrap_or_default();
        let size: usize = inner.iter().product();
        Output { spec, shape: [&[rows], inner].concat(), elements: result.elements.slice().part(from * size, rows * size) }
    }
}

/// An answer.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub(crate) struct Answer {
    pub(crate) body: Vec<u8>,
    /// The bytes of its JSON, if binary data follows it.
    pub(crate) json_bytes: Option<usize>,
}

impl From<Answer> for Response<Bytes> {
    fn from(Answer { body, json_bytes }: Answer) -> Response<Bytes> {
        let mut response = Response::new(Bytes::from(body));
        let kind = if json_bytes.is_some() { "application/octet-stream" } else { "application/json" };
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
        if let Some(bytes) = json_bytes {
            response.headers_mut().insert(HeaderName::from_static(JSON_BYTES_HEADER), HeaderValue::from(bytes));
        }
        response
    }
}

/// JSON of a text or a number, behind what is there.
pub(crate) fn json(into: &mut Vec<u8>, value: &(impl serde::Serialize + ?Sized)) {
    // Neither a text nor a number can fail to be written to memory.
    let _ = serde_json::to_writer(into, value);
}
