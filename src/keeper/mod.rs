//! The keeper: one process per container that holds its checkpoints and answers requests.
//!
//! The first `checkpoint` starts it; it ends with the last release or with the container. It listens on a unix
//! socket in its state directory (see [`StateDirectory`]) and speaks one JSON object per line ([`protocol`]).
//! One thread owns the engine, for ptrace is bound to the thread that attached: requests of several clients are
//! carried out one after the other, each to its end even if its client has gone.

mod client;
mod directory;
mod engine;
mod launch;
pub mod protocol;
mod server;
mod target;
mod watched;
mod work;

#[cfg(test)]
mod tests;

pub use client::Client;
pub use directory::StateDirectory;
pub use engine::attach;
pub use launch::{Errand, run};
pub use server::Operations;
pub use target::{Identity, TargetError};
pub use work::Work;

use std::io;
use std::path::PathBuf;

/// Why a keeper could not be reached or started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No keeper runs for this container, so there is no checkpoint of it.
    #[error("{label} has no checkpoint: take one with `snapback checkpoint`")]
    NoKeeper {
        /// The container or process tree.
        label: String,
    },
    /// The keeper's socket was there, the keeper was not.
    #[error(
        "the keeper of {label} has died and its checkpoints with it; {label} itself was left as it was: \
         take a new checkpoint"
    )]
    Died {
        /// The container or process tree.
        label: String,
    },
    /// The connection broke before the answer came.
    #[error("the keeper of {label} ended before it answered: its log may be in {}", log.display())]
    Broken {
        /// The container or process tree.
        label: String,
        /// Where the keeper writes its log.
        log: PathBuf,
    },
    /// Something other than a keeper sits at the place of the socket or of a directory.
    #[error("{} is taken: {what}; remove it or choose another --root", path.display())]
    Taken {
        /// The path.
        path: PathBuf,
        /// What was found there.
        what: String,
    },
    /// The other side speaks another version of the protocol.
    #[error(
        "the keeper speaks protocol {theirs}, this program {ours}: use the snapback that took the checkpoint"
    )]
    Version {
        /// The keeper's version.
        theirs: u32,
        /// Ours.
        ours: u32,
    },
    /// A step on the way failed.
    #[error("{what} {}: {error}", path.display())]
    Io {
        /// What was tried, as `cannot create`.
        what: &'static str,
        /// On which path.
        path: PathBuf,
        /// What the kernel said.
        error: io::Error,
    },
    /// The answer was not of the protocol.
    #[error("the keeper's answer makes no sense: {0}")]
    Protocol(String),
    /// The keeper could not start.
    #[error("the keeper did not start: {0}")]
    Start(String),
    /// The process asked for is not one that can be kept.
    #[error(transparent)]
    Target(#[from] TargetError),
}

impl Error {
    fn io(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Error {
        let path = path.into();
        move |error| Error::Io { what, path, error }
    }
}
