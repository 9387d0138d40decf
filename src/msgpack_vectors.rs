//! The decoder of frames and records against MessagePack as others write it: tests/data/msgpack-test-suite.json, 85 values in 233 encodings.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::Value as Json;

use crate::core::message::Message;
use crate::mesh::{FrameError, read_value};
use crate::wal::frame::decode;

/// Any value that a message or a record could hold. Extensions and timestamps are not among them: nothing here sends one.
#[derive(Clone, PartialEq, Debug)]
enum Any {
    Nil,
    Bool(bool),
    Whole(i128),
    Real(f64),
    Text(String),
    Bytes(Vec<u8>),
    Array(Vec<Any>),
    Map(Vec<(Any, Any)>),
}

impl<'de> Deserialize<'de> for Any {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Any, D::Error> {
        struct Anything;
        impl<'de> Visitor<'de> for Anything {
            type Value = Any;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a value of a message")
            }
            fn visit_unit<E: Error>(self) -> Result<Any, E> {
                Ok(Any::Nil)
            }
            fn visit_bool<E: Error>(self, truth: bool) -> Result<Any, E> {
                Ok(Any::Bool(truth))
            }
            fn visit_i64<E: Error>(self, number: i64) -> Result<Any, E> {
                Ok(Any::Whole(number.into()))
            }
            fn visit_u64<E: Error>(self, number: u64) -> Result<Any, E> {
                Ok(Any::Whole(number.into()))
            }
            fn visit_f64<E: Error>(self, number: f64) -> Result<Any, E> {
                Ok(Any::Real(number))
            }
            fn visit_str<E: Error>(self, text: &str) -> Result<Any, E> {
                Ok(Any::Text(text.to_owned()))
            }
            fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<Any, E> {
                Ok(Any::Bytes(bytes.to_vec()))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Any, A::Error> {
                let mut array = Vec::new();
                while let Some(element) = seq.next_element()? {
                    array.push(element);
                }
                Ok(Any::Array(array))
            }
            fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Any, A::Error> {
                let mut map = Vec::new();
                while let Some(entry) = entries.next_entry()? {
                    map.push(entry);
                }
                Ok(Any::Map(map))
            }
        }
        deserializer.deserialize_any(Anything)
    }
}

struct Vector {
    what: String,
    /// `None`: an extension or a timestamp.
    value: Option<Any>,
    encodings: Vec<Vec<u8>>,
}

fn hex(text: &str) -> Vec<u8> {
    text.split('-').filter(|byte| !byte.is_empty()).map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect()
}

fn any(json: &Json) -> Any {
    match json {
        Json::Null => Any::Nil,
        Json::Bool(truth) => Any::Bool(*truth),
        Json::Number(number) => number.as_i128().map_or_else(|| Any::Real(number.as_f64().unwrap()), Any::Whole),
        Json::String(text) => Any::Text(text.clone()),
        Json::Array(array) => Any::Array(array.iter().map(any).collect()),
        Json::Object(map) => Any::Map(map.iter().map(|(key, value)| (Any::Text(key.clone()), any(value))).collect()),
    }
}

fn vectors() -> Vec<Vector> {
    let suite: BTreeMap<String, Vec<BTreeMap<String, Json>>> =
        serde_json::from_str(include_str!("../tests/data/msgpack-test-suite.json")).unwrap();
    let vector = |(file, vector): (&String, &BTreeMap<String, Json>)| {
        let encodings = vector["msgpack"].as_array().unwrap().iter().map(|text| hex(text.as_str().unwrap())).collect();
        let mut kinds = vector.iter().filter(|(kind, _)| *kind != "msgpack");
        let (kind, value) = kinds.next().unwrap();
        let value = match kind.as_str() {
            "timestamp" | "ext" => None,
            "binary" => Some(Any::Bytes(hex(value.as_str().unwrap()))),
            "bignum" => Some(Any::Whole(value.as_str().unwrap().parse().unwrap())),
            _ => Some(any(value)),
        };
        Vector { what: format!("{file}: {value:?}"), value, encodings }
    };
    suite.iter().flat_map(|(file, vectors)| vectors.iter().map(move |vector| (file, vector))).map(vector).collect()
}

/// As a frame's packet is read.
fn from_frame(bytes: &[u8]) -> Result<Any, FrameError> {
    read_value(bytes)
}

/// As a log's records are read.
fn from_log(bytes: &[u8]) -> Result<Any, String> {
    let mut values = decode(bytes).map_err(|error| error.to_string())?;
    if values.len() == 1 { Ok(values.remove(0)) } else { Err(format!("{} values", values.len())) }
}

/// A whole number may be written as floating point, and objects in the vectors have no order.
fn same(read: &Any, wanted: &Any) -> bool {
    match (read, wanted) {
        (Any::Real(real), Any::Whole(whole)) => *real as i128 == *whole && real.fract() == 0.0,
        (Any::Array(read), Any::Array(wanted)) => read.len() == wanted.len() && read.iter().zip(wanted).all(|(a, b)| same(a, b)),
        (Any::Map(read), Any::Map(wanted)) => {
            let has = |(key, value): &(Any, Any)| wanted.iter().any(|(k, v)| same(key, k) && same(value, v));
            read.len() == wanted.len() && read.iter().all(has)
        }
        (read, wanted) => read == wanted,
    }
}

#[test]
fn each_of_233_encodings_is_read_as_its_value_or_refused_for_a_reason() {
    let (mut values, mut read, mut refused) = (0, 0, 0);
    for Vector { what, value, encodings } in vectors() {
        values += 1;
        for bytes in encodings {
            match &value {
                Some(wanted) => {
                    let (frame, log) = (from_frame(&bytes).unwrap(), from_log(&bytes).unwrap());
                    assert!(same(&frame, wanted) && same(&log, wanted), "{what} as {bytes:02x?}: {frame:?}, {log:?}");
                    read += 1;
                }
                // rmp-serde offers an extension as a newtype, which no type of ours takes from there.
                None => {
                    let why = from_frame(&bytes).unwrap_err().to_string();
                    assert!(why.contains("newtype struct"), "{what}: {why}");
                    assert!(from_log(&bytes).is_err(), "{what}");
                    refused += 1;
                }
            }
        }
    }
    assert_eq!((values, read, refused), (85, 203, 30), "19 of those refused are timestamps and 11 other extensions");
}

#[test]
fn an_encoding_that_is_cut_short_at_any_byte_or_followed_by_another_is_an_error() {
    let mut cuts = 0;
    for bytes in vectors().iter().flat_map(|vector| &vector.encodings) {
        for kept in 0..bytes.len() {
            assert!(from_frame(&bytes[..kept]).is_err() && from_log(&bytes[..kept]).is_err(), "{kept} bytes of {bytes:02x?}");
            cuts += 1;
        }
        assert!(from_frame(&[bytes.as_slice(), &[0xC0]].concat()).is_err(), "{bytes:02x?} and nil");
        assert!(read_value::<Message>(bytes).is_err(), "{bytes:02x?} is no message");
    }
    assert_eq!(cuts, 1_669, "as many as the encodings have bytes");
}

#[test]
fn values_within_values_without_end_are_refused() {
    let arrays = |depth: usize| [vec![0x91; depth], vec![0xC0]].concat();
    let maps = |depth: usize| [[0x81, 0xC0].repeat(depth), vec![0xC0]].concat();
    assert!(from_frame(&arrays(50)).is_ok() && from_frame(&maps(50)).is_ok());
    for depth in [65, 1_000, 500_000] {
        let deep = [arrays(depth), maps(depth)];
        for bytes in deep {
            let why = from_frame(&bytes).unwrap_err().to_string();
            assert!(why.contains("depth limit"), "{depth}: {why}");
            assert!(from_log(&bytes).unwrap_err().contains("depth limit"), "{depth}");
        }
    }
    // A length of four gigabytes, and nothing behind it: nothing is reserved for what is not there.
    for bytes in
        [[0xDD, 0xFF, 0xFF, 0xFF, 0xFF], [0xDF, 0xFF, 0xFF, 0xFF, 0xFF], [0xC6, 0xFF, 0xFF, 0xFF, 0xFF], [0xDB, 0xFF, 0xFF, 0xFF, 0xFF]]
    {
        assert!(from_frame(&bytes).is_err() && from_log(&bytes).is_err());
    }
}
