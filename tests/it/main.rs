//! Real processes, real sockets, the command line. One binary, so that it links once.

#![expect(
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stderr,
    clippy::unwrap_used,
    reason = "a test that finds something else than it expects fails, and says where"
)]

mod bad_input;
mod chaos;
mod command_line;
mod consensus;
mod damaged_requests;
mod data_plane;
mod events;
mod h1spec;
mod history;
mod leases;
mod limits;
mod logs;
mod members;
mod mesh;
mod model_server;
mod nemesis;
mod partitions;
mod rollouts;
mod smuggling;
mod switches;
mod tidy;
mod traffic;
mod wire;
