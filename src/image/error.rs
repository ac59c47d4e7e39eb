//! What can go wrong with an image on disk.

use std::io;
use std::path::{Path, PathBuf};

use crate::outcome::Refusal;
use crate::record;

/// Result of this room.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong with an image on disk.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be done, and nothing was touched.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// Whoever asked for it does not want it any more.
    #[error("cancelled, and nothing is left of it: {0}")]
    Cancelled(super::persist::Why),
    /// A call about a file or a directory failed.
    #[error("cannot {what} {}: {error}", path.display())]
    File {
        /// What was tried, as `write`.
        what: &'static str,
        /// Of which.
        path: PathBuf,
        /// What the kernel said.
        error: io::Error,
    },
    /// The checkpoint in RAM could not be read.
    #[error("{what}: {error}")]
    Source {
        /// What of it.
        what: String,
        /// What the kernel said.
        error: io::Error,
    },
    /// A file of an image is damaged, or not one.
    #[error("{}: {error}", path.display())]
    Image {
        /// Which.
        path: PathBuf,
        /// What is wrong and where.
        error: record::Error,
    },
    /// The records are intact but do not fit together.
    #[error("{}: {problem}", path.display())]
    Inconsistent {
        /// Which file.
        path: PathBuf,
        /// What is wrong and where.
        problem: String,
    },
    /// An address space or a context.
    #[error(transparent)]
    Memory(#[from] crate::memory::Error),
}

impl Error {
    /// Makes one of a failed call.
    pub(super) fn file(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error + use<> {
        let path = path.to_owned();
        move |error| Error::File { what, path, error }
    }

    /// Makes one of what is wrong with a file of an image.
    pub(super) fn image(path: &Path) -> impl Fn(record::Error) -> Error + use<> {
        let path = path.to_owned();
        move |error| match error {
            record::Error::Sink(error) => Error::File {
                what: "write",
                path: path.clone(),
                error,
            },
            error => Error::Image {
                path: path.clone(),
                error,
            },
        }
    }
}
