//! What callers may send to a model, and what a model's file may be, for the fuzzer and its corpus.

use bytes::Bytes;

use super::compare::Answer;
use super::elements::Datatype;
use super::onnx_file;
use super::request::{Call, Form, InferRequest, Output};
use super::tensor::{Dim, Tensor, TensorSpec};

/// The body of a prediction, or of an answer, in every form: one that can be compared is like itself. Every tensor that is taken has as many
/// elements as its shape says, and the answer is JSON, or JSON and as many bytes as it says.
pub(crate) fn infer(body: &[u8]) {
    // As if a header said that what may be JSON is JSON.
    let json_bytes = body.iter().rposition(|byte| *byte == b'}').map(|at| at + 1);
    for json_bytes in [None, json_bytes] {
        let compared = Answer::read(body, json_bytes).map(|answer| answer.is_like(&answer, 0));
        assert!(compared.is_none_or(|like| like == Some(true)), "{compared:?}");
    }
    let batch = || Dim::Named("batch".to_owned());
    let spec = |name: &str, datatype, shape| TensorSpec { name: name.to_owned(), datatype, shape };
    let pixels = [spec("pixels", Datatype::Fp32, Some(vec![batch(), Dim::Fixed(64)]))];
    let two = [spec("a", Datatype::Fp32, Some(vec![batch(), Dim::Fixed(2)])), spec("b", Datatype::Int64, Some(vec![batch()]))];
    let open: Vec<_> = Datatype::ALL.iter().map(|datatype| spec("x", *datatype, None)).collect();
    for inputs in [pixels.as_slice(), &two].into_iter().chain(open.chunks(1)) {
        for form in [Form::V1, Form::V2(None), Form::V2(json_bytes)] {
            let call = Call { form, body: Bytes::copy_from_slice(body) };
            let Ok(request) = InferRequest::read(&call, inputs, inputs) else { continue };
            assert_eq!(request.tensors.len(), inputs.len());
            for Tensor { shape, elements } in &request.tensors {
                let size = shape.iter().try_fold(1usize, |product, size| product.checked_mul(*size));
                assert_eq!(Some(elements.slice().len()), size);
            }
            let Ok(answer) = request.answer("m", "1", &Output::whole(inputs, &request.tensors)) else { continue };
            let json = answer.body.get(..answer.json_bytes.unwrap_or(answer.body.len())).unwrap_or_default();
            let json: Result<serde_json::Value, _> = serde_json::from_slice(json);
            assert!(json.is_ok(), "{answer:?}");
            let compared = Answer::read(&answer.body, answer.json_bytes).map(|answer| answer.is_like(&answer, 0));
            assert!(compared.is_none_or(|like| like == Some(true)), "{compared:?}");
        }
    }
}

/// A model's file, as it is checked before it is loaded. What is declared stands in the file.
pub(crate) fn model_file(file: &[u8]) {
    for (name, _) in onnx_file::check(file).unwrap_or_default() {
        assert!(name.is_empty() || file.windows(name.len()).any(|bytes| bytes == name.as_bytes()));
    }
}
