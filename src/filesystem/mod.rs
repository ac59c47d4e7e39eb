//! Files: the writable layer of a container, its tmpfs mounts and its volumes go back with its processes.

mod area;
mod areas;
pub mod capture;
pub mod check;
pub mod complete;
pub mod content;
pub mod cut;
pub mod diff;
pub mod execute;
pub mod image;
pub mod index;
pub mod journal;
pub mod known;
mod layers;
pub mod mapped;
pub mod meta;
pub mod mounted;
pub mod patch;
pub mod plan;
pub mod rebound;
pub mod session;
pub mod store;
mod stored;
pub mod touched;
pub mod tree;
pub mod uses;
pub mod verify;
pub mod walk;

pub use area::{Area, Found, Kind, LeftOut, Options};
pub use areas::discover;
pub use diff::{Change, ChangeKind};
pub use execute::Put;
pub use image::Image;
pub use session::{Files, Mounts, Moved, Plans, Prepared};
pub use stored::{Contents, StoredArea};
pub use uses::{How, Use};

#[cfg(test)]
mod tests;

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
