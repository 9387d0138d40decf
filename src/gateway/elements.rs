//! The numbers of a tensor: from JSON to what a model computes with, and never silently to another number.
//!
//! Their arrays are read by hand. serde_json visits each number through several layers, and with thousands of numbers in a request that
//! took most of its time.

use std::fmt;

use serde_json::value::RawValue;

use crate::gateway::request::json;
use crate::gateway::tensor::{DIMENSIONS_MAX, Tensor};

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
/// Floating point of 32 bits holds every whole number up to this.
const FP32_WHOLE_MAX: u64 = 16_777_216;
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

    /// Bytes of one element as binary data.
    pub(crate) const fn bytes(self) -> usize {
        match self {
            Datatype::Bool | Datatype::Uint8 | Datatype::Int8 => 1,
            Datatype::Uint16 | Datatype::Int16 | Datatype::Fp16 => 2,
            Datatype::Uint32 | Datatype::Int32 | Datatype::Fp32 => 4,
            Datatype::Uint64 | Datatype::Int64 | Datatype::Fp64 => 8,
        }
    }

    /// The smallest and the largest whole number of the type; `None` for floating point.
    fn range(self) -> Option<(i64, u64)> {
        let range = match self {
            Datatype::Bool => (0, 1),
            Datatype::Uint8 => (0, u8::MAX.into()),
            Datatype::Uint16 => (0, u16::MAX.into()),
            Datatype::Uint32 => (0, u32::MAX.into()),
            Datatype::Uint64 => (0, u64::MAX),
            Datatype::Int8 => (i8::MIN.into(), i8::MAX as u64),
            Datatype::Int16 => (i16::MIN.into(), i16::MAX as u64),
            Datatype::Int32 => (i32::MIN.into(), i32::MAX as u64),
            Datatype::Int64 => (i64::MIN, i64::MAX as u64),
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

impl Elements {
    /// No elements, of the kind that a model computes this declared type with. `None` of the models that load here declares another type than
    /// those with an arm of their own.
    fn none(declared: Datatype) -> Elements {
        match declared {
            Datatype::Fp16 | Datatype::Fp32 | Datatype::Fp64 => Elements::F32(Vec::new()),
            Datatype::Int8 => Elements::I8(Vec::new()),
            Datatype::Uint8 => Elements::U8(Vec::new()),
            _ => Elements::I32(Vec::new()),
        }
    }

    /// These behind those that there are; nothing if they are of another kind, which those of one input never are.
    pub(crate) fn append(&mut self, more: &Elements) {
        match (self, more) {
            (Elements::F32(data), Elements::F32(more)) => data.extend_from_slice(more),
            (Elements::I32(data), Elements::I32(more)) => data.extend_from_slice(more),
            (Elements::I8(data), Elements::I8(more)) => data.extend_from_slice(more),
            (Elements::U8(data), Elements::U8(more)) => data.extend_from_slice(more),
            _ => {}
        }
    }

    /// All of them.
    pub(crate) fn slice(&self) -> Slice<'_> {
        match self {
            Elements::F32(data) => Slice::F32(data),
            Elements::I32(data) => Slice::I32(data),
            Elements::I8(data) => Slice::I8(data),
            Elements::U8(data) => Slice::U8(data),
        }
    }
}

/// Some of a tensor's elements, as they are written into an answer.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Slice<'a> {
    F32(&'a [f32]),
    I32(&'a [i32]),
    I8(&'a [i8]),
    U8(&'a [u8]),
}

impl<'a> Slice<'a> {
    /// How many they are.
    pub(crate) fn len(self) -> usize {
        match self {
            Slice::F32(data) => data.len(),
            Slice::I32(data) => data.len(),
            Slice::I8(data) => data.len(),
            Slice::U8(data) => data.len(),
        }
    }

    /// So many of them, from this one on; fewer where there are fewer.
    pub(crate) fn part(self, from: usize, length: usize) -> Slice<'a> {
        fn part<T>(data: &[T], from: usize, length: usize) -> &[T] {
            let rest = data.get(from..).unwrap_or_default();
            rest.get(..length).unwrap_or(rest)
        }
        match self {
            Slice::F32(data) => Slice::F32(part(data, from, length)),
            Slice::I32(data) => Slice::I32(part(data, from, length)),
            Slice::I8(data) => Slice::I8(part(data, from, length)),
            Slice::U8(data) => Slice::U8(part(data, from, length)),
        }
    }

    /// Writes them as a JSON array.
    pub(crate) fn write(self, datatype: Datatype, into: &mut Vec<u8>) {
        match self {
            Slice::F32(data) => json(into, data),
            Slice::I32(data) if datatype == Datatype::Bool => {
                into.push(b'[');
                for (number, element) in data.iter().enumerate() {
                    if number > 0 {
                        into.push(b',');
                    }
                    into.extend_from_slice(if *element == 0 { b"false" } else { b"true" });
                }
                into.push(b']');
            }
            Slice::I32(data) => json(into, data),
            Slice::I8(data) => json(into, data),
            Slice::U8(data) => json(into, data),
        }
    }

    /// Writes them as JSON arrays nested as `shape` says; without a dimension, the one element by itself.
    pub(crate) fn write_nested(self, shape: &[usize], datatype: Datatype, into: &mut Vec<u8>) {
        match shape {
            [] => {
                let begin = into.len();
                self.part(0, 1).write(datatype, into);
                // Without the brackets of its array.
                into.pop();
                into.drain(begin..=begin);
            }
            [_] => self.write(datatype, into),
            [count, inner @ ..] => {
                let size: usize = inner.iter().product();
                into.push(b'[');
                for number in 0..*count {
                    if number > 0 {
                        into.push(b',');
                    }
                    self.part(number * size, size).write_nested(inner, datatype, into);
                }
                into.push(b']');
            }
        }
    }

    /// Writes them as binary data: little-endian, each in the size of its type.
    pub(crate) fn write_bytes(self, datatype: Datatype, into: &mut Vec<u8>) {
        into.reserve(self.len() * datatype.bytes());
        match (self, datatype) {
            (Slice::F32(data), Datatype::Fp16) => data.iter().for_each(|real| into.extend_from_slice(&half::from_f32(*real).to_le_bytes())),
            (Slice::F32(data), Datatype::Fp64) => data.iter().for_each(|real| into.extend_from_slice(&f64::from(*real).to_le_bytes())),
            (Slice::F32(data), _) => data.iter().for_each(|real| into.extend_from_slice(&real.to_le_bytes())),
            (Slice::I32(data), Datatype::Bool) => into.extend(data.iter().map(|number| u8::from(*number != 0))),
            (Slice::I32(data), Datatype::Int64) => data.iter().for_each(|number| into.extend_from_slice(&i64::from(*number).to_le_bytes())),
            (Slice::I32(data), _) => data.iter().for_each(|number| into.extend_from_slice(&number.to_le_bytes())),
            (Slice::I8(data), _) => into.extend(data.iter().map(|number| *number as u8)),
            (Slice::U8(data), _) => into.extend_from_slice(data),
        }
    }
}

/// Floating point of 16 bits, which Rust has no type for.
mod half {
    /// The number that is nearest; of two that are as near, the even one.
    pub(super) fn from_f32(real: f32) -> u16 {
        let bits = real.to_bits();
        let (sign, exponent, fraction) = ((bits >> 16) as u16 & 0x8000, (bits >> 23) as i32 & 0xff, bits & 0x7f_ffff);
        if exponent == 0xff {
            // Infinite, or not a number.
            return sign | 0x7c00 | if fraction == 0 { 0 } else { 0x200 };
        }
        let (whole, shift) = match exponent - 127 + 15 {
            ..=-11 => return sign,
            // Below the normal numbers: the leading digit is written out.
            low @ ..=0 => (fraction | 0x80_0000, (14 - low) as u32),
            31.. => return sign | 0x7c00,
            normal => ((normal as u32) << 23 | fraction, 13),
        };
        let (kept, cut, middle) = (whole >> shift, whole & ((1 << shift) - 1), 1 << (shift - 1));
        // A carry out of the fraction is the next exponent, and out of that, infinity.
        sign | (kept + u32::from(cut > middle || (cut == middle && kept & 1 == 1))) as u16
    }

    pub(super) fn to_f64(half: u16) -> f64 {
        let (exponent, fraction) = (i32::from(half >> 10 & 0x1f), f64::from(half & 0x3ff));
        let size = match exponent {
            0 => fraction * 2f64.powi(-24),
            31 if fraction == 0.0 => f64::INFINITY,
            31 => f64::NAN,
            _ => (1024.0 + fraction) * 2f64.powi(exponent - 25),
        };
        if half & 0x8000 == 0 { size } else { -size }
    }
}

/// How many elements a shape has. The error is for the caller.
fn total(shape: &[usize]) -> Result<usize, String> {
    let total = shape.iter().try_fold(1usize, |product, size| product.checked_mul(*size));
    total.ok_or_else(|| format!("shape {shape:?} has more elements than a request can hold"))
}

/// Reads a tensor's binary data: little-endian, as many elements as `shape` says.
pub(crate) fn read_bytes(bytes: &[u8], shape: &[usize], claimed: Datatype, declared: Datatype) -> Result<Elements, String> {
    let wanted = total(shape)?.checked_mul(claimed.bytes());
    if wanted != Some(bytes.len()) {
        let wanted = wanted.map_or_else(|| "more than a request can hold".to_owned(), |wanted| wanted.to_string());
        return Err(format!("binary_data_size is {}, and shape {shape:?} of {claimed} takes {wanted}", bytes.len()));
    }
    let rule = Rule::new(claimed, declared);
    Ok(match Elements::none(declared) {
        // What is taken as it is.
        Elements::F32(_) if (claimed, declared) == (Datatype::Fp32, Datatype::Fp32) => Elements::F32(little(bytes, f32::from_le_bytes)),
        Elements::I32(_) if (claimed, declared) == (Datatype::Int32, Datatype::Int32) => Elements::I32(little(bytes, i32::from_le_bytes)),
        Elements::I8(_) if claimed == Datatype::Int8 => Elements::I8(little(bytes, i8::from_le_bytes)),
        Elements::U8(_) if claimed == Datatype::Uint8 => Elements::U8(bytes.to_vec()),
        Elements::F32(_) => Elements::F32(converted(bytes, rule)?),
        Elements::I32(_) => Elements::I32(converted(bytes, rule)?),
        Elements::I8(_) => Elements::I8(converted(bytes, rule)?),
        Elements::U8(_) => Elements::U8(converted(bytes, rule)?),
    })
}

fn little<T, const N: usize>(bytes: &[u8], number: fn([u8; N]) -> T) -> Vec<T> {
    bytes.as_chunks::<N>().0.iter().map(|bytes| number(*bytes)).collect()
}

fn converted<E: Element>(bytes: &[u8], rule: Rule) -> Result<Vec<E>, String> {
    let element = |(at, number): (usize, Result<Number, String>)| {
        let converted = number.and_then(|number| rule.convert(number));
        converted.map_err(|why| format!("element {at} of its binary data: {why}"))
    };
    numbers(bytes, rule.claimed).enumerate().map(element).collect()
}

/// The numbers that binary data of this type is.
pub(crate) fn numbers(bytes: &[u8], datatype: Datatype) -> impl Iterator<Item = Result<Number, String>> {
    bytes.chunks_exact(datatype.bytes()).map(move |bytes| {
        let mut long = [0; 8];
        long.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
        let bits = u64::from_le_bytes(long);
        Ok(match datatype {
            Datatype::Bool if bits > 1 => return Err(format!("byte {bits} is neither 0 nor 1, as BOOL is")),
            Datatype::Bool => Number::Bool(bits == 1),
            Datatype::Int8 => Number::Whole((bits as i8).into()),
            Datatype::Int16 => Number::Whole((bits as i16).into()),
            Datatype::Int32 => Number::Whole((bits as i32).into()),
            Datatype::Int64 => Number::Whole(bits as i64),
            Datatype::Uint8 | Datatype::Uint16 | Datatype::Uint32 | Datatype::Uint64 => {
                i64::try_from(bits).map_or(Number::Large(bits), Number::Whole)
            }
            Datatype::Fp16 => Number::Real(half::to_f64(bits as u16)),
            Datatype::Fp32 => Number::Real(f32::from_bits(bits as u32).into()),
            Datatype::Fp64 => Number::Real(f64::from_bits(bits)),
        })
    })
}

/// Reads a tensor's data: a flat array, or arrays nested as `shape` says. `claimed` is the request's datatype, `declared` the
/// model's.
pub(crate) fn read(data: &RawValue, shape: &[usize], claimed: Datatype, declared: Datatype) -> Result<Elements, String> {
    let rule = Rule::new(claimed, declared);
    match Elements::none(declared) {
        Elements::F32(_) => read_as(data, shape, rule).map(Elements::F32),
        Elements::I32(_) => read_as(data, shape, rule).map(Elements::I32),
        Elements::I8(_) => read_as(data, shape, rule).map(Elements::I8),
        Elements::U8(_) => read_as(data, shape, rule).map(Elements::U8),
    }
}

fn read_as<E: Element>(data: &RawValue, shape: &[usize], rule: Rule) -> Result<Vec<E>, String> {
    let total = total(shape)?;
    let text = data.get();
    // Each element takes two bytes of text at least, whatever the shape promises.
    let capacity = total.min(text.len() / 2 + 1);
    let mut reader = Reader { rule, shape, total, text: Text(text.as_bytes()), read: Vec::with_capacity(capacity) };
    if reader.text.peek() != Some(b'[') {
        return Err("data must be an array".to_owned());
    }
    reader.array(0)?;
    match reader.read.len() {
        read if read == total => Ok(reader.read),
        read => Err(format!("data has {read} elements, and shape {shape:?} has {total}")),
    }
}

/// A number of the model's own kind.
trait Element: Copy {
    /// Exactly this whole number, or nothing.
    fn from_whole(number: i64) -> Option<Self>;
    /// Exactly this whole number, which is above those of [`Element::from_whole`], or nothing.
    fn from_large(number: u64) -> Option<Self>;
    /// This number, rounded only where `exact` does not forbid it, or nothing.
    fn from_real(number: f64, exact: bool) -> Option<Self>;
}

impl Element for f32 {
    fn from_whole(number: i64) -> Option<f32> {
        let real = number as f32;
        (number.unsigned_abs() <= FP32_WHOLE_MAX || real as i128 == i128::from(number)).then_some(real)
    }

    fn from_large(number: u64) -> Option<f32> {
        let real = number as f32;
        (real as u128 == u128::from(number)).then_some(real)
    }

    fn from_real(number: f64, exact: bool) -> Option<f32> {
        let real = number as f32;
        (!exact || f64::from(real) == number || number.is_nan()).then_some(real)
    }
}

macro_rules! whole_element {
    ($($type:ty),*) => {$(
        impl Element for $type {
            fn from_whole(number: i64) -> Option<$type> {
                number.try_into().ok()
            }

            fn from_large(_: u64) -> Option<$type> {
                None
            }

            fn from_real(number: f64, _: bool) -> Option<$type> {
                whole(number)?.try_into().ok()
            }
        }
    )*};
}

whole_element!(i32, i8, u8);

/// The whole number that this is, if it is one that floating point holds exactly.
fn whole(number: f64) -> Option<i64> {
    let cut = number as i64;
    (cut as f64 == number && number.abs() <= WHOLE_MAX).then_some(cut)
}

/// A number of a request or an answer, or a truth value.
#[derive(Clone, Copy)]
pub(crate) enum Number {
    Bool(bool),
    Whole(i64),
    /// A whole number above those.
    Large(u64),
    Real(f64),
}

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Number::Bool(truth) => truth.fmt(f),
            Number::Whole(number) => number.fmt(f),
            Number::Large(number) => number.fmt(f),
            Number::Real(number) => number.fmt(f),
        }
    }
}

/// What is asked of each number.
#[derive(Clone, Copy)]
struct Rule {
    claimed: Datatype,
    declared: Datatype,
    /// The whole numbers of the claimed type; `None` if it is floating point.
    range: Option<(i64, u64)>,
    /// The largest number of the claimed type, if it is floating point.
    most: f64,
    /// No rounding to what the model computes with.
    exact: bool,
}

impl Rule {
    fn new(claimed: Datatype, declared: Datatype) -> Rule {
        let most = match claimed {
            Datatype::Fp16 => FP16_MAX,
            Datatype::Fp32 => f64::from(f32::MAX),
            _ => f64::MAX,
        };
        let exact = claimed == Datatype::Fp64 && declared != Datatype::Fp64;
        Rule { claimed, declared, range: claimed.range(), most, exact }
    }

    /// The number as the model takes it. An error says what it is instead.
    fn convert<E: Element>(self, number: Number) -> Result<E, String> {
        let converted = match self.range {
            Some(range) => self.whole(number, range)?,
            None => {
                let claimed = match number {
                    Number::Bool(_) => return Err(self.foreign(number)),
                    Number::Whole(number) => number as f64,
                    Number::Large(number) => number as f64,
                    Number::Real(number) => number,
                };
                // JSON has no word for what is infinite; binary data has.
                if claimed.is_finite() && claimed.abs() > self.most {
                    return Err(format!("{number} is beyond {}", self.claimed));
                }
                let truth = self.declared != Datatype::Bool || claimed == 0.0 || claimed == 1.0;
                E::from_real(claimed, self.exact).filter(|_| truth)
            }
        };
        converted.ok_or_else(|| self.lossy(number))
    }

    /// A short number as the model takes it, or nothing: then [`Rule::convert`] says why.
    #[inline]
    fn fits<E: Element>(self, number: f64) -> Option<E> {
        let truth = self.declared != Datatype::Bool || number == 0.0 || number == 1.0;
        let converted = match self.range {
            Some((least, most)) => E::from_whole(whole(number).filter(|_| number >= least as f64 && number <= most as f64)?),
            None => E::from_real(Some(number).filter(|number| number.abs() <= self.most)?, self.exact),
        };
        converted.filter(|_| truth)
    }

    /// The same for a claimed type of whole numbers.
    fn whole<E: Element>(self, number: Number, (least, most): (i64, u64)) -> Result<Option<E>, String> {
        let claimed = match number {
            Number::Bool(truth) if self.claimed == Datatype::Bool => Some(i64::from(truth)),
            Number::Bool(_) => None,
            Number::Whole(number) => Some(number),
            Number::Large(number) if number <= most => return Ok(E::from_large(number).filter(|_| self.declared != Datatype::Bool)),
            Number::Large(_) => None,
            Number::Real(number) => whole(number),
        };
        let fits = |number: &i64| *number >= least && (*number < 0 || *number as u64 <= most);
        let claimed = claimed.filter(fits).ok_or_else(|| self.foreign(number))?;
        let truth = self.declared != Datatype::Bool || matches!(claimed, 0 | 1);
        Ok(E::from_whole(claimed).filter(|_| truth))
    }

    fn foreign(self, number: Number) -> String {
        format!("{number} is not {}", self.claimed)
    }

    fn lossy(self, number: Number) -> String {
        let Rule { claimed, declared, .. } = self;
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
    text: Text<'a>,
    read: Vec<E>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Found {
    Scalar,
    List,
}

impl<E: Element> Reader<'_, E> {
    /// One array, which begins here, within `depth` others.
    fn array(&mut self, depth: usize) -> Result<(), String> {
        let rank = self.shape.len();
        if depth > 0 && depth >= rank {
            return Err(format!("data is nested deeper than shape {:?}", self.shape));
        }
        self.text.pass(1);
        let (mut count, mut kind) = (0usize, None);
        loop {
            let found = match self.text.peek() {
                Some(b',') => {
                    self.text.pass(1);
                    continue;
                }
                Some(b'[') => {
                    self.array(depth + 1)?;
                    Found::List
                }
                Some(b']') | None => break,
                Some(first) => {
                    self.scalar(first)?;
                    Found::Scalar
                }
            };
            if *kind.get_or_insert(found) != found {
                return Err("data mixes numbers and arrays in one array".to_owned());
            }
            count += 1;
        }
        self.text.pass(1);
        let flat = depth == 0 && kind != Some(Found::List);
        let innermost = depth + 1 == rank;
        let fits = self.shape.get(depth) == Some(&count);
        let level_fits = match kind {
            Some(Found::Scalar) => innermost && fits,
            Some(Found::List) | None => fits,
        };
        if !flat && !level_fits {
            let shape = self.shape;
            return Err(format!("data has an array of {count} at depth {}, which shape {shape:?} does not allow", depth + 1));
        }
        Ok(())
    }

    /// One element, which begins here with this byte.
    #[inline]
    fn scalar(&mut self, first: u8) -> Result<(), String> {
        if self.read.len() == self.total {
            return Err(format!("data has more than the {} elements of shape {:?}", self.total, self.shape));
        }
        let element = self.text.element(first, self.rule, self.read.len())?;
        self.read.push(element);
        Ok(())
    }
}

/// Reads values whose shape nobody says: arrays nested evenly, one value or several of the same shape.
#[derive(Debug)]
pub(crate) struct Nested {
    declared: Datatype,
    elements: Elements,
    /// The shape of each value, once there is one.
    shape: Option<Vec<usize>>,
    values: usize,
}

impl Nested {
    /// For an input of this type.
    pub(crate) fn new(declared: Datatype) -> Nested {
        Nested { declared, elements: Elements::none(declared), shape: None, values: 0 }
    }

    /// Reads one value. Its numbers are taken as those of the model's own type.
    pub(crate) fn add(&mut self, value: &RawValue) -> Result<(), String> {
        let rule = Rule::new(self.declared, self.declared);
        let shape = match &mut self.elements {
            Elements::F32(read) => read_nested(value, rule, read),
            Elements::I32(read) => read_nested(value, rule, read),
            Elements::I8(read) => read_nested(value, rule, read),
            Elements::U8(read) => read_nested(value, rule, read),
        }?;
        match &self.shape {
            Some(first) if *first != shape => return Err(format!("shape {shape:?}, and the ones before have {first:?}")),
            Some(_) => {}
            None => self.shape = Some(shape),
        }
        self.values += 1;
        Ok(())
    }

    /// The only value.
    pub(crate) fn tensor(self) -> Tensor {
        Tensor { shape: self.shape.unwrap_or_default(), elements: self.elements }
    }

    /// All of them, one behind the other.
    pub(crate) fn stacked(self) -> Tensor {
        let inner = self.shape.unwrap_or_default();
        Tensor { shape: [vec![self.values], inner].concat(), elements: self.elements }
    }
}

/// Reads arrays nested evenly; their shape.
fn read_nested<E: Element>(value: &RawValue, rule: Rule, read: &mut Vec<E>) -> Result<Vec<usize>, String> {
    let mut reader = NestedReader { rule, text: Text(value.get().as_bytes()), read, sizes: Vec::new(), numbers: None };
    reader.value(0)?;
    Ok(reader.sizes.into_iter().flatten().collect())
}

struct NestedReader<'a, 'e, E> {
    rule: Rule,
    text: Text<'a>,
    read: &'e mut Vec<E>,
    /// How long the arrays at each depth are, once the first of them has ended.
    sizes: Vec<Option<usize>>,
    /// The depth at which numbers are.
    numbers: Option<usize>,
}

impl<E: Element> NestedReader<'_, '_, E> {
    fn value(&mut self, depth: usize) -> Result<(), String> {
        match self.text.peek() {
            Some(b'[') => self.array(depth),
            Some(first) => {
                if *self.numbers.get_or_insert(depth) != depth {
                    return Err(UNEVEN.to_owned());
                }
                let element = self.text.element(first, self.rule, self.read.len())?;
                self.read.push(element);
                Ok(())
            }
            None => Err("nothing where a value belongs".to_owned()),
        }
    }

    fn array(&mut self, depth: usize) -> Result<(), String> {
        if depth == DIMENSIONS_MAX {
            return Err(format!("arrays nested deeper than {DIMENSIONS_MAX}, which is as many dimensions as a tensor has at most"));
        }
        if self.numbers.is_some_and(|numbers| numbers <= depth) {
            return Err(UNEVEN.to_owned());
        }
        if self.sizes.len() == depth {
            self.sizes.push(None);
        }
        self.text.pass(1);
        let mut count = 0;
        loop {
            match self.text.peek() {
                Some(b',') => self.text.pass(1),
                Some(b']') | None => break,
                Some(_) => {
                    self.value(depth + 1)?;
                    count += 1;
                }
            }
        }
        self.text.pass(1);
        match self.sizes.get_mut(depth).map(|size| *size.get_or_insert(count)) {
            Some(first) if first != count => Err(format!("arrays of {first} and of {count} beside each other; a tensor's are all alike")),
            _ => Ok(()),
        }
    }
}

const UNEVEN: &str = "numbers and arrays beside each other; a tensor's arrays are nested evenly";

/// JSON that serde_json has passed, so that nobody need ask again whether it is.
#[derive(Clone, Copy)]
struct Text<'a>(&'a [u8]);

impl Text<'_> {
    /// The next byte that is not white space; it stays.
    fn peek(&mut self) -> Option<u8> {
        while let [b' ' | b'\t' | b'\n' | b'\r', rest @ ..] = self.0 {
            self.0 = rest;
        }
        self.0.first().copied()
    }

    fn pass(&mut self, bytes: usize) {
        self.0 = self.0.get(bytes..).unwrap_or_default();
    }

    /// The element that begins here with this byte, as the model takes it; `at` is its number.
    #[inline]
    fn element<E: Element>(&mut self, first: u8, rule: Rule, at: usize) -> Result<E, String> {
        let before = *self;
        if let Some(element) = self.short().and_then(|number| rule.fits(number)) {
            return Ok(element);
        }
        *self = before;
        self.long_element(first, rule, at)
    }

    /// The same for what is not short, or not taken.
    #[cold]
    fn long_element<E: Element>(&mut self, first: u8, rule: Rule, at: usize) -> Result<E, String> {
        let number = self.number(first).map_err(|what| format!("element {at} of data is {what}"))?;
        rule.convert(number).map_err(|why| format!("element {at} of data: {why}"))
    }

    /// The number that begins here, if it is one of few digits and without an exponent, as most are: then its digits and its power of ten are
    /// exact, and the one division rounds to the number that is nearest.
    #[inline]
    fn short(&mut self) -> Option<f64> {
        let (negative, text) = match self.0 {
            [b'-', rest @ ..] => (true, rest),
            rest => (false, rest),
        };
        let mut digits = Digits::default();
        let mut rest = digits.read(text);
        let mut real = digits.value as f64;
        if let [b'.', fraction @ ..] = rest {
            let whole = digits.count;
            rest = digits.read(fraction);
            real = digits.value as f64 / POWERS_OF_TEN.get(digits.count - whole)?;
        }
        if digits.count == 0 || digits.count > SHORT_DIGITS_MAX || matches!(rest, [b'e' | b'E', ..]) {
            return None;
        }
        self.0 = rest;
        Some(if negative { -real } else { real })
    }

    /// The number or truth value that begins here with this byte; otherwise what is here instead.
    fn number(&mut self, first: u8) -> Result<Number, &'static str> {
        let word = self.0.iter().take_while(|byte| matches!(byte, b'-' | b'+' | b'.' | b'0'..=b'9' | b'a'..=b'z' | b'E')).count();
        let token = self.0.get(..word).and_then(|token| std::str::from_utf8(token).ok()).unwrap_or_default();
        self.pass(word);
        match first {
            b'-' | b'0'..=b'9' => {}
            b't' => return Ok(Number::Bool(true)),
            b'f' => return Ok(Number::Bool(false)),
            b'"' => return Err("text, not a number"),
            b'{' => return Err("an object, not a number"),
            b'n' => return Err("null, not a number"),
            _ => return Err("not a number"),
        }
        let whole = || token.parse().map(Number::Whole).or_else(|_| token.parse().map(Number::Large)).ok();
        let real = || token.parse().ok().filter(|real: &f64| real.is_finite()).map(Number::Real);
        whole().filter(|_| token != "-0").or_else(real).ok_or("a number out of range")
    }
}

/// Digits of a number, as far as they fit.
#[derive(Default)]
struct Digits {
    value: u64,
    count: usize,
}

impl Digits {
    /// Takes the digits at the beginning, and gives back what is behind them.
    #[inline]
    fn read<'a>(&mut self, mut text: &'a [u8]) -> &'a [u8] {
        while let [digit @ b'0'..=b'9', rest @ ..] = text {
            self.value = self.value.wrapping_mul(10).wrapping_add(u64::from(digit - b'0'));
            self.count += 1;
            text = rest;
        }
        text
    }
}

/// So many digits are below 2^53, whatever they are.
const SHORT_DIGITS_MAX: usize = 15;
/// As many as there are digits of a short number.
const POWERS_OF_TEN: [f64; SHORT_DIGITS_MAX + 1] = [1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 1e10, 1e11, 1e12, 1e13, 1e14, 1e15];

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
            ("[1e999]", "element 0 of data is a number out of range"),
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
    fn every_number_is_the_nearest_there_is() {
        let mut random = fastrand::Rng::with_seed(7);
        let mut tokens: Vec<String> = [
            "0",
            "-0",
            "-0.0",
            "1e0",
            "1E+2",
            "-1.5e-3",
            "0.1",
            "123456789012345678",
            "1234567890123456789",
            "9223372036854775807",
            "-9223372036854775808",
            "9223372036854775808",
            "18446744073709551615",
            "18446744073709551616",
            "9007199254740993",
            "9007199254740993.0",
            "0.30000000000000004",
            "5e-324",
            "1.7976931348623157e308",
            "1e-400",
            "1e-99999999999",
            "0e99999999999",
            "123456789.123456789e-10",
            "1e22",
            "1e23",
            "0.000000000000000000000001",
        ]
        .map(str::to_owned)
        .to_vec();
        for _ in 0..20_000 {
            let real = f64::from_bits(random.u64(..));
            if real.is_finite() {
                tokens.extend([format!("{real}"), format!("{real:e}"), format!("{}", real as f32 / 7.0)]);
            }
            tokens.push(format!("{}.{:05}", random.i16(..), random.u32(..100_000)));
            tokens.push(format!("{}e{}", random.i64(..), random.i8(-30..30)));
            tokens.push(random.i64(..).to_string());
        }
        let mut shorts = 0;
        for token in tokens.iter().filter(|token| token.parse::<f64>().is_ok_and(f64::is_finite)) {
            let raw = RawValue::from_string(format!("[ {token} ]")).unwrap();
            let mut text = Text(raw.get().as_bytes());
            text.pass(1);
            let first = text.peek().unwrap();
            let short = text;
            let long = match text.number(first).unwrap() {
                Number::Bool(_) => panic!("{token}"),
                Number::Whole(number) => number as f64,
                Number::Large(number) => number as f64,
                Number::Real(number) => number,
            };
            let wanted = token.parse().map(f64::to_bits);
            assert_eq!(Ok(long.to_bits()), wanted, "{token}");
            assert_eq!(text.peek(), Some(b']'), "{token}");
            let mut text = short;
            if let Some(short) = text.short() {
                assert_eq!(Ok(short.to_bits()), wanted, "{token}");
                assert_eq!(text.peek(), Some(b']'), "{token}");
                shorts += 1;
            }
        }
        assert!(shorts > 20_000, "{shorts} of {}", tokens.len());
    }

    #[test]
    fn a_shape_that_promises_much_reserves_little() {
        let Err(refused) = fp32("[1]", &[1 << 40]) else { panic!() };
        assert!(refused.contains("data has 1 elements"), "{refused}");
    }

    #[test]
    fn sixteen_bits_of_floating_point_come_and_go_and_the_nearest_is_taken() {
        for bits in 0..=u16::MAX {
            let real = half::to_f64(bits);
            let back = half::from_f32(real as f32);
            assert!(back == bits || (real.is_nan() && half::to_f64(back).is_nan()), "{bits:#06x} is {real}, and back {back:#06x}");
        }
        for (real, bits) in [
            (65_504.0, 0x7bff),
            (65_519.0, 0x7bff),
            (65_520.0, 0x7c00),
            (-1e9, 0xfc00),
            (f32::INFINITY, 0x7c00),
            (1.0 + 1.0 / 2_048.0, 0x3c00),
            (1.0 + 3.0 / 2_048.0, 0x3c02),
            (1.0 + 1.001 / 2_048.0, 0x3c01),
            (f32::MIN_POSITIVE, 0),
            (2f32.powi(-25), 0),
            (2f32.powi(-25) * 1.001, 1),
            (-(2f32.powi(-24) * 1.5), 0x8002),
        ] {
            assert_eq!(half::from_f32(real), bits, "{real}");
        }
        assert!(half::to_f64(half::from_f32(f32::NAN)).is_nan());
    }

    #[test]
    fn binary_data_of_every_type_is_what_the_same_numbers_are_as_json() {
        use Datatype::*;
        let bytes = |claimed: Datatype| -> Vec<u8> {
            [0i64, 1]
                .iter()
                .flat_map(|number| match claimed {
                    Fp16 => half::from_f32(*number as f32).to_le_bytes().to_vec(),
                    Fp32 => (*number as f32).to_le_bytes().to_vec(),
                    Fp64 => (*number as f64).to_le_bytes().to_vec(),
                    _ => number.to_le_bytes()[..claimed.bytes()].to_vec(),
                })
                .collect()
        };
        for claimed in Datatype::ALL {
            for declared in [Fp32, Fp64, Fp16, Int64, Int32, Bool, Int8, Uint8] {
                let binary = read_bytes(&bytes(claimed), &[2], claimed, declared).unwrap();
                assert_eq!(binary, read_text("[0,1]", &[2], claimed, declared).unwrap(), "{claimed} for {declared}");
                let mut back = Vec::new();
                binary.slice().write_bytes(declared, &mut back);
                assert_eq!(back, bytes(declared), "{declared} as the model gives it");
            }
        }
        let negative = read_bytes(&(-2i16).to_le_bytes(), &[], Int16, Int64).unwrap();
        assert_eq!(negative, Elements::I32(vec![-2]));
        let read = read_bytes(&f32::NEG_INFINITY.to_le_bytes(), &[1], Fp32, Fp64).unwrap();
        assert_eq!(read, Elements::F32(vec![f32::NEG_INFINITY]), "what JSON has no word for");
    }

    #[test]
    fn binary_data_that_would_become_other_numbers_is_refused() {
        use Datatype::*;
        for (bytes, claimed, declared, why) in [
            (
                &u64::MAX.to_le_bytes()[..],
                Uint64,
                Int64,
                "element 0 of its binary data: 18446744073709551615 as UINT64 cannot become INT64",
            ),
            (&i64::MIN.to_le_bytes(), Int64, Int64, "too large"),
            (&0.1f64.to_le_bytes(), Fp64, Fp32, "0.1 as FP64 cannot become FP32"),
            (&f32::NAN.to_le_bytes(), Fp32, Int32, "NaN as FP32 cannot become INT32"),
            (&[2], Bool, Bool, "byte 2 is neither 0 nor 1"),
            (&[2], Uint8, Bool, "2 as UINT8 cannot become BOOL"),
            (&[1, 0], Uint8, Uint8, "binary_data_size is 2, and shape [1] of UINT8 takes 1"),
            (&[1], Int16, Int64, "binary_data_size is 1, and shape [1] of INT16 takes 2"),
        ] {
            let refused = read_bytes(bytes, &[1], claimed, declared).unwrap_err();
            assert!(refused.contains(why), "{bytes:?}: {refused}");
        }
        assert!(read_bytes(&[], &[usize::MAX], Fp64, Fp64).unwrap_err().contains("takes more than a request can hold"));
    }
}
