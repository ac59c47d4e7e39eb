//! What can go wrong with a container, told with the object and, where there is one, the remedy.

use std::path::PathBuf;

use nix::errno::Errno;

use super::locate::Status;

/// An error of the container room.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The ID cannot name a container.
    #[error("container ID {id:?}: {reason}")]
    InvalidId {
        /// The ID as given.
        id: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// There is no such container below this root directory.
    #[error("container {id:?} does not exist below {}", root.display())]
    Unknown {
        /// The ID as given.
        id: String,
        /// The directory of the containers' states.
        root: PathBuf,
    },
    /// `create` with the ID of a container that is there.
    #[error("container {0:?} already exists; delete it or choose another ID")]
    Exists(String),
    /// The container is there, but not in a state that allows this.
    #[error("container {id:?} is {status}: {wanted}")]
    WrongStatus {
        /// Its ID.
        id: String,
        /// What it is.
        status: Status,
        /// What it would have to be.
        wanted: &'static str,
    },
    /// A state file that can't be understood.
    #[error("state of container {id:?}: {} can't be read: {reason}", path.display())]
    BadState {
        /// Its ID.
        id: String,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The bundle's configuration, or a part of it that can't be honoured.
    #[error("{}: {reason}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Something asked for on the command line that can't be done.
    #[error("{0}")]
    Unsupported(String),
    /// The program can't be started: it is not there, or no program.
    #[error("{what}: {reason}")]
    Program {
        /// What was being done.
        what: String,
        /// `exec: "NAME": …`, as runc says it.
        reason: String,
    },
    /// libcontainer failed.
    #[error("{what}")]
    Runtime {
        /// What was being done.
        what: String,
        /// Its error.
        #[source]
        source: libcontainer::error::LibcontainerError,
    },
    /// A file could not be read or written.
    #[error("{what} {}", path.display())]
    Io {
        /// What was being done.
        what: &'static str,
        /// To which file.
        path: PathBuf,
        /// The reason.
        #[source]
        source: std::io::Error,
    },
    /// A system call failed.
    #[error("{what}")]
    Kernel {
        /// What was being done.
        what: String,
        /// The reason.
        #[source]
        source: Errno,
    },
}

impl Error {
    pub(super) fn io(
        what: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.into();
        move |source| Error::Io { what, path, source }
    }

    pub(super) fn kernel(what: impl Into<String>) -> impl FnOnce(Errno) -> Error {
        let what = what.into();
        move |source| Error::Kernel { what, source }
    }

    pub(super) fn runtime<E: Into<libcontainer::error::LibcontainerError>>(
        what: impl Into<String>,
    ) -> impl FnOnce(E) -> Error {
        let what = what.into();
        move |source| {
            let source = source.into();
            match program_error(&source) {
                Some(reason) => Error::Program { what, reason },
                None => Error::Runtime { what, source },
            }
        }
    }
}

/// How the error of a program that can't be started begins. It comes back from the container's process as text, with
/// three layers of libcontainer's around it.
pub(super) const PROGRAM: &str = "exec: \"";

fn program_error(error: &(dyn std::error::Error + 'static)) -> Option<String> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        let text = error.to_string();
        if let Some(start) = text.find(PROGRAM) {
            return Some(text[start..].to_owned());
        }
        cause = error.source();
    }
    None
}
