//! The protocol, pure: inputs to outputs.

pub mod ballot;
pub mod gate;
pub(crate) mod hash;
pub mod ids;
pub mod message;
pub mod record;
pub mod state;
pub mod value;
