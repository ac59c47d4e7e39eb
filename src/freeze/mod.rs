//! Find and stop a process tree, hold it, run batches in it, let it go.
//!
//! A [`Tree`] is known for as long as its root lives; [`Tree::stop`] gives a [`Stopped`] tree, which is all that
//! may be captured or changed. Nothing stays traced between operations but the shadows.

mod batch;
mod bootstrap;
mod calls;
mod copy;
mod discover;
mod inject;
mod kill;
mod lineage;
mod open;
mod orphans;
mod pass;
mod program;
mod revive;
mod stopped;
mod thread;
mod tree;
mod waiting;
mod watch;

pub use batch::{Arg, Batch, MOST_DATA, MOST_STEPS, Output, Outputs, StepId};
pub use copy::{InCopy, PlainCall};
pub use inject::{STORE_OFFSET, TargetWindow, WINDOW_MAPPING, forked_last};
pub use open::Made;
pub use revive::LEAST_NO_PID;
pub use stopped::{Process, Stopped};
pub use thread::Thread;
pub use tree::{Member, OnTracerDeath, Settings, Tree, UnknownCall};

use std::io;

use nix::errno::Errno;
use nix::unistd::Pid;

use crate::outcome::Refusal;

/// What can go wrong while finding, stopping or using a tree.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be done, and nothing was touched.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// A task ended while it was stopped.
    #[error("task {0} ended while it was stopped")]
    Gone(Pid),
    /// A task stopped for another reason than the one expected.
    #[error("task {tid} reported {event} while running a batch")]
    Unexpected {
        /// The task.
        tid: Pid,
        /// What it reported.
        event: String,
    },
    /// A step of a batch that has to work did not.
    #[error("{what} in pid {pid}: {errno}")]
    Call {
        /// The process.
        pid: Pid,
        /// The call.
        what: &'static str,
        /// Its error.
        errno: Errno,
    },
    /// A request of ours to the kernel failed.
    #[error("{what}: {error}")]
    System {
        /// The request.
        what: String,
        /// Its error.
        error: io::Error,
    },
}

/// Result of this room.
pub type Result<T> = std::result::Result<T, Error>;

/// Names the request that failed.
pub(crate) trait Context<T> {
    /// Wraps the error with the request's name.
    fn context(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<io::Error>> Context<T> for std::result::Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| Error::System {
            what: what(),
            error: error.into(),
        })
    }
}

/// A refusal that names a process.
pub(crate) fn refuse(pid: Pid, object: impl Into<String>, remedy: impl Into<String>) -> Error {
    let holder = format!("pid {pid} ({})", crate::kernel::procfs::comm(pid));
    Error::Refused(Refusal {
        object: object.into(),
        holder,
        remedy: remedy.into(),
    })
}

#[cfg(test)]
mod tests;

#[cfg(test)]
mod orphans_tests;
