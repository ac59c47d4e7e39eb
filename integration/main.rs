//! Tests of the `snapback` command on real processes, one module per subject. `docs/testing.md` says how to run them.

mod support;

mod architecture;
mod completeness;
mod fixtures_memory;
mod fixtures_objects;
mod fixtures_sockets;
mod fixtures_task;
mod refusals;
mod runtime;
