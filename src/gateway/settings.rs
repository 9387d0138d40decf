//! `<id>.config.json`: how this node computes a model, beside the model's file.
//!
//! It is no part of the model: its digest is not the mesh's business, nodes may differ in it, and a change is a matter of one node, from the
//! next time that it loads the model.

use std::time::Duration;

use serde::Deserialize;

use crate::gateway::tensor::{Dim, TensorSpec};

/// Largest file of settings, in bytes.
pub const MODEL_SETTINGS_BYTES_MAX: u64 = 64 << 10;
/// Most rows that may be computed together.
pub const BATCH_ROWS_MAX: usize = 4_096;
/// Longest time that a request may wait for others, in microseconds.
pub const BATCH_WAIT_US_MAX: u64 = 1_000_000;

/// What an operator says of one model.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub(crate) struct Settings {
    /// Requests are computed together, if so.
    pub(crate) batching: Option<Batching>,
}

/// How requests are computed together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Batching {
    /// Rows at most.
    pub(crate) rows_max: usize,
    /// How long the first of them waits for others.
    pub(crate) wait: Duration,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    batch_rows_max: Option<usize>,
    batch_wait_us: Option<u64>,
}

impl Settings {
    /// Reads the file. The error is for an operator.
    pub(crate) fn read(bytes: &[u8]) -> Result<Settings, String> {
        let File { batch_rows_max, batch_wait_us } = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        let wait_us = batch_wait_us.unwrap_or_default();
        if wait_us > BATCH_WAIT_US_MAX {
            return Err(format!("batch_wait_us is {wait_us}; it may be 0 to {BATCH_WAIT_US_MAX}"));
        }
        let batching = match batch_rows_max {
            None if batch_wait_us.is_some() => {
                return Err("batch_wait_us without batch_rows_max, which says how many rows to wait for".to_owned());
            }
            None => None,
            Some(rows_max @ 1..=BATCH_ROWS_MAX) => {
                Some(Batching { rows_max, wait: Duration::from_micros(wait_us) }).filter(|_| rows_max > 1)
            }
            Some(rows_max) => {
                return Err(format!("batch_rows_max is {rows_max}; it may be 1 to {BATCH_ROWS_MAX}, and 1 is to compute each alone"));
            }
        };
        Ok(Settings { batching })
    }
}

/// Says why requests to a model with these inputs and outputs cannot be computed together, if so. Whether its rows are independent of each
/// other, no file says: whoever asks for it has to know.
pub(crate) fn check_rows(inputs: &[TensorSpec], outputs: &[TensorSpec]) -> Result<(), String> {
    for spec in inputs {
        let Some([Dim::Named(rows), rest @ ..]) = spec.shape.as_deref() else {
            return Err(format!("input {spec} has no open first dimension"));
        };
        let elsewhere = inputs.iter().filter_map(|other| other.shape.as_ref()?.get(1..)).flatten();
        if rest.iter().chain(elsewhere).any(|dim| matches!(dim, Dim::Named(name) if name == rows)) {
            return Err(format!("input {spec} has its first dimension in other places, too"));
        }
    }
    let fixed = outputs.iter().find(|spec| spec.shape.as_ref().is_some_and(|shape| !matches!(shape.first(), Some(Dim::Named(_)))));
    match fixed {
        Some(spec) => Err(format!("output {spec} has no open first dimension")),
        None if inputs.is_empty() => Err("it has no inputs".to_owned()),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gateway::elements::Datatype;

    #[test]
    fn settings_are_read_strictly_and_batching_is_off_unless_they_say_otherwise() {
        let read = |text: &str| Settings::read(text.as_bytes());
        let batching = |rows_max, us| Ok(Settings { batching: Some(Batching { rows_max, wait: Duration::from_micros(us) }) });
        assert_eq!(read("{}"), Ok(Settings::default()));
        assert_eq!(read(r#"{"batch_rows_max": 1}"#), Ok(Settings::default()));
        assert_eq!(read(r#"{"batch_rows_max": 32}"#), batching(32, 0));
        assert_eq!(read(r#"{"batch_rows_max": 32, "batch_wait_us": 500}"#), batching(32, 500));
        for (bad, why) in [
            ("", "EOF"),
            (r#"{"batch_rows": 3}"#, "unknown field `batch_rows`, expected `batch_rows_max` or `batch_wait_us`"),
            (r#"{"batch_rows_max": 0}"#, "batch_rows_max is 0; it may be 1 to 4096"),
            (r#"{"batch_rows_max": 5000}"#, "batch_rows_max is 5000; it may be 1 to 4096"),
            (r#"{"batch_rows_max": 2, "batch_wait_us": 1000001}"#, "batch_wait_us is 1000001; it may be 0 to 1000000"),
            (r#"{"batch_wait_us": 5}"#, "batch_wait_us without batch_rows_max"),
        ] {
            let refused = read(bad).unwrap_err();
            assert!(refused.contains(why), "{bad}: {refused}");
        }
    }

    #[test]
    fn only_a_model_with_an_open_first_dimension_everywhere_has_rows_to_join() {
        let spec = |name: &str, shape: Option<&[&str]>| {
            let dim = |size: &&str| size.parse().map_or_else(|_| Dim::Named((*size).to_owned()), Dim::Fixed);
            TensorSpec { name: name.into(), datatype: Datatype::Fp32, shape: shape.map(|shape| shape.iter().map(dim).collect()) }
        };
        let good = spec("x", Some(&["n", "64"]));
        assert_eq!(check_rows(&[good.clone(), spec("z", Some(&["n", "k"]))], &[spec("y", Some(&["m", "10"])), spec("w", None)]), Ok(()));
        for (input, output, why) in [
            (spec("x", None), spec("y", None), "input x FP32 has no open first dimension"),
            (spec("x", Some(&[])), spec("y", None), "input x FP32 [] has no open first dimension"),
            (spec("x", Some(&["1", "64"])), spec("y", None), "input x FP32 [1, 64] has no open first dimension"),
            (spec("x", Some(&["n", "n"])), spec("y", None), "input x FP32 [n, n] has its first dimension in other places, too"),
            (good.clone(), spec("y", Some(&["1", "10"])), "output y FP32 [1, 10] has no open first dimension"),
        ] {
            assert_eq!(check_rows(&[input], &[output]), Err(why.to_owned()));
        }
        let crossed = [good, spec("z", Some(&["m", "n"]))];
        assert!(check_rows(&crossed, &[]).unwrap_err().contains("in other places"));
        assert!(check_rows(&[], &[]).is_err());
    }
}
