//! The V1 protocol, which is that of TensorFlow Serving's REST API: `{"instances": […]}`, answered by `{"predictions": […]}`, row by row, and
//! `{"inputs": …}`, answered by `{"outputs": …}`, input by input. Shapes are those of the nested arrays; types are the model's own.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use crate::gateway::elements::Nested;
use crate::gateway::request::{Answer, Output, json};
use crate::gateway::tensor::{Sizes, Tensor, TensorSpec, list};

/// The one signature that a model here has.
const SIGNATURE: &str = "serving_default";

/// How the answer is to be written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Wanted {
    /// As many instances as were given, each with all outputs.
    Rows(usize),
    /// Output by output.
    Columns,
}

#[derive(Deserialize)]
struct RequestJson<'a> {
    #[serde(borrow)]
    signature_name: Option<Cow<'a, str>>,
    #[serde(borrow)]
    instances: Option<&'a RawValue>,
    #[serde(borrow)]
    inputs: Option<&'a RawValue>,
}

/// An object's values, with their JSON unread, in order.
struct Named<'a>(Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'de> Deserialize<'de> for Named<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Values;
        impl<'de> Visitor<'de> for Values {
            type Value = Named<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of inputs by their names")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Named<'de>, A::Error> {
                let mut values = Vec::new();
                while let Some(name) = map.next_key()? {
                    values.push((name, map.next_value()?));
                }
                Ok(Named(values))
            }
        }
        deserializer.deserialize_map(Values)
    }
}

/// Reads a request for a model with these inputs: its tensors in the model's order. The error says what was got and what is wanted.
pub(crate) fn read(body: &[u8], inputs: &[TensorSpec]) -> Result<(Vec<Tensor>, Wanted), String> {
    let request: RequestJson<'_> =
        serde_json::from_slice(body).map_err(|error| format!("the body is not a V1 prediction request: {error}"))?;
    if let Some(other) = request.signature_name.filter(|name| !name.is_empty() && name != SIGNATURE) {
        return Err(format!("the model has no signature {other:?}; it has {SIGNATURE}, which need not be named"));
    }
    let (read, by_row) = match (request.instances, request.inputs) {
        (Some(instances), None) => (rows(instances, inputs)?, true),
        (None, Some(columns)) => (columns_of(columns, inputs).map_err(|why| format!("inputs: {why}"))?, false),
        (Some(_), Some(_)) => return Err("both instances and inputs are given; give one of them".to_owned()),
        (None, None) => {
            let why = "neither instances nor inputs are given: this path takes V1 requests, and /v2/models/{route}/infer those of V2";
            return Err(why.to_owned());
        }
    };
    let mut sizes = Sizes::default();
    let mut instances = 0;
    for (tensor, spec) in read.iter().zip(inputs) {
        sizes.check(&tensor.shape, spec).map_err(|why| format!("input {}: {why}", spec.name))?;
        instances = tensor.shape.first().copied().unwrap_or_default();
    }
    Ok((read, if by_row { Wanted::Rows(instances) } else { Wanted::Columns }))
}

/// Instances: of each input, its values one behind the other.
fn rows(instances: &RawValue, inputs: &[TensorSpec]) -> Result<Vec<Tensor>, String> {
    let text = instances.get().strip_prefix('[').ok_or("instances must be an array")?.trim_start();
    if text.starts_with(']') {
        return Err("instances is empty; there is nothing to predict".to_owned());
    }
    if !text.starts_with('{') {
        // The values of the only input: together they are one value of one dimension more.
        return columns_of(instances, inputs).map_err(|why| format!("instances: {why}"));
    }
    let all: Vec<&RawValue> = serde_json::from_str(instances.get()).map_err(|error| error.to_string())?;
    let mut read: Vec<Nested> = inputs.iter().map(|spec| Nested::new(spec.datatype)).collect();
    for (number, instance) in all.into_iter().enumerate() {
        add(&mut read, instance, inputs).map_err(|why| format!("instance {number}: {why}"))?;
    }
    Ok(read.into_iter().map(Nested::stacked).collect())
}

/// What is given for each input, as one value of it.
fn columns_of(given: &RawValue, inputs: &[TensorSpec]) -> Result<Vec<Tensor>, String> {
    let mut read: Vec<Nested> = inputs.iter().map(|spec| Nested::new(spec.datatype)).collect();
    add(&mut read, given, inputs)?;
    Ok(read.into_iter().map(Nested::tensor).collect())
}

/// Adds one value to each input: an object has them by name, and where there is one input only its value may stand alone.
fn add(read: &mut [Nested], given: &RawValue, inputs: &[TensorSpec]) -> Result<(), String> {
    if !given.get().starts_with('{') {
        return match read {
            [only] => only.add(given),
            _ => Err(format!("the model has several inputs; give an object with {}", list(inputs))),
        };
    }
    let Named(values) = serde_json::from_str(given.get()).map_err(|error| error.to_string())?;
    for (index, (name, _)) in values.iter().enumerate() {
        if !inputs.iter().any(|spec| spec.name == *name) {
            return Err(format!("the model has no input {name:?}; it wants {}", list(inputs)));
        }
        if values.iter().take(index).any(|(other, _)| other == name) {
            return Err(format!("input {name} is given twice"));
        }
    }
    for (nested, spec) in read.iter_mut().zip(inputs) {
        let value = values.iter().find(|(name, _)| *name == spec.name).map(|(_, value)| value);
        let value = value.ok_or_else(|| format!("input {} is missing; the model wants {spec}", spec.name))?;
        nested.add(value).map_err(|why| format!("input {}: {why}", spec.name))?;
    }
    Ok(())
}

impl Wanted {
    /// Writes the answer. The error is for the caller.
    pub(crate) fn answer(self, outputs: &[Output<'_>]) -> Result<Answer, String> {
        let mut body = Vec::new();
        match (self, outputs) {
            (Wanted::Columns, [only]) => {
                body.extend_from_slice(b"{\"outputs\":");
                only.write(&mut body);
            }
            (Wanted::Columns, outputs) => {
                body.extend_from_slice(b"{\"outputs\":{");
                for (number, output) in outputs.iter().enumerate() {
                    name(&mut body, number, output);
                    output.write(&mut body);
                }
                body.push(b'}');
            }
            (Wanted::Rows(instances), outputs) => {
                if let Some(odd) = outputs.iter().find(|output| output.shape.first() != Some(&instances)) {
                    let what =
                        format!("output {} has shape {:?}, which is not a row for each of {instances} instances", odd.spec.name, odd.shape);
                    return Err(format!("{what}; ask with inputs instead of instances"));
                }
                body.extend_from_slice(b"{\"predictions\":[");
                for row in 0..instances {
                    if row > 0 {
                        body.push(b',');
                    }
                    if let [only] = outputs {
                        only.write_row(&mut body, row);
                        continue;
                    }
                    body.push(b'{');
                    for (number, output) in outputs.iter().enumerate() {
                        name(&mut body, number, output);
                        output.write_row(&mut body, row);
                    }
                    body.push(b'}');
                }
                body.push(b']');
            }
        }
        body.push(b'}');
        Ok(Answer { body, json_bytes: None })
    }
}

fn name(into: &mut Vec<u8>, number: usize, output: &Output<'_>) {
    if number > 0 {
        into.push(b',');
    }
    json(into, &output.spec.name);
    into.push(b':');
}

impl Output<'_> {
    /// All of it, nested as its shape is.
    fn write(&self, into: &mut Vec<u8>) {
        self.elements.write_nested(&self.shape, self.spec.datatype, into);
    }

    /// One of its rows.
    fn write_row(&self, into: &mut Vec<u8>, row: usize) {
        let shape = self.shape.get(1..).unwrap_or_default();
        let size: usize = shape.iter().product();
        self.elements.part(row * size, size).write_nested(shape, self.spec.datatype, into);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gateway::elements::{Datatype, Elements};
    use crate::gateway::tensor::Dim;

    fn spec(name: &str, datatype: Datatype, shape: &[Dim]) -> TensorSpec {
        TensorSpec { name: name.into(), datatype, shape: Some(shape.to_vec()) }
    }

    fn batch() -> Dim {
        Dim::Named("batch".into())
    }

    fn one() -> Vec<TensorSpec> {
        vec![spec("a", Datatype::Fp32, &[batch(), Dim::Fixed(2)])]
    }

    fn two() -> Vec<TensorSpec> {
        vec![spec("a", Datatype::Fp32, &[batch(), Dim::Fixed(2)]), spec("b", Datatype::Int64, &[batch()])]
    }

    fn read(body: &str, inputs: &[TensorSpec]) -> Result<(Vec<Tensor>, Wanted), String> {
        super::read(body.as_bytes(), inputs)
    }

    fn answered(wanted: Wanted, tensors: &[Tensor], specs: &[TensorSpec]) -> Result<String, String> {
        wanted.answer(&Output::whole(specs, tensors)).map(|answer| String::from_utf8(answer.body).unwrap())
    }

    #[test]
    fn rows_and_columns_of_one_input_are_the_same_tensor() {
        let tensor = Tensor { shape: vec![2, 2], elements: Elements::F32(vec![1.0, 2.0, 3.5, -4.0]) };
        for (body, wanted) in [
            (r#"{"instances": [[1, 2], [3.5, -4]]}"#, Wanted::Rows(2)),
            (r#"{"signature_name": "serving_default", "instances": [{"a": [1, 2]}, {"a": [3.5, -4]}]}"#, Wanted::Rows(2)),
            (r#"{"inputs": [[1, 2], [3.5, -4]]}"#, Wanted::Columns),
            (r#"{"inputs": {"a": [[1, 2], [3.5, -4]]}, "instances": null}"#, Wanted::Columns),
        ] {
            assert_eq!(read(body, &one()).unwrap(), (vec![tensor.clone()], wanted), "{body}");
        }
    }

    #[test]
    fn several_inputs_are_given_by_name() {
        let tensors = vec![
            Tensor { shape: vec![2, 2], elements: Elements::F32(vec![1.0, 2.0, 3.0, 4.0]) },
            Tensor { shape: vec![2], elements: Elements::I32(vec![5, 6]) },
        ];
        for (body, wanted) in [
            (r#"{"instances": [{"b": 5, "a": [1, 2]}, {"a": [3, 4], "b": 6}]}"#, Wanted::Rows(2)),
            (r#"{"inputs": {"b": [5, 6], "a": [[1, 2], [3, 4]]}}"#, Wanted::Columns),
        ] {
            assert_eq!(read(body, &two()).unwrap(), (tensors.clone(), wanted), "{body}");
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_with_what_is_wanted() {
        for (body, inputs, why) in [
            ("[]", one(), "the body is not a V1 prediction request"),
            ("{}", one(), "neither instances nor inputs are given: this path takes V1 requests"),
            (r#"{"instances": [[1,2]], "inputs": [[1,2]]}"#, one(), "both instances and inputs are given"),
            (r#"{"signature_name": "classify", "instances": [[1,2]]}"#, one(), r#"no signature "classify"; it has serving_default"#),
            (r#"{"instances": 7}"#, one(), "instances must be an array"),
            (r#"{"instances": [ ]}"#, one(), "instances is empty"),
            (r#"{"instances": [1, 2]}"#, one(), "input a: shape [2] has 1 dimensions, not 2; the model wants a FP32 [batch, 2]"),
            (r#"{"instances": [[1,2,3]]}"#, one(), "input a: shape [1, 3] has 3 in dimension 1, not 2"),
            (r#"{"instances": [[1,2],[3]]}"#, one(), "instances: arrays of 2 and of 1 beside each other"),
            (r#"{"instances": [[1,2],3]}"#, one(), "instances: numbers and arrays beside each other"),
            (r#"{"instances": [[1,[2]]]}"#, one(), "instances: numbers and arrays beside each other"),
            (r#"{"instances": [[1,"2"]]}"#, one(), "instances: element 1 of data is text, not a number"),
            (r#"{"instances": [[1,2],{"a":[1,2]}]}"#, one(), "instances: numbers and arrays beside each other"),
            (
                r#"{"instances": [{"a":[1,2],"b":1},[1,2]]}"#,
                two(),
                "instance 1: the model has several inputs; give an object with a FP32 [batch, 2], b",
            ),
            (r#"{"instances": [[1,2]]}"#, two(), "instances: the model has several inputs"),
            (r#"{"instances": [{"a":[1,2],"b":1},{"a":[1,2]}]}"#, two(), "instance 1: input b is missing; the model wants b INT64 [batch]"),
            (
                r#"{"instances": [{"a":[1,2],"b":1},{"a":[1],"b":1}]}"#,
                two(),
                "instance 1: input a: shape [1], and the ones before have [2]",
            ),
            (r#"{"instances": [{"a":[1,2],"b":1,"c":1}]}"#, two(), r#"instance 0: the model has no input "c"; it wants a FP32"#),
            (r#"{"instances": [{"a":[1,2],"b":1,"b":1}]}"#, two(), "instance 0: input b is given twice"),
            (r#"{"instances": [{"a":[1,2],"b":1.5}]}"#, two(), "instance 0: input b: element 0 of data: 1.5 is not INT64"),
            (r#"{"inputs": {"a":[[1,2]],"b":[1,2]}}"#, two(), "input b: shape [2] has 2 in dimension 0, but batch is 1 in input a"),
            (r#"{"inputs": [1]}"#, two(), "inputs: the model has several inputs"),
        ] {
            let refused = read(body, &inputs).unwrap_err();
            assert!(refused.contains(why), "{body}: {refused}");
        }
        let deep = format!(r#"{{"inputs": {}1{}}}"#, "[".repeat(100), "]".repeat(100));
        assert!(read(&deep, &one()).unwrap_err().contains("arrays nested deeper than 16"));
    }

    #[test]
    fn answers_are_nested_like_their_outputs_and_by_name_where_there_are_several() {
        let (tensors, rows) = read(r#"{"instances": [{"a": [1, 2], "b": 5}, {"a": [3, 4.5], "b": 6}]}"#, &two()).unwrap();
        assert_eq!(answered(rows, &tensors, &two()).unwrap(), r#"{"predictions":[{"a":[1.0,2.0],"b":5},{"a":[3.0,4.5],"b":6}]}"#);
        assert_eq!(answered(rows, &tensors[..1], &one()).unwrap(), r#"{"predictions":[[1.0,2.0],[3.0,4.5]]}"#);
        assert_eq!(answered(rows, &tensors[1..], &two()[1..]).unwrap(), r#"{"predictions":[5,6]}"#);
        assert_eq!(answered(Wanted::Columns, &tensors, &two()).unwrap(), r#"{"outputs":{"a":[[1.0,2.0],[3.0,4.5]],"b":[5,6]}}"#);
        assert_eq!(answered(Wanted::Columns, &tensors[..1], &one()).unwrap(), r#"{"outputs":[[1.0,2.0],[3.0,4.5]]}"#);
        let scalar = [Tensor { shape: vec![], elements: Elements::I32(vec![1]) }];
        let truth = [spec("y", Datatype::Bool, &[])];
        assert_eq!(answered(Wanted::Columns, &scalar, &truth).unwrap(), r#"{"outputs":true}"#);
        let refused = answered(Wanted::Rows(2), &scalar, &truth).unwrap_err();
        assert_eq!(refused, "output y has shape [], which is not a row for each of 2 instances; ask with inputs instead of instances");
        let empty = [Tensor { shape: vec![2, 0, 3], elements: Elements::F32(vec![]) }];
        assert_eq!(answered(Wanted::Columns, &empty, &one()).unwrap(), r#"{"outputs":[[],[]]}"#);
    }
}
