//! The numbers of a tensor: from JSON to what a model computes with, and never silently to another number.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

/// An element type of the Open Inference Protocol V2.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Datatype {
    Bool,
    Uint8,
    Uint16,
    Uint32,
    Uint64,
    Int8,
    Int16,
    Int32,
    Int64,
    Fp16,
    Fp32,
    Fp64,
}

/// Largest finite number of 16-bit floating point.
const FP16_MAX: f64 = 65_504.0;
/// Floating point of 64 bits holds every whole number up to this.
const WHOLE_MAX: f64 = 9_007_199_254_740_992.0;

impl Datatype {
    pub(crate) const ALL: [Datatype; 12] = [
        Datatype::Bool,
        Datatype::Uint8,
        Datatype::Uint16,
        Datatype::Uint32,
        Datatype::Uint64,
        Datatype::Int8,
        Datatype::Int16,
        Datatype::Int32,
        Datatype::Int64,
        Datatype::Fp16,
        Datatype::Fp32,
        Datatype::Fp64,
    ];

    /// The protocol's word for it.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Datatype::Bool => "BOOL",
            Datatype::Uint8 => "UINT8",
            Datatype::Uint16 => "UINT16",
            Datatype::Uint32 => "UINT32",
            Datatype::Uint64 => "UINT64",
            Datatype::Int8 => "INT8",
            Datatype::Int16 => "INT16",
            Datatype::Int32 => "INT32",
            Datatype::Int64 => "INT64",
            Datatype::Fp16 => "FP16",
            Datatype::Fp32 => "FP32",
            Datatype::Fp64 => "FP64",
        }
    }

    pub(crate) fn parse(word: &str) -> Option<Datatype> {
        Datatype::ALL.into_iter().find(|datatype| datatype.as_str() == word)
    }

    /// The smallest and the largest whole number of the type; `None` for floating point.
    fn range(self) -> Option<(i128, i128)> {
        let range = match self {
            Datatype::Bool => (0, 1),
            Datatype::Uint8 => (0, u8::MAX.into()),
            Datatype::Uint16 => (0, u16::MAX.into()),
            Datatype::Uint32 => (0, u32::MAX.into()),
            Datatype::Uint64 => (0, u64::MAX.into()),
            Datatype::Int8 => (i8::MIN.into(), i8::MAX.into()),
            Datatype::Int16 => (i16::MIN.into(), i16::MAX.into()),
            Datatype::Int32 => (i32::MIN.into(), i32::MAX.into()),
            Datatype::Int64 => (i64::MIN.into(), i64::MAX.into()),
            Datatype::Fp16 | Datatype::Fp32 | Datatype::Fp64 => return None,
        };
        Some(range)
    }
}

impl fmt::Display for Datatype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// What a model computes with.
#[derive(Clone, PartialEq, Debug)]
pub(crate) enum Elements {
    F32(Vec<f32>),
    I32(Vec<i32>),
    I8(Vec<i8>),
    U8(Vec<u8>),
}

/// Reads a tensor's data: a flat array, or arrays nested as `shape` says. `claimed` is the request's datatype, `declared` the
/// model's. `None` of the models that load here declares another type than those with an arm of their own.
pub(crate) fn read(data: &RawValue, shape: &[usize], claimed: Datatype, declared: Datatype) -> Result<Elements, String> {
    let rule = Rule { claimed, declared };
    match declared {
        Datatype::Fp16 | Datatype::Fp32 | Datatype::Fp64 => read_as(data, shape, rule).map(Elements::F32),
        Datatype::Int8 => read_as(data, shape, rule).map(Elements::I8),
        Datatype::Uint8 => read_as(data, shape, rule).map(Elements::U8),
        _ => read_as(data, shape, rule).map(Elements::I32),
    }
}

fn read_as<E: Element>(data: &RawValue, shape: &[usize], rule: Rule) -> Result<Vec<E>, String> {
    let total = shape.iter().try_fold(1usize, |product, size| product.checked_mul(*size));
    let total = total.ok_or_else(|| format!("shape {shape:?} has more elements than a request can hold"))?;
    // Each element takes two bytes of text at least, whatever the shape promises.
    let capacity = total.min(data.get().len() / 2 + 1);
    let mut reader = Reader { rule, shape, total, read: Vec::with_capacity(capacity), problem: None };
    let level = Level { reader: &mut reader, depth: 0 };
    let outcome = level.deserialize(&mut serde_json::Deserializer::from_str(data.get()));
    match (outcome, reader.problem.take()) {
        (_, Some(problem)) => Err(problem),
        (Err(error), None) => Err(error.to_string()),
        (Ok(Found::Scalar), None) => Err("data must be an array".to_owned()),
        (Ok(Found::List), None) if reader.read.len() != total => {
            Err(format!("data has {} elements, and shape {shape:?} has {total}", reader.read.len()))
        }
        (Ok(Found::List), None) => Ok(reader.read),
    }
}

/// A number of the model's own kind.
trait Element: Copy {
    /// Exactly this whole number, or nothing.
    fn from_whole(number: i128) -> Option<Self>;
    /// This number, rounded only where `exact` does not forbid it, or nothing.
    fn from_real(number: f64, exact: bool) -> Option<Self>;
}

impl Element for f32 {
    fn from_whole(number: i128) -> Option<f32> {
        let real = number as f32;
        (real as i128 == number).then_some(real)
    }

    fn from_real(number: f64, exact: bool) -> Option<f32> {
        let real = number as f32;
        (!exact || f64::from(real) == number).then_some(real)
    }
}

macro_rules! whole_element {
    ($($type:ty),*) => {$(
        impl Element for $type {
            fn from_whole(number: i128) -> Option<$type> {
                number.try_into().ok()
            }

            fn from_real(number: f64, _: bool) -> Option<$type> {
                whole(number)?.try_into().ok()
            }
        }
    )*};
}

whole_element!(i32, i8, u8);

/// The whole number that this is, if it is one that floating point holds exactly.
fn whole(number: f64) -> Option<i128> {
    (number.fract() == 0.0 && number.abs() <= WHOLE_MAX).then_some(number as i128)
}

/// A JSON number, or a truth value.
#[derive(Clone, Copy)]
enum Number {
    Bool(bool),
    Whole(i128),
    Real(f64),
}

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Number::Bool(truth) => truth.fmt(f),
            Number::Whole(number) => number.fmt(f),
            Number::Real(number) => number.fmt(f),
        }
    }
}

/// What is asked of each number.
#[derive(Clone, Copy)]
struct Rule {
    claimed: Datatype,
    declared: Datatype,
}

impl Rule {
    /// The number as the model takes it. An error says what it is instead.
    fn convert<E: Element>(self, number: Number) -> Result<E, String> {
        let foreign = || format!("{number} is not {}", self.claimed);
        let (converted, whole_number) = match self.claimed.range() {
            Some((least, most)) => {
                let claimed = match number {
                    Number::Bool(truth) if self.claimed == Datatype::Bool => Some(i128::from(truth)),
                    Number::Bool(_) => None,
                    Number::Whole(number) => Some(number),
                    Number::Real(number) => whole(number),
                };
                let claimed = claimed.filter(|number| (least..=most).contains(number)).ok_or_else(foreign)?;
                (E::from_whole(claimed), Some(claimed))
            }
            None => {
                let claimed = match number {
                    Number::Bool(_) => return Err(foreign()),
                    Number::Whole(number) => number as f64,
                    Number::Real(number) => number,
                };
                let most = match self.claimed {
                    Datatype::Fp16 => FP16_MAX,
                    Datatype::Fp32 => f64::from(f32::MAX),
                    _ => f64::MAX,
                };
                if claimed.abs() > most {
                    return Err(format!("{number} is beyond {}", self.claimed));
                }
                let exact = self.claimed == Datatype::Fp64 && self.declared != Datatype::Fp64;
                (E::from_real(claimed, exact), whole(claimed))
            }
        };
        let truth_wanted = self.declared == Datatype::Bool && !matches!(whole_number, Some(0 | 1));
        converted.filter(|_| !truth_wanted).ok_or_else(|| self.lossy(number))
    }

    fn lossy(self, number: Number) -> String {
        let Rule { claimed, declared } = self;
        match declared {
            Datatype::Int64 if claimed == Datatype::Int64 => {
                format!("{number} is too large: models here compute INT64 in 32 bits, from {} to {}", i32::MIN, i32::MAX)
            }
            _ => format!("{number} as {claimed} cannot become {declared}, which the model wants, without being another number"),
        }
    }
}

struct Reader<'a, E> {
    rule: Rule,
    shape: &'a [usize],
    total: usize,
    read: Vec<E>,
    problem: Option<String>,
}

impl<E: Element> Reader<'_, E> {
    fn push<Error: serde::de::Error>(&mut self, number: Number) -> Result<Found, Error> {
        if self.read.len() == self.total {
            return self.refuse(format!("data has more than the {} elements of shape {:?}", self.total, self.shape));
        }
        match self.rule.convert(number) {
            Ok(element) => self.read.push(element),
            Err(why) => return self.refuse(format!("element {} of data: {why}", self.read.len())),
        }
        Ok(Found::Scalar)
    }

    /// The problem is kept here, where serde adds no line and column of a part of the body to it.
    fn refuse<T, Error: serde::de::Error>(&mut self, problem: String) -> Result<T, Error> {
        self.problem = Some(problem);
        Err(Error::custom("refused"))
    }

    fn no_number<T, Error: serde::de::Error>(&mut self, what: &str) -> Result<T, Error> {
        self.refuse(format!("element {} of data is {what}, not a number", self.read.len()))
    }
}

/// One level of nesting: `depth` arrays have been entered.
struct Level<'r, 'a, E> {
    reader: &'r mut Reader<'a, E>,
    depth: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Found {
    Scalar,
    List,
}

impl<'de, E: Element> DeserializeSeed<'de> for Level<'_, '_, E> {
    type Value = Found;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Found, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de, E: Element> Visitor<'de> for Level<'_, '_, E> {
    type Value = Found;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("numbers")
    }

    fn visit_bool<Error: serde::de::Error>(self, truth: bool) -> Result<Found, Error> {
        self.reader.push(Number::Bool(truth))
    }

    fn visit_u64<Error: serde::de::Error>(self, number: u64) -> Result<Found, Error> {
        self.reader.push(Number::Whole(number.into()))
    }

    fn visit_i64<Error: serde::de::Error>(self, number: i64) -> Result<Found, Error> {
        self.reader.push(Number::Whole(number.into()))
    }

    fn visit_f64<Error: serde::de::Error>(self, number: f64) -> Result<Found, Error> {
        self.reader.push(Number::Real(number))
    }

    fn visit_str<Error: serde::de::Error>(self, _: &str) -> Result<Found, Error> {
        self.reader.no_number("text")
    }

    fn visit_unit<Error: serde::de::Error>(self) -> Result<Found, Error> {
        self.reader.no_number("null")
    }

    fn visit_map<A: MapAccess<'de>>(self, _: A) -> Result<Found, A::Error> {
        self.reader.no_number("an object")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Found, A::Error> {
        let Level { reader, depth } = self;
        let rank = reader.shape.len();
        if depth > 0 && depth >= rank {
            return reader.refuse(format!("data is nested deeper than shape {:?}", reader.shape));
        }
        let (mut count, mut kind) = (0usize, None);
        while let Some(found) = elements.next_element_seed(Level { reader: &mut *reader, depth: depth + 1 })? {
            if *kind.get_or_insert(found) != found {
                return reader.refuse("data mixes numbers and arrays in one array".to_owned());
            }
            count += 1;
        }
        let flat = depth == 0 && kind != Some(Found::List);
        let innermost = depth + 1 == rank;
        let fits = reader.shape.get(depth) == Some(&count);
        let level_fits = match kind {
            Some(Found::Scalar) => innermost && fits,
            Some(Found::List) | None => fits,
        };
        if !flat && !level_fits {
            let shape = reader.shape;
            return reader.refuse(format!("data has an array of {count} at depth {}, which shape {shape:?} does not allow", depth + 1));
        }
        Ok(Found::List)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(text: &str, shape: &[usize], claimed: Datatype, declared: Datatype) -> Result<Elements, String> {
        let raw = RawValue::from_string(text.to_owned()).unwrap();
        read(&raw, shape, claimed, declared)
    }

    fn fp32(text: &str, shape: &[usize]) -> Result<Elements, String> {
        read_text(text, shape, Datatype::Fp32, Datatype::Fp32)
    }

    #[test]
    fn flat_and_nested_data_are_the_same_tensor() {
        let six = Elements::F32(vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        assert_eq!(fp32("[1,2,3,4,5,6]", &[2, 3]).unwrap(), six);
        assert_eq!(fp32("[[1,2,3],[4,5,6]]", &[2, 3]).unwrap(), six);
        assert_eq!(fp32("[[[1],[2]],[[3],[4]],[[5],[6]]]", &[3, 2, 1]).unwrap(), six);
        assert_eq!(fp32("[0.1]", &[]).unwrap(), Elements::F32(vec![0.1]));
        assert_eq!(fp32("[]", &[0, 64]).unwrap(), Elements::F32(vec![]));
    }

    #[test]
    fn data_that_does_not_have_its_shape_is_refused() {
        for (text, shape, why) in [
            ("[1,2,3]", &[2, 2][..], "data has 3 elements, and shape [2, 2] has 4"),
            ("[1,2,3,4,5]", &[2, 2], "data has more than the 4 elements of shape [2, 2]"),
            ("[[1,2],[3]]", &[2, 2], "data has an array of 1 at depth 2, which shape [2, 2] does not allow"),
            ("[[1,2,3,4]]", &[2, 2], "data has an array of 4 at depth 2, which shape [2, 2] does not allow"),
            ("[[[1,2],[3,4]]]", &[2, 2], "data is nested deeper than shape [2, 2]"),
            ("[1,[2]]", &[2, 1], "data mixes numbers and arrays in one array"),
            ("[[1,2],[3,4]]", &[2, 2, 1], "data has an array of 2 at depth 2, which shape [2, 2, 1] does not allow"),
            ("7", &[1], "data must be an array"),
            ("[1]", &[usize::MAX, 2], "more elements than a request can hold"),
        ] {
            let refused = fp32(text, shape).unwrap_err();
            assert!(refused.contains(why), "{text} as {shape:?}: {refused}");
        }
    }

    #[test]
    fn what_is_not_a_number_is_named() {
        for (text, why) in [
            (r#"[1,"2"]"#, "element 1 of data is text, not a number"),
            ("[null]", "element 0 of data is null, not a number"),
            ("[{}]", "element 0 of data is an object, not a number"),
            ("[true]", "element 0 of data: true is not FP32"),
            ("[1e39]", "beyond FP32"),
            ("[1e999]", "number out of range"),
        ] {
            let refused = fp32(text, &[2]).unwrap_err();
            assert!(refused.contains(why), "{text}: {refused}");
        }
    }

    #[test]
    fn every_datatype_is_taken_where_nothing_is_lost() {
        use Datatype::*;
        for claimed in Datatype::ALL {
            assert_eq!(Datatype::parse(claimed.as_str()), Some(claimed));
            for (declared, wanted) in [
                (Fp32, Elements::F32(vec![0.0, 1.0])),
                (Fp64, Elements::F32(vec![0.0, 1.0])),
                (Int64, Elements::I32(vec![0, 1])),
                (Int32, Elements::I32(vec![0, 1])),
                (Bool, Elements::I32(vec![0, 1])),
                (Int8, Elements::I8(vec![0, 1])),
                (Uint8, Elements::U8(vec![0, 1])),
            ] {
                assert_eq!(read_text("[0,1]", &[2], claimed, declared).unwrap(), wanted, "{claimed} for {declared}");
            }
        }
        assert_eq!(read_text("[true,false]", &[2], Bool, Fp32).unwrap(), Elements::F32(vec![1.0, 0.0]));
        assert_eq!(read_text("[0.1]", &[1], Fp64, Fp64).unwrap(), Elements::F32(vec![0.1]));
        assert_eq!(read_text("[16777217]", &[1], Fp32, Fp32).unwrap(), Elements::F32(vec![16_777_216.0]));
        assert_eq!(read_text("[3.0]", &[1], Fp32, Int64).unwrap(), Elements::I32(vec![3]));
    }

    #[test]
    fn a_number_that_would_become_another_is_refused() {
        use Datatype::*;
        for (text, claimed, declared, why) in [
            ("[0.1]", Fp64, Fp32, "0.1 as FP64 cannot become FP32"),
            ("[16777217]", Int64, Fp32, "16777217 as INT64 cannot become FP32"),
            ("[0.5]", Fp32, Int64, "0.5 as FP32 cannot become INT64"),
            ("[300]", Int32, Uint8, "300 as INT32 cannot become UINT8"),
            ("[2]", Int32, Bool, "2 as INT32 cannot become BOOL"),
            ("[3000000000]", Int64, Int64, "too large"),
            ("[256]", Uint8, Fp32, "256 is not UINT8"),
            ("[-1]", Uint64, Fp32, "-1 is not UINT64"),
            ("[1.5]", Int8, Fp32, "1.5 is not INT8"),
            ("[2]", Bool, Fp32, "2 is not BOOL"),
            ("[70000]", Fp16, Fp32, "70000 is beyond FP16"),
        ] {
            let refused = read_text(text, &[1], claimed, declared).unwrap_err();
            assert!(refused.contains(why), "{text}: {refused}");
        }
    }

    #[test]
    fn a_shape_that_promises_much_reserves_little() {
        let Err(refused) = fp32("[1]", &[1 << 40]) else { panic!() };
        assert!(refused.contains("data has 1 elements"), "{refused}");
    }
}
