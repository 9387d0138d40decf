//! The gateway as a whole, without a front: requests in, answers out.

mod endpoints;
pub(crate) mod mirror;
mod onnx;
mod rig;
mod routing;
mod trial;
mod upstream;
