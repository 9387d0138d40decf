//! Real processes, real sockets, the command line. One binary, so that it links once.

mod bad_input;
mod command_line;
mod consensus;
mod data_plane;
mod logs;
mod mesh;
mod partitions;
mod tidy;
