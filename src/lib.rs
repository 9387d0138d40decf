//! canary-mesh: a peer-to-peer mesh that switches a fleet between a stable and a canary model by one atomic decision.

pub mod api;
pub mod cli;
pub mod core;
pub mod gateway;
pub mod http;
pub mod mesh;
pub mod node;
pub mod peers;
pub mod wal;
