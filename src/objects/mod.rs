//! Descriptors: file tables, and one file per kind of open file description.
//!
//! Five operations on the descriptors of a stopped tree, each in the file of its name: *capture* (live state to
//! records), *observe* (what is there now, of all that was recorded; the hot path), *plan* (pure: recorded and observed
//! to a list of changes, or a refusal), *execute* (makes the changes) and *verify* (the oracle: compares live and
//! recorded state by other means than the rest).
//!
//! A **description** is an open file description: what open(2), pipe2(2), accept4(2) … make and what dup(2) and fork(2)
//! share. A **table** is what `CLONE_FILES` shares: numbers, each with a close-on-exec bit and a description. Both are
//! recorded once, however many hold them.
//!
//! Every kind has a file with its `State` and much the same functions, which [`state::State`] dispatches to:
//!
//! | function | when | what |
//! |---|---|---|
//! | `capture(&Live)` | checkpoint | the state to record, or a refusal |
//! | `State::observe(&self, &Live)` | rollback, if the recorded object is still there | the state now, in the same shape |
//! | `State::difference(&self, now)` | planning, pure | what must change to make `now` equal to `self`, or that another must be made |
//! | `State::make(&self)` | execution | makes one that is gone, in the keeper; it is then passed into the tables |
//! | `Change::apply(...)` | execution | makes the change on the live object |
//! | `State::compare`, `verify` | after a rollback | what differs, in words |
//!
//! Sockets are planned and made all together, since both ends of a connection go back together. `docs/descriptors.md` says
//! what goes back of which kind.
//!
//! No function here may block: what it duplicates from the tree it reads and writes with `O_NONBLOCK` semantics that
//! do not touch the shared flags (`MSG_DONTWAIT`, `RWF_NOWAIT`, `SPLICE_F_NONBLOCK`). A duplicate lives no longer than
//! the call that made it.

pub mod capture;
pub mod epoll;
pub mod epoll_watch;
pub mod eventfd;
pub mod execute;
pub mod fdinfo;
pub mod file;
pub mod inotify;
pub mod live;
pub mod locks;
mod make;
pub mod matching;
pub mod model;
pub mod mounts;
mod moved;
pub mod multicast;
pub mod observe;
mod outside;
pub mod pipe;
pub mod plan;
mod proc_file;
mod reborn;
pub mod records;
mod side_by_side;
pub mod signalfd;
pub mod socket;
pub mod socket_apply;
mod socket_diag;
mod socket_ends;
pub mod socket_extra;
pub mod socket_inside;
pub mod socket_make;
pub mod socket_options;
pub mod socket_plan;
mod socket_queue;
mod socket_substitute;
mod socket_verify;
pub mod state;
pub mod survey;
pub mod sysv;
pub mod table;
pub mod tcp;
mod tcp_join;
mod tcp_queue;
pub mod terminal;
pub mod terminal_queue;
pub mod timerfd;
pub mod transfer;
mod transplant;
mod udp;
pub mod unix;
pub mod verify;

pub use capture::{Capture, Found, Looked, find};
pub use execute::{Effects, execute};
pub use model::{Observed, Recorded};
pub use moved::moved;
pub use observe::{Asked, ask, observe};
pub use plan::{Plan, plan, prepare};
pub use reborn::{Gone, Reborn, Stead, reborn};
pub use transplant::{Made, Nameless, as_recorded, check_transplant, transplant};
pub use verify::{Difference, verify};

use nix::errno::Errno;

use crate::outcome::Refusal;

/// Why an operation on descriptors failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing was changed: an object that can't be recorded or brought back.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// Records could not be written or read back.
    #[error(transparent)]
    Record(#[from] crate::record::Error),
    /// The tree could not be looked at or changed.
    #[error(transparent)]
    Freeze(#[from] crate::freeze::Error),
    /// The kernel refused a call on a descriptor of the tree.
    #[error("{what} of pid {pid}: {call}: {errno}")]
    Descriptor {
        /// What it was about, as `fd 7`.
        what: String,
        /// Host PID of the process.
        pid: i32,
        /// The call.
        call: &'static str,
        /// Its error.
        errno: Errno,
    },
    /// The kernel refused a call of our own.
    #[error("{call}: {errno}")]
    Own {
        /// The call.
        call: &'static str,
        /// Its error.
        errno: Errno,
    },
    /// A text of `/proc` does not read as documented in proc(5).
    #[error("{path}: {problem}")]
    Text {
        /// The file.
        path: String,
        /// What is wrong with it.
        problem: String,
    },
}
