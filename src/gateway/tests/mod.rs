//! The gateway as a whole, without a front: requests in, answers out.

mod onnx;
mod rig;
mod routing;
mod upstream;
