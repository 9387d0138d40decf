//! What callers may send to a model, and what a model's file may be, for the fuzzer and its corpus.

use super::compare::Answer;
use super::elements::{Datatype, Elements};
use super::onnx_file;
use super::v2::{Dim, InferRequest, TensorSpec};

/// The body of a prediction, or of an answer: one that can be compared is like itself. Every tensor that is taken has as many elements as its shape says, and the answer is JSON.
pub(crate) fn infer(body: &[u8]) {
    let compared = Answer::read(body).map(|answer| answer.is_like(&answer, 0));
    assert!(compared.is_none_or(|like| like == Some(true)), "{compared:?}");
    let batch = || Dim::Named("batch".to_owned());
    let spec = |name: &str, datatype, shape| TensorSpec { name: name.to_owned(), datatype, shape };
    let pixels = [spec("pixels", Datatype::Fp32, Some(vec![batch(), Dim::Fixed(64)]))];
    let two = [spec("a", Datatype::Fp32, Some(vec![batch(), Dim::Fixed(2)])), spec("b", Datatype::Int64, Some(vec![batch()]))];
    let open: Vec<_> = Datatype::ALL.iter().map(|datatype| spec("x", *datatype, None)).collect();
    for inputs in [pixels.as_slice(), &two].into_iter().chain(open.chunks(1)) {
        let Ok(request) = InferRequest::read(body, inputs, inputs) else { continue };
        assert_eq!(request.tensors.len(), inputs.len());
        for tensor in &request.tensors {
            let elements = match &tensor.elements {
                Elements::F32(elements) => elements.len(),
                Elements::I32(elements) => elements.len(),
                Elements::I8(elements) => elements.len(),
                Elements::U8(elements) => elements.len(),
            };
            assert_eq!(Some(elements), tensor.shape.iter().try_fold(1usize, |product, size| product.checked_mul(*size)));
        }
        let answer = request.answer("m", "1", inputs, &request.tensors).unwrap_or_default();
        let answer: Result<serde_json::Value, _> = serde_json::from_slice(&answer);
        assert!(answer.is_ok(), "{answer:?}");
    }
}

/// A model's file, as it is checked before it is loaded. What is declared stands in the file.
pub(crate) fn model_file(file: &[u8]) {
    for (name, _) in onnx_file::check(file).unwrap_or_default() {
        assert!(name.is_empty() || file.windows(name.len()).any(|bytes| bytes == name.as_bytes()));
    }
}
