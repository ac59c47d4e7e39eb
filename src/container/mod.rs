//! OCI containers through libcontainer; the only room that names it.

pub mod config;
