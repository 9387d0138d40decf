//! The Open Inference Protocol V2: a request's JSON to the tensors that a model wants, and its answer back.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize, Serializer};
use serde_json::value::RawValue;

use crate::gateway::elements::{self, Datatype, Elements};

/// Dimensions that one tensor may have.
pub(crate) const DIMENSIONS_MAX: usize = 16;

/// One input or output of a model, as its file declares it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct TensorSpec {
    pub(crate) name: String,
    pub(crate) datatype: Datatype,
    /// `None` where the file leaves even the number of dimensions open.
    pub(crate) shape: Option<Vec<Dim>>,
}

/// A declared dimension.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Dim {
    /// This size and no other.
    Fixed(usize),
    /// Any size, but the same wherever the name stands.
    Named(String),
}

impl fmt::Display for TensorSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.name, self.datatype)?;
        let Some(shape) = &self.shape else { return Ok(()) };
        let sizes = shape.iter().map(|dim| match dim {
            Dim::Fixed(size) => size.to_string(),
            Dim::Named(name) => name.clone(),
        });
        write!(f, " [{}]", sizes.collect::<Vec<_>>().join(", "))
    }
}

/// A tensor that fits its input.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Tensor {
    pub(crate) shape: Vec<usize>,
    pub(crate) elements: Elements,
}

/// A request that fits its model.
#[derive(Debug)]
pub(crate) struct InferRequest {
    id: Option<String>,
    /// In the order of the model's inputs.
    pub(crate) tensors: Vec<Tensor>,
    /// Which of the model's outputs the answer holds, by index, in the order asked for.
    outputs: Vec<usize>,
}

#[derive(Deserialize)]
struct RequestJson<'a> {
    id: Option<String>,
    #[serde(borrow)]
    inputs: Vec<TensorJson<'a>>,
    #[serde(borrow)]
    outputs: Option<Vec<OutputName<'a>>>,
}

/// An input of a request, or an output of an answer, with its numbers unread.
#[derive(Deserialize)]
pub(super) struct TensorJson<'a> {
    #[serde(borrow)]
    pub(super) name: Cow<'a, str>,
    pub(super) shape: Vec<usize>,
    #[serde(borrow)]
    pub(super) datatype: Cow<'a, str>,
    #[serde(borrow)]
    pub(super) data: &'a RawValue,
}

#[derive(Deserialize)]
struct OutputName<'a> {
    #[serde(borrow)]
    name: Cow<'a, str>,
}

impl InferRequest {
    /// Reads a request for a model with these inputs and outputs. The error says what was got and what is wanted.
    pub(crate) fn read(body: &[u8], inputs: &[TensorSpec], outputs: &[TensorSpec]) -> Result<InferRequest, String> {
        let json: RequestJson<'_> =
            serde_json::from_slice(body).map_err(|error| format!("the body is not a V2 inference request: {error}"))?;
        let mut given: BTreeMap<&str, &TensorJson<'_>> = BTreeMap::new();
        for input in &json.inputs {
            if !inputs.iter().any(|spec| spec.name == input.name) {
                return Err(format!("the model has no input {:?}; it wants {}", input.name, list(inputs)));
            }
            if given.insert(&input.name, input).is_some() {
                return Err(format!("input {} is given twice", input.name));
            }
        }
        let mut sizes = BTreeMap::new();
        let mut tensors = Vec::with_capacity(inputs.len());
        for spec in inputs {
            let input = given.get(spec.name.as_str()).ok_or_else(|| format!("input {} is missing; the model wants {spec}", spec.name))?;
            tensors.push(input.tensor(spec, &mut sizes).map_err(|why| format!("input {}: {why}", spec.name))?);
        }
        let outputs = wanted(json.outputs.as_deref(), outputs)?;
        Ok(InferRequest { id: json.id, tensors, outputs })
    }

    /// Writes the answer: of all the model's `outputs` and `results` those that were asked for.
    pub(crate) fn answer(
        &self,
        model: &str,
        version: &str,
        outputs: &[TensorSpec],
        results: &[Tensor],
    ) -> Result<Vec<u8>, serde_json::Error> {
        let output = |index: &usize| Some(OutputJson { spec: outputs.get(*index)?, tensor: results.get(*index)? });
        let outputs = self.outputs.iter().filter_map(output).collect();
        serde_json::to_vec(&ResponseJson { model_name: model, model_version: version, id: self.id.as_deref(), outputs })
    }
}

impl TensorJson<'_> {
    fn tensor<'s>(&self, spec: &'s TensorSpec, sizes: &mut BTreeMap<&'s str, (usize, &'s str)>) -> Result<Tensor, String> {
        let Some(claimed) = Datatype::parse(&self.datatype) else {
            let all = Datatype::ALL.map(Datatype::as_str).join(", ");
            return Err(match self.datatype.as_ref() {
                "BYTES" => format!("datatype BYTES (text) is not taken by models here; the model wants {spec}"),
                other => format!("datatype {other:?} is none of {all}; the model wants {spec}"),
            });
        };
        if self.shape.len() > DIMENSIONS_MAX {
            return Err(format!("{} dimensions, and a tensor has {DIMENSIONS_MAX} at most", self.shape.len()));
        }
        let unfit = |why: String| format!("shape {:?} {why}; the model wants {spec}", self.shape);
        if let Some(dims) = &spec.shape {
            if dims.len() != self.shape.len() {
                return Err(unfit(format!("has {} dimensions, not {}", self.shape.len(), dims.len())));
            }
            for (index, (dim, size)) in dims.iter().zip(&self.shape).enumerate() {
                match dim {
                    Dim::Fixed(wanted) if wanted == size => {}
                    Dim::Fixed(wanted) => return Err(unfit(format!("has {size} in dimension {index}, not {wanted}"))),
                    Dim::Named(name) => {
                        let (first, input) = *sizes.entry(name).or_insert((*size, &spec.name));
                        if first != *size {
                            return Err(unfit(format!("has {size} in dimension {index}, but {name} is {first} in input {input}")));
                        }
                    }
                }
            }
        }
        let elements = elements::read(self.data, &self.shape, claimed, spec.datatype)?;
        Ok(Tensor { shape: self.shape.clone(), elements })
    }
}

fn list(specs: &[TensorSpec]) -> String {
    specs.iter().map(TensorSpec::to_string).collect::<Vec<_>>().join(", ")
}

/// The indices of the outputs that are asked for; all of them where none is named.
fn wanted(names: Option<&[OutputName<'_>]>, outputs: &[TensorSpec]) -> Result<Vec<usize>, String> {
    let Some(names) = names.filter(|names| !names.is_empty()) else { return Ok((0..outputs.len()).collect()) };
    let mut wanted = Vec::new();
    for OutputName { name } in names {
        let Some(index) = outputs.iter().position(|spec| spec.name == *name) else {
            return Err(format!("the model has no output {name:?}; it gives {}", list(outputs)));
        };
        if wanted.contains(&index) {
            return Err(format!("output {name} is asked for twice"));
        }
        wanted.push(index);
    }
    Ok(wanted)
}

#[derive(Serialize)]
struct ResponseJson<'a> {
    model_name: &'a str,
    model_version: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    outputs: Vec<OutputJson<'a>>,
}

struct OutputJson<'a> {
    spec: &'a TensorSpec,
    tensor: &'a Tensor,
}

impl Serialize for OutputJson<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeStruct as _;
        let mut output = serializer.serialize_struct("Output", 4)?;
        output.serialize_field("name", &self.spec.name)?;
        output.serialize_field("shape", &self.tensor.shape)?;
        output.serialize_field("datatype", self.spec.datatype.as_str())?;
        match &self.tensor.elements {
            Elements::F32(data) => output.serialize_field("data", data)?,
            Elements::I32(data) if self.spec.datatype == Datatype::Bool => {
                output.serialize_field("data", &data.iter().map(|number| *number != 0).collect::<Vec<_>>())?;
            }
            Elements::I32(data) => output.serialize_field("data", data)?,
            Elements::I8(data) => output.serialize_field("data", data)?,
            Elements::U8(data) => output.serialize_field("data", data)?,
        }
        output.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(name: &str, datatype: Datatype, shape: &[Dim]) -> TensorSpec {
        TensorSpec { name: name.into(), datatype, shape: Some(shape.to_vec()) }
    }

    fn batch() -> Dim {
        Dim::Named("batch".into())
    }

    fn inputs() -> [TensorSpec; 2] {
        [spec("a", Datatype::Fp32, &[batch(), Dim::Fixed(2)]), spec("b", Datatype::Int64, &[batch()])]
    }

    fn outputs() -> [TensorSpec; 2] {
        [spec("x", Datatype::Fp32, &[batch()]), spec("y", Datatype::Bool, &[batch()])]
    }

    fn read(body: &str) -> Result<InferRequest, String> {
        InferRequest::read(body.as_bytes(), &inputs(), &outputs())
    }

    const A: &str = r#"{"name":"a","shape":[2,2],"datatype":"FP32","data":[1,2,3,4]}"#;
    const B: &str = r#"{"name":"b","shape":[2],"datatype":"INT64","data":[5,6]}"#;

    #[test]
    fn inputs_come_in_the_models_order_and_outputs_in_the_callers() {
        let request = read(&format!(r#"{{"id":"7","inputs":[{B},{A}],"outputs":[{{"name":"y"}},{{"name":"x"}}]}}"#)).unwrap();
        assert_eq!(request.tensors[0], Tensor { shape: vec![2, 2], elements: Elements::F32(vec![1.0, 2.0, 3.0, 4.0]) });
        assert_eq!(request.tensors[1], Tensor { shape: vec![2], elements: Elements::I32(vec![5, 6]) });
        let results = [
            Tensor { shape: vec![2], elements: Elements::F32(vec![0.1, f32::NAN]) },
            Tensor { shape: vec![2], elements: Elements::I32(vec![0, 1]) },
        ];
        let answer = request.answer("m", "12345678", &outputs(), &results).unwrap();
        assert_eq!(
            String::from_utf8(answer).unwrap(),
            r#"{"model_name":"m","model_version":"12345678","id":"7","outputs":[{"name":"y","shape":[2],"datatype":"BOOL","data":[false,true]},{"name":"x","shape":[2],"datatype":"FP32","data":[0.1,null]}]}"#
        );
    }

    #[test]
    fn what_does_not_fit_is_refused_with_what_is_wanted() {
        let one = |input: &str| format!(r#"{{"inputs":[{A},{input}]}}"#);
        for (body, why) in [
            ("{".to_owned(), "the body is not a V2 inference request: EOF"),
            ("[]".to_owned(), "the body is not a V2 inference request"),
            ("{}".to_owned(), "missing field `inputs`"),
            (one(r#"{"name":"b","datatype":"INT64","data":[]}"#), "missing field `shape`"),
            (one(r#"{"name":"b","shape":[-2],"datatype":"INT64","data":[]}"#), "integer `-2`"),
            (one(r#"{"name":"b","shape":[2],"datatype":"INT64"}"#), "missing field `data`"),
            (
                one(r#"{"name":"c","shape":[2],"datatype":"INT64","data":[]}"#),
                r#"no input "c"; it wants a FP32 [batch, 2], b INT64 [batch]"#,
            ),
            (one(A), "input a is given twice"),
            (format!(r#"{{"inputs":[{A}]}}"#), "input b is missing; the model wants b INT64 [batch]"),
            (one(r#"{"name":"b","shape":[2],"datatype":"INT7","data":[5,6]}"#), r#"input b: datatype "INT7" is none of BOOL, UINT8"#),
            (one(r#"{"name":"b","shape":[2],"datatype":"BYTES","data":["5","6"]}"#), "BYTES (text) is not taken"),
            (one(r#"{"name":"b","shape":[2,1],"datatype":"INT64","data":[5,6]}"#), "shape [2, 1] has 2 dimensions, not 1"),
            (one(r#"{"name":"b","shape":[3],"datatype":"INT64","data":[5,6,7]}"#), "has 3 in dimension 0, but batch is 2 in input a"),
            (one(r#"{"name":"b","shape":[2],"datatype":"INT64","data":[5]}"#), "input b: data has 1 elements, and shape [2] has 2"),
            (one(r#"{"name":"b","shape":[2],"datatype":"INT64","data":[5,6.5]}"#), "input b: element 1 of data: 6.5 is not INT64"),
            (format!(r#"{{"inputs":[{A},{B}],"outputs":[{{"name":"z"}}]}}"#), r#"no output "z"; it gives x FP32 [batch], y BOOL [batch]"#),
            (format!(r#"{{"inputs":[{A},{B}],"outputs":[{{"name":"x"}},{{"name":"x"}}]}}"#), "output x is asked for twice"),
        ] {
            let refused = read(&body).unwrap_err();
            assert!(refused.contains(why), "{body}: {refused}");
        }
        let wrong = A.replace("[2,2]", "[4,1]");
        let refused = read(&format!(r#"{{"inputs":[{wrong},{B}]}}"#)).unwrap_err();
        assert_eq!(refused, "input a: shape [4, 1] has 1 in dimension 1, not 2; the model wants a FP32 [batch, 2]");
    }

    #[test]
    fn fields_beyond_the_protocol_are_let_be() {
        let body = format!(r#"{{"parameters":{{"k":1}},"inputs":[{A},{B}],"outputs":[],"x":null}}"#);
        assert_eq!(read(&body).unwrap().outputs, [0, 1]);
    }
}
