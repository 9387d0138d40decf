//! Tensors: what a model's file declares of them, and what a request gives.

use std::collections::BTreeMap;
use std::fmt;

use crate::api::TensorMetadata;
use crate::gateway::elements::{Datatype, Elements};

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

impl TensorSpec {
    /// The same as the protocol describes it.
    pub(crate) fn metadata(&self) -> TensorMetadata {
        let size = |dim: &Dim| match dim {
            Dim::Fixed(size) => i64::try_from(*size).unwrap_or(i64::MAX),
            Dim::Named(_) => -1,
        };
        let shape = self.shape.as_ref().map_or_else(|| vec![-1], |dims| dims.iter().map(size).collect());
        TensorMetadata { name: self.name.clone(), datatype: self.datatype.to_string(), shape }
    }
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

/// All of them, for a sentence.
pub(crate) fn list(specs: &[TensorSpec]) -> String {
    specs.iter().map(TensorSpec::to_string).collect::<Vec<_>>().join(", ")
}

/// A tensor that fits its input.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Tensor {
    pub(crate) shape: Vec<usize>,
    pub(crate) elements: Elements,
}

/// What the named dimensions are in this request: each size, and the input that it was first seen in.
#[derive(Default)]
pub(crate) struct Sizes<'s>(BTreeMap<&'s str, (usize, &'s str)>);

impl<'s> Sizes<'s> {
    /// Says why a shape does not fit what is declared, if so.
    pub(crate) fn check(&mut self, shape: &[usize], spec: &'s TensorSpec) -> Result<(), String> {
        if shape.len() > DIMENSIONS_MAX {
            return Err(format!("{} dimensions, and a tensor has {DIMENSIONS_MAX} at most", shape.len()));
        }
        let unfit = |why: String| format!("shape {shape:?} {why}; the model wants {spec}");
        let Some(dims) = &spec.shape else { return Ok(()) };
        if dims.len() != shape.len() {
            return Err(unfit(format!("has {} dimensions, not {}", shape.len(), dims.len())));
        }
        for (index, (dim, size)) in dims.iter().zip(shape).enumerate() {
            match dim {
                Dim::Fixed(wanted) if wanted == size => {}
                Dim::Fixed(wanted) => return Err(unfit(format!("has {size} in dimension {index}, not {wanted}"))),
                Dim::Named(name) => {
                    let (first, input) = *self.0.entry(name).or_insert((*size, &spec.name));
                    if first != *size {
                        return Err(unfit(format!("has {size} in dimension {index}, but {name} is {first} in input {input}")));
                    }
                }
            }
        }
        Ok(())
    }
}
