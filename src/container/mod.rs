//! OCI containers through libcontainer; the only room that names it.
//!
//! libcontainer clones with raw `clone3` and runs Rust code in the child, changes the working directory and leaks
//! descriptors: what starts processes here is for the single-threaded command line only and not public. Public is
//! [`locate`], which reads a container's state and touches nothing.

pub(crate) mod again;
mod cgroups;
pub(crate) mod children;
pub mod config;
mod copy_up;
pub(crate) mod create;
mod error;
pub(crate) mod exec;
pub(crate) mod features;
pub(crate) mod lifecycle;
mod locate;
pub(crate) mod overlay;
mod program;
pub(crate) mod view;

pub use cgroups::Cgroup;
pub use error::Error;
pub use locate::{Located, Status, list, locate};
