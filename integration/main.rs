//! Tests of the `snapback` command on real processes, one module per subject. `docs/testing.md` says how to run them.

mod support;

mod again;
mod architecture;
mod bad_input;
mod completeness;
mod containers;
mod faults;
mod file_programs;
mod files;
mod fixtures_memory;
mod fixtures_objects;
mod fixtures_sockets;
mod fixtures_task;
mod honesty;
mod leaks;
mod moved;
mod orphans;
mod overlay;
mod persist;
mod postgresql;
mod postgresql_files;
mod real_programs;
mod refusals;
mod restore;
mod revival;
mod roots;
mod runtime;
mod stress;
mod to_disk;
mod tree;
