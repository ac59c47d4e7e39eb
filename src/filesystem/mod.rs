//! Files: the writable layer of a container, its tmpfs mounts and its volumes go back with its processes.

mod area;
mod areas;
mod layers;

pub use area::{Area, Found, Kind, LeftOut, Options};
pub use areas::discover;

use std::io;
use std::path::PathBuf;

use crate::outcome::Refusal;

/// Why an operation on files failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing was changed: something that can't be recorded or brought back.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The kernel refused a call on a file.
    #[error("{what} {}: {error}", path.display())]
    File {
        /// What was to be done.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// What came of it.
        error: io::Error,
    },
}

/// Result of this room.
pub type Result<T> = std::result::Result<T, Error>;
