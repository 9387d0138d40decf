//! Whether two answers to the same request say the same. Pure.
//!
//! Understood are answers of the Open Inference Protocol V2 (`{"outputs": [{name, shape, datatype, data}]}`, by name, also with binary data) and
//! of V1 (`{"predictions": […]}`, and `{"outputs": …}` as arrays or as an object of arrays). Whole numbers and truth values must be equal. Of floating point with more than one number in the last
//! dimension the largest of each row must be in the same place, as a classifier's are; other floating point may differ by a share of the
//! larger one. Everything else (text, objects, other shapes, what is not JSON) cannot be compared, and then nothing is said.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error as _, SeqAccess, Visitor};
use serde_json::value::RawValue;

use crate::core::state::WEIGHT_WHOLE_BP;
use crate::gateway::elements::{self, Datatype};
use crate::gateway::tensor::DIMENSIONS_MAX;
use crate::gateway::v2::{Binary, Data, TensorJson};

/// Numbers of one answer at most that are compared.
pub const COMPARED_ELEMENTS_MAX: usize = 65_536;

/// An answer that can be compared with another one.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Answer(BTreeMap<String, Output>);

#[derive(Clone, PartialEq, Debug)]
struct Output {
    kind: Kind,
    shape: Vec<usize>,
    numbers: Vec<Number>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Whole,
    /// Floating point.
    Real,
    /// One number for each instance, of a type that nobody names.
    Untold,
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum Number {
    Whole(i64),
    /// Not a number where JSON has null: it has no word for it.
    Real(f64),
}

impl Number {
    fn real(self) -> f64 {
        match self {
            Number::Whole(number) => number as f64,
            Number::Real(number) => number,
        }
    }
}

impl From<elements::Number> for Number {
    fn from(number: elements::Number) -> Number {
        match number {
            elements::Number::Bool(truth) => Number::Whole(truth.into()),
            elements::Number::Whole(number) => Number::Whole(number),
            // What is beyond 63 bits is compared by its bits.
            elements::Number::Large(number) => Number::Whole(number as i64),
            elements::Number::Real(number) => Number::Real(number),
        }
    }
}

#[derive(Deserialize)]
struct AnswerJson<'a> {
    #[serde(borrow)]
    outputs: Option<&'a RawValue>,
    #[serde(borrow)]
    predictions: Option<&'a RawValue>,
}

impl Answer {
    /// Reads an answer; `None` if it is not of a kind that can be compared. With binary data: `json_bytes` of it are JSON.
    pub(crate) fn read(body: &[u8], json_bytes: Option<usize>) -> Option<Answer> {
        let (text, binary) = Binary::split(body, json_bytes).ok()?;
        let json: AnswerJson<'_> = serde_json::from_slice(text).ok()?;
        match (json.outputs, json.predictions) {
            (Some(outputs), None) => match serde_json::from_str::<Vec<TensorJson<'_>>>(outputs.get()) {
                Ok(outputs) => v2(&outputs, binary),
                Err(_) if outputs.get().starts_with('{') => {
                    let outputs: BTreeMap<String, &RawValue> = serde_json::from_str(outputs.get()).ok()?;
                    let read = outputs.into_iter().map(|(name, output)| Some((name, v1(output)?))).collect::<Option<BTreeMap<_, _>>>()?;
                    Some(Answer(read)).filter(|read| !read.0.is_empty())
                }
                Err(_) => Some(Answer([("outputs".to_owned(), v1(outputs)?)].into())),
            },
            (None, Some(predictions)) => Some(Answer([("predictions".to_owned(), v1(predictions)?)].into())),
            _ => None,
        }
    }

    /// Whether both say the same; `None` if they are not of the same form. Numbers may differ by this share of the larger one.
    pub(crate) fn is_like(&self, other: &Answer, distance_bp_max: u16) -> Option<bool> {
        let same_form =
            |((a, one), (b, two)): ((&String, &Output), (&String, &Output))| a == b && one.kind == two.kind && one.shape == two.shape;
        if self.0.len() != other.0.len() || !self.0.iter().zip(&other.0).all(same_form) {
            return None;
        }
        Some(self.0.values().zip(other.0.values()).all(|(one, two)| one.is_like(two, distance_bp_max)))
    }
}

fn v2<'a>(outputs: &[TensorJson<'a>], mut binary: Binary<'a>) -> Option<Answer> {
    let mut read = BTreeMap::new();
    for output in outputs {
        let data = binary.data(output).ok()?;
        if read.insert(output.name.clone().into_owned(), output.read(data)?).is_some() {
            return None;
        }
    }
    binary.end().ok()?;
    Some(Answer(read)).filter(|read| !read.0.is_empty())
}

impl TensorJson<'_> {
    fn read(&self, data: Data<'_>) -> Option<Output> {
        let kind = match (Datatype::parse(&self.datatype), self.datatype.as_ref()) {
            (Some(Datatype::Fp16 | Datatype::Fp32 | Datatype::Fp64), _) | (None, "BF16") => Kind::Real,
            (Some(_), _) => Kind::Whole,
            (None, _) => return None,
        };
        let numbers = match data {
            Data::Json(data) => Numbers::read(data)?.numbers,
            Data::Binary(bytes) => {
                let datatype = Datatype::parse(&self.datatype)?;
                let few = bytes.len() % datatype.bytes() == 0 && bytes.len() / datatype.bytes() <= COMPARED_ELEMENTS_MAX;
                few.then(|| elements::numbers(bytes, datatype).map(|number| number.ok().map(Number::from)).collect::<Option<_>>())??
            }
        };
        let size = self.shape.iter().try_fold(1usize, |product, size| product.checked_mul(*size))?;
        let output = Output { kind, shape: self.shape.clone(), numbers };
        let fits = size == output.numbers.len() && output.shape.len() <= DIMENSIONS_MAX && (kind == Kind::Real || output.is_whole());
        fits.then_some(output)
    }
}

/// V1 names neither shape nor type. Arrays in an array are rows of floating point; numbers in it are what they look like.
fn v1(predictions: &RawValue) -> Option<Output> {
    let Numbers { numbers, shape, .. } = Numbers::read(predictions)?;
    let kind = if shape.len() == 1 { Kind::Untold } else { Kind::Real };
    let shape: Vec<usize> = shape.into_iter().flatten().collect();
    let fits = shape.iter().try_fold(1usize, |product, size| product.checked_mul(*size)) == Some(numbers.len());
    fits.then_some(Output { kind, shape, numbers })
}

impl Output {
    fn is_whole(&self) -> bool {
        self.numbers.iter().all(|number| matches!(number, Number::Whole(_)))
    }

    fn is_like(&self, other: &Output, distance_bp_max: u16) -> bool {
        match (self.kind, self.shape.last()) {
            (Kind::Whole, _) => self.numbers == other.numbers,
            (Kind::Real, Some(row)) if *row > 1 => {
                let mut rows = self.numbers.chunks(*row).zip(other.numbers.chunks(*row));
                rows.all(|(one, two)| arg_max(one) == arg_max(two))
            }
            (Kind::Untold, _) if self.is_whole() && other.is_whole() => self.numbers == other.numbers,
            (Kind::Real | Kind::Untold, _) => {
                self.numbers.iter().zip(&other.numbers).all(|(a, b)| is_near(a.real(), b.real(), distance_bp_max))
            }
        }
    }
}

/// Where the largest number is; the first of several. Nowhere if none is a number.
fn arg_max(row: &[Number]) -> Option<usize> {
    let numbers = row.iter().map(|number| number.real()).enumerate().filter(|(_, number)| !number.is_nan());
    let largest = numbers.fold(None, |best: Option<(usize, f64)>, (at, number)| match best {
        Some((_, largest)) if largest >= number => best,
        _ => Some((at, number)),
    });
    largest.map(|(at, _)| at)
}

fn is_near(a: f64, b: f64, distance_bp_max: u16) -> bool {
    let allowed = f64::from(distance_bp_max) / f64::from(WEIGHT_WHOLE_BP) * a.abs().max(b.abs());
    (a - b).abs() <= allowed || (a.is_nan() && b.is_nan())
}

/// The numbers of nested arrays, in order.
#[derive(Default)]
struct Numbers {
    numbers: Vec<Number>,
    /// How long the arrays at each depth are, once the first of them has ended.
    shape: Vec<Option<usize>>,
    /// The depth at which numbers are.
    depth: Option<usize>,
}

impl Numbers {
    fn read(json: &RawValue) -> Option<Numbers> {
        let mut numbers = Numbers::default();
        Level { into: &mut numbers, depth: 0 }.deserialize(&mut serde_json::Deserializer::from_str(json.get())).ok()?;
        (numbers.depth != Some(0)).then_some(numbers)
    }

    fn push<E: serde::de::Error>(&mut self, depth: usize, number: Number) -> Result<(), E> {
        if *self.depth.get_or_insert(depth) != depth || self.numbers.len() == COMPARED_ELEMENTS_MAX {
            return Err(E::custom("numbers at several depths, or too many"));
        }
        self.numbers.push(number);
        Ok(())
    }
}

struct Level<'n> {
    into: &'n mut Numbers,
    depth: usize,
}

impl<'de> DeserializeSeed<'de> for Level<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Level<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("numbers")
    }

    fn visit_bool<E: serde::de::Error>(self, truth: bool) -> Result<(), E> {
        self.into.push(self.depth, Number::Whole(truth.into()))
    }

    fn visit_i64<E: serde::de::Error>(self, number: i64) -> Result<(), E> {
        self.into.push(self.depth, Number::Whole(number))
    }

    fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<(), E> {
        // What is beyond 63 bits is compared by its bits.
        self.into.push(self.depth, Number::Whole(number as i64))
    }

    fn visit_f64<E: serde::de::Error>(self, number: f64) -> Result<(), E> {
        self.into.push(self.depth, Number::Real(number))
    }

    fn visit_unit<E: serde::de::Error>(self) -> Result<(), E> {
        self.into.push(self.depth, Number::Real(f64::NAN))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<(), A::Error> {
        let Level { into, depth } = self;
        if depth == DIMENSIONS_MAX {
            return Err(A::Error::custom("nested too deep"));
        }
        let mut count = 0;
        while elements.next_element_seed(Level { into: &mut *into, depth: depth + 1 })?.is_some() {
            count += 1;
        }
        if into.shape.len() <= depth {
            into.shape.resize(depth + 1, None);
        }
        let first = into.shape.get_mut(depth).map(|length| *length.get_or_insert(count));
        if first == Some(count) { Ok(()) } else { Err(A::Error::custom("arrays of different lengths")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn v2(shape: &[usize], datatype: &str, data: serde_json::Value) -> String {
        json!({ "model_name": "m", "outputs": [{ "name": "y", "shape": shape, "datatype": datatype, "data": data }] }).to_string()
    }

    /// At a distance of 5 %.
    fn like(one: &str, two: &str) -> Option<bool> {
        let read = |text: &str| Answer::read(text.as_bytes(), None);
        let alike = read(one)?.is_like(&read(two)?, 500);
        let back = read(two)?.is_like(&read(one)?, 500);
        assert_eq!(alike, back, "{one} and {two}");
        alike
    }

    #[test]
    fn classifiers_are_alike_if_every_row_has_its_largest_in_the_same_place() {
        let fp32 = |shape: &[usize], data| v2(shape, "FP32", data);
        assert_eq!(like(&fp32(&[1, 3], json!([0.1, 0.7, 0.2])), &fp32(&[1, 3], json!([0.3, 0.4, 0.3]))), Some(true));
        assert_eq!(like(&fp32(&[1, 3], json!([0.1, 0.7, 0.2])), &fp32(&[1, 3], json!([0.7, 0.1, 0.2]))), Some(false));
        let rows = fp32(&[2, 2], json!([[0.9, 0.1], [0.2, 0.8]]));
        assert_eq!(like(&rows, &fp32(&[2, 2], json!([0.6, 0.4, 0.0, 1.0]))), Some(true), "nested or flat");
        assert_eq!(like(&rows, &fp32(&[2, 2], json!([0.6, 0.4, 0.8, 0.2]))), Some(false), "one row is enough");
        assert_eq!(like(&rows, &fp32(&[2, 2], json!([0.9, 0.1, null, null]))), Some(false), "what is not a number is nowhere");
    }

    #[test]
    fn floating_point_may_differ_by_a_share_of_the_larger_one() {
        let one = |number: f64| v2(&[1, 1], "FP64", json!([number]));
        for (a, b, alike) in [
            (100.0, 95.0, true),
            (100.0, 94.9, false),
            (-100.0, -95.0, true),
            (-1.0, 1.0, false),
            (0.0, 0.0, true),
            (0.0, 1e-300, false),
            (f64::MAX, -f64::MAX, false),
        ] {
            assert_eq!(like(&one(a), &one(b)), Some(alike), "{a} and {b}");
        }
        assert_eq!(like(&v2(&[1], "FP32", json!([null])), &v2(&[1], "FP32", json!([null]))), Some(true));
        assert_eq!(like(&v2(&[1], "FP32", json!([null])), &v2(&[1], "FP32", json!([0.0]))), Some(false));
    }

    #[test]
    fn whole_numbers_and_truth_values_must_be_equal() {
        let large = i64::MAX - 1;
        assert_eq!(like(&v2(&[2], "INT64", json!([large, 1])), &v2(&[2], "INT64", json!([large, 1]))), Some(true));
        assert_eq!(like(&v2(&[2], "INT64", json!([large, 1])), &v2(&[2], "INT64", json!([large + 1, 1]))), Some(false));
        assert_eq!(like(&v2(&[1], "BOOL", json!([true])), &v2(&[1], "BOOL", json!([1]))), Some(true));
        assert_eq!(like(&v2(&[1], "BOOL", json!([true])), &v2(&[1], "BOOL", json!([false]))), Some(false));
    }

    #[test]
    fn outputs_are_compared_by_name_and_all_of_them() {
        let output = |name: &str, label: u8| json!({ "name": name, "shape": [1], "datatype": "UINT8", "data": [label] });
        let both = |a: serde_json::Value, b: serde_json::Value| json!({ "outputs": [a, b] }).to_string();
        assert_eq!(like(&both(output("x", 1), output("y", 2)), &both(output("y", 2), output("x", 1))), Some(true));
        assert_eq!(like(&both(output("x", 1), output("y", 2)), &both(output("x", 1), output("y", 3))), Some(false));
        assert_eq!(like(&both(output("x", 1), output("y", 2)), &both(output("x", 1), output("z", 2))), None);
        assert_eq!(like(&both(output("x", 1), output("x", 1)), &both(output("x", 1), output("x", 1))), None, "the same name twice");
    }

    #[test]
    fn v1_predictions_are_rows_of_a_classifier_or_one_number_each() {
        let v1 = |predictions: serde_json::Value| json!({ "predictions": predictions }).to_string();
        assert_eq!(like(&v1(json!([[0.1, 0.9], [0.8, 0.2]])), &v1(json!([[0.4, 0.6], [1, 0]]))), Some(true));
        assert_eq!(like(&v1(json!([[0.1, 0.9]])), &v1(json!([[0.9, 0.1]]))), Some(false));
        assert_eq!(like(&v1(json!([100.0, 1])), &v1(json!([96, 1.0]))), Some(true), "numbers by their distance");
        assert_eq!(like(&v1(json!([100.0, 1])), &v1(json!([90.0, 1]))), Some(false));
        assert_eq!(like(&v1(json!([7])), &v1(json!([7]))), Some(true));
        assert_eq!(like(&v1(json!([100])), &v1(json!([101]))), Some(false), "whole numbers on both sides must be equal");
        assert_eq!(like(&v1(json!([[2.0], [3.0]])), &v1(json!([[2.01], [3.0]]))), Some(true));
    }

    #[test]
    fn v1_outputs_are_arrays_or_an_object_of_arrays() {
        let outputs = |outputs: serde_json::Value| json!({ "outputs": outputs }).to_string();
        assert_eq!(like(&outputs(json!([[0.1, 0.9]])), &outputs(json!([[0.4, 0.6]]))), Some(true));
        assert_eq!(like(&outputs(json!([[0.1, 0.9]])), &outputs(json!([[0.9, 0.1]]))), Some(false));
        let both = |y: u8| outputs(json!({ "p": [[0.1, 0.9]], "y": [y] }));
        assert_eq!((like(&both(1), &both(1)), like(&both(1), &both(2))), (Some(true), Some(false)));
        assert_eq!(like(&both(1), &outputs(json!({ "p": [[0.1, 0.9]] }))), None);
        assert_eq!(like(&outputs(json!({})), &outputs(json!({}))), None);
    }

    #[test]
    fn binary_data_is_compared_like_the_same_numbers_as_json() {
        let read = |datatype: &str, bytes: &[u8], shape: &[usize]| {
            let output = json!({ "name": "y", "shape": shape, "datatype": datatype, "parameters": { "binary_data_size": bytes.len() } });
            let json = json!({ "outputs": [output] }).to_string();
            Answer::read(&[json.as_bytes(), bytes].concat(), Some(json.len()))
        };
        let bytes: Vec<u8> = [0.1f32, 0.9].iter().flat_map(|real| real.to_le_bytes()).collect();
        let binary = read("FP32", &bytes, &[1, 2]).unwrap();
        let json = |data| Answer::read(v2(&[1, 2], "FP32", data).as_bytes(), None).unwrap();
        assert_eq!(binary.is_like(&json(json!([0.4, 0.6])), 0), Some(true));
        assert_eq!(binary.is_like(&json(json!([0.6, 0.4])), 0), Some(false));
        let labels = read("INT64", &7i64.to_le_bytes(), &[1]).unwrap();
        assert_eq!(labels.is_like(&Answer::read(v2(&[1], "INT64", json!([7])).as_bytes(), None).unwrap(), 0), Some(true));
        assert_eq!(read("FP32", &bytes[..7], &[1, 2]), None);
        assert_eq!(read("FP32", &bytes, &[1, 1]), None);
        assert_eq!(read("BOOL", &[2], &[1]), None);
    }

    #[test]
    fn what_is_not_understood_is_not_compared() {
        let good = v2(&[1, 2], "FP32", json!([1.0, 2.0]));
        for other in [
            "".to_owned(),
            "hello".to_owned(),
            "{}".to_owned(),
            r#"{"outputs":[]}"#.to_owned(),
            r#"{"outputs":[],"predictions":[1]}"#.to_owned(),
            r#"{"predictions":1}"#.to_owned(),
            r#"{"predictions":["a"]}"#.to_owned(),
            r#"{"predictions":[{"a":1}]}"#.to_owned(),
            r#"{"predictions":[[1,2],[3]]}"#.to_owned(),
            r#"{"predictions":[1,[2]]}"#.to_owned(),
            v2(&[1, 3], "FP32", json!([1.0, 2.0, 3.0])),
            v2(&[1, 2], "FP32", json!([1.0])),
            v2(&[1, 2], "BYTES", json!(["a", "b"])),
            v2(&[1, 2], "INT64", json!([1, 2])),
            v2(&[1, 2], "INT64", json!([1.5, 2])),
            v2(&[usize::MAX, 2], "FP32", json!([1.0])),
            json!({ "predictions": vec![0; COMPARED_ELEMENTS_MAX + 1] }).to_string(),
            format!(r#"{{"predictions":{}1{}}}"#, "[".repeat(100), "]".repeat(100)),
        ] {
            assert_eq!(like(&good, &other), None, "{other}");
            if Answer::read(other.as_bytes(), None).is_none() {
                assert_eq!(like(&other, &other), None);
            }
        }
        assert_eq!(like(r#"{"predictions":[]}"#, r#"{"predictions":[]}"#), Some(true), "nothing is like nothing");
    }
}
