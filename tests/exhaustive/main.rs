//! Every reachable state of three real nodes in a small world: `docs/EXHAUSTIVE.md` says what is in it, and how to run more of it.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, clippy::print_stdout, reason = "tests")]

mod model;
mod runs;
mod world;
