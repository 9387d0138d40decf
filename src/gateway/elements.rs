//! The numbers of a tensor: from JSON to what a model computes with, and never silently to another number.
//!
//! Their arrays are read by hand. serde_json visits each number through several layers, and with thousands of numbers in a request that
//! took most of its time.

use std::fmt;

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

/// Reads a tensor's data: a flat array, or arrays nested as `shape` says. `claimed` is the request's datatype, `declared` the
/// model's. `None` of the models that load here declares another type than those with an arm of their own.
pub(crate) fn read(data: &RawValue, shape: &[usize], claimed: Datatype, declared: Datatype) -> Result<Elements, String> {
    let rule = Rule::new(claimed, declared);
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
        (!exact || f64::from(real) == number).then_some(real)
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

/// A JSON number, or a truth value.
#[derive(Clone, Copy)]
enum Number {
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
                if claimed.abs() > self.most {
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
        let before = self.text;
        match self.text.short().and_then(|number| self.rule.fits(number)) {
            Some(element) if self.read.len() < self.total => self.read.push(element),
            _ => {
                self.text = before;
                self.long_scalar(first)?;
            }
        }
        Ok(())
    }

    /// The same for what is not short, or not taken.
    #[cold]
    fn long_scalar(&mut self, first: u8) -> Result<(), String> {
        let at = self.read.len();
        let number = self.text.number(first).map_err(|what| format!("element {at} of data is {what}"))?;
        if at == self.total {
            return Err(format!("data has more than the {} elements of shape {:?}", self.total, self.shape));
        }
        let element = self.rule.convert(number).map_err(|why| format!("element {at} of data: {why}"))?;
        self.read.push(element);
        Ok(())
    }
}

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
}
