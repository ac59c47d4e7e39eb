//! Snapback takes a checkpoint of a running process tree, keeps it in RAM and rolls the tree back to it in
//! place, as often as asked.
//!
//! The rooms, each importing only from those before it ([`outcome`] and [`fault`] lie below all): [`record`], [`kernel`], [`freeze`], then [`memory`],
//! [`task`], [`objects`] and [`filesystem`] (which do not import one another), [`checkpoint`], [`rollback`], [`image`], [`engine`],
//! [`container`] and [`keeper`], and `cli` in the binary's own face.

pub mod fault;
pub mod outcome;
pub mod phases;

pub mod record;

pub mod kernel;

pub mod freeze;

pub mod filesystem;
pub mod memory;
pub mod objects;
pub mod task;

pub mod checkpoint;
pub mod restore;
pub mod rollback;

pub mod image;

pub mod engine;

pub mod container;
pub mod keeper;

pub mod cli;
