//! The Open Inference Protocol V2: a request's JSON to the tensors that a model wants, and its answer back. With its extension for binary
//! tensor data: then the JSON says how many bytes of each tensor follow it, in the order in which it lists them.

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::gateway::elements::{self, Datatype};
use crate::gateway::request::{Answer, JSON_BYTES_HEADER, Output, json};
use crate::gateway::tensor::{Sizes, Tensor, TensorSpec, list};

/// What the answer is to hold.
#[derive(PartialEq, Eq, Debug)]
pub(crate) struct Wanted {
    id: Option<String>,
    /// Which of the model's outputs, by index, in the order asked for.
    outputs: Vec<WantedOutput>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct WantedOutput {
    index: usize,
    /// As binary data.
    binary: bool,
}

#[derive(Deserialize)]
struct RequestJson<'a> {
    id: Option<String>,
    parameters: Option<RequestParameters>,
    #[serde(borrow)]
    inputs: Vec<TensorJson<'a>>,
    #[serde(borrow)]
    outputs: Option<Vec<OutputJson<'a>>>,
}

#[derive(Deserialize)]
struct RequestParameters {
    binary_data_output: Option<bool>,
}

/// An input of a request, or an output of an answer, with its numbers unread.
#[derive(Deserialize)]
pub(super) struct TensorJson<'a> {
    #[serde(borrow)]
    pub(super) name: Cow<'a, str>,
    pub(super) shape: Vec<usize>,
    #[serde(borrow)]
    pub(super) datatype: Cow<'a, str>,
    parameters: Option<TensorParameters>,
    #[serde(borrow)]
    pub(super) data: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct TensorParameters {
    binary_data_size: Option<u64>,
}

#[derive(Deserialize)]
struct OutputJson<'a> {
    #[serde(borrow)]
    name: Cow<'a, str>,
    parameters: Option<OutputParameters>,
}

#[derive(Deserialize)]
struct OutputParameters {
    binary_data: Option<bool>,
}

/// Where a tensor's numbers are.
#[derive(Clone, Copy)]
pub(super) enum Data<'a> {
    Json(&'a RawValue),
    Binary(&'a [u8]),
}

/// The binary data of a body, as far as it is not taken yet.
pub(super) struct Binary<'a> {
    rest: &'a [u8],
    /// There may be some.
    announced: bool,
}

impl<'a> Binary<'a> {
    /// The JSON of a body, and what follows it.
    pub(super) fn split(body: &'a [u8], json_bytes: Option<usize>) -> Result<(&'a [u8], Binary<'a>), String> {
        let json_length = json_bytes.unwrap_or(body.len());
        let split = body.split_at_checked(json_length);
        let (json, rest) = split
            .ok_or_else(|| format!("header {JSON_BYTES_HEADER} says that {json_length} bytes are JSON, and the body has {}", body.len()))?;
        Ok((json, Binary { rest, announced: json_bytes.is_some() }))
    }

    /// The numbers of the next tensor, in the order in which the JSON lists them.
    pub(super) fn data(&mut self, tensor: &TensorJson<'a>) -> Result<Data<'a>, String> {
        let size = tensor.parameters.as_ref().and_then(|parameters| parameters.binary_data_size);
        match (tensor.data, size) {
            (Some(data), None) => Ok(Data::Json(data)),
            (Some(_), Some(_)) => Err("it has both data and binary_data_size".to_owned()),
            (None, None) => Err("it has neither data nor, among its parameters, binary_data_size".to_owned()),
            (None, Some(_)) if !self.announced => {
                Err(format!("it has binary_data_size, and header {JSON_BYTES_HEADER}, which says where the JSON ends, is missing"))
            }
            (None, Some(size)) => {
                let split = usize::try_from(size).ok().and_then(|size| self.rest.split_at_checked(size));
                let left = self.rest.len();
                let (data, rest) = split.ok_or_else(|| format!("binary_data_size is {size}, and {left} bytes of the body are left"))?;
                self.rest = rest;
                Ok(Data::Binary(data))
            }
        }
    }

    /// All of it has been taken.
    pub(super) fn end(self) -> Result<(), String> {
        match self.rest.len() {
            0 => Ok(()),
            left => Err(format!("the body has {left} bytes more than its JSON and every binary_data_size in it add up to")),
        }
    }
}

/// Reads a request for a model with these inputs and outputs: its tensors in the model's order. The error says what was got and what is
/// wanted.
pub(crate) fn read(
    body: &[u8],
    json_bytes: Option<usize>,
    inputs: &[TensorSpec],
    outputs: &[TensorSpec],
) -> Result<(Vec<Tensor>, Wanted), String> {
    let (text, mut binary) = Binary::split(body, json_bytes)?;
    let json: RequestJson<'_> = serde_json::from_slice(text).map_err(|error| format!("the body is not a V2 inference request: {error}"))?;
    let mut given: BTreeMap<&str, (&TensorJson<'_>, Data<'_>)> = BTreeMap::new();
    for input in &json.inputs {
        if !inputs.iter().any(|spec| spec.name == input.name) {
            return Err(format!("the model has no input {:?}; it wants {}", input.name, list(inputs)));
        }
        let data = binary.data(input).map_err(|why| format!("input {}: {why}", input.name))?;
        if given.insert(&input.name, (input, data)).is_some() {
            return Err(format!("input {} is given twice", input.name));
        }
    }
    binary.end()?;
    let mut sizes = Sizes::default();
    let mut tensors = Vec::with_capacity(inputs.len());
    for spec in inputs {
        let input = given.get(spec.name.as_str()).ok_or_else(|| format!("input {} is missing; the model wants {spec}", spec.name))?;
        tensors.push(tensor(input.0, input.1, spec, &mut sizes).map_err(|why| format!("input {}: {why}", spec.name))?);
    }
    let binary = json.parameters.and_then(|parameters| parameters.binary_data_output).unwrap_or(false);
    Ok((tensors, Wanted { id: json.id, outputs: wanted(json.outputs.as_deref(), binary, outputs)? }))
}

fn tensor<'s>(input: &TensorJson<'_>, data: Data<'_>, spec: &'s TensorSpec, sizes: &mut Sizes<'s>) -> Result<Tensor, String> {
    let Some(claimed) = Datatype::parse(&input.datatype) else {
        let all = Datatype::ALL.map(Datatype::as_str).join(", ");
        return Err(match input.datatype.as_ref() {
            "BYTES" => format!("datatype BYTES (text) is not taken by models here; the model wants {spec}"),
            other => format!("datatype {other:?} is none of {all}; the model wants {spec}"),
        });
    };
    sizes.check(&input.shape, spec)?;
    let elements = match data {
        Data::Json(data) => elements::read(data, &input.shape, claimed, spec.datatype),
        Data::Binary(data) => elements::read_bytes(data, &input.shape, claimed, spec.datatype),
    };
    Ok(Tensor { shape: input.shape.clone(), elements: elements? })
}

/// The outputs that are asked for; all of them where none is named.
fn wanted(asked: Option<&[OutputJson<'_>]>, binary: bool, outputs: &[TensorSpec]) -> Result<Vec<WantedOutput>, String> {
    let Some(asked) = asked.filter(|asked| !asked.is_empty()) else {
        return Ok((0..outputs.len()).map(|index| WantedOutput { index, binary }).collect());
    };
    let mut wanted: Vec<WantedOutput> = Vec::new();
    for OutputJson { name, parameters } in asked {
        let Some(index) = outputs.iter().position(|spec| spec.name == *name) else {
            return Err(format!("the model has no output {name:?}; it gives {}", list(outputs)));
        };
        if wanted.iter().any(|wanted| wanted.index == index) {
            return Err(format!("output {name} is asked for twice"));
        }
        let own = parameters.as_ref().and_then(|parameters| parameters.binary_data);
        wanted.push(WantedOutput { index, binary: own.unwrap_or(binary) });
    }
    Ok(wanted)
}

impl Wanted {
    /// Writes the answer.
    pub(crate) fn answer(&self, model: &str, version: &str, outputs: &[Output<'_>]) -> Answer {
        let (mut body, mut binary) = (Vec::new(), Vec::new());
        body.extend_from_slice(b"{\"model_name\":");
        json(&mut body, model);
        body.extend_from_slice(b",\"model_version\":");
        json(&mut body, version);
        if let Some(id) = &self.id {
            body.extend_from_slice(b",\"id\":");
            json(&mut body, id);
        }
        body.extend_from_slice(b",\"outputs\":[");
        let asked = self.outputs.iter().filter_map(|wanted| Some((outputs.get(wanted.index)?, wanted.binary)));
        for (number, (Output { spec, shape, elements }, is_binary)) in asked.enumerate() {
            if number > 0 {
                body.push(b',');
            }
            body.extend_from_slice(b"{\"name\":");
            json(&mut body, &spec.name);
            body.extend_from_slice(b",\"shape\":");
            json(&mut body, shape);
            body.extend_from_slice(b",\"datatype\":");
            json(&mut body, spec.datatype.as_str());
            if is_binary {
                body.extend_from_slice(b",\"parameters\":{\"binary_data_size\":");
                json(&mut body, &(elements.len() * spec.datatype.bytes()));
                body.push(b'}');
                elements.write_bytes(spec.datatype, &mut binary);
            } else {
                body.extend_from_slice(b",\"data\":");
                elements.write(spec.datatype, &mut body);
            }
            body.push(b'}');
        }
        body.extend_from_slice(b"]}");
        let json_bytes = self.outputs.iter().any(|wanted| wanted.binary).then_some(body.len());
        body.append(&mut binary);
        Answer { body, json_bytes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gateway::elements::Elements;
    use crate::gateway::tensor::Dim;

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

    fn read(body: &str) -> Result<(Vec<Tensor>, Wanted), String> {
        super::read(body.as_bytes(), None, &inputs(), &outputs())
    }

    /// The answer to a request, if the model gives these.
    fn answer(wanted: &Wanted, results: &[Tensor]) -> Answer {
        wanted.answer("m", "12345678", &Output::whole(&outputs(), results))
    }

    fn results() -> [Tensor; 2] {
        [
            Tensor { shape: vec![2], elements: Elements::F32(vec![0.1, f32::NAN]) },
            Tensor { shape: vec![2], elements: Elements::I32(vec![0, 1]) },
        ]
    }

    const A: &str = r#"{"name":"a","shape":[2,2],"datatype":"FP32","data":[1,2,3,4]}"#;
    const B: &str = r#"{"name":"b","shape":[2],"datatype":"INT64","data":[5,6]}"#;

    #[test]
    fn inputs_come_in_the_models_order_and_outputs_in_the_callers() {
        let (tensors, wanted) = read(&format!(r#"{{"id":"7","inputs":[{B},{A}],"outputs":[{{"name":"y"}},{{"name":"x"}}]}}"#)).unwrap();
        assert_eq!(tensors[0], Tensor { shape: vec![2, 2], elements: Elements::F32(vec![1.0, 2.0, 3.0, 4.0]) });
        assert_eq!(tensors[1], Tensor { shape: vec![2], elements: Elements::I32(vec![5, 6]) });
        let answer = answer(&wanted, &results());
        assert_eq!(answer.json_bytes, None);
        assert_eq!(
            String::from_utf8(answer.body).unwrap(),
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
            (
                one(r#"{"name":"b","shape":[2],"datatype":"INT64"}"#),
                "input b: it has neither data nor, among its parameters, binary_data_size",
            ),
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
        let all = [0, 1].map(|index| WantedOutput { index, binary: false });
        assert_eq!(read(&body).unwrap().1.outputs, all);
    }

    /// A request whose inputs are binary data, and the bytes of its JSON.
    fn binary(parts: &[&[u8]], json: &str) -> (Vec<u8>, usize) {
        ([json.as_bytes(), &parts.concat()].concat(), json.len())
    }

    fn floats(reals: &[f32]) -> Vec<u8> {
        reals.iter().flat_map(|real| real.to_le_bytes()).collect()
    }

    const BINARY_A: &str = r#"{"name":"a","shape":[2,2],"datatype":"FP32","parameters":{"binary_data_size":16}}"#;

    #[test]
    fn binary_data_follows_the_json_in_the_order_of_its_inputs() {
        let b = r#"{"name":"b","shape":[2],"datatype":"INT16","parameters":{"binary_data_size":4,"more":1}}"#;
        let (body, json_bytes) =
            binary(&[&[5, 0, 0xff, 0xff], &floats(&[1.0, 2.0, 3.0, 4.0])], &format!(r#"{{"inputs":[{b},{BINARY_A}]}}"#));
        let (tensors, _) = super::read(&body, Some(json_bytes), &inputs(), &outputs()).unwrap();
        assert_eq!(tensors[0].elements, Elements::F32(vec![1.0, 2.0, 3.0, 4.0]));
        assert_eq!(tensors[1].elements, Elements::I32(vec![5, -1]));
        let (body, json_bytes) = binary(&[&floats(&[1.0, 2.0, 3.0, 4.0])], &format!(r#"{{"inputs":[{B},{BINARY_A}]}}"#));
        let (tensors, _) = super::read(&body, Some(json_bytes), &inputs(), &outputs()).unwrap();
        assert_eq!(tensors[1].elements, Elements::I32(vec![5, 6]), "one as JSON, the other as binary data");
        let plain = format!(r#"{{"inputs":[{B},{A}]}}"#);
        assert!(super::read(plain.as_bytes(), Some(plain.len()), &inputs(), &outputs()).is_ok(), "without any, the header says all of it");
    }

    #[test]
    fn binary_data_that_does_not_add_up_is_refused() {
        let wants = |json: &str, parts: &[u8], header: Option<usize>, why: &str| {
            let (body, json_bytes) = binary(&[parts], json);
            let refused = super::read(&body, header.or(Some(json_bytes)), &inputs(), &outputs()).unwrap_err();
            assert!(refused.contains(why), "{json}: {refused}");
        };
        let both = format!(r#"{{"inputs":[{B},{BINARY_A}]}}"#);
        let sixteen = floats(&[1.0, 2.0, 3.0, 4.0]);
        wants(&both, &sixteen[..15], None, "input a: binary_data_size is 16, and 15 bytes of the body are left");
        wants(
            &both,
            &[&sixteen[..], &[0]].concat(),
            None,
            "the body has 1 bytes more than its JSON and every binary_data_size in it add up to",
        );
        wants(&both, &sixteen, Some(10_000), "header inference-header-content-length says that 10000 bytes are JSON, and the body has");
        wants(&both, &sixteen, Some(20), "the body is not a V2 inference request: EOF");
        let short = both.replace(":16}", ":12}");
        wants(&short, &sixteen[..12], None, "input a: binary_data_size is 12, and shape [2, 2] of FP32 takes 16");
        let twice = both.replace(r#""parameters""#, r#""data":[1,2,3,4],"parameters""#);
        wants(&twice, &sixteen, None, "input a: it has both data and binary_data_size");
        wants(&both.replace(":16}", ":-1}"), &sixteen, None, "integer `-1`");
        let refused = read(&both).unwrap_err();
        assert!(refused.contains("input a: it has binary_data_size, and header inference-header-content-length, which says"), "{refused}");
    }

    #[test]
    fn outputs_are_binary_data_where_the_request_says_so() {
        let asked = |more: &str| {
            let (_, wanted) = read(&format!(r#"{{"inputs":[{A},{B}]{more}}}"#)).unwrap();
            let answer = answer(&wanted, &results());
            let json = String::from_utf8(answer.body[..answer.json_bytes.unwrap()].to_vec()).unwrap();
            (json, answer.body[answer.json_bytes.unwrap()..].to_vec())
        };
        let x = r#"{"name":"x","shape":[2],"datatype":"FP32","parameters":{"binary_data_size":8}}"#;
        let y = r#"{"name":"y","shape":[2],"datatype":"BOOL","parameters":{"binary_data_size":2}}"#;
        let head = r#"{"model_name":"m","model_version":"12345678","outputs":["#;
        let (json, bytes) = asked(r#","parameters":{"binary_data_output":true}"#);
        assert_eq!(json, format!("{head}{x},{y}]}}"));
        assert_eq!(bytes, [floats(&[0.1, f32::NAN]), vec![0, 1]].concat());
        let (json, bytes) = asked(r#","outputs":[{"name":"y","parameters":{"binary_data":true}},{"name":"x"}]"#);
        assert_eq!(json, format!(r#"{head}{y},{{"name":"x","shape":[2],"datatype":"FP32","data":[0.1,null]}}]}}"#));
        assert_eq!(bytes, [0, 1]);
        let (json, _) =
            asked(r#","parameters":{"binary_data_output":true},"outputs":[{"name":"y","parameters":{"binary_data":false}},{"name":"x"}]"#);
        assert_eq!(json, format!(r#"{head}{{"name":"y","shape":[2],"datatype":"BOOL","data":[false,true]}},{x}]}}"#));
    }
}
